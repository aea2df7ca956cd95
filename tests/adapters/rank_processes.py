"""Starts the ranks of a learner as processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

from azr_async.programs.placement import free_port

ROOT = Path(__file__).parents[2]


def run_ranks(module: str, folder: Path, count: int) -> None:
    """`python -m module folder` on each of `count` ranks; all have to end well."""
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    try:
        complaints = [process.communicate(timeout=250)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()  # those that wait for one that has failed
    assert [process.returncode for process in processes] == [0] * count, "\n".join(complaints)
