"""The gate in front of vLLM: never more than the slots, the most urgent first, nothing lost to cancellation."""

import asyncio
from contextlib import AsyncExitStack

from hypothesis import given
from hypothesis import strategies as some

from azr_async.adapters.engines.gate import Gate


async def test_the_most_urgent_goes_first_and_a_shut_gate_lets_nobody_in() -> None:
    gate, order = Gate(1), list[int]()

    async def pass_through(priority: int, job_id: int) -> None:
        async with gate.admitted(priority, job_id):
            order.append(job_id)

    gate.shut()
    async with asyncio.TaskGroup() as group:
        for priority, job_id in ((5, 1), (3, 9), (3, 2), (4, 7)):
            group.create_task(pass_through(priority, job_id))
        await asyncio.sleep(0)
        assert order == []
        gate.open()
    assert order == [2, 9, 7, 1]


@given(slots=some.integers(1, 4), deeds=some.lists(some.integers(0, 11), max_size=40))
def test_whatever_is_cancelled_no_slot_is_lost_and_none_is_given_twice(slots: int, deeds: list[int]) -> None:
    async def run() -> None:
        gate, inside = Gate(slots), set[int]()

        async def stay(number: int, leave: asyncio.Event) -> None:
            async with gate.admitted(number % 3, number):
                inside.add(number)
                try:
                    await leave.wait()
                finally:
                    inside.discard(number)

        tasks: dict[int, tuple[asyncio.Task[None], asyncio.Event]] = {}
        for number, deed in enumerate(deeds):
            if deed < 6 or not tasks:
                leave = asyncio.Event()
                tasks[number] = (asyncio.create_task(stay(number, leave)), leave)
            else:
                task, leave = tasks.pop(sorted(tasks)[deed % len(tasks)])
                leave.set() if deed % 2 else task.cancel()
            if deed % 3:
                await asyncio.sleep(0)
            assert len(inside) <= slots
        for _, leave in tasks.values():
            leave.set()
        await asyncio.gather(*(task for task, _ in tasks.values()))
        async with AsyncExitStack() as stack, asyncio.timeout(5.0):  # every slot is there again
            for number in range(slots):
                await stack.enter_async_context(gate.admitted(0, number))

    asyncio.run(asyncio.wait_for(run(), 20.0))
