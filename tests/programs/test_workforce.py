"""Orders for more or fewer workers: what is refused and why, and how they reach the launcher."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from azr_async.config import Config, PlacementConfig
from azr_async.errors import ConfigError
from azr_async.programs.fates import Deadlines, Ended, ProgramSpec
from azr_async.programs.mailbox import POINTER, SOCKET, WorkersOrder, ask, mailbox
from azr_async.programs.placement import Placed, place, place_another
from azr_async.programs.supervision import Supervisor
from azr_async.programs.workforce import Workforce


async def carry_out(order: WorkersOrder) -> str:
    if order.add > 2:
        raise ConfigError("no room. Ask for less.")
    return f"{order.add} {order.remove} {order.total}"


def folders(tmp_path: Path) -> tuple[Path, Path]:
    run_dir, wires_dir = tmp_path / "run", tmp_path / "w"
    run_dir.mkdir()
    wires_dir.mkdir()
    return run_dir, wires_dir


async def test_an_order_is_carried_out_and_answered(tmp_path: Path) -> None:
    run_dir, wires_dir = folders(tmp_path)
    async with mailbox(run_dir, wires_dir, carry_out):
        assert (wires_dir / SOCKET).stat().st_mode & 0o777 == 0o600
        assert await ask(run_dir, WorkersOrder(add=2), deadline_seconds=5.0) == "2 () None"
        assert await ask(run_dir, WorkersOrder(remove=("inference-1",)), deadline_seconds=5.0) == (
            "0 ('inference-1',) None"
        )
        with pytest.raises(ConfigError, match=r"^no room\. Ask for less\.$"):
            await ask(run_dir, WorkersOrder(add=3), deadline_seconds=5.0)
    with pytest.raises(ConfigError, match="no run is going on in"):
        await ask(run_dir, WorkersOrder(add=1), deadline_seconds=5.0)


@pytest.mark.parametrize(
    "line", [b"\n", b"[]\n", b'{"add": "many"}\n', b'{"add": 1, "shell": "x"}\n', b'{"add": -1}\n']
)
async def test_what_is_no_order_is_refused(tmp_path: Path, line: bytes) -> None:
    run_dir, wires_dir = folders(tmp_path)
    async with mailbox(run_dir, wires_dir, carry_out):
        reader, writer = await asyncio.open_unix_connection(wires_dir / SOCKET)
        writer.write(line)
        answer = json.loads(await reader.readline())
        writer.close()
    assert not answer["is_done"]
    assert "this is no order" in answer["text"]


async def test_a_launcher_that_does_not_answer_is_told(tmp_path: Path) -> None:
    run_dir, wires_dir = folders(tmp_path)

    async def never(order: WorkersOrder) -> str:
        await asyncio.Event().wait()
        return ""

    async with mailbox(run_dir, wires_dir, never):
        with pytest.raises(ConfigError, match=r"did not answer within 0\.2 s"):
            await ask(run_dir, WorkersOrder(add=1), deadline_seconds=0.2)


def test_a_pointer_that_leads_nowhere_is_no_run(tmp_path: Path) -> None:
    (tmp_path / POINTER).write_text(str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="no run is going on"):
        asyncio.run(ask(tmp_path, WorkersOrder(add=1), deadline_seconds=1.0))


def test_one_more_worker_goes_where_nobody_is() -> None:
    config = Config(placement=PlacementConfig(inference_gpus=2, train_gpus=1))
    assert [placed.gpus for placed in place(config)[:2]] == [(0,), (1,)]
    assert place_another(config, 2, {0, 1, 2}, found=4).gpus == (3,)
    assert place_another(config, 3, {0, 2}, found=3).gpus == (1,)
    with pytest.raises(ConfigError, match="inference-4 needs 1 free GPU, but of the 3 GPUs"):
        place_another(config, 4, {0, 1, 2}, found=3)
    assert place_another(Config(), 1, (), found=0).gpus == ()


@asynccontextmanager
async def two_workers(
    folder: Path, *, newcomer: str = "exec sleep 60"
) -> AsyncIterator[tuple[Workforce, asyncio.Queue[Ended]]]:
    """A run of real processes, on GPUs 0 and 1 of 8, and who has left it. Only the wish to stop may end it."""

    def spec(placed: Placed) -> ProgramSpec:
        is_old = placed.process in ("inference-0", "inference-1")
        argv = ("sh", "-c", "exec sleep 60" if is_old else newcomer)
        return ProgramSpec(name=placed.process, argv=argv, env=os.environ, log_path=folder / "log")

    async def place_one(index: int, taken: Collection[int]) -> Placed:
        await asyncio.sleep(0)  # as counting GPUs does, it lets others go first
        free = min(set(range(8)) - set(taken))
        return Placed(process=f"inference-{index}", role="generates", arguments=(), gpus=(free,))

    placed_at = {one.process: one for one in [await place_one(index, range(index)) for index in range(2)]}
    learner = ProgramSpec(
        name="learner-0",
        argv=("sleep", "60"),
        env=os.environ,
        log_path=folder / "log",
        ends_the_run=True,
        is_told_to_stop=True,
    )
    deadlines = Deadlines(start_seconds=60.0, stop_seconds=60.0, linger_seconds=1.0, grace_seconds=0.2)
    left: asyncio.Queue[Ended] = asyncio.Queue()
    supervisor = Supervisor([*map(spec, placed_at.values()), learner], deadlines, on_removed=left.put_nowait)
    supervisor.is_under_way = True
    running = asyncio.ensure_future(supervisor.run())
    for name in supervisor.states():
        supervisor.heard_of(name)
    await asyncio.sleep(0)  # the run has begun
    try:
        yield Workforce(supervisor, placed_at, place_one, spec), left
        assert not running.done()
    finally:
        supervisor.request_stop()
        end = await running
    assert end.kind == "interrupted"


async def test_a_worker_that_was_just_added_can_be_removed(tmp_path: Path) -> None:
    async with two_workers(tmp_path) as (workforce, left):
        orders = WorkersOrder(add=1), WorkersOrder(remove=("inference-2",))
        told = await asyncio.gather(*map(workforce.carry_out, orders))
        assert told[0].startswith("inference-2 will get the newest weights")
        assert told[1].startswith("inference-2 will leave")
        assert (await left.get()).name == "inference-2"
        assert "inference-2" not in workforce.supervisor.states()


async def test_two_orders_at_once_get_two_numbers_and_two_gpus(tmp_path: Path) -> None:
    async with two_workers(tmp_path) as (workforce, _):
        await asyncio.gather(*(workforce.carry_out(WorkersOrder(add=1)) for _ in range(2)))
        assert {name: one.gpus for name, one in workforce.placed.items()} == {
            "inference-0": (0,),
            "inference-1": (1,),
            "inference-2": (2,),
            "inference-3": (3,),
        }


async def test_a_run_does_not_go_on_without_its_last_worker_although_that_was_a_newcomer(tmp_path: Path) -> None:
    deadlines = Deadlines(start_seconds=60.0, stop_seconds=60.0, linger_seconds=1.0, grace_seconds=0.2)
    sleeping = {"argv": ("sleep", "60"), "env": os.environ, "log_path": tmp_path / "log"}
    learner = ProgramSpec(name="learner-0", ends_the_run=True, **sleeping)
    supervisor = Supervisor([learner, ProgramSpec(name="inference-0", **sleeping)], deadlines)
    supervisor.is_under_way = True
    running = asyncio.ensure_future(supervisor.run())
    for name in supervisor.states():
        supervisor.heard_of(name)
    await asyncio.sleep(0)
    supervisor.remove("inference-0")
    supervisor.add(ProgramSpec(name="inference-1", **(sleeping | {"argv": ("sh", "-c", "exit 7")})))
    end = await running
    assert end.kind == "failed"
    assert [(one.name, one.status) for one in end.programs if not one.was_told] == [("inference-1", 7)]


async def test_a_run_goes_on_without_a_newcomer_that_cannot_start(tmp_path: Path) -> None:
    async with two_workers(tmp_path, newcomer="exit 7") as (workforce, left):
        await workforce.carry_out(WorkersOrder(add=1))
        lost = await left.get()
        assert (lost.name, lost.status) == ("inference-2", 7)
        assert set(workforce.supervisor.states()) == {"inference-0", "inference-1", "learner-0"}
