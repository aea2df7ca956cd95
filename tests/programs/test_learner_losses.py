"""Workers are lost while weights are pushed, and come back: the learner goes on. Real processes, real broadcasts."""

import asyncio
import logging
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from azr_async.config import Config
from azr_async.errors import PeerVanished
from azr_async.messages import WeightsReady
from azr_async.programs.learner import learn
from azr_async.programs.wiring import Reporter
from tests.programs.push_worker import WIDTH, Fault, installed_by, push_worker
from tests.programs.test_learner import Peers, a_config, failing_with, lines_of
from tests.random_models import save_random_model


def two_workers(folder: Path, **sections: dict[str, Any]) -> Config:
    base = {
        "placement": {"inference_workers": 2},
        "evaluation": {"every_steps": 0, "suite": "none"},
        "weights": {"deadline_seconds": 3.0, "bucket_mb": 1},
        "wires": {"heartbeat_seconds": 0.2},
    }
    (folder / "wires").mkdir()
    config = a_config(folder, **(base | sections))
    save_random_model(folder / "model", seed=5, intermediate_size=WIDTH)
    return config


async def run_with(peers: Peers, folder: Path, reporter: Reporter | None = None) -> None:
    """A learner from start to end; its workers run already."""
    async with asyncio.TaskGroup() as group:
        group.create_task(peers.selfplay())
        await learn(
            reporter or Reporter("learner-0"),
            run_dir=folder / "run",
            wires_dir=peers.wires_dir,
            config=peers.config,
            rank=0,
            resume=None,
        )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_worker_lost_in_the_middle_of_a_push_is_left_out_and_the_push_repeated(
    tmp_path: Path, how: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    config = two_workers(tmp_path)
    peers = Peers(config, tmp_path / "wires")
    with (
        push_worker("inference-0", config, peers.wires_dir),
        push_worker("inference-1", config, peers.wires_dir, Fault(2, how)),
        caplog.at_level(logging.WARNING),
    ):
        await run_with(peers, tmp_path)
    assert [line["step"] for line in lines_of(tmp_path) if line["step"]] == [1, 2, 3, 4, 5]
    assert installed_by("inference-0", peers.wires_dir) == [0, 1, 2, 3, 4, 5]
    assert installed_by("inference-1", peers.wires_dir) == [0, 1]
    assert [sorted(workers) for workers in peers.named] == [["inference-0", "inference-1"]] * 2 + [["inference-0"]] * 4
    warnings = [record.getMessage() for record in caplog.records]
    assert any("inference worker inference-1 was lost; the run goes on with inference-0" in text for text in warnings)
    assert all(line["weights"]["push_seconds"] < 3.0 + 5.0 for line in lines_of(tmp_path))


async def test_nobody_waits_until_the_deadline_in_a_group_that_another_worker_never_joined(tmp_path: Path) -> None:
    config = two_workers(tmp_path, weights={"deadline_seconds": 30.0, "bucket_mb": 1}, run={"steps": 1})
    peers = Peers(config, tmp_path / "wires")
    with (
        push_worker("inference-0", config, peers.wires_dir),
        push_worker("inference-1", config, peers.wires_dir, Fault("join", signal.SIGKILL)),
    ):
        async with asyncio.timeout(20.0):
            await run_with(peers, tmp_path)
    assert installed_by("inference-0", peers.wires_dir) == [0, 1]


async def test_a_worker_that_was_started_again_gets_the_weights_and_is_named_again(tmp_path: Path) -> None:
    """It is killed in the push of version 2 and started again while the learner goes on."""
    config = two_workers(tmp_path, run={"steps": 10_000}, checkpoint={"every_steps": 0})
    reporter = Reporter("learner-0")
    with ExitStack() as processes:
        for name, fault in (("inference-0", None), ("inference-1", Fault(2, signal.SIGKILL))):
            first = processes.enter_context(push_worker(name, config, tmp_path / "wires", fault))

        def look(ready: WeightsReady) -> None:
            if ready.version == 2:
                second = processes.enter_context(push_worker("inference-1", config, tmp_path / "wires"))
                expected.append(second.pid)
            if ready.workers.get("inference-1") in expected:
                reporter.stop_requested.set()

        expected: list[int | None] = []
        peers = Peers(config, tmp_path / "wires", on_weights=look)
        await run_with(peers, tmp_path, reporter)
        assert first.exitcode == -signal.SIGKILL
    assert sorted(peers.named[-1]) == ["inference-0", "inference-1"]
    assert installed_by("inference-1", tmp_path / "wires")[:2] == [0, 1]
    assert installed_by("inference-1", tmp_path / "wires")[2] > 2


async def test_without_any_worker_the_learner_waits_for_one_and_pushes_what_it_missed(tmp_path: Path) -> None:
    config = two_workers(tmp_path, placement={"inference_workers": 1})
    peers = Peers(config, tmp_path / "wires")
    with ExitStack() as processes:
        first = processes.enter_context(push_worker("inference-0", config, peers.wires_dir, Fault(2, signal.SIGKILL)))

        async def start_again() -> None:
            await asyncio.to_thread(first.join)
            processes.enter_context(push_worker("inference-0", config, peers.wires_dir))

        async with asyncio.TaskGroup() as group:
            group.create_task(start_again())
            await run_with(peers, tmp_path)
    assert [line["step"] for line in lines_of(tmp_path) if line["step"]] == [1, 2, 3, 4, 5]
    assert installed_by("inference-0", peers.wires_dir) == [0, 1, 2, 3, 4, 5]


async def test_a_worker_that_comes_while_the_learner_waits_for_a_batch_gets_the_weights_at_once(tmp_path: Path) -> None:
    """No batch can come before: there is no other worker to make it."""
    config = two_workers(tmp_path, placement={"inference_workers": 1}, run={"steps": 3})
    workers = ExitStack()
    first = workers.enter_context(push_worker("inference-0", config, tmp_path / "wires"))

    def kill_and_start_again(ready: WeightsReady) -> None:
        if ready.version == 2 and first.is_alive():
            first.kill()
            first.join()
            workers.enter_context(push_worker("inference-0", config, tmp_path / "wires"))

    peers = Peers(config, tmp_path / "wires", on_weights=kill_and_start_again, withheld_batch=2)
    with workers:
        await run_with(peers, tmp_path)
    assert [line["step"] for line in lines_of(tmp_path) if line["step"]] == [1, 2, 3]
    assert len({workers["inference-0"] for workers in peers.named}) == 2
    assert installed_by("inference-0", peers.wires_dir) == [0, 1, 2, 2, 3]


async def test_when_no_worker_comes_back_in_time_the_learner_says_so(tmp_path: Path) -> None:
    config = two_workers(
        tmp_path, placement={"inference_workers": 1}, wires={"heartbeat_seconds": 0.2, "start_seconds": 9.0}
    )
    peers = Peers(config, tmp_path / "wires")
    with push_worker("inference-0", config, peers.wires_dir, Fault(1, signal.SIGKILL)):
        async with failing_with(PeerVanished) as messages:
            await run_with(peers, tmp_path)
    assert any("every inference worker was lost, and none came back within 9 s" in message for message in messages)


async def test_an_evaluation_that_died_with_the_last_worker_is_given_up(tmp_path: Path) -> None:
    config = two_workers(
        tmp_path,
        placement={"inference_workers": 1},
        evaluation={"every_steps": 2, "suite": "starter"},
        checkpoint={"every_steps": 0},
        run={"steps": 3},
    )
    workers = ExitStack()
    first = workers.enter_context(push_worker("inference-0", config, tmp_path / "wires"))

    def kill_and_start_again(kind: str, version: int) -> None:
        if (kind, version) == ("EvaluationRequest", 2):
            first.kill()
            first.join()
            workers.enter_context(push_worker("inference-0", config, tmp_path / "wires"))

    peers = Peers(config, tmp_path / "wires", on_request=kill_and_start_again, unanswered_evaluation=2)
    with workers:
        await run_with(peers, tmp_path)
    assert [line["step"] for line in lines_of(tmp_path) if "eval" in line] == [0, 3]
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2, 3]
