"""How much of a raw broadcast does a push of weights reach, and how long does it keep an engine from generating?

A random model with the shapes of a 32-layer Llama, of --megabytes in float32, goes from this process to 1 and to 2
others. In turn, repeat by repeat:

    raw, flat          torch.distributed.broadcast of as many bytes: one tensor, nothing packed, checked or copied
    raw, in buckets    the same in pieces of --bucket-mb
    raw, then copied   one tensor, then copied into the parameters of a model
    push               what the learner does: buckets, digest, confirmation by every rank; the tensors are looked at
    push, installed    the same, and copied into the parameters of a model
    small raw, small push   the starter's model, many times in a row

Time is from the first byte until the last receiver has everything, the pause what a receiver spends in the push. All
cases run in the same processes, one thread for torch in each, after a round that does not count: all memory has been
touched on both sides, by the raw broadcasts as well. The table shows medians, and how much of the raw speed a case
reaches: the median over repeats of the raw time divided by the case's time in the same repeat. The last lines compare
that of `push` with what it is to reach. The JSON has every repeat. On a busy machine look at the best repeats instead
(--best). A CPU shows gloo only; with a GPU for every process NCCL is measured as well.

    python benchmarks/weights.py --output benchmarks/results/weights.json
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from whole_runs import write_json

from azr_async.adapters.models import load_model
from azr_async.adapters.weights import WeightGroup, connect_store, host_store

LAYERS = 32
DEADLINE_SECONDS = 60.0
TO_REACH = 0.9
"""Of a raw broadcast of the same bytes."""
SPAWN = get_context("spawn")
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """What every process of one measurement has to know."""

    backend: str
    receivers: int
    megabytes: int
    bucket_mb: int
    small_pushes: int

    @property
    def world_size(self) -> int:
        """Sender and receivers."""
        return 1 + self.receivers


@dataclass(frozen=True)
class Measured:
    """One repeat of one case; seconds and bytes are those of one model."""

    case: str
    backend: str
    receivers: int
    model_bytes: int
    seconds: float
    pause_seconds: float
    """The longest of the receivers."""
    cpu_seconds: float
    """All processes together."""


def main() -> None:
    """Measure with 1 and 2 receivers, print the table."""
    arguments = _parser().parse_args()
    rows: list[Measured] = []
    for backend, receivers in itertools.product(("gloo", "nccl"), arguments.receivers):
        if backend == "gloo" or torch.cuda.device_count() > receivers:
            setting = Setting(backend, receivers, arguments.megabytes, arguments.bucket_mb, arguments.small_pushes)
            rows.extend(measured(setting, arguments.repeats))
    load = os.getloadavg()
    show(rows, best=arguments.best)
    Console().print(f"load of the machine in the last 1, 5, 15 minutes: {load}")
    write_json(arguments.output, "weights", {"load": load, "repeats": [asdict(row) for row in rows]})


def measured(setting: Setting, repeats: int) -> Iterator[Measured]:
    """Every case `repeats` times, in turn, after one round that does not count."""
    store = host_store("127.0.0.1", 0)
    with receiving_processes(setting, store.port) as pipes:
        side = Side(setting, 0, store)
        for repeat, case in itertools.product(range(-1, repeats), CASES):
            for pipe in pipes:
                pipe.send(case)
            for pipe in pipes:
                _answer(pipe)
            began, cpu = time.perf_counter(), time.process_time()
            CASES[case].send(side)
            answers = [_answer(pipe) for pipe in pipes]
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            each = setting.small_pushes if CASES[case].is_small else 1
            if repeat >= 0:
                yield Measured(
                    case,
                    setting.backend,
                    setting.receivers,
                    sum(tensor.nbytes for tensor in side.weights(case).values()),
                    seconds / each,
                    max(pause for pause, _ in answers) / each,
                    (cpu + sum(theirs for _, theirs in answers)) / each,
                )
        for pipe in pipes:
            pipe.send(None)
        side.close()


# ---------------------------------------------------------------- processes


class Side:
    """One process with its models, the group that is measured, and torch's own."""

    def __init__(self, setting: Setting, rank: int, store: TCPStore) -> None:
        torch.set_num_threads(1)
        self.setting, self.version = setting, 0
        self.device = torch.device("cuda", rank) if setting.backend == "nccl" else torch.device("cpu")
        self.large = {name: tensor.to(self.device) for name, tensor in llama(setting.megabytes * 10**6).items()}
        self.small = {name: tensor.detach().to(self.device) for name, tensor in starter().items()}
        self.flat_N = torch.ones(sum(t.nbytes for t in self.large.values()), dtype=torch.uint8, device=self.device)
        self.small_N = torch.ones(sum(t.nbytes for t in self.small.values()), dtype=torch.uint8, device=self.device)
        raw = PrefixStore(f"raw-{setting.backend}", store)
        dist.init_process_group(setting.backend, store=raw, rank=rank, world_size=setting.world_size)
        self.group = WeightGroup(
            store,
            group=0,
            rank=rank,
            world_size=setting.world_size,
            device=self.device,
            deadline_seconds=DEADLINE_SECONDS,
        )

    def weights(self, case: str) -> Weights:
        """What the case is about."""
        return self.small if CASES[case].is_small else self.large

    def synchronize(self) -> None:
        """Wait for the GPU, if there is one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Leave both groups."""
        self.group.close()
        dist.destroy_process_group()


@contextmanager
def receiving_processes(setting: Setting, port: int) -> Iterator[list[Connection]]:
    """Processes that serve ranks 1 and up; they end with the block."""
    pipes, processes = [], []
    for rank in range(1, setting.world_size):
        here, there = SPAWN.Pipe()
        pipes.append(here)
        processes.append(SPAWN.Process(target=serve, args=(there, setting, rank, port), daemon=True))
        processes[-1].start()
    yield pipes
    for process in processes:
        process.join(DEADLINE_SECONDS)


def serve(pipe: Connection, setting: Setting, rank: int, port: int) -> None:
    """Take part in the cases that are named on the pipe; answer each with the pause and the CPU time."""
    side = Side(setting, rank, connect_store("127.0.0.1", port, DEADLINE_SECONDS))
    while (case := pipe.recv()) is not None:
        pipe.send((0.0, 0.0))
        began, cpu = time.perf_counter(), time.process_time()
        CASES[case].receive(side)
        side.synchronize()
        pipe.send((time.perf_counter() - began, time.process_time() - cpu))
    side.close()


def _answer(pipe: Connection) -> tuple[float, float]:
    if not pipe.poll(DEADLINE_SECONDS):
        raise SystemExit(f"a receiver did not answer within {DEADLINE_SECONDS} s")
    pause_seconds, cpu_seconds = pipe.recv()
    return pause_seconds, cpu_seconds


# ---------------------------------------------------------------- models


def llama(model_bytes: int) -> Weights:
    """Random, float32, of about so many bytes, with the proportions of Llama 2."""
    # Per layer: q and o of h x h, k and v of h x h/4, three of h x 2.6875 h; with 7.8 h rows in embedding and head.
    hidden = round((model_bytes / 4 / (LAYERS * 10.5625 + 2 * 7.8)) ** 0.5 / 16) * 16
    wide, vocabulary = hidden * 43 // 16, int(7.8 * hidden)
    layer = {
        **{f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"},
        **{f"self_attn.{name}_proj.weight": (hidden // 4, hidden) for name in "kv"},
        **{f"mlp.{name}_proj.weight": (wide, hidden) for name in ("gate", "up")},
        "mlp.down_proj.weight": (hidden, wide),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        **{f"model.layers.{n}.{name}": shape for n in range(LAYERS) for name, shape in layer.items()},
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def starter() -> Weights:
    """The model of the starter."""
    return dict(load_model("starter", "float32", torch.device("cpu"))[0].named_parameters())


def copied_into(weights: Weights) -> Callable[[Iterable[tuple[str, Tensor]]], None]:
    """What an engine does with tensors that arrive."""

    def install(tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            weights[name].copy_(tensor)

    return install


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """What the sender does, and what a receiver."""

    send: Callable[[Side], None]
    receive: Callable[[Side], None]
    is_small: bool = False


def raw(side: Side) -> None:
    dist.broadcast(side.flat_N, 0)


def raw_in_buckets(side: Side) -> None:
    for bucket_N in side.flat_N.split(side.setting.bucket_mb * 2**20):  # type: ignore[no-untyped-call]
        dist.broadcast(bucket_N, 0)


def raw_then_copied(side: Side) -> None:
    dist.broadcast(side.flat_N, 0)
    start = 0
    for tensor in side.large.values():
        tensor.copy_(side.flat_N[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += tensor.nbytes


def push(side: Side) -> None:
    side.version += 1
    side.group.send(side.large.items(), version=side.version, bucket_bytes=side.setting.bucket_mb * 2**20)


def small_raw(side: Side) -> None:
    for _ in range(side.setting.small_pushes):
        dist.broadcast(side.small_N, 0)


def small_push(side: Side) -> None:
    for version in range(side.setting.small_pushes):
        side.group.send(side.small.items(), version=version, bucket_bytes=side.setting.bucket_mb * 2**20)


def receive_small(side: Side) -> None:
    for _ in range(side.setting.small_pushes):
        side.group.receive(copied_into(side.small))


CASES = {
    "raw, flat": Case(raw, raw),
    "raw, in buckets": Case(raw_in_buckets, raw_in_buckets),
    "push": Case(push, lambda side: _ignore(side.group.receive(list))),
    "raw, then copied": Case(raw, raw_then_copied),
    "push, installed": Case(push, lambda side: _ignore(side.group.receive(copied_into(side.large)))),
    "small raw": Case(small_raw, small_raw, is_small=True),
    "small push": Case(small_push, receive_small, is_small=True),
}


def _ignore(_: object) -> None:
    """Of a push only the time counts."""


# ---------------------------------------------------------------- table


def show(rows: list[Measured], *, best: bool) -> None:
    """Beside each case's time its part of the raw broadcast's speed."""
    middle: Callable[[Iterable[float]], float] = min if best else statistics.median
    columns = ("case", "backend", "receivers", "MB", "ms", "MB/s", "of flat", "of buckets", "pause ms", "CPU ms")
    table = Table(*columns, title=f"weights, {'best' if best else 'median'} of the repeats")
    verdicts = []
    for backend, receivers, case in dict.fromkeys((row.backend, row.receivers, row.case) for row in rows):
        same = [row for row in rows if (row.backend, row.receivers) == (backend, receivers)]
        mine = [row for row in same if row.case == case]
        flat, buckets = ("small raw", "small raw") if CASES[case].is_small else ("raw, flat", "raw, in buckets")
        seconds, pause, cpu = (
            middle(getattr(row, field) for row in mine) for field in ("seconds", "pause_seconds", "cpu_seconds")
        )
        of_flat, of_buckets = (_share_reached(same, case, reference, best=best) for reference in (flat, buckets))
        model_bytes = mine[0].model_bytes
        cells = (f"{model_bytes / 1e6:.1f}", f"{1e3 * seconds:.2f}", f"{model_bytes / seconds / 1e6:,.0f}")
        shares = (f"{of_flat:.2f}", f"{of_buckets:.2f}")
        table.add_row(case, backend, str(receivers), *cells, *shares, f"{1e3 * pause:.2f}", f"{1e3 * cpu:.1f}")
        if case == "push":
            verdicts.append(
                f"{backend}, {receivers} receivers: push reaches {of_flat:.2f} of one flat raw broadcast and "
                f"{of_buckets:.2f} of one in buckets; {TO_REACH} is to be reached"
            )
    console = Console(width=120)
    console.print(table)
    for verdict in verdicts:
        console.print(verdict)


def _share_reached(rows: list[Measured], case: str, reference: str, *, best: bool) -> float:
    """Of the speed of the reference: in the middle repeat, or the best of the one against the best of the other."""
    raw, mine = ([row.seconds for row in rows if row.case == name] for name in (reference, case))
    if best:
        return min(raw) / min(mine)
    return statistics.median(theirs / ours for theirs, ours in zip(raw, mine, strict=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500, help="of the large model, in millions of bytes [500]")
    parser.add_argument("--bucket-mb", type=int, default=64, help="as weights.bucket_mb [64]")
    parser.add_argument("--receivers", type=int, nargs="+", default=[1, 2], help="[1 2]")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--small-pushes", type=int, default=100, help="in one repeat [100]")
    parser.add_argument("--best", action="store_true", help="show the best repeats instead of medians")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    return parser


if __name__ == "__main__":
    main()
