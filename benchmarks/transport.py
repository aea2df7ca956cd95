"""How many rollouts per second does self-play take in, from how many engines, and what does each cost?

Rollouts of 4096 tokens (ids, log-probabilities, versions, and 16 kB of text) come from 1 to 256 scripted inference
workers, each with sockets of its own, hosted in a few processes:

self-play      the whole program of a run, as it ships: engine client, stages, sandbox, journal; batches go on to a
               learner that only counts them. The rate is what reaches that learner.
engine client  the receiving half of it alone: ZeroMQ, decoding, jobs and leases.
raw pyzmq      the same bytes through bare PUSH and PULL sockets, not even decoded: the floor.
HTTP+JSON      a POST per rollout over open connections, JSON to arrays, as others stream.

Cost is CPU time of the receiving process for one rollout. Latency, from the engine's hand to the receiver's, is
measured in a second pass at a gentle pace, where nothing queues. Memory is the receiver's, first to last reading.

    python benchmarks/transport.py --engines 1 4 16 64 256 --output benchmarks/results/transport.json
"""

import argparse
import asyncio
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import uvloop
from rich.console import Console
from rich.table import Table
from scripted_peers import SPAWN, Script, Step, scripted_learner, scripted_workers, self_play_process, worker_name
from transport_floors import FLOORS, Meter, rollout_bytes
from whole_runs import write_json

from azr_async.adapters.channels import ZmqReceiver, ZmqSender, shared_context, zmq_receiver, zmq_sender
from azr_async.adapters.engine_client import RemoteEngines
from azr_async.config import Config
from azr_async.messages import CancelJob, GenerateJob, GenerationResults, Prompt, WorkerReady
from azr_async.programs.wiring import endpoint

PROMPT_TOKENS: Final = 256
TOKENS: Final = 4096 - PROMPT_TOKENS
IN_FLIGHT: Final = 1024
"""Samples being made at a time, over all engines."""
GENTLE_RATE: Final = 200.0
"""Rollouts a second when latency is measured."""
KINDS: Final = ("self-play", "engine client", *FLOORS)
THOUGHT: Final = "so the value is that of the sum of these, and from that it follows; " * 235
HOSTS: Final = 2
"""Processes that share the scripted workers."""
RECEIVER_SECONDS: Final = 60.0
"""For a receiver to start, measure and answer."""


def main() -> None:
    """Measure every kind at every number of engines, repeats interleaved, print medians and ratios."""
    arguments = _parser().parse_args()
    rows: list[dict[str, Any]] = []
    for repeat in range(1, arguments.repeats + 1):
        for engines in arguments.engines:
            for kind in arguments.kinds:
                row = {"kind": kind, "engines": engines, **measured(kind, engines, arguments.seconds)}
                rows.append(row)
                progress = f"{repeat} of {arguments.repeats}: {kind}, {engines} engines"
                print(f"{progress}: {row['rollouts_per_second']:,.0f} rollouts a second", file=sys.stderr)
    show(rows)
    write_json(arguments.output, "transport", {"load": os.getloadavg(), "repeats": rows})


def measured(kind: str, engines: int, seconds: float) -> dict[str, Any]:
    """One kind at full speed, and its latency at a gentle pace."""
    if kind == "self-play":
        return with_self_play(engines, seconds)
    one = with_client if kind == "engine client" else with_floor
    hurried = one(kind, engines, seconds, math.inf)
    gentle = one(kind, engines, min(seconds, 3.0), GENTLE_RATE)
    return hurried | {name: gentle[name] for name in ("p50_ms", "p99_ms")}


def answer(job: GenerateJob, index: int) -> str:
    """A long thought and a short answer; begins with the moment at which it was sent."""
    opening = f"<think>{time.monotonic_ns()} {THOUGHT}</think>\n<answer>\n"
    if job.prompt.text.startswith("Set"):
        number = job.seed % 1000
        return f"{opening}```python\ndef f(x):\n    return x + {number}\n```\n```input\n{number}\n```\n</answer>"
    return f"{opening}```output\n{(job.seed + index) % 100}\n```\n</answer>"


# ---------------------------------------------------------------- the product


def with_self_play(engines: int, seconds: float) -> dict[str, Any]:
    """The whole self-play program; one kind of tasks, whose judging needs no program to run."""
    config = _config(engines)
    version, readings = SPAWN.Value("i", 0), list[tuple[float, float, float]]()

    def is_over(steps: Sequence[Step]) -> bool:
        if len(steps) > len(readings):  # a reading with each step; the first two fill the window
            times = process.cpu_times()
            readings.append((steps[-1].ended_seconds, times.user + times.system, process.memory_info().rss / 1e6))
        return len(readings) > 3 and readings[-1][0] - readings[2][0] > seconds

    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        wires_dir = Path(scratch) / "wires"
        wires_dir.mkdir(mode=0o700)
        process = stack.enter_context(self_play_process(config, Path(scratch) / "run", wires_dir))
        stack.enter_context(scripted_workers(config, wires_dir, _script(math.inf), version, processes=HOSTS))
        steps = uvloop.run(scripted_learner(config, wires_dir, version, until=is_over))
        threads, files = process.num_threads(), process.num_fds()
    rollouts = sum(step.rollouts for step in steps[3:])
    return {
        "rollouts_per_second": rollouts / (readings[-1][0] - readings[2][0]),
        "cpu_microseconds": 1e6 * (readings[-1][1] - readings[2][1]) / rollouts,
        "p50_ms": None,
        "p99_ms": None,
        "resident_mb": [resident for _, _, resident in readings[2:]],
        "threads": threads,
        "open_files": files,
    }


def with_client(_: str, engines: int, seconds: float, rate: float) -> dict[str, Any]:
    """`RemoteEngines` in a process of its own."""
    config, version = _config(engines), SPAWN.Value("i", 0)
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(1, mp_context=SPAWN) as pool,
        scripted_workers(config, Path(scratch), _script(rate), version, processes=HOSTS),
    ):
        received = pool.submit(client_process, config.model_dump_json(), Path(scratch), seconds)
        return received.result(RECEIVER_SECONDS)


def client_process(config_json: str, wires_dir: Path, seconds: float) -> dict[str, Any]:
    """Ask for samples, as many as self-play would at a time, and count what comes."""
    return uvloop.run(_ask(Config.model_validate_json(config_json), wires_dir, Meter(seconds)))


async def _ask(config: Config, wires_dir: Path, meter: Meter) -> dict[str, Any]:
    results: ZmqReceiver[GenerationResults | WorkerReady] = zmq_receiver(
        endpoint(config, wires_dir, "selfplay-results"),
        (GenerationResults, WorkerReady),
        name="selfplay",
        capacity=256,
        expected_senders=config.inference_workers,
    )
    names = {worker_name(index): index for index in range(config.inference_workers)}
    over = asyncio.Event()

    async def ask(first: int) -> None:
        for job_id in range(first, sys.maxsize, IN_FLIGHT):
            job = GenerateJob(job_id=job_id, prompt=Prompt(text="Work out"), samples=8, priority=job_id,
                              temperature=1.0, top_p=1.0, max_tokens=TOKENS, seed=job_id)  # fmt: skip
            async for completion in engines.generate(job):
                sent_ns = int(completion.text[7 : completion.text.index(" ")])
                if not meter.arrived(sent_ns):
                    over.set()

    def connect(ready: WorkerReady) -> ZmqSender[GenerateJob | CancelJob]:
        seconds = RECEIVER_SECONDS
        return zmq_sender(ready.endpoint, name="selfplay", peer=ready.worker, connect_seconds=seconds, context=context)

    async with results, shared_context() as context, asyncio.TaskGroup() as group:
        engines = RemoteEngines(
            results,
            connect,
            expected_workers=list(names),
            ready_seconds=60.0,
            job_seconds=60.0,
        )
        tasks = [group.create_task(engines.run(), name="engines")]
        engines.installed(names)
        tasks += [group.create_task(ask(first), name=f"ask-{first}") for first in range(IN_FLIGHT // 8)]
        await over.wait()
        result = meter.result()
        for task in tasks:
            task.cancel()
    return result


def with_floor(kind: str, engines: int, seconds: float, rate: float) -> dict[str, Any]:
    """A receiver in a process of its own, senders in as many as our workers have."""
    receive, send = FLOORS[kind]
    payload = rollout_bytes(TOKENS, PROMPT_TOKENS, THOUGHT)[kind == "HTTP+JSON"]
    hosts = min(HOSTS, engines)
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        address = f"ipc://{scratch}/floor"
        receiving = pool.submit(receive, address, seconds)
        senders = [
            SPAWN.Process(target=send, args=(address, engines // hosts, hosts / rate, payload), daemon=True)
            for _ in range(hosts)
        ]
        for sender in senders:
            sender.start()
        try:
            return receiving.result(RECEIVER_SECONDS)
        finally:
            for sender in senders:
                sender.kill()
                sender.join()


def _config(engines: int) -> Config:
    return Config.model_validate(
        {
            "model": {"dialogue": "azr-chat"},
            "placement": {"inference_workers": engines},
            "engine": {"slots": IN_FLIGHT // engines, "kind": "transformers", "context_tokens": 8192},
            "flow": {"tasks": ["deduction"], "propose_samples": 8, "solve_samples": 256, "max_lag": 3},
            "library": {"seed_tasks": 8},
            "evaluation": {"suite": "none"},
        }
    )


def _script(rate: float) -> Script:
    return Script(
        answer=answer,
        tokens=TOKENS,
        prompt_tokens=PROMPT_TOKENS,
        slot_tokens_per_second=rate * TOKENS / IN_FLIGHT,
        spread=0.0 if rate == math.inf else 0.3,  # so that not all of them end in the same moment
    )


# ---------------------------------------------------------------- table


def show(rows: list[dict[str, Any]]) -> None:
    """Medians; each cost beside that of the raw socket and beside that of one engine."""
    columns = ("receiver", "engines", "rollouts/s", "MB/s", "CPU us each", "of raw", "of 1 engine", "p50 ms", "p99 ms")
    table = Table(*columns, "resident MB", title="rollouts of 4096 tokens, medians of the repeats")
    size = len(rollout_bytes(TOKENS, PROMPT_TOKENS, THOUGHT)[0])
    for kind in dict.fromkeys(row["kind"] for row in rows):
        same = [row for row in rows if row["kind"] == kind]
        for engines in dict.fromkeys(row["engines"] for row in same):
            mine = [row for row in same if row["engines"] == engines]
            cost, rate = median(mine, "cpu_microseconds"), median(mine, "rollouts_per_second")
            raw = [row for row in rows if (row["kind"], row["engines"]) == ("raw pyzmq", engines)]
            one = [row for row in same if row["engines"] == 1]
            ratios = [f"{cost / median(other, 'cpu_microseconds'):.2f}" if other else "" for other in (raw, one)]
            latency = ["" if row is None else f"{row:.1f}" for row in (median(mine, "p50_ms"), median(mine, "p99_ms"))]
            first, last = (statistics.median(row["resident_mb"][end] for row in mine) for end in (0, -1))
            numbers = (f"{rate:,.0f}", f"{rate * size / 1e6:,.0f}", f"{cost:,.0f}", *ratios, *latency)
            table.add_row(kind, str(engines), *numbers, f"{first:.0f} - {last:.0f}")
    Console(width=120).print(table)


def median(rows: list[dict[str, Any]], name: str) -> Any:  # noqa: ANN401  None where it was not measured
    """Of one figure over the repeats."""
    return None if rows[0][name] is None else float(statistics.median(row[name] for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="[1 4 16 64 256]")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="[all four]")
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring in each cell [4]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the results as JSON, too")
    return parser


if __name__ == "__main__":
    main()
