"""Every setting, one frozen section per concern. `configs/` holds presets; `--section.name value` overrides.

Settings are documented by the text under them: it is what `python run.py --help` prints.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from azr_async.messages import Task

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Moment = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A group of settings: frozen, and an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class RunConfig(Section):
    """How long, from which seed, and where the files go."""

    steps: PositiveInt = 120
    """Optimizer steps in all."""

    seed: NonNegativeInt = 1
    """Fixes every random choice of the run; the interleaving of processes stays free."""

    max_restarts: NonNegativeInt = 3
    """How often each inference worker is started again when it is lost; 0: its loss ends the run."""

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,80}$")] = "starter"
    """Ends the name of the run directory, runs/<time>-<name>/."""


class ModelConfig(Section):
    """The model that learns."""

    path: str = "starter"
    """`starter` (shipped, CPU), a local Hugging Face folder, or a hub id."""

    dialogue: Literal["compact", "azr-chat", "azr-base"] = "compact"
    """Prompt language: `compact` is the starter's; real models use `azr-chat` (chat template) or `azr-base`."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in the engines and of the learner's matrix products; master weights are float32."""


class PlacementConfig(Section):
    """Which devices do what. 0 and 0 is the CPU."""

    inference_gpus: NonNegativeInt = 0
    """GPUs that generate."""

    train_gpus: NonNegativeInt = 0
    """GPUs that learn; one learner rank each."""

    inference_workers: NonNegativeInt = 0
    """Inference processes; 0 means one per engine (GPUs / tensor_parallel), or one on the CPU."""

    learner_ranks: NonNegativeInt = 0
    """Learner processes; 0 means one per train GPU, or one on the CPU."""

    tensor_parallel: PositiveInt = 1
    """GPUs that one engine spans; the embedded engine has one."""

    mode: Literal["dedicated", "shared"] = "dedicated"
    """`shared` lets one GPU both generate and learn; weights then go through the host's memory."""

    gpu_memory_gb: NonNegativeFloat = 0.0
    """Memory of a GPU in GB (1e9 bytes), for the estimate of what fits. 0 asks this machine's GPUs; without any, 80."""

    @model_validator(mode="after")
    def _every_device_has_a_use(self) -> Self:
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        inference, train, span = self.inference_gpus, self.train_gpus, self.tensor_parallel
        if bool(inference) != bool(train):
            idle = "train_gpus" if inference else "inference_gpus"
            yield (
                f"inference_gpus = {inference} and train_gpus = {train}: either both sides have GPUs or none has. "
                f"Set {idle} to 1 or more, or both to 0 for the CPU."
            )
        if inference % span:
            yield (
                f"tensor_parallel = {span} does not divide inference_gpus = {inference}. "
                f"Use {inference - inference % span or span} or {inference - inference % span + span} inference GPUs."
            )
        if span > 1 and not inference:
            yield f"tensor_parallel = {span} needs GPUs. Set inference_gpus to a multiple of {span}, or leave it at 1."
        if inference and self.inference_workers not in (0, inference // span):
            yield (
                f"inference_workers = {self.inference_workers} but {inference} GPUs make {inference // span} engines "
                f"of {span}. Leave inference_workers out; it is for the CPU."
            )
        if train and self.learner_ranks not in (0, train):
            yield (
                f"learner_ranks = {self.learner_ranks} but there are {train} train GPUs, one rank each. "
                "Leave learner_ranks out; it is for the CPU."
            )


class EngineConfig(Section):
    """The inference engine inside each worker."""

    kind: Literal["auto", "transformers", "vllm"] = "auto"
    """`transformers` is the embedded engine, `vllm` needs that package; `auto` is vLLM on GPUs and else embedded."""

    slots: PositiveInt = 256
    """Sequences generated side by side by one worker."""

    context_tokens: PositiveInt = 256
    """Longest prompt plus completion; sets the memory of the key-value cache."""

    on_new_weights: Literal["keep", "recompute", "restart"] = "keep"
    """Running sequences go on when weights arrive, with the old key-value cache or a new one; or they start again."""

    memory_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Part of each GPU's memory that vLLM may use; the key-value cache takes what the weights leave."""

    oversubscription: PositiveFloat = 1.25
    """Samples sent to a worker, relative to its slots; the surplus waits there so that no slot idles."""


class ProposeConfig(Section):
    """How new tasks are asked for."""

    references: NonNegativeInt = 1
    """K: solved tasks shown to the proposer. 0 is an ablation of the paper."""

    induction_pairs: Annotated[int, Field(ge=3)] = 6
    """N: inputs asked for by an induction proposal; half are shown to solvers, half judge them."""

    temperature: NonNegativeFloat = 1.0
    """Sampling temperature."""

    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling; 1 samples from the whole distribution."""

    max_tokens: PositiveInt = 64
    """Longest proposal."""

    determinism_runs: Annotated[int, Field(ge=1, le=2)] = 2
    """Executions that must agree before a task is valid; 2 run in differently seeded processes."""

    every_pair: bool = False
    """An induction proposal is valid only if every input gives a result (paper); else failing inputs are left out."""

    text_limit: PositiveInt = 1024
    """Longest output text of a valid task, characters. Longer ones are rejected, never cut."""


class SolveConfig(Section):
    """How tasks are attempted."""

    attempts: PositiveInt = 8
    """G: attempts per new task; their success estimates learnability."""

    trained_attempts: PositiveInt = 8
    """How many of the G attempts are trained on. 1 is the paper."""

    temperature: NonNegativeFloat = 1.0
    """Sampling temperature."""

    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling; 1 samples from the whole distribution."""

    max_tokens: PositiveInt = 48
    """Longest answer."""

    @model_validator(mode="after")
    def _train_only_what_is_sampled(self) -> Self:
        if self.trained_attempts > self.attempts:
            raise ValueError(
                f"trained_attempts = {self.trained_attempts} but only {self.attempts} attempts are sampled. "
                f"Lower trained_attempts to {self.attempts} or raise attempts."
            )
        return self


class RewardConfig(Section):
    """Rewards of both roles (paper, section 3)."""

    proposer_extreme: Annotated[float, Field(ge=-1.0, le=0.0)] = 0.0
    """Reward of a valid proposal that all or none of the attempts solve: 0 in the paper, -0.5 in the published code."""

    float_tolerance: NonNegativeFloat = 0.0
    """Relative tolerance when floats are compared; 0 compares exactly."""


class FlowConfig(Section):
    """How far self-play may run ahead of the learner, and what a step consumes."""

    max_lag: NonNegativeInt | Literal["auto"] = 2
    """Hard age limit of a trained token, in optimizer steps. 0 is the synchronous algorithm; `auto` searches the limit
    with the most useful throughput, trained tokens/s x ess, between lag_floor and lag_ceiling (docs/tuning.md)."""

    lag_floor: NonNegativeInt = 1
    """Smallest limit that max_lag = auto tries."""

    lag_ceiling: NonNegativeInt = 8
    """Largest limit that max_lag = auto tries: no token is ever older."""

    lag_decision_steps: Annotated[int, Field(ge=2)] = 10
    """Steps that max_lag = auto measures before it decides."""

    lag_least_gain: Share = 0.02
    """Relative gain in useful throughput that max_lag = auto takes more staleness for."""

    late: Literal["wait", "drop"] = "wait"
    """A sample about to exceed max_lag while still being generated: `wait` lets the learner wait for it, `drop` trains
    on what is there and returns the late sample's prompt to the pool."""

    tasks: tuple[Task, ...] = ("deduction", "abduction", "induction")
    """Task kinds in play."""

    propose_samples: PositiveInt = 8
    """Proposer samples per task kind and step."""

    solve_samples: PositiveInt = 96
    """Solver samples per task kind and step; topped up from the library."""

    @property
    def lag_limit(self) -> int:
        """No token that is trained is ever older, in optimizer steps."""
        return self.lag_ceiling if self.max_lag == "auto" else self.max_lag

    @model_validator(mode="after")
    def _limits_leave_a_choice(self) -> Self:
        if self.max_lag == "auto" and self.lag_floor >= self.lag_ceiling:
            raise ValueError(
                f"max_lag = auto has nothing to choose between lag_floor = {self.lag_floor} and lag_ceiling = "
                f"{self.lag_ceiling}. Raise lag_ceiling, or set max_lag to {self.lag_ceiling}."
            )
        return self

    @field_validator("tasks")
    @classmethod
    def _tasks_can_be_played(cls, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        if not set(tasks) & {"deduction", "abduction"}:
            raise ValueError(
                "no program would ever be proposed: induction takes its programs from the other two kinds. "
                "Add deduction or abduction."
            )
        if len(set(tasks)) < len(tasks):
            raise ValueError("a task kind is named twice. Name each once.")
        return tasks


class LibraryConfig(Section):
    """The valid tasks that self-play has found."""

    capacity: PositiveInt = 16384
    """Most tasks kept per kind; those that teach least go first: used often, solved always or never, old."""

    seed_tasks: PositiveInt = 64
    """Tasks per kind that the untrained policy proposes before the first step."""

    seed_proposals: PositiveInt = 2000
    """Give up seeding a kind after this many proposals, and go on with what there is."""

    seed_file: Path | None = None
    """JSONL of tasks (`task`, `program`, `input` or `inputs`, `message`) to start from, beside the identity triplet;
    seeding goes on until there are `seed_tasks`."""


class SandboxConfig(Section):
    """Where model-written programs run."""

    require: Literal["strict", "best-effort"] = "strict"
    """`strict` refuses to start unless the isolation layers that hold hostile programs were seen to work
    (docs/sandbox.md); `best-effort` starts anyway and reports what is missing."""

    workers: PositiveInt = 2
    """Programs run side by side."""

    wall_seconds: PositiveFloat = 3.0
    """Wall time of one program on one input."""

    cpu_seconds: PositiveInt = 1
    """CPU time of one program on one input."""

    memory_mb: PositiveInt = 512
    """Address space of one program."""

    cache_mb: PositiveInt = 64
    """Memory of self-play for verdicts, compiled programs and literals that were met before."""

    allowed_imports: tuple[str, ...] = (
        "math", "cmath", "re", "collections", "itertools", "functools", "string", "heapq", "bisect", "statistics",
        "fractions", "decimal", "typing", "dataclasses", "enum", "json", "operator", "copy", "textwrap", "abc",
    )  # fmt: skip
    """Modules that programs may import."""


class LearnerConfig(Section):
    """The off-policy update."""

    learning_rate: PositiveFloat = 5e-4
    """AdamW learning rate; constant after the warm-up."""

    warmup_steps: NonNegativeInt = 5
    """Steps over which the learning rate rises linearly."""

    betas: tuple[Moment, Moment] = (0.9, 0.95)
    """AdamW moments."""

    weight_decay: NonNegativeFloat = 0.0
    """AdamW weight decay."""

    clip_norm: PositiveFloat = 1.0
    """Largest gradient norm; longer gradients are scaled down."""

    step_seconds: PositiveFloat = 7200.0
    """A training step that has not ended by then hangs, and ends the run by name."""

    objective: Literal["decoupled-ppo", "masked-is", "cispo", "none"] = "decoupled-ppo"
    """Off-policy objective (docs/papers.md). `none` is plain REINFORCE without correction: only with max_lag = 0."""

    allow_uncorrected: bool = False
    """Train stale data without correction all the same (for the staleness study)."""

    clip_low: Share = 0.2
    """PPO clip below 1."""

    clip_high: NonNegativeFloat = 0.2
    """PPO clip above 1."""

    dual_clip: NonNegativeFloat = 3.0
    """Bound on the loss of bad samples, as a multiple of the advantage (> 1); 0 switches it off."""

    ratio_cap: PositiveFloat = 2.0
    """C: truncation of the behaviour weight (decoupled-ppo) and upper bound of the mask (masked-is)."""

    ratio_floor: NonNegativeFloat = 0.5
    """Lower bound of the mask (masked-is)."""

    proximal: Literal["detached", "recomputed", "interpolated"] = "detached"
    """Proximal policy. `detached` is exact with one mini-batch per step, and free."""

    minibatches: PositiveInt = 1
    """Optimizer updates per batch and version."""

    normalise: Literal["sample", "token"] = "sample"
    """TRR++ statistics over samples (paper) or response tokens (published code), per (role, task) cell."""

    aggregation: Literal["token", "sequence"] = "token"
    """Mean over all trained tokens, or over sequences of their token means; counts are global."""

    cell_weights: Literal["tokens", "equal"] = "tokens"
    """Weigh the six cells by their tokens, or each exactly the same (published code)."""

    propose_weight: NonNegativeFloat = 0.3
    """Weight of the proposer's loss relative to the solver's. 0 leaves the proposer untrained (ablation)."""

    entropy_weight: NonNegativeFloat = 0.0
    """Entropy bonus."""

    microbatch_tokens: PositiveInt = 4096
    """Most tokens (padding included) of one forward and backward pass."""

    share_prompts: bool = True
    """Compute a prompt once for all of its completions; equal up to rounding. Long sequences are never shared."""

    layout: Literal["auto", "rows", "packed"] = "auto"
    """How sequences lie in a micro-batch: side by side in padded `rows`, which may share prompts, or `packed` one after
    the other without padding, each seeing itself only. `auto` packs batches with a sequence above 1024 tokens."""

    logits_mb: PositiveInt = 256
    """Logits held at a time, float32; more are computed in blocks, and once more for the gradient. A block takes about
    three times its size."""

    sharding: Literal["full", "none"] = "full"
    """Weights, gradients and optimizer state on several ranks: `full` leaves each its part (FSDP2), `none` copies
    them."""

    cpu_offload: bool = False
    """Keep the parts of sharded weights, and the optimizer's state, in the host's memory: slower, for models that do
    not fit otherwise."""

    gradient_checkpointing: bool = False
    """Trade compute for memory."""

    @model_validator(mode="after")
    def _bounds_are_bounds(self) -> Self:
        problems = []
        if 0.0 < self.dual_clip <= 1.0:
            problems.append(
                f"dual_clip = {self.dual_clip} would clip good samples too. Use more than 1, or 0 for none."
            )
        if self.ratio_floor > self.ratio_cap:
            problems.append(
                f"ratio_floor = {self.ratio_floor} is above ratio_cap = {self.ratio_cap}, so every token would be "
                "masked. Lower ratio_floor."
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


class EvaluationConfig(Section):
    """Held-out tasks: judged greedily, never trained on."""

    every_steps: NonNegativeInt = 20
    """0 evaluates only at the start and at the end."""

    suite: str = "starter"
    """`starter` (shipped), a JSONL of tasks, or `none`."""

    proposals: NonNegativeInt = 60
    """Proposals per task kind that are sampled from held-out references, to see how many are valid."""


class CheckpointConfig(Section):
    """What a run can be continued from."""

    every_steps: NonNegativeInt = 60
    """0 writes only the last one."""

    keep: PositiveInt = 2
    """How many checkpoints stay on disk."""

    write_seconds: PositiveFloat = 600.0
    """Longest wait for a checkpoint that is written while training goes on: by the next one, or by the run's end."""


class JournalConfig(Section):
    """How much of the ledger stays: what became of every sample."""

    keep_steps: NonNegativeInt = 1000
    """Steps of which every sample stays, besides those after the oldest checkpoint; older ones are summed up."""


class WeightsConfig(Section):
    """How new weights reach the engines."""

    bucket_mb: PositiveInt = 16
    """Tensors are broadcast in buckets of this size."""

    deadline_seconds: PositiveFloat = 60.0
    """Longest silence of a worker in a push; then it is named, and the push repeated among the others."""

    canary_tolerance: PositiveFloat = 1e-4
    """Largest difference, in nats, between engine and learner on the canary sequences (1e-4 fits float32)."""

    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """TCP port of the weight group on the learner's host; 0 picks a free one."""


class WiresConfig(Section):
    """Sockets between the processes; always on this host."""

    transport: Literal["ipc", "tcp"] = "ipc"
    """`ipc` uses socket files in a private folder, `tcp` loopback ports."""

    base_port: Annotated[int, Field(ge=1024, le=65000)] = 47000
    """First TCP port, when transport is tcp."""

    heartbeat_seconds: PositiveFloat = 2.0
    """Each end of a wire says that it lives this often."""

    peer_timeout_seconds: PositiveFloat = 60.0
    """A peer silent for longer has vanished."""

    start_seconds: PositiveFloat = 300.0
    """A program that is not ready by then has failed to start. The first batch and the first evaluation may take this
    long on top of step_seconds, for self-play fills its library before."""

    step_seconds: PositiveFloat = 600.0
    """Longest wait of the learner for a batch or an evaluation (the first ones: start_seconds more) and of self-play
    for a generation."""

    message_mb: PositiveInt = 256
    """Largest message."""

    stop_seconds: PositiveFloat = 60.0
    """After Ctrl-C: time to finish the step and write the checkpoint before processes are killed."""


class ControlConfig(Section):
    """Controls of an experiment."""

    shuffle_rewards: bool = False
    """Shuffle rewards within each cell: a run that must not improve."""


class TelemetryConfig(Section):
    """Where metrics go, besides metrics.jsonl."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ("tensorboard",)
    """accelerate trackers."""


class Config(Section):
    """The whole tree: what `config.yaml` in the run directory holds."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    placement: PlacementConfig = PlacementConfig()
    engine: EngineConfig = EngineConfig()
    flow: FlowConfig = FlowConfig()
    propose: ProposeConfig = ProposeConfig()
    solve: SolveConfig = SolveConfig()
    reward: RewardConfig = RewardConfig()
    library: LibraryConfig = LibraryConfig()
    sandbox: SandboxConfig = SandboxConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    journal: JournalConfig = JournalConfig()
    weights: WeightsConfig = WeightsConfig()
    wires: WiresConfig = WiresConfig()
    control: ControlConfig = ControlConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def weights_device(self) -> Literal["cpu", "cuda"]:
        """Where weights are while they are broadcast: between GPUs, unless one GPU is at both ends."""
        return "cuda" if self.placement.inference_gpus and self.placement.mode == "dedicated" else "cpu"

    @property
    def engine_kind(self) -> Literal["transformers", "vllm"]:
        """The engine that the workers run."""
        if self.engine.kind != "auto":
            return self.engine.kind
        return "vllm" if self.placement.inference_gpus else "transformers"

    @property
    def inference_workers(self) -> int:
        """Inference processes of this run."""
        return self.placement.inference_workers or max(
            1, self.placement.inference_gpus // self.placement.tensor_parallel
        )

    @property
    def learner_ranks(self) -> int:
        """Learner processes of this run."""
        return self.placement.learner_ranks or max(1, self.placement.train_gpus)

    def _problems(self) -> Iterator[str]:
        if self.learner.objective == "none" and self.flow.lag_limit > 0 and not self.learner.allow_uncorrected:
            yield (
                f"learner.objective = none trains data up to {self.flow.lag_limit} steps old without correction. "
                "Choose decoupled-ppo, masked-is or cispo, set flow.max_lag to 0, "
                "or insist with learner.allow_uncorrected."
            )
        if self.learner.minibatches > 1 and self.learner.proximal == "detached":
            yield (
                f"learner.minibatches = {self.learner.minibatches} with learner.proximal = detached has no trust "
                "region: the ratio is 1 in every update. Set learner.proximal to recomputed, or minibatches to 1."
            )
        longest = max(self.propose.max_tokens, self.solve.max_tokens)
        if longest >= self.engine.context_tokens:
            yield (
                f"engine.context_tokens = {self.engine.context_tokens} leaves no room for a prompt beside "
                f"{longest} completion tokens. Raise engine.context_tokens or lower max_tokens of propose and solve."
            )
        if self.flow.solve_samples % self.solve.trained_attempts:
            whole_groups = self.flow.solve_samples // self.solve.trained_attempts
            yield (
                f"flow.solve_samples = {self.flow.solve_samples} is not a multiple of solve.trained_attempts = "
                f"{self.solve.trained_attempts}, so a step could not be filled exactly. "
                f"Use {max(1, whole_groups) * self.solve.trained_attempts}."
            )
        # Fewer would fill the solvers' window with old groups until no proposal may start: the step would never fill.
        needed = self.flow.propose_samples * self.solve.trained_attempts
        if self.flow.solve_samples < needed:
            yield (
                f"flow.solve_samples = {self.flow.solve_samples} has no room for solve.trained_attempts = "
                f"{self.solve.trained_attempts} of flow.propose_samples = {self.flow.propose_samples} new tasks. "
                f"Raise flow.solve_samples to {needed}, or lower one of the others."
            )
        if self.library.seed_tasks > self.library.capacity:
            yield (
                f"library.seed_tasks = {self.library.seed_tasks} exceed library.capacity = {self.library.capacity}. "
                "Raise the capacity or lower the seed tasks."
            )
