"""What goes wrong, where and when: a schedule of faults that depends on its seed alone."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, Literal

Kind = Literal["kill", "stop", "drop", "delay", "duplicate", "corrupt", "disk", "clock", "group"]
KINDS: Final[tuple[Kind, ...]] = ("kill", "stop", "drop", "delay", "duplicate", "corrupt", "disk", "clock", "group")
ON_WIRES: Final = frozenset({"drop", "delay", "duplicate", "corrupt"})
Aim = Literal["anywhere", "checkpoint", "journal"]
AIMS: Final[tuple[Aim, ...]] = ("anywhere", "checkpoint", "journal")
Part = Literal["message", "control", "answer"]
PARTS: Final[tuple[Part, ...]] = ("message", "control", "answer")

EVERYTHING: Final = "all"
"""The target of `group`: every process of the run at once."""
SANDBOX: Final = ("zygote", "parser")
MOST_PASSED: Final = 5
"""Messages of a wire that are let pass before one is tampered with."""
SHORT_SECONDS: Final = (0.1, 2.0)
"""A stop or a delay that nobody should take for a death; one of two is longer than the peer time-out instead."""
LONG_SHARES: Final = (1.2, 1.7)
"""Of the peer time-out."""
FULL_SECONDS: Final = (0.2, 6.0)
"""How long a disk stays full."""
ROOM_BYTES: Final = (0, 65_536, 524_288)
"""The size up to which files may still grow on a full disk."""
JUMP_HOURS: Final = (1.0, 48.0)
AT_THE_START: Final = 0.15
"""Share of the faults that come while the run is still starting."""
START_SECONDS: Final = 6.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    kind: Kind
    target: str
    """A process (`inference-0`, `selfplay`, `learner-0`, `launcher`, `zygote`, `parser`), a wire with who speaks on it
    (`selfplay-results from inference-0`), or `all`."""
    step: int
    """Comes when metrics.jsonl has this step; 0: while the run is starting."""
    after_seconds: float
    """So long after that step, or after the start."""
    seconds: float = 0.0
    """How long it lasts (stop, disk), how late a message comes (delay), how far the wall clock jumps (clock)."""
    aim: Aim = "anywhere"
    """Of a group: wait until a checkpoint or the journal is being written."""
    part: Part = "message"
    """Of a wire: a message, any word of its sender, or a word of its receiver."""
    passed: int = 0
    """How many such parts go by unharmed before."""
    bit: int = 0
    """Which bit is turned around (corrupt): modulo the length of what is sent."""
    room_bytes: int = 0
    """Up to which size files may still grow (disk)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One run and what goes wrong in it, in order."""

    number: int
    seed: int
    """`run.seed` of the run."""
    workers: int
    ranks: int
    max_lag: int
    faults: tuple[Fault, ...]

    @property
    def has_proxies(self) -> bool:
        """Is something done to a wire?"""
        return any(fault.kind in ON_WIRES for fault in self.faults)


def programs(workers: int, ranks: int) -> list[str]:
    """The programs of a run beside its launcher."""
    return [*(f"inference-{i}" for i in range(workers)), "selfplay", *(f"learner-{r}" for r in range(ranks))]


def wires(workers: int, ranks: int) -> list[tuple[str, str, str]]:
    """Every wire as (who connects and sends, name, who listens). A name of several senders comes several times."""
    names = [f"inference-{i}" for i in range(workers)]
    return [
        *((name, "selfplay-results", "selfplay") for name in names),
        *((name, "learner-weights", "learner-0") for name in names),
        *(("selfplay", f"{name}-jobs", name) for name in names),
        *(("learner-0", f"{name}-push", name) for name in names),
        ("selfplay", "learner-batches", "learner-0"),
        ("learner-0", "selfplay-requests", "selfplay"),
        *((name, "launcher", "launcher") for name in programs(workers, ranks)),
    ]


def wire_target(sender: str, wire: str) -> str:
    """How a fault calls one sender's end of a wire."""
    return f"{wire} from {sender}"


def plan(
    seed: int, number: int, *, kinds: Sequence[Kind], per_run: int, steps: int, peer_timeout_seconds: float
) -> Plan:
    """The run of this number: the same for the same arguments, whatever runs were before it.

    Args:
        kinds: which may occur; in any `len(kinds)` faults from a multiple of that on, each does once.
        per_run: faults of one run.
        steps: of the run; the faults are spread over them, in order.
        peer_timeout_seconds: silence after which a peer counts as dead.
    """
    draw = random.Random(f"{seed} run {number}")
    workers, ranks = draw.choice((1, 2, 2)), draw.choice((1, 1, 2))
    wanted = islice(_deck(seed, kinds, number * per_run), per_run)
    moments = _moments(draw, per_run, steps)
    faults = tuple(
        _fault(draw, kind, moment, workers=workers, ranks=ranks, peer_timeout_seconds=peer_timeout_seconds)
        for kind, moment in zip(wanted, moments, strict=True)
    )
    return Plan(
        number=number,
        seed=draw.randrange(2**31),
        workers=workers,
        ranks=ranks,
        max_lag=draw.choice((0, 1, 2)),
        faults=faults,
    )


def _deck(seed: int, kinds: Sequence[Kind], start: int) -> Iterator[Kind]:
    """The kinds of all faults from `start` on: shuffled decks, so that none is left out for long."""
    size = len(kinds)
    while True:
        deck = list(kinds)
        random.Random(f"{seed} deck {start // size}").shuffle(deck)
        yield deck[start % size]
        start += 1


def _moments(draw: random.Random, count: int, steps: int) -> list[tuple[int, float]]:
    """(step, seconds after it), in order, each in a share of the run of its own; the first may be while it starts."""
    span = (steps - 1) / count
    moments = [(1 + int(span * (number + draw.uniform(0.0, 0.7))), draw.uniform(0.0, 0.3)) for number in range(count)]
    if draw.random() < AT_THE_START * count:
        moments[0] = (0, draw.uniform(0.0, START_SECONDS))
    return moments


def _fault(
    draw: random.Random,
    kind: Kind,
    moment: tuple[int, float],
    *,
    workers: int,
    ranks: int,
    peer_timeout_seconds: float,
) -> Fault:
    step, after_seconds = moment
    processes = programs(workers, ranks)
    target, seconds, aim = EVERYTHING, 0.0, AIMS[0]
    match kind:
        case "kill" | "stop":
            target = draw.choice((*processes, "launcher", *SANDBOX))
            seconds = _pause(draw, peer_timeout_seconds) if kind == "stop" else 0.0
        case "disk":
            target, seconds = draw.choice((*processes, "selfplay", "learner-0")), draw.uniform(*FULL_SECONDS)
        case "clock":
            target, seconds = draw.choice(processes), draw.choice((-1, 1)) * 3600.0 * draw.uniform(*JUMP_HOURS)
        case "group":
            aim = draw.choice(AIMS)
        case _:
            sender, wire, _ = draw.choice(wires(workers, ranks))
            target = wire_target(sender, wire)
            seconds = _pause(draw, peer_timeout_seconds) if kind == "delay" else 0.0
    return Fault(
        kind=kind,
        target=target,
        step=step,
        after_seconds=after_seconds,
        seconds=seconds,
        aim=aim,
        part=draw.choices(PARTS, (6, 1, 2))[0],
        passed=draw.randrange(MOST_PASSED),
        bit=draw.randrange(2**31),
        room_bytes=draw.choice(ROOM_BYTES),
    )


def _pause(draw: random.Random, peer_timeout_seconds: float) -> float:
    if draw.random() < 0.5:
        return draw.uniform(*SHORT_SECONDS)
    return peer_timeout_seconds * draw.uniform(*LONG_SHARES)
