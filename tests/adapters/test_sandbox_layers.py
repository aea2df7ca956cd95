"""Isolation on hosts that offer less than this one: what is missing is found out by trying, and told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from azr_async.adapters.sandbox.crew import ATTEMPTS, WALL
from azr_async.adapters.sandbox.pool import SandboxPool
from azr_async.adapters.sandbox.slots import Slot
from azr_async.adapters.sandbox.verdicts import Limits, Report
from azr_async.errors import SandboxError

ROOT = Path(__file__).parents[2]

NUMBERS = {
    "x86_64": {"unshare": 272, "seccomp": 317, "landlock": 444, "mount": 165},
    "aarch64": {"unshare": 97, "seccomp": 277, "landlock": 444, "mount": 40},
}[os.uname().machine]

ON_A_HOST_THAT_REFUSES = """
import asyncio, ctypes, json, struct, sys
from azr_async.adapters.sandbox.inside import kernel
from azr_async.adapters.sandbox.pool import SandboxPool
from azr_async.errors import SandboxError

numbers, require = json.loads(sys.argv[1]), sys.argv[2]
filter = struct.pack("<HBBI", 0x20, 0, 0, 0)
for number in numbers:
    filter += struct.pack("<HBBI", 0x15, 0, 1, number) + struct.pack("<HBBI", 0x06, 0, 0, 0x00050001)
filter += struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000)
kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
kernel.seccomp_filter(filter)()

async def main():
    try:
        async with SandboxPool(workers=1, require=require) as pool:
            outcome, = await pool.run("def f(x): return x + 1", ["1"], times=2)
            return {"layers": pool.layers, "text": outcome.text}
    except SandboxError as error:
        return {"error": str(error)}

print(json.dumps(asyncio.run(main())))
"""


def start_where_refused(*calls: str, require: str = "strict") -> dict[str, object]:
    """Start a sandbox on a host that answers `calls` with EPERM; its layers, or why it does not start."""
    done = subprocess.run(
        [sys.executable, "-c", ON_A_HOST_THAT_REFUSES, json.dumps([NUMBERS[call] for call in calls]), require],
        env={"PYTHONPATH": os.fspath(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


async def test_the_wall_is_verified_and_no_canary_gets_out() -> None:
    async with SandboxPool(workers=1) as pool:
        layers = pool.layers
    assert [layer for layer in (*WALL, "canaries") if not layers[layer].startswith("verified")] == []


@pytest.mark.parametrize(("deaths", "holds"), [(1, True), (99, False)])
async def test_a_zygote_that_ends_under_a_canary_is_its_doing_only_if_it_does_so_every_time(
    monkeypatch: pytest.MonkeyPatch, deaths: int, holds: bool
) -> None:
    run, struck = Slot.run, list[int]()

    async def killing(slot: Slot, request: bytes, limits: Limits, *, inputs: int) -> Report:
        if b"Ploop for ever" in request and len(struck) < deaths:
            slot.helper.strike()
            struck.append(slot.helper.process.pid)
        return await run(slot, request, limits, inputs=inputs)

    monkeypatch.setattr(Slot, "run", killing)
    pool = SandboxPool(workers=1)
    if holds:
        async with pool:
            assert pool.layers["canaries"].startswith("verified")
    else:
        with pytest.raises(SandboxError, match="loop for ever and end its zygote"):
            await pool.__aenter__()
    assert len(struck) == (1 if holds else ATTEMPTS)


@pytest.mark.parametrize(
    ("calls", "lost"),
    [
        (["unshare"], {"namespaces", "file_view"}),
        (["mount"], {"file_view"}),
        (["landlock"], {"landlock"}),
        (["unshare", "landlock"], {"namespaces", "file_view", "landlock"}),
    ],
)
def test_the_wall_holds_without_the_layers_behind_it(calls: list[str], lost: set[str]) -> None:
    answer = start_where_refused(*calls)
    layers = answer["layers"]
    assert isinstance(layers, dict)
    assert {layer for layer, state in layers.items() if not state.startswith("verified")} == lost
    assert all("Operation not permitted" in layers[layer] or layer == "file_view" for layer in lost)
    assert answer["text"] == "2"


def test_strict_refuses_to_start_without_the_wall_and_says_what_to_do() -> None:
    error = str(start_where_refused("seccomp")["error"])
    assert "seccomp (unavailable: " in error
    assert "--security-opt" in error
    assert "best-effort" in error


def test_best_effort_starts_without_the_wall_and_says_what_could_get_out() -> None:
    answer = start_where_refused("seccomp", require="best-effort")
    layers = answer["layers"]
    assert isinstance(layers, dict)
    assert layers["seccomp"].startswith("unavailable")
    assert layers["canaries"].startswith("escaped: ")
    assert answer["text"] == "2"
