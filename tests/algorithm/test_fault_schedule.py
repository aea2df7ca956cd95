"""The schedule of faults: the same for a seed, complete, and within its bounds."""

import pytest
from hypothesis import given
from hypothesis.strategies import integers, sampled_from, sets

from azr_async.algorithm.fault_schedule import (
    JUMP_HOURS,
    KINDS,
    LONG_SHARES,
    MOST_PASSED,
    ON_WIRES,
    SANDBOX,
    START_SECONDS,
    Kind,
    Plan,
    plan,
    programs,
    wire_target,
    wires,
)
from azr_async.config import Config
from azr_async.programs.wiring import endpoint_names

TIMEOUT_SECONDS = 6.0
STEPS = 40

seeds = integers(0, 2**31)
numbers = integers(0, 500)


def planned(seed: int, number: int, kinds: tuple[Kind, ...] = KINDS, per_run: int = 3) -> Plan:
    return plan(seed, number, kinds=kinds, per_run=per_run, steps=STEPS, peer_timeout_seconds=TIMEOUT_SECONDS)


@given(seed=seeds, number=numbers)
def test_the_same_seed_and_number_give_the_same_plan(seed: int, number: int) -> None:
    assert planned(seed, number) == planned(seed, number)


@given(seed=seeds)
def test_another_seed_gives_another_schedule(seed: int) -> None:
    assert [planned(seed, number).faults for number in range(5)] != [planned(seed + 1, n).faults for n in range(5)]


@given(seed=seeds, start=integers(0, 50))
def test_every_kind_comes_once_in_as_many_faults_as_there_are_kinds(seed: int, start: int) -> None:
    runs = range(3 * start, 3 * start + 3)  # 3 runs of 3 faults: one deck of 9
    assert sorted(fault.kind for number in runs for fault in planned(seed, number).faults) == sorted(KINDS)


@given(seed=seeds, number=numbers, kinds=sets(sampled_from(KINDS), min_size=1))
def test_only_the_wanted_kinds_come(seed: int, number: int, kinds: set[Kind]) -> None:
    wanted = tuple(kind for kind in KINDS if kind in kinds)
    assert {fault.kind for fault in planned(seed, number, wanted).faults} <= kinds


@given(seed=seeds, number=numbers, per_run=integers(1, 6))
def test_faults_come_in_order_and_within_the_run(seed: int, number: int, per_run: int) -> None:
    faults = planned(seed, number, per_run=per_run).faults
    assert len(faults) == per_run
    assert [fault.step for fault in faults] == sorted(fault.step for fault in faults)
    assert all(0 <= fault.step < STEPS for fault in faults)
    assert all(0.0 <= fault.after_seconds <= START_SECONDS for fault in faults)
    assert all(0 <= fault.passed < MOST_PASSED for fault in faults)


@given(seed=seeds, number=numbers)
def test_every_target_is_there_in_the_run(seed: int, number: int) -> None:
    made = planned(seed, number)
    known = {*programs(made.workers, made.ranks), "launcher", *SANDBOX, "all"}
    on_wires = {wire_target(sender, wire) for sender, wire, _ in wires(made.workers, made.ranks)}
    assert all(fault.target in (on_wires if fault.kind in ON_WIRES else known) for fault in made.faults)
    assert made.has_proxies == any(fault.kind in ON_WIRES for fault in made.faults)


@given(seed=seeds, number=numbers)
def test_what_lasts_is_lifted_again(seed: int, number: int) -> None:
    faults = planned(seed, number).faults
    assert all(fault.seconds > 0 for fault in faults if fault.kind in ("stop", "delay", "disk"))
    longest = TIMEOUT_SECONDS * LONG_SHARES[1]
    assert all(fault.seconds <= longest for fault in faults if fault.kind in ("stop", "delay"))
    assert all(abs(fault.seconds) <= 3600 * JUMP_HOURS[1] for fault in faults)


def test_stops_are_shorter_and_longer_than_the_peer_timeout() -> None:
    stops = [fault.seconds for number in range(40) for fault in planned(0, number, ("stop",)).faults]
    assert min(stops) < TIMEOUT_SECONDS < max(stops)


@pytest.mark.parametrize(("workers", "ranks"), [(1, 1), (2, 2)])
def test_the_wires_are_those_of_a_run(workers: int, ranks: int) -> None:
    config = Config.model_validate({"placement": {"inference_workers": workers, "learner_ranks": ranks}})
    assert {wire for _, wire, _ in wires(workers, ranks)} == set(endpoint_names(config))
