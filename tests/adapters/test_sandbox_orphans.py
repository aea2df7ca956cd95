"""No sandbox process outlives its owner, whatever it is computing."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

OWNER = """
import asyncio, sys
from azr_async.adapters.sandbox.pool import SandboxPool

async def main():
    async with SandboxPool(workers=1, wall_seconds=60, cpu_seconds=60, label=sys.argv[1]) as sandbox:
        running = asyncio.create_task(sandbox.run("def f(x):\\n    while True: pass", ["1"]))
        while sandbox.busy_seconds < 0.2:
            await asyncio.sleep(0.01)
        print("busy", flush=True)
        await running

asyncio.run(main())
"""


@pytest.mark.parametrize("how", [psutil.Process.kill, psutil.Process.terminate])
def test_processes_of_a_killed_owner_are_gone_at_once(tmp_path: Path, how: object) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "busy\n"
    family = psutil.Process(owner.pid).children(recursive=True)
    assert len(family) >= 2
    (owner.kill if how is psutil.Process.kill else owner.terminate)()
    owner.communicate()
    _, left = psutil.wait_procs(family, timeout=5.0)
    assert left == []
