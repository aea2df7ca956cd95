"""Everything that flows between stages and processes, in the order in which it flows.

Messages are frozen, built whole, and check themselves. `adapters/channels/wire.py` turns them into
MessagePack and back; nothing is ever pickled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import PlainValidator

from azr_async.errors import MessageError

Task = Literal["deduction", "abduction", "induction"]
Role = Literal["propose", "solve"]
Cell = tuple[Role, Task]

TASKS: Final[tuple[Task, ...]] = ("deduction", "abduction", "induction")
ROLES: Final[tuple[Role, ...]] = ("propose", "solve")
CELLS: Final[tuple[Cell, ...]] = tuple((role, task) for role in ROLES for task in TASKS)


def cell_name(cell: Cell) -> str:
    """The name of a (role, task) cell in metrics: `propose_deduction` ... `solve_induction`."""
    return "_".join(cell)


def _array_of(dtype: type[np.generic]) -> PlainValidator:
    def check(value: object) -> NDArray[Any]:
        if not isinstance(value, np.ndarray) or value.dtype != dtype or value.ndim != 1:
            raise ValueError(f"expected a one-dimensional {np.dtype(dtype).name} array")
        return value

    return PlainValidator(check)


Int32s = Annotated[NDArray[np.int32], _array_of(np.int32)]
Float32s = Annotated[NDArray[np.float32], _array_of(np.float32)]


# ---------------------------------------------------------------- problems


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One input of a program and what the program returns for it."""

    input: str
    """Argument list as Python source, literals only: `[1, 2], 'a'`."""
    output: str
    """The returned value as a Python literal, for prompts."""
    value: str
    """The same value as canonical tagged JSON (`algorithm/values.py`), for judging."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A valid task: a program that ran, with what it returned.

    Deduction and abduction have one pair; induction has several, of which the first
    `shown_pairs` go into the solver's prompt and the others are held out for the judge.
    """

    task: Task
    program: str
    pairs: tuple[Pair, ...]
    message: str = ""
    shown_pairs: int = 1

    def __post_init__(self) -> None:
        if not self.pairs or not 0 < self.shown_pairs <= len(self.pairs):
            raise MessageError(
                f"a {self.task} problem has {len(self.pairs)} pairs and shows {self.shown_pairs}; it needs at least "
                "one shown pair. Look at the task that proposed it."
            )

    @property
    def key(self) -> tuple[str, str, str]:
        """Two problems with the same key are the same task."""
        return (self.task, self.program.strip(), "\n".join(pair.input for pair in self.pairs))


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What a model is asked, before any tokenizer has seen it."""

    text: str
    is_chat: bool = False
    """True: `text` is a user's turn and goes through the tokenizer's chat template."""
    keep_special_tokens: bool = False
    """True: special tokens other than end-of-sequence stay visible in the completion's text."""
    stop: tuple[str, ...] = ()
    """Texts after which generation ends; the stop text is kept in the completion."""


# ---------------------------------------------------------------- self-play <-> inference workers


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateJob:
    """self-play -> worker. One prompt, `samples` independent completions."""

    job_id: int
    prompt: Prompt
    samples: int
    priority: int
    """Lower goes first: the number of the group, so that old groups finish before new ones start."""
    temperature: float
    """0 means greedy."""
    top_p: float
    max_tokens: int
    seed: int
    """With the sample's index and the token's position it fixes every random draw."""
    indices: tuple[int, ...] = ()
    """Which of the samples to make, after another worker was lost with them; empty: all of them."""

    @property
    def wanted(self) -> tuple[int, ...]:
        """Indices of the samples to make."""
        return self.indices or tuple(range(self.samples))


@dataclass(frozen=True, kw_only=True, slots=True)
class CancelJob:
    """self-play -> worker. Nobody waits for this job any more: drop what is left of it."""

    job_id: int


Finish = Literal["stop", "length", "prompt_too_long"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One sampled answer. The three arrays have one entry per sampled token, end-of-sequence included."""

    job_id: int
    index: int
    """Which of the job's `samples` this is."""
    finish: Finish
    text: str
    prompt_ids: Int32s
    token_ids: Int32s
    behavior_logp: Float32s
    """Nats, under the distribution that was sampled from (after temperature and top-p)."""
    token_version: Int32s
    """Version of the weights that sampled each token."""

    def __post_init__(self) -> None:
        lengths = [len(self.token_ids), len(self.behavior_logp), len(self.token_version)]
        if len(set(lengths)) > 1:
            raise MessageError(
                f"completion {self.index} of job {self.job_id}: token_ids, behavior_logp, token_version have lengths "
                f"{lengths}, but each needs one entry per sampled token. Check the engine that sent it."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationResults:
    """worker -> self-play. Completions that ended in the same engine step, and the worker's running totals."""

    worker: str
    completions: tuple[Completion, ...]
    busy_seconds: float
    """Total so far: wall time in which the engine was computing."""
    generated_tokens: int
    """Total so far."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Further totals so far, by flat metric names: what `python -m azr_async plan` learns the engine's speed from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerReady:
    """worker -> self-play and learner. The worker serves jobs at `endpoint`."""

    worker: str
    endpoint: str
    slots: int
    """Sequences it generates side by side."""
    ranks: int = 1
    """Processes of it that hold weights: its share of the broadcast group."""
    incarnation: int = 0
    """Tells the worker from those of its name that it was started instead of: its process id."""


# ---------------------------------------------------------------- self-play <-> learner


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One completion and the credit it earned; every array has length T = prompt + completion."""

    rollout_id: int
    group_id: int
    role: Role
    task: Task
    token_ids: Int32s
    behavior_logp: Float32s
    """[T] nats, under the weights that sampled the token; 0.0 on the prompt."""
    token_version: Int32s
    """[T] weights version that sampled the token, as the engine reports it; -1 on the prompt."""
    reward: float

    def __post_init__(self) -> None:
        lengths = [len(self.token_ids), len(self.behavior_logp), len(self.token_version)]
        if len(set(lengths)) > 1:
            raise MessageError(
                f"rollout {self.rollout_id}: token_ids, behavior_logp, token_version have lengths {lengths}, "
                "but each needs one entry per token. Check the sender's prompt padding."
            )

    @property
    def prompt_length(self) -> int:
        """Tokens that were given, not sampled."""
        return int(np.count_nonzero(self.token_version < 0))

    @property
    def oldest_version(self) -> int:
        """Version that sampled its oldest trained token."""
        return int(self.token_version[self.prompt_length :].min())

    @property
    def spans_versions(self) -> bool:
        """New weights arrived while it was being sampled."""
        return self.oldest_version < int(self.token_version.max())


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRequest:
    """learner -> self-play. Send the batch that weights of `version` will be trained on."""

    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutBatch:
    """self-play -> learner. All samples of one optimizer step."""

    version: int
    """Learner version at consumption: no trained token is older than `version - max_lag`."""
    rollouts: tuple[Rollout, ...]
    stats: Mapping[str, float] = field(default_factory=dict)
    """Flat counters since the previous batch, dotted names as in `metrics.jsonl`."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What is told once, in words, under such names: with the first batch."""
    incarnation: int = 0
    """Of the self-play that made it, as `Handover` numbers them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsReady:
    """learner -> self-play. Every engine now samples with `version`."""

    version: int
    workers: Mapping[str, int] = field(default_factory=dict)
    """Name and incarnation of those that do. Others may have older weights: they get no jobs until they are named."""
    max_lag: int | None = None
    """Staleness bound of what is admitted from now on; None: as before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Handover:
    """learner -> self-play, before anything else to one that was started because another was lost.

    Then it hears what the other one would have to hear again: the state that the run goes on from (if nothing came of
    the other one), the newest WeightsReady, and the requests that are open.
    """

    incarnation: int
    """Counts those that the learner has had: what others have sent does not count any more."""
    has_begun: bool
    """False: nothing came of the others; begin as they should have."""
    held: tuple[int, ...] = ()
    """Versions of the batches that the learner has and that the weights do not contain yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StateRequest:
    """learner -> self-play. Say how a run can go on with weights of `version`, the newest that are installed."""

    version: int
    kept_step: int = 0
    """Of the oldest checkpoint: no run goes on from an earlier one. 0 where there is none yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfPlayState:
    """self-play -> learner, which files it in the checkpoint of `version`; learner -> self-play, before the first
    WeightsReady of a run that goes on from there."""

    version: int
    state: str
    """JSON (`programs/standing.py`)."""
    incarnation: int = 0
    """Of the self-play that says so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRequest:
    """learner -> self-play. Judge the held-out suite greedily; weights stay at `version` until the answer."""

    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """self-play -> learner. Per held-out task, in the suite's order: was it solved?"""

    version: int
    tasks: tuple[Task, ...]
    solved: tuple[bool, ...]
    valid: Mapping[str, float] = field(default_factory=dict)
    """Per task kind: share of valid proposals when held-out problems are the references; sampled, not greedy."""
    incarnation: int = 0
    """Of the self-play that made it."""


# ---------------------------------------------------------------- learner <-> inference workers


@dataclass(frozen=True, kw_only=True, slots=True)
class PushWeights:
    """learner -> worker. Join the broadcast of `version` now."""

    version: int
    group: int
    """The broadcast group that it comes through."""
    canary_ids: tuple[Int32s, ...]
    """Fixed token sequences to score with the new weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsInstalled:
    """worker -> learner. What the new weights say about the canary sequences; that they arrived, the group has seen."""

    worker: str
    version: int
    canary_logp: Float32s
    """Log-probabilities of every canary token but the first of each sequence, joined; nats."""
    pause_seconds: float
    """Time in which this worker sampled nothing because of the push."""
    group: int
    """Of the order that this answers: the same version may be pushed again through another group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinWeights:
    """learner -> worker. Become rank `rank`, and those after it, of the broadcast group kept at `host`:`port`."""

    host: str
    port: int
    rank: int
    """The worker's first; it has as many as it said when it was ready."""
    world_size: int
    group: int
    """Number of the group, counted up with each rebuild."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsJoined:
    """worker -> learner. The worker is in broadcast group `group`."""

    worker: str
    group: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenUp:
    """learner -> worker. The run goes on without this worker, which has to end to be started again."""

    why: str


# ---------------------------------------------------------------- everybody -> launcher


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """any program -> launcher. What it is doing now, for the live view."""

    process: str
    phase: str
    done: int = 0
    total: int = 0


Message = (
    GenerateJob
    | CancelJob
    | GenerationResults
    | WorkerReady
    | BatchRequest
    | RolloutBatch
    | WeightsReady
    | Handover
    | StateRequest
    | SelfPlayState
    | EvaluationRequest
    | EvaluationResult
    | PushWeights
    | WeightsInstalled
    | JoinWeights
    | WeightsJoined
    | GivenUp
    | Progress
)

# ---------------------------------------------------------------- inside the self-play process

Status = Literal[
    "ok", "error", "timeout", "memory", "blocked", "nondeterministic", "rejected", "output_too_long", "lost"
]
"""`lost`: the host kept it from ending, several times; that says nothing about the program or the answer."""
Limit = Literal["", "wall", "cpu", "memory", "processes", "files", "output", "calls"]
"""The limit that a run met, where it met one; `calls` are system calls that no other name stands for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """sandbox -> stage. What became of one run of one program on one input."""

    status: Status
    value: str = ""
    """Canonical tagged JSON of what was returned; empty unless ok."""
    text: str = ""
    """The same as a Python literal; empty unless ok."""
    error: str = ""
    """Why it is not ok, in a few words."""
    limit: Limit = ""
    """Which limit it met: finer than the status."""
    ran: bool = True
    """False: it never came to run, being no program, no literal, or against the rules."""
    wall_ms: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """pacing -> propose or solve. Permission to start one group."""

    group_id: int
    task: Task
    is_proposal: bool
    """False: solve a task of the library again."""
    trained_attempts: int
    """Solver samples of this group that are trained on."""
    version: int
    """Newest version that every engine had at admission: no token of the group can be older."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """What a proposer wrote, taken apart but not yet run."""

    task: Task
    program: str
    inputs: tuple[str, ...]
    message: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Malformed:
    """A completion that does not have the form the prompt asked for."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """propose -> validate. A proposer's completion."""

    admission: Admission
    references: tuple[Problem, ...]
    completion: Completion
    draft: Draft | Malformed


@dataclass(frozen=True, kw_only=True, slots=True)
class Challenge:
    """validate or pacing -> solve. A problem to attempt; `proposal` is None for library tasks."""

    group_id: int
    problem: Problem
    proposal: Proposal | None
    attempts: int
    """Samples to generate."""
    trained_attempts: int
    """The first so many of them are trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """solve -> verify. One solver completion."""

    challenge: Challenge
    completion: Completion


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """verify -> advantage. An attempt and its reward: 1 right, -0.5 well-formed but wrong, -1 not well-formed."""

    attempt: Attempt
    reward: float
    reason: str
    is_judged: bool = True
    """False when the sandbox could not run the answer: the attempt is left out, and `reward` means nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """validate or propose -> advantage. A proposal that is no valid task."""

    proposal: Proposal
    reason: str
    is_trained: bool = True
    """False when the proposer is not to blame: its sample is not trained on."""


def joined(arrays: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Concatenate, also when there is nothing to join."""
    return np.concatenate(arrays) if arrays else np.zeros(0, np.float32)
