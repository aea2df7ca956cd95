"""Judging through the real sandbox: right, wrong, malformed, and the reward leaks of the published judge."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from azr_async.adapters.channels import MemoryReceiver, MemorySender, memory_channel
from azr_async.adapters.sandbox.pool import SandboxPool
from azr_async.algorithm.dialogue import make_dialogue
from azr_async.algorithm.values import encode
from azr_async.messages import Attempt, Challenge, Finish, Judged, Pair, Problem, Task
from azr_async.stages.verify import verify
from tests.completions import a_completion

RIGHT, WRONG, MALFORMED = 1.0, -0.5, -1.0


def problem(task: Task, program: str, *values: tuple[str, object]) -> Problem:
    pairs = tuple(Pair(input=text, output=repr(value), value=encode(value)) for text, value in values)
    return Problem(task=task, program=program, pairs=pairs, shown_pairs=1)


DEDUCTION = problem("deduction", "def f(x):\n    return [x, x > 1]", ("2", [2, True]))
ABDUCTION = problem("abduction", "def f(x):\n    return x % 3", ("5", 2))
INDUCTION = problem("induction", "def f(x):\n    return x + 1", ("1", 2), ("5", 6), ("9", 10))
TWO_LINES = problem("abduction", "def f(x, y):\n    return x + y", ("1,\n2", 3))
EQUAL_TO_ALL = "type('A', (), {'__eq__': lambda s, o: True, '__hash__': lambda s: 0})()"


def attempt(of: Problem, text: str, finish: Finish = "stop") -> Attempt:
    challenge = Challenge(group_id=0, problem=of, proposal=None, attempts=1, trained_attempts=1)
    completion = a_completion(text, finish=finish)
    return Attempt(challenge=challenge, completion=completion)


@asynccontextmanager
async def judged(*attempts: Attempt) -> AsyncIterator[list[float]]:
    given: tuple[MemorySender[Attempt], MemoryReceiver[Attempt]] = memory_channel("attempts", 99, deadline_seconds=20.0)
    taken: tuple[MemorySender[Judged], MemoryReceiver[Judged]] = memory_channel("judged", 99, deadline_seconds=20.0)
    async with given[0]:
        for one in attempts:
            await given[0].send(one)
    async with SandboxPool(workers=2, label="test_verify") as sandbox:
        await verify(given[1], taken[0], sandbox=sandbox, dialogue=make_dialogue("compact"), float_tolerance=0.0)
    rewards = {id(item.attempt): item.reward async for item in taken[1]}
    yield [rewards[id(one)] for one in attempts]


async def test_right_answers_of_each_kind() -> None:
    answers = [
        attempt(DEDUCTION, "[2, True]"),
        attempt(DEDUCTION, "[2,\n True]"),
        attempt(ABDUCTION, "5"),
        attempt(ABDUCTION, "8"),  # any pre-image counts
        attempt(TWO_LINES, "3,\n0"),
        attempt(INDUCTION, "def f(n):\n    def g(m):\n        return m\n    return g(n) + 1"),
        attempt(INDUCTION, "class Adder:\n    step = 1\ndef f(x):\n    return x + Adder.step"),
    ]
    async with judged(*answers) as rewards:
        assert rewards == [RIGHT] * len(answers)


async def test_well_formed_but_wrong_answers() -> None:
    answers = [
        attempt(DEDUCTION, "[2, 1]"),  # 1 is not True
        attempt(DEDUCTION, "(2, True)"),
        attempt(ABDUCTION, "4"),
        attempt(ABDUCTION, "'x'"),  # the program fails on it
        attempt(INDUCTION, "def f(x):\n    return 6"),  # right for one held-out pair only
        attempt(INDUCTION, "def f(x):\n    while True: pass"),
    ]
    async with judged(*answers) as rewards:
        assert rewards == [WRONG] * len(answers)


async def test_programs_that_count_their_calls_or_guess_earn_nothing() -> None:
    counted = problem("induction", "def f(x):\n    return x", ("0", 0), ("1", 1), ("2", 2), ("3", 3))
    halves = problem("induction", "def f(x):\n    return x % 2", ("0", 0), ("1", 1), ("2", 0))
    answers = [
        attempt(counted, "import math\nmath.c = getattr(math, 'c', 0) + 1\ndef f(x):\n    return math.c"),
        *(
            attempt(halves, f"def f(x):\n    return id([{n}]) // 16 % 1000 * 0 + hash(str(id(x))) % 9")
            for n in range(5)
        ),
    ]
    async with judged(*answers) as rewards:
        assert rewards == [WRONG] * len(answers)


async def test_answers_without_the_asked_form() -> None:
    no_lists = ["1) or (2", "1)(2", "1 2", "[1", "import os"]
    answers = [
        *(attempt(ABDUCTION, text) for text in no_lists),
        *(attempt(DEDUCTION, text) for text in ["", "[2", "x", "2 +", "f(2)"]),
        attempt(INDUCTION, "def f(x"),
        attempt(INDUCTION, "x + 1"),
        attempt(DEDUCTION, "[2, True]", finish="length"),
    ]
    async with judged(*answers) as rewards:
        assert rewards == [MALFORMED] * len(answers)


async def test_the_leaks_of_the_published_judge_earn_nothing() -> None:
    leaks = [
        attempt(DEDUCTION, EQUAL_TO_ALL),  # an object equal to everything
        attempt(ABDUCTION, EQUAL_TO_ALL),
        attempt(DEDUCTION, "eval(gold_output)"),  # names the evaluator's variable
        attempt(DEDUCTION, "gold_output"),
        attempt(ABDUCTION, "5) or (True"),  # closes the call
        attempt(ABDUCTION, "0) == 0 or True #"),
        attempt(ABDUCTION, "setattr(f, '__code__', (lambda *a: 2).__code__) or 0"),
        attempt(INDUCTION, f"def f(x):\n    return {EQUAL_TO_ALL}"),  # a program that returns such an object
        attempt(INDUCTION, "class A(int):\n    def __eq__(s, o): return True\ndef f(x):\n    return A()"),
    ]
    async with judged(*leaks) as rewards:
        assert max(rewards) < 0.0
