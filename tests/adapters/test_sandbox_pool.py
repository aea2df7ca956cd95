"""The sandbox: programs run, what they return arrives, what they do stays inside."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from azr_async.adapters.sandbox.crew import PARSERS, SPARE_SLOTS
from azr_async.adapters.sandbox.pool import SandboxPool
from azr_async.algorithm.judging import judge_abduction, judge_deduction, judge_induction
from azr_async.algorithm.values import encode, literal
from azr_async.errors import SandboxError
from azr_async.messages import Pair, Problem, Status

ENDLESS = "def f(x):\n    while True: pass\n"


@asynccontextmanager
async def sandbox(workers: int = 1, wall_seconds: float = 10.0, label: str = "") -> AsyncIterator[SandboxPool]:
    limits = {"wall_seconds": wall_seconds, "cpu_seconds": 1.0}
    async with SandboxPool(workers=workers, memory_mb=128, label=label, **limits) as pool:
        yield pool


def processes_labelled(label: str) -> set[int]:
    """Every process with `label` in its command line: zygotes, parsers and their forks."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and label.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.add(int(entry.name))
        except OSError:
            continue
    return found


def programs_labelled(label: str) -> set[int]:
    """Those that a zygote forked, ahead of their request or not: a zygote and what waits for it are above them."""
    labelled = processes_labelled(label)
    parents = {process: parent_of(process) for process in labelled}
    return {process for process in labelled if parents.get(parents[process]) in labelled}


def parent_of(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def computing(label: str) -> set[int]:
    """Those that use the processor now."""
    return {process for process in programs_labelled(label) if cpu_ticks(process) > 2}


def cpu_ticks(process: int) -> int:
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another process does and does not tell."""
    while not condition():  # noqa: ASYNC110 - there is nothing to be woken by
        await asyncio.sleep(0.005)


async def test_one_outcome_per_input_in_order() -> None:
    async with sandbox() as pool:
        outcomes = await pool.run("def f(a, b=1):\n    return (a, b)\n", ["1", "2, 3", "b=4, a={'k': [1.5]}", "1"])
    assert [outcome.text for outcome in outcomes] == ["(1, 1)", "(2, 3)", "({'k': [1.5]}, 4)", "(1, 1)"]


PROGRAMS: dict[Status, list[tuple[str, str]]] = {
    "ok": [
        ("def f(x): return x", "[1, 2]"),
        ("def f(x): return x", "[1,\n 2]"),
        ("def f(x, y): return x + y", "'a',\n'b'"),
        ("def f(x): return x", "1 # a comment"),
        ("def f(x): print(x)", "1"),
        ("def f(input): return input", "1"),
        ("f = lambda x: x", "1"),
        ("from math import floor as f", "1.5"),
        ("class P:\n  pass\ndef g(x): return x\ndef f(x): return g(x)", "1"),
        ("import math\nfrom collections import Counter\ndef f(x): return dict(Counter(x))", "'aab'"),
        ("def f(\u03c0): return {'\u03c0': '\\N{BULLET}'.encode('utf-16-le')}", "'\u0434'"),
        ("class A:\n  pass\ndef f(x): return A().__class__.__name__, type(x).__qualname__", "1"),
        ("class A:\n  def __init__(self): self.os = 1\ndef f(x): return A().__dict__, A().os, vars(A())", "1"),
        ("class A:\n  def __setattr__(self, k, v): super().__setattr__(k, v)\ndef f(x):\n  A().x = x", "1"),
        ("class A:\n  pass\ndef f(x):\n  a = A(); a.__dict__['x'] = x; a.__dict__ |= {'y': 2}\n  return a.x, a.y", "1"),
        ("class A:\n  y = 1\ndef f(x): return A.__dict__['y'], '__dict__' in A.__dict__", "1"),
        ("def f(x):\n  y = 2\n  return vars()", "1"),
        ("import collections.abc as c\nfrom collections import abc\ndef f(x): return c is abc", "1"),
        ("import json\ndef f(x): return json.decoder.JSONDecodeError('m', 'd', 0).msg", "1"),
        ("from math import *\ndef f(x): return floor(x)", "1.5"),
        (
            "from operator import attrgetter, methodcaller\n"
            "def f(x): return attrgetter('real')(x), methodcaller('bit_count')(x)",
            "3",
        ),
        ("from string import Formatter\ndef f(x): return Formatter().format('{0.real} {a[0]}', x, a=[2])", "1"),
        ("import typing\nclass A:\n  x: 'int'\ndef f(x): return str(typing.get_type_hints(A))", "1"),
        (
            "from __future__ import annotations\nfrom functools import singledispatch\n@singledispatch\n"
            "def g(x): return 'any'\n@g.register\ndef _(x: int): return 'int'\ndef f(x): return g(x)",
            "1",
        ),
        ("def f(x):\n  match x:\n    case complex(real=r): return r", "1j"),
        ("def f(x): return x", "-1j"),
        (
            "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n  x: int\n"
            "def f(x): return P(x).x",
            "1",
        ),
        ("from functools import singledispatch\n@singledispatch\ndef f(x): return x", "1"),
        ("def f(x): return x.encode('utf-16').decode('utf-16') + x.encode('cp1252').hex()", "'a'"),
    ],
    "error": [
        ("def f(x): return 1 / 0", "1"),
        ("def f(x): raise SystemExit", "1"),
        ("def f(x): raise KeyboardInterrupt", "1"),
        ("def f(x): return f(x)", "1"),
        ("def f(x): return object()", "1"),
        ("from collections import Counter\ndef f(x): return Counter(x)", "'a'"),
        ("def f(x): return open('/etc/passwd').read()", "1"),
        ("def f(): return 1", "1"),
        ("def f(x", "1"),
        ("x = 1", "1"),
        ("", "1"),
        ("def f(x): return '\0'", "1"),
        ("def f(x): return '\ud800'", "1"),
        ("def f(x): return x\nf" + "(1)" * 20_000, "1"),
    ],
    "memory": [
        ("def f(x): return [0] * 10**9", "1"),
        ("def f(x):\n  r = []\n  while True: r.append(bytearray(10**6))", "1"),
    ],
    "output_too_long": [
        ("def f(x): return 'a' * 10**6", "1"),
        ("def f(x): return list(range(10**5))", "1"),
        ("def f(x): return 2 ** 10**5", "1"),
    ],
    "rejected": [
        ("import os\ndef f(x): return x", "1"),
        ("def f(x):\n  import random\n  return x", "1"),
        ("from . import x\ndef f(x): return x", "1"),
        ("def f(x): return ().__class__.__bases__", "1"),
        ("def f(x):\n  match f:\n    case object(__globals__=g): return 'escaped'", "1"),
        ("def f(a): return a", "a=1, a=2"),
        ("def f(x): return __import__('os')", "1"),
        ("#" + "a" * 70_000 + "\ndef f(x): return x", "1"),
        ("def f(x): return " + "-" * 60_000 + "1", "1"),
        ("def f(x): return x", "__import__('os').getpid()"),
        ("def f(x): return x", "range(3)"),
        ("def f(x): return x", "1) or (True"),
        ("def f(x): return x", "*[1]"),
        ("def f(x): return x", "**{'x': 1}"),
        ("def f(x): return x", "1 2"),
        ("def f(x): return x", "(" * 5000),
        ("def f(x): return x", "'" + "a" * 70_000 + "'"),
    ],
}


@pytest.mark.parametrize("status", PROGRAMS)
async def test_the_status_says_what_became_of_it(status: Status) -> None:
    async with sandbox() as pool:
        outcomes = [(program, (await pool.run(program, [text]))[0]) for program, text in PROGRAMS[status]]
        assert [(program[:80], outcome) for program, outcome in outcomes if outcome.status != status] == []
        assert (await pool.run("def f(x): return x + 1", ["1"]))[0].text == "2"


async def test_an_outcome_says_whether_it_came_to_run() -> None:
    questions = [
        ("def f(x", "1"),
        ("x = 1", "1"),
        ("import os\ndef f(x): ...", "1"),
        ("def f(x): ...", "f"),
        ("def f(x): 1 / 0", "1"),
    ]
    async with sandbox() as pool:
        outcomes = [(await pool.run(program, [text]))[0] for program, text in questions]
    assert [outcome.ran for outcome in outcomes] == [False, False, False, False, True]


async def test_two_runs_disagree_where_a_program_sees_its_process() -> None:
    async with sandbox() as pool:
        for program in (
            "def f(x): return list({'a', 'b', 'c', 'd', 'e', 'g'})",
            "def f(x): return hash(x)",
            "def f(x): return id(x)",
            "def f(x): return repr(object())",
            "import math\ndef f(x):\n  math.n = getattr(math, 'n', 0) + x\n  return math.n",
            "def f(x): return 1 if hash(x) % 2 else 1 / 0",
        ):
            outcomes = await pool.run(program, ["'a'", "'b'", "'c'"] if "math" not in program else ["1", "2"], times=2)
            assert {"nondeterministic"} <= {outcome.status for outcome in outcomes}, program


async def test_an_error_says_what_it_was_about_in_one_short_line() -> None:
    async with sandbox() as pool:
        (outcome,) = await pool.run("def f(x): raise ValueError('a' * x + chr(10) + 'b')", ["9"])
        (long,) = await pool.run("def f(x): raise ValueError('a' * x)", ["9_999"])
        (rude,) = await pool.run("class E(Exception):\n  def __str__(self): 1 / 0\ndef f(x): raise E", ["1"])
    assert outcome.error == "ValueError: aaaaaaaaa"
    assert 100 < len(long.error) <= 200
    assert rude.error == "E"


async def test_times_can_be_parsed() -> None:
    program = (
        "import time, datetime\ndef f(x): return time.strptime(x, '%Y').tm_year, "
        "datetime.datetime.strptime(x, '%Y').year"
    )
    async with SandboxPool(workers=1, allowed_imports=["time", "datetime"]) as pool:
        (outcome,) = await pool.run(program, ["'1999'"], times=2)
    assert outcome.text == "(1999, 1999)", outcome


async def test_two_runs_agree_where_only_order_differs() -> None:
    async with sandbox() as pool:
        (outcome,) = await pool.run("def f(x): return {'a', 'b', x}, {x: 1, 'b': 2}", ["'q'"], times=2)
    assert (outcome.status, outcome.text) == ("ok", "({'a', 'b', 'q'}, {'q': 1, 'b': 2})")


async def test_module_globals_are_fresh_for_every_input() -> None:
    program = "seen = []\ndef f(x, memory=[]):\n    seen.append(x); memory.append(x)\n    return seen + memory\n"
    async with sandbox() as pool:
        assert [o.text for o in await pool.run(program, ["1", "2"])] == ["[1, 1]", "[2, 2]"]


async def test_nothing_a_program_changes_reaches_the_next_one() -> None:
    poison = (
        "import math, json, re\n"
        "def f(x):\n    math.floor = lambda x: 7\n    json.dumps = json.loads = re.sub = None\n    math.extra = 1\n"
    )
    victim = (
        "import math, json, re\n"
        "def f(x): return [math.floor(x), hasattr(math, 'extra'), json.dumps(x), re.sub('a', 'b', 'a')]"
    )
    async with sandbox() as pool:
        assert (await pool.run(poison, ["1"]))[0].status == "ok"
        assert (await pool.run(victim, ["1.5"]))[0].text == "[1, False, '1.5', 'b']"


async def test_an_input_that_fails_leaves_the_others_of_its_call_alone() -> None:
    program = "def f(x):\n    if x == 2: return [0] * 10**9\n    if x == 3: raise ValueError\n    return x\n"
    async with sandbox() as pool:
        statuses = [outcome.status for outcome in await pool.run(program, ["1", "2", "3", "4"])]
    assert statuses == ["ok", "memory", "error", "ok"]


async def test_a_time_limit_ends_the_call_it_is_met_in() -> None:
    async with sandbox() as pool:
        outcomes = await pool.run("def f(x):\n    while x: pass\n    return x\n", ["0", "1", "0.0", "2"])
    assert [outcome.status for outcome in outcomes] == ["ok", "timeout", "timeout", "timeout"]


async def test_a_program_that_sleeps_is_ended_by_the_wall_clock() -> None:
    async with SandboxPool(workers=1, wall_seconds=0.3, allowed_imports=["time"]) as pool:
        (outcome,) = await pool.run("import time\ndef f(x): time.sleep(x)", ["100"])
    assert (outcome.status, outcome.error) == ("timeout", "wall time")


async def test_endless_programs_cost_about_one_limit_in_all() -> None:
    async with sandbox(wall_seconds=1.0) as pool:
        await pool.run("def f(x): return x", ["0"])
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            endless = [group.create_task(pool.run(f"{ENDLESS}#{n}", ["1"])) for n in range(4)]
            quick = [group.create_task(pool.run(f"def f(x): return {n}", ["1"])) for n in range(20)]
        elapsed = time.monotonic() - started
    assert {task.result()[0].status for task in endless} == {"timeout"}
    assert {task.result()[0].status for task in quick} == {"ok"}
    assert elapsed < 3.0


async def test_the_same_question_is_answered_from_memory() -> None:
    async with sandbox() as pool:
        first = await pool.run("def f(x): return x", ["1", "2"])
        forks = pool.meter.forks
        assert await pool.run("def f(x): return x", ["2", "1"]) == first[::-1]
        assert pool.meter.forks == forks
        assert pool.meter.remembered == 2


LITERALS = {
    "1": "1",
    " [1, (2,), {'a': {3}}]\n": '[1,{"t":[2]},{"d":[["a",{"s":[3]}]]}]',
    "-1.5": "-1.5",
    "-inf": '{"f":"-inf"}',
    "float('nan')": '{"f":"nan"}',
    "frozenset({1, 2})": '{"z":[1,2]}',
    "set()": '{"s":[]}',
    "3-4j": '{"c":[3.0,-4.0]}',
    "1,\\\n2": '{"t":[1,2]}',
    "'a' 'b'": '"ab"',
    "0xff": "255",
}
NO_LITERALS = [
    "",
    "f(1)",
    "x",
    "1 + 1",
    "[x for x in (1,)]",
    "lambda: 1",
    "...",
    "__import__('os')",
    "{[]: 1}",
    "{**{}}",
    "[*[1]]",
    "1; 2",
    "1\n2",
    "f'{1}'",
    "set([1])",
    "frozenset([1])",
    "float('1')",
    "not 1",
    "True or 1",
    "{nan}",
    "\0",
    "type('A', (), {'__eq__': lambda s, o: True})()",
    "(" * 9999,
    "9" * 5000,
    "[" * 70 + "]" * 70,
]


async def test_a_literal_is_read() -> None:
    async with sandbox() as pool:
        assert {text: (await pool.literal(text)).value for text in LITERALS} == LITERALS


async def test_anything_else_is_no_literal() -> None:
    async with sandbox() as pool:
        outcomes = {text: await pool.literal(text) for text in NO_LITERALS}
    assert {text for text, outcome in outcomes.items() if outcome.status != "rejected" or outcome.ran} == set()


EQUAL_TO_EVERYTHING = "type('A', (), {'__eq__': lambda self, other: True, '__hash__': lambda self: 0})()"


def gold(program: str, value: object, text: str = "1") -> Problem:
    return Problem(
        task="deduction", program=program, pairs=(Pair(input=text, output=literal(value), value=encode(value)),)
    )


DEDUCTION_LEAKS = [EQUAL_TO_EVERYTHING, "gold", "agent_output", "eval('gold')", "gold_output", "42 if 1 else 0", "f(1)"]


async def test_no_deduction_answer_but_the_value_earns_credit() -> None:
    async with sandbox() as pool:
        task = gold("def f(x): return 42", 42)
        rewards = {answer: judge_deduction(task, await pool.literal(answer)).reward for answer in DEDUCTION_LEAKS}
        assert set(rewards.values()) == {-1.0}, rewards
        assert judge_deduction(task, await pool.literal("42")).reward == 1.0


ABDUCTION_LEAKS = [
    "1) or True or f(1",
    "1) == f(1) or (True",
    EQUAL_TO_EVERYTHING,
    "setattr(f, '__code__', (lambda *a: 42).__code__) or 0",
    "(f := lambda x: 42)",
    "gold_input",
    "1)\nreturn_value = (42",
    "x=__import__('os')",
]


async def test_no_abduction_answer_but_a_pre_image_earns_credit() -> None:
    async with sandbox() as pool:
        task = gold("def f(x): return x", 42, "42")
        outcomes = await pool.run(task.program, ABDUCTION_LEAKS)
        rewards = [judge_abduction(task, outcome).reward for outcome in outcomes]
        assert set(rewards) == {-1.0}, rewards
        assert judge_abduction(task, (await pool.run(task.program, ["40 +\n2"]))[0]).reward == -1.0
        assert judge_abduction(task, (await pool.run(task.program, ["\n42\n"]))[0]).reward == 1.0


INDUCTION_LEAKS = [
    f"def f(x): return {EQUAL_TO_EVERYTHING}",
    "class A(int):\n  def __eq__(self, other): return True\n  def __hash__(self): return 0\ndef f(x): return A(x)",
    "class A:\n  def __eq__(self, other): return True\ndef f(x): return [A()]",
    "class A(str):\n  def __repr__(self): return '42'\ndef f(x): return A()",
    "def f(x): return gold_output",
    "def f(x): return output",
]


async def test_no_induction_answer_but_a_right_program_earns_credit() -> None:
    async with sandbox() as pool:
        task = gold("def f(x): return 42", 42)
        rewards = {answer: judge_induction(task, await pool.run(answer, ["1"])).reward for answer in INDUCTION_LEAKS}
        assert set(rewards.values()) <= {-0.5, -1.0}, rewards
        assert judge_induction(task, await pool.run("def f(x): return 41 + x", ["1"])).reward == 1.0


async def test_expressions_are_evaluated_only_on_request_and_only_inside() -> None:
    program = "base = 10\ndef f(x): return list(x)"
    async with sandbox() as pool:
        assert (await pool.run(program, ["range(3)"]))[0].status == "rejected"
        texts = ["range(3)", "[base]", "1) or (1", "__import__('os')"]
        outcomes = await pool.run(program, texts, input_mode="expression")
    assert [outcome.text or outcome.status for outcome in outcomes] == ["[0, 1, 2]", "[10]", "rejected", "rejected"]


async def test_leaving_the_block_leaves_no_process_and_no_descriptor() -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    async with sandbox(workers=2, label="test-leaving") as pool:
        await pool.run("def f(x): return x", ["1"], times=2)
        assert processes_labelled("test-leaving")
    assert not processes_labelled("test-leaving")
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_cancelling_a_run_kills_the_program() -> None:
    async with sandbox(label="test-cancelling") as pool:
        run = asyncio.ensure_future(pool.run(ENDLESS, ["1"]))
        await until(lambda: bool(computing("test-cancelling")))
        before = processes_labelled("test-cancelling")
        programs = computing("test-cancelling")
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert processes_labelled("test-cancelling") < before - programs
        assert (await pool.run("def f(x): return x", ["1"]))[0].status == "ok"


async def test_a_killed_zygote_loses_no_run() -> None:
    async with sandbox(workers=2, label="test-killed") as pool:
        for process in processes_labelled("test-killed"):
            os.kill(process, signal.SIGKILL)
        async with asyncio.TaskGroup() as group:
            runs = [group.create_task(pool.run(f"def f(x): return {n}", ["1"], times=2)) for n in range(10)]
        assert [run.result()[0].text for run in runs] == [str(n) for n in range(10)]


async def test_a_zygote_killed_under_a_running_program_loses_no_run() -> None:
    async with sandbox(label="test-under") as pool:
        async with asyncio.TaskGroup() as group:
            run = group.create_task(pool.run("def f(x):\n    for i in range(x): pass\n    return 'end'", ["9_000_000"]))
            await until(lambda: bool(computing("test-under")))
            for process in processes_labelled("test-under") - programs_labelled("test-under"):
                os.kill(process, signal.SIGKILL)
        assert run.result()[0].text == "'end'"


async def test_a_sandbox_used_after_its_end_says_so() -> None:
    async with sandbox() as pool:
        pass
    with pytest.raises(SandboxError, match="closed"):
        await pool.run("def f(x): return x", ["1"])


async def test_a_module_that_does_not_exist_is_named() -> None:
    with pytest.raises(SandboxError, match=r"no_such_module.*allowed_imports"):
        async with SandboxPool(workers=1, allowed_imports=["math", "no_such_module"]):
            pass


async def test_busy_seconds_are_the_time_in_which_programs_ran() -> None:
    async with SandboxPool(workers=2, wall_seconds=0.5, allowed_imports=["time"]) as pool:
        async with asyncio.TaskGroup() as group:
            for n in range(2):
                group.create_task(pool.run(f"import time\ndef f(x): time.sleep(x)#{n}", ["100"]))
        assert 1.0 <= pool.busy_seconds < 3.0


async def test_mixed_programs_by_the_hundred_leave_nothing_behind() -> None:
    mixture = (
        "def f(x): return x + {n}",
        "def f(x): return {n} / 0",
        "def f(x): return [{n}] * 10**10",
        "def f(x): return 'a' * {n} * 10**6",
        "import os\ndef f(x): return {n}",
        "def f(x): return id(x) + {n}",
    )
    async with sandbox(workers=2, label="test-mixed") as pool:
        async with asyncio.TaskGroup() as group:
            for number in range(600):
                program = mixture[number % len(mixture)].format(n=number + 1)
                group.create_task(pool.run(program, ["1"], times=1 + number % 2))
        numbers = pool.numbers()
        assert sum(count for name, count in numbers.items() if name.startswith("executions.")) == 600
        assert numbers["restarts"] == numbers["waiting"] == numbers["kills"] == 0
        # Slow moments of the machine add zygotes, up to a bound; each is a process and the one that waits for it,
        # and a child that waits for a program.
        assert len(programs_labelled("test-mixed")) <= 2 * (2 + SPARE_SLOTS)
        assert len(processes_labelled("test-mixed")) <= 3 * 2 * (2 + SPARE_SLOTS) + 2 * PARSERS
    assert not processes_labelled("test-mixed")
