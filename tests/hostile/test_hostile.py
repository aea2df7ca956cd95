"""Programs that try to get out, to stay, to lie or to break what comes after them; one per file in `programs/`.

Each says in its first lines what it tries and which statuses are right for it. They run four times: behind the gate and
without it, on this host and on one that offers neither namespaces nor Landlock. After each of them an ordinary program
must give its usual answer, and nothing may be left: no file, no process, no call to a listening port.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GROUPS = {
    "resources",
    "processes",
    "files",
    "network",
    "introspection",
    "forging",
    "poisoning",
    "parsing",
    "nondeterminism",
}
LIMITS = {"wall", "cpu", "memory", "processes", "files", "output", "calls"}
STATUSES = {"ok", "error", "timeout", "memory", "blocked", "nondeterministic", "rejected", "output_too_long"}


def attack(*options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, os.fspath(HERE / "run.py"), *options],
        env={"PYTHONPATH": os.fspath(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("gate", [[], ["--ungated"]], ids=["gated", "ungated"])
@pytest.mark.parametrize("host", [[], ["--refuse", "unshare,landlock"]], ids=["this_host", "bare_host"])
def test_every_program_gets_its_status_and_nothing_gets_out(gate: list[str], host: list[str]) -> None:
    result = attack(*gate, *host)
    print(json.dumps(result["layers"], indent=1))
    assert result["wrong"] == {}
    assert result["victims"] == []
    assert result["escapes"] == []
    assert result["programs"] >= 80
    assert result["layers"]["seccomp"].startswith("verified")
    assert result["layers"]["namespaces"].startswith("unavailable") or not host


def test_every_group_has_programs_and_every_program_says_what_is_right() -> None:
    heads = {path: path.read_bytes().split(b"\n")[:4] for path in HERE.glob("programs/*/*.program")}
    assert set(Counter(path.parent.name for path in heads)) == GROUPS
    for path, (what, gated, ungated, argument) in heads.items():
        assert what.startswith(b"# "), path
        assert argument.startswith(b"# input:"), path
        expected = gated.decode().removeprefix("# gated: ").split()
        expected += ungated.decode().removeprefix("# ungated: ").split()
        statuses, limits = zip(*(each.partition("/")[::2] for each in expected), strict=True)
        assert set(statuses) <= STATUSES, path
        assert set(limits) <= LIMITS | {""}, path
