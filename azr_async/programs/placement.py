"""Which program runs on which device: pure planning, and the question what this host has."""

import os
import socket
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from azr_async.config import Config
from azr_async.errors import ConfigError

PACKAGE_ROOT: Final = Path(__file__).parents[2]

_TORCHRUN: Final = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_UNASKED_PORTS: Final = range(20_000, 32_000)
"""Below those that Linux gives to connections and to whoever binds to port 0."""

VLLM_ENVIRONMENT: Final[Mapping[str, str]] = {
    "VLLM_PLUGINS": "azr_async",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # it would put the threads of all workers on the same core
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
"""What vLLM is told that its arguments have no name for."""

Role = Literal["generates", "plays, judges, paces", "learns"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """One program of a run and its devices."""

    process: str
    """Its name in messages, logs and the live view."""
    role: Role
    arguments: tuple[str, ...]
    """What follows `python -m`, without the folders."""
    gpus: tuple[int, ...]
    """Indices among the GPUs that the launcher may use; empty on the CPU."""
    rank: int | None = None
    """Rank in the learner group; None outside of it."""

    @property
    def devices(self) -> str:
        """For people: `cuda:0`, `cuda:4..7`, `CPU`."""
        if not self.gpus:
            return "CPU"
        first, last = self.gpus[0], self.gpus[-1]
        return f"cuda:{first}" if first == last else f"cuda:{first}..{last}"


def place(config: Config) -> tuple[Placed, ...]:
    """Every program of a run: engines on the first GPUs, learner ranks on the next ones, or on the same if shared."""
    placement = config.placement
    span = placement.tensor_parallel if placement.inference_gpus else 0
    count = config.inference_workers
    engines = [place_another(config, index, range(index * span), count * span) for index in range(count)]
    selfplay = Placed(
        process="selfplay", role="plays, judges, paces", arguments=("azr_async.programs.selfplay",), gpus=()
    )
    first_train_gpu = 0 if placement.mode == "shared" else placement.inference_gpus
    ranks = [
        Placed(
            process=f"learner-{rank}",
            role="learns",
            arguments=("azr_async.programs.learner", "--rank", str(rank)),
            gpus=(first_train_gpu + rank,) if placement.train_gpus else (),
            rank=rank,
        )
        for rank in range(config.learner_ranks)
    ]
    return (*engines, selfplay, *ranks)


def worker_index(process: str) -> int:
    """The number in the name of an inference worker."""
    return int(process.rpartition("-")[2])


def place_another(config: Config, index: int, taken: Collection[int], found: int) -> Placed:
    """One more engine, on GPUs that no program has. Raises ConfigError when there are not enough of them."""
    placement = config.placement
    span = placement.tensor_parallel if placement.inference_gpus else 0
    free = [first for first in range(found - span + 1) if not {*range(first, first + span)} & set(taken)]
    if span and not free:
        raise ConfigError(
            f"inference-{index} needs {span} free GPU{'s side by side' if span > 1 else ''}, but of the "
            f"{_counted(found)} of this machine {', '.join(f'cuda:{gpu}' for gpu in sorted(taken))} are in use. "
            "Remove a worker first."
        )
    return Placed(
        process=f"inference-{index}",
        role="generates",
        arguments=("azr_async.programs.inference", "--index", str(index)),
        gpus=tuple(range(free[0], free[0] + span)) if span else (),
    )


def gpus_needed(config: Config) -> int:
    """How many GPUs the host must have."""
    sides = (config.placement.inference_gpus, config.placement.train_gpus)
    return max(sides) if config.placement.mode == "shared" else sum(sides)


def gpus_found() -> int:
    """GPUs that this process may use."""
    import torch  # slow to import, and a CPU run does not ask

    return torch.cuda.device_count()


def smallest_gpu_bytes(found: int) -> int | None:
    """Memory of the smallest GPU that this process may use; None when there is none."""
    import torch

    return min((torch.cuda.get_device_properties(index).total_memory for index in range(found)), default=None)


def check_gpus(config: Config, found: int) -> None:
    """Raise ConfigError when the host has fewer GPUs than the configuration wants; says what fits instead."""
    placement, needed = config.placement, gpus_needed(config)
    if needed <= found:
        return
    wish = f"{placement.inference_gpus} inference + {placement.train_gpus} train GPUs need {needed}"
    if placement.mode == "shared":
        wish = f"{placement.inference_gpus} inference and {placement.train_gpus} train GPUs, shared, need {needed}"
    raise ConfigError(f"{wish}, but this machine has {_counted(found)}. {_what_fits(config, found)}")


def check_engines(config: Config) -> None:
    """Raise ConfigError for a placement that `place` can draw but no engine can fill yet."""
    span = config.placement.tensor_parallel
    if span > 1 and config.engine_kind == "transformers":
        raise ConfigError(
            f"placement.tensor_parallel = {span}: the embedded engine runs on one GPU. Leave tensor_parallel out; "
            "more --inference-gpus make more engines."
        )


def environment(
    placed: Placed, everyone: Sequence[Placed], base: Mapping[str, str], *, rendezvous_port: int, run_dir: Path
) -> dict[str, str]:
    """The environment of one program: the launcher's, with devices, threads and its place in the learner group.

    Learner ranks see all train GPUs and choose by LOCAL_RANK, as under torchrun; an engine sees only its own.
    """
    ranks = [other for other in everyone if other.rank is not None]
    is_rank = placed.rank is not None
    gpus = tuple(dict.fromkeys(gpu for rank in ranks for gpu in rank.gpus)) if is_rank else placed.gpus
    result = {name: value for name, value in base.items() if name not in _TORCHRUN}
    result["CUDA_VISIBLE_DEVICES"] = ",".join(_as_numbered_by(base.get("CUDA_VISIBLE_DEVICES"), gpu) for gpu in gpus)
    # The programs are the launcher's own code, wherever it was started from.
    result["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), base.get("PYTHONPATH")]))
    # Two threads per process on shared cores are several times slower than one; a GPU program needs few.
    result |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    result |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "PYTHONHASHSEED": "0"}
    # vLLM's own processes show this instead of a command line.
    result |= {**VLLM_ENVIRONMENT, "VLLM_PROCESS_NAME_PREFIX": f"{placed.process} of {run_dir}"}
    if sys.platform == "linux":
        result["GLOO_SOCKET_IFNAME"] = "lo"  # all programs are on this host; its name may resolve to anything
    if placed.rank is not None and len(ranks) > 1:  # a rank alone meets nobody, and opens no port
        result |= {
            "RANK": str(placed.rank),
            "LOCAL_RANK": str(placed.rank),
            "WORLD_SIZE": str(len(ranks)),
            "LOCAL_WORLD_SIZE": str(len(ranks)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(rendezvous_port),
        }
    return result


def command(placed: Placed, *, run_dir: Path, wires_dir: Path, resume: Path | None) -> tuple[str, ...]:
    """The command line of one program; the run directory in it shows in `ps` which run it belongs to."""
    folders = ("--run-dir", str(run_dir), "--wires", str(wires_dir))
    resuming = ("--resume", str(resume)) if resume is not None and placed.rank is not None else ()
    leash = ("azr_async.programs.leash", str(os.getpid()))
    return (sys.executable, "-m", *leash, *placed.arguments, *folders, *resuming)


def free_port() -> int:
    """A TCP port that was free on loopback a moment ago, and that the kernel gives to nobody who asks for any."""
    for number in range(len(_UNASKED_PORTS)):
        port = _UNASKED_PORTS[(os.getpid() + number) % len(_UNASKED_PORTS)]
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ConfigError(f"no TCP port from {_UNASKED_PORTS[0]} to {_UNASKED_PORTS[-1]} is free. End what uses them.")


def describe_host(found: int) -> str:
    """One line about this machine."""
    return f"{len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count()} CPU cores, {_counted(found)}"


def _as_numbered_by(visible: str | None, gpu: int) -> str:
    # The user may have given the launcher only some GPUs; ours are counted among those.
    names = visible.split(",") if visible else []
    return names[gpu].strip() if gpu < len(names) else str(gpu)


def _counted(gpus: int) -> str:
    return {0: "no GPU", 1: "1 GPU"}.get(gpus, f"{gpus} GPUs")


def _what_fits(config: Config, found: int) -> str:
    if found == 0:
        return (
            "Leave --inference-gpus and --train-gpus out to run on the CPU. If there should be GPUs, `nvidia-smi` must "
            "list them, and torch must be a CUDA build: `python -c 'import torch; print(torch.version.cuda)'`."
        )
    if found == 1:
        return (
            "What fits: --inference-gpus 1 --train-gpus 1 --placement shared --engine.memory-share 0.4. "
            "For the CPU leave --inference-gpus and --train-gpus out."
        )
    span = config.placement.tensor_parallel
    if span >= found:
        return f"An engine of {span} GPUs leaves none to learn; lower --placement.tensor-parallel below {found}."
    inference = max(span, found // 2 // span * span)
    return f"What fits: --inference-gpus {inference} --train-gpus {found - inference}. For the CPU leave both out."
