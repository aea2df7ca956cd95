"""The learner as its peers see it: a scripted self-play and a worker with a real model, over the real wires."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from azr_async.adapters import checkpoints
from azr_async.adapters.channels import ZmqReceiver, ZmqSender, zmq_receiver, zmq_sender
from azr_async.adapters.trainer import Trainer, connect_ranks
from azr_async.adapters.weights import WeightGroup, connect_store
from azr_async.config import Config
from azr_async.errors import AzrError, PeerVanished, WeightsError
from azr_async.messages import (
    BatchRequest,
    EvaluationRequest,
    EvaluationResult,
    GivenUp,
    JoinWeights,
    PushWeights,
    RolloutBatch,
    SelfPlayState,
    StateRequest,
    WeightsInstalled,
    WeightsJoined,
    WeightsReady,
    WorkerReady,
)
from azr_async.programs.learner import learn
from azr_async.programs.learner_wires import ToSelfPlay
from azr_async.programs.wiring import Reporter, endpoint
from tests.random_models import random_model, save_random_model
from tests.rollout_batches import random_batch

TASKS = ("deduction", "abduction", "abduction", "induction")
STATS = {
    "valid_rate.deduction": 0.75,
    "solve_rate.abduction": 0.5,
    "tokens.generated": 1000.0,
    "tokens.dropped": 3.0,
    "samples.dropped": 1.0,
    "busy.inference": 0.6,
    "busy.sandbox": 0.1,
    "library.deduction": 64.0,
    "rejected.malformed": 2.0,
}


@dataclass
class Peers:
    """Self-play and one worker; `heard` is everything that reached them, in order."""

    config: Config
    wires_dir: Path
    tamper: Callable[[WeightsInstalled], WeightsInstalled] = lambda answer: answer
    is_worker_silent: bool = False
    on_request: Callable[[str, int], None] = lambda kind, version: None
    on_weights: Callable[[WeightsReady], None] = lambda ready: None
    unanswered_evaluation: int | None = None
    """Version whose evaluation is never answered."""
    first_batch_after_seconds: float = 0.0
    withheld_batch: int | None = None
    """Version whose batch is not sent before its weights are announced for the second time."""
    named: list[Mapping[str, int]] = field(default_factory=list)
    """The workers of each WeightsReady."""
    states: list[SelfPlayState] = field(default_factory=list)
    """What self-play was told to go on from."""
    heard: list[tuple[str, int]] = field(default_factory=list)
    model: Any = field(default_factory=lambda: random_model("qwen2-tied", seed=77))
    installed: int = -1
    told_worker: str = ""
    """Why the worker was given up."""

    async def selfplay(self) -> None:
        """Answers every request at once, with batches that lag by one version where they can."""
        requests: ZmqReceiver[ToSelfPlay] = zmq_receiver(
            endpoint(self.config, self.wires_dir, "selfplay-requests"),
            (BatchRequest, EvaluationRequest, StateRequest, SelfPlayState, WeightsReady),
            name="selfplay-requests",
            capacity=8,
        )
        replies: ZmqSender[RolloutBatch | EvaluationResult | SelfPlayState] = zmq_sender(
            endpoint(self.config, self.wires_dir, "learner-batches"), name="selfplay", peer="learner-0"
        )
        async with requests, replies:
            async for request in requests:
                self.note(type(request).__name__, request.version)
                match request:
                    case BatchRequest(version=version):
                        if version == 0:
                            await asyncio.sleep(self.first_batch_after_seconds)
                        if version != self.withheld_batch:
                            await replies.send(self.batch(version))
                    case WeightsReady(version=version):
                        self.named.append(request.workers)
                        self.on_weights(request)
                        if version == self.withheld_batch and self.heard.count(("WeightsReady", version)) == 2:
                            await replies.send(self.batch(version))
                    case StateRequest(version=version):
                        await replies.send(SelfPlayState(version=version, state=f"self-play at {version}"))
                    case SelfPlayState():
                        self.states.append(request)
                    case EvaluationRequest(version=version) if version != self.unanswered_evaluation:
                        solved = (True, version > 0, False, True)
                        await replies.send(
                            EvaluationResult(version=version, tasks=TASKS, solved=solved, valid={"deduction": 0.8})
                        )

    async def worker(self) -> None:
        """Installs what is pushed into a real model and scores the canaries with it."""
        pushes: ZmqReceiver[JoinWeights | PushWeights | GivenUp] = zmq_receiver(
            endpoint(self.config, self.wires_dir, "inference-0-push"),
            (JoinWeights, PushWeights, GivenUp),
            name="inference-0-push",
            capacity=8,
        )
        learner: ZmqSender[WorkerReady | WeightsJoined | WeightsInstalled] = zmq_sender(
            endpoint(self.config, self.wires_dir, "learner-weights"), name="inference-0", peer="learner-0"
        )
        async with pushes, learner, AsyncExitStack() as stack:
            await learner.send(WorkerReady(worker="inference-0", endpoint="ipc:///unused", slots=4))
            group: WeightGroup | None = None
            async for order in pushes:
                match order:
                    case JoinWeights():
                        group = await asyncio.to_thread(self.join, order)
                        stack.callback(group.close)
                        await learner.send(WeightsJoined(worker="inference-0", group=order.group))
                    case PushWeights():
                        assert group is not None
                        version, _ = await asyncio.to_thread(group.receive, self.install)
                        self.note("PushWeights", version)
                        answer = WeightsInstalled(
                            worker="inference-0",
                            version=version,
                            canary_logp=self.score(order.canary_ids),
                            pause_seconds=0.01,
                            group=order.group,
                        )
                        if not self.is_worker_silent:
                            await learner.send(self.tamper(answer))
                    case GivenUp():
                        self.told_worker = order.why

    def batch(self, version: int) -> RolloutBatch:
        return RolloutBatch(version=version, rollouts=random_batch(version, lag=1).rollouts, stats=STATS)

    def note(self, kind: str, version: int) -> None:
        self.heard.append((kind, version))
        self.on_request(kind, version)

    def join(self, order: JoinWeights) -> WeightGroup:
        return WeightGroup(
            connect_store(order.host, order.port, 20.0),
            group=order.group,
            rank=order.rank,
            world_size=order.world_size,
            device=torch.device("cpu"),
            deadline_seconds=20.0,
        )

    def install(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            self.model.get_parameter(name).data.copy_(tensor)

    def score(self, sequences: tuple[NDArray[np.int32], ...]) -> NDArray[np.float32]:
        config = Config()
        return Trainer(self.model, config, connect_ranks(config)).score(sequences)


def a_config(folder: Path, **sections: dict[str, Any]) -> Config:
    model = folder / "model"
    save_random_model(model, seed=5)
    base: dict[str, dict[str, Any]] = {
        "run": {"steps": 5},
        "model": {"path": str(model)},
        "evaluation": {"every_steps": 2},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "telemetry": {"trackers": ()},
        "weights": {"deadline_seconds": 20.0},
    }
    return Config.model_validate({name: base.get(name, {}) | sections.get(name, {}) for name in base | sections})


async def run_learner(
    folder: Path,
    config: Config,
    peers: Peers | None = None,
    *,
    resume: Path | None = None,
    reporter: Reporter | None = None,
) -> Peers:
    """One learner from start to end, with its peers."""
    wires_dir = folder / "wires"
    wires_dir.mkdir(exist_ok=True)
    peers = peers or Peers(config, wires_dir)
    async with asyncio.TaskGroup() as group:
        helpers = [group.create_task(peers.selfplay()), group.create_task(peers.worker())]
        await learn(
            reporter or Reporter("learner-0"),
            run_dir=folder / "run",
            wires_dir=wires_dir,
            config=config,
            rank=0,
            resume=resume,
        )
        async with asyncio.timeout(10):
            await asyncio.wait(helpers)
    return peers


def lines_of(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


def leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]


@asynccontextmanager
async def failing_with(kind: type[AzrError]) -> AsyncIterator[list[str]]:
    """The body must fail with an error of `kind`; its message is appended to what is yielded."""
    messages: list[str] = []
    with pytest.raises(BaseExceptionGroup) as caught:
        yield messages
    messages += [str(leaf) for leaf in leaves(caught.value) if isinstance(leaf, kind)]


async def test_a_run_trains_pushes_evaluates_and_writes_everything_down(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    peers = await run_learner(tmp_path, config)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [line["version"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if "eval" in line] == [0, 2, 4, 5]
    assert lines[0]["eval"] == {
        "deduction": 1.0,
        "abduction": 0.0,
        "induction": 1.0,
        "mean": 0.5,
        "n": 4,
        "valid": {"deduction": 0.8},
    }
    assert lines[2]["eval"] == {
        "deduction": 1.0,
        "abduction": 0.5,
        "induction": 1.0,
        "mean": 0.75,
        "n": 4,
        "valid": {"deduction": 0.8},
    }
    assert [line["solved"] for line in lines_of(tmp_path, "evaluations.jsonl")] == [[1, 0, 0, 1], *[[1, 1, 0, 1]] * 3]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000004", "step-000005"]
    assert [version for kind, version in peers.heard if kind == "PushWeights"] == [0, 1, 2, 3, 4, 5]
    assert [version for kind, version in peers.heard if kind == "BatchRequest"] == [0, 1, 2, 3, 4]


async def test_a_metrics_line_has_every_promised_key(tmp_path: Path) -> None:
    await run_learner(tmp_path, a_config(tmp_path, run={"steps": 2}))
    line = lines_of(tmp_path)[1]
    assert line["lag"] == {"mean": 1.0, "max": 1, "bound": 2} or line["lag"]["max"] == 0
    assert line["valid_rate"] == {"deduction": 0.75, "abduction": None, "induction": None}
    assert line["solve_rate"] == {"deduction": None, "abduction": 0.5, "induction": None}
    assert line["library"] == {"deduction": 64, "abduction": None, "induction": None}
    assert line["tokens"]["generated"] == 1000
    assert line["tokens"]["dropped"] == 3
    assert line["tokens"]["trained"] > 0
    assert line["samples"] == {"trained": 24, "dropped": 1, "computed": 24, "spanning": 0}
    assert line["busy"]["inference"] == 0.6
    assert 0 < line["busy"]["learner"] <= 1
    assert set(line["reward"]) == {f"{role}_{task}" for role in ("propose", "solve") for task in set(TASKS)}
    assert line["weights"]["canary_max_logp_error"] < 1e-4
    assert line["weights"]["pause_seconds"] == 0.01
    assert line["rejected"] == {"malformed": 2}
    assert {"loss", "grad_norm", "learning_rate", "ess", "clip_fraction", "wall_seconds"} <= line.keys()
    assert line.keys() >= lines_of(tmp_path)[0].keys() - {"eval"}


async def test_the_worker_ends_with_the_weights_of_the_last_checkpoint(tmp_path: Path) -> None:
    peers = await run_learner(tmp_path, a_config(tmp_path))
    folder = checkpoints.newest(tmp_path / "run" / "checkpoints")
    saved = AutoModelForCausalLM.from_pretrained(folder)
    initial = random_model("qwen2-tied", 5)
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, peers.model.get_parameter(name))
        assert not torch.equal(parameter, initial.get_parameter(name))


async def test_an_evaluation_is_answered_before_other_weights_are_pushed(tmp_path: Path) -> None:
    peers = await run_learner(tmp_path, a_config(tmp_path, evaluation={"every_steps": 1}))
    newest = -1
    for kind, version in peers.heard:
        newest = version if kind == "PushWeights" else newest
        assert kind != "EvaluationRequest" or version == newest


async def test_the_next_batch_is_asked_for_before_the_weights_are_pushed(tmp_path: Path) -> None:
    heard = (await run_learner(tmp_path, a_config(tmp_path))).heard
    for version in range(1, 5):
        assert heard.index(("BatchRequest", version)) < heard.index(("PushWeights", version))


async def test_a_resumed_run_ends_like_one_that_was_never_interrupted(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder in (whole, halves):
        folder.mkdir()
    config = a_config(tmp_path)
    await run_learner(whole, config)
    await run_learner(halves, config.model_copy(update={"run": config.run.model_copy(update={"steps": 3})}))
    await run_learner(halves, config, resume=halves / "run" / "checkpoints" / "step-000003")
    expected = AutoModelForCausalLM.from_pretrained(whole / "run" / "checkpoints" / "step-000005")
    resumed = AutoModelForCausalLM.from_pretrained(halves / "run" / "checkpoints" / "step-000005")
    for ours, theirs in zip(resumed.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    lines = lines_of(halves)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [line["wall_seconds"] for line in lines] == sorted(line["wall_seconds"] for line in lines)


async def test_self_play_goes_on_from_what_it_said_for_the_checkpoint(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    await run_learner(tmp_path, config)
    folder = tmp_path / "run" / "checkpoints" / "step-000004"
    assert (folder / "selfplay.json").read_text() == "self-play at 4"
    longer = config.model_copy(update={"run": config.run.model_copy(update={"steps": 6})})
    peers = await run_learner(tmp_path, longer, resume=folder)
    assert peers.states == [SelfPlayState(version=4, state="self-play at 4")]
    assert next(kind for kind, _ in peers.heard if kind in ("SelfPlayState", "WeightsReady")) == "SelfPlayState"


async def test_a_run_resumed_from_an_older_checkpoint_leaves_nothing_of_the_abandoned_steps(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    await run_learner(tmp_path, config)
    root = tmp_path / "run" / "checkpoints"
    (root / "step-000005").rename(root / "step-000120")
    shorter = config.model_copy(update={"run": config.run.model_copy(update={"steps": 6})})
    await run_learner(tmp_path, shorter, resume=root / "step-000004")
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines_of(tmp_path, "evaluations.jsonl")] == [0, 2, 4, 6]
    assert sorted(path.name for path in root.iterdir()) == ["step-000004", "step-000006"]


async def test_a_run_resumed_into_another_folder_continues_the_copied_lines(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    config = a_config(tmp_path)
    await run_learner(old, config)
    (new / "run").mkdir(parents=True)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        copied = (old / "run" / name).read_bytes()
        (new / "run" / name).write_bytes(copied)
    await run_learner(new, config, resume=old / "run" / "checkpoints" / "step-000004")
    before, after = lines_of(old), lines_of(new)
    assert [line["step"] for line in after] == [0, 1, 2, 3, 4, 5]
    assert after[:5] == before[:5]
    assert after[5]["wall_seconds"] > after[4]["wall_seconds"]
    assert [line["step"] for line in lines_of(new, "evaluations.jsonl")] == [0, 2, 4, 5]
    assert sorted(path.name for path in (new / "run" / "checkpoints").iterdir()) == ["step-000005"]
    assert sorted(path.name for path in (old / "run" / "checkpoints").iterdir()) == ["step-000004", "step-000005"]


async def test_a_checkpoint_is_not_written_before_the_line_of_its_step(tmp_path: Path) -> None:
    config = a_config(tmp_path, wires={"step_seconds": 1.0})
    (tmp_path / "wires").mkdir()
    async with failing_with(PeerVanished) as messages:
        await run_learner(tmp_path, config, Peers(config, tmp_path / "wires", unanswered_evaluation=2))
    assert "no EvaluationResult from selfplay within 1 s" in messages[0]
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000"]


async def test_the_first_batch_may_take_the_time_of_the_start_on_top(tmp_path: Path) -> None:
    config = a_config(tmp_path, run={"steps": 1}, wires={"step_seconds": 0.2, "start_seconds": 20.0})
    (tmp_path / "wires").mkdir()
    await run_learner(tmp_path, config, Peers(config, tmp_path / "wires", first_batch_after_seconds=0.5))
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1]


async def test_a_stop_finishes_the_step_and_writes_a_checkpoint(tmp_path: Path) -> None:
    config = a_config(tmp_path, run={"steps": 1000}, checkpoint={"every_steps": 0})
    wires_dir = tmp_path / "wires"
    wires_dir.mkdir()
    reporter = Reporter("learner-0")

    def stop_at_three(kind: str, version: int) -> None:
        if (kind, version) == ("BatchRequest", 3):
            reporter.stop_requested.set()

    peers = Peers(config, wires_dir, on_request=stop_at_three)
    await run_learner(tmp_path, config, peers, reporter=reporter)
    steps = [line["step"] for line in lines_of(tmp_path)]
    assert steps == list(range(steps[-1] + 1))
    assert steps[-1] in (3, 4)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{steps[-1]:06d}"]


async def test_a_stop_before_the_start_ends_at_once(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    reporter = Reporter("learner-0")
    reporter.stop_requested.set()
    (tmp_path / "wires").mkdir()
    await learn(reporter, run_dir=tmp_path / "run", wires_dir=tmp_path / "wires", config=config, rank=0, resume=None)
    assert not (tmp_path / "run" / "checkpoints").exists()


async def test_a_worker_that_computes_something_else_stops_the_run_by_name(tmp_path: Path) -> None:
    config = a_config(tmp_path)

    def disagree(answer: WeightsInstalled) -> WeightsInstalled:
        return WeightsInstalled(
            worker=answer.worker,
            version=answer.version,
            canary_logp=answer.canary_logp + np.float32(0.25),
            pause_seconds=0.0,
            group=answer.group,
        )

    (tmp_path / "wires").mkdir()
    async with failing_with(WeightsError) as messages:
        await run_learner(tmp_path, config, Peers(config, tmp_path / "wires", tamper=disagree))
    assert "inference-0 and the learner disagree by 0.25 nats" in messages[0]
    assert "canary_tolerance = 0.0001" in messages[0]


async def test_an_answer_to_an_earlier_attempt_at_a_push_does_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = a_config(tmp_path, weights={"deadline_seconds": 1.0}, wires={"start_seconds": 2.0})
    (tmp_path / "wires").mkdir()
    earlier = Peers(config, tmp_path / "wires", tamper=lambda answer: replace(answer, group=answer.group - 1))
    async with failing_with(PeerVanished):
        await run_learner(tmp_path, config, earlier)
    assert "no WeightsInstalled came within weights.deadline_seconds = 1 s" in caplog.text


async def test_a_worker_that_does_not_answer_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = a_config(tmp_path, weights={"deadline_seconds": 1.0}, wires={"start_seconds": 5.0})
    (tmp_path / "wires").mkdir()
    peers = Peers(config, tmp_path / "wires", is_worker_silent=True)
    async with failing_with(PeerVanished) as messages:
        await run_learner(tmp_path, config, peers)
    assert any("every inference worker was lost, and none came back within 5 s" in message for message in messages)
    warnings = " ".join(record.getMessage() for record in caplog.records)
    assert "inference worker inference-0 was lost" in warnings
    assert "no WeightsInstalled came within weights.deadline_seconds = 1 s" in warnings
    assert "no WeightsInstalled came within weights.deadline_seconds = 1 s" in peers.told_worker


async def test_a_worker_that_never_starts_is_named(tmp_path: Path) -> None:
    config = a_config(tmp_path, wires={"start_seconds": 0.5})
    (tmp_path / "wires").mkdir()
    async with failing_with(PeerVanished) as messages:
        await learn(
            Reporter("learner-0"),
            run_dir=tmp_path / "run",
            wires_dir=tmp_path / "wires",
            config=config,
            rank=0,
            resume=None,
        )
    assert any("inference-0" in message for message in messages)
