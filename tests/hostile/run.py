"""Runs every hostile program in a sandbox and prints, as JSON, what became of it and what got out.

    python tests/hostile/run.py [--ungated] [--refuse CALL,CALL]

`--ungated` switches the gate off, so that programs reach the walls. `--refuse` answers the named system calls with
EPERM, as a container or an old kernel would, so that the layers which need them are missing.
"""

import argparse
import asyncio
import json
import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import uvloop

from azr_async.adapters.sandbox.inside import kernel
from azr_async.adapters.sandbox.pool import DEFAULT_IMPORTS, SandboxPool

PROGRAMS: Final = Path(__file__).parent / "programs"
LABEL: Final = f"hostile-{os.getpid()}"
MARKER: Final = Path(f"/tmp/azr-hostile-{os.getpid()}")
LEFT_BEHIND: Final = (MARKER, Path("/dev/shm/azr"), Path("/tmp/escaped"))
REFUSABLE: Final = {
    "x86_64": {"unshare": 272, "mount": 165, "landlock": 444},
    "aarch64": {"unshare": 97, "mount": 40, "landlock": 444},
}[os.uname().machine]
WANTED_BY_PROGRAMS: Final = (
    "os socket ctypes threading _thread subprocess signal mmap gc inspect time random datetime tempfile pathlib io "
    "codecs resource builtins sys atexit urllib.request multiprocessing multiprocessing.pool"
)
VICTIM: Final = """
import collections
import decimal
import json
import math
import re
def f(x):
    counts = collections.Counter('abca')
    return (
        len([1, 2, 3]), sorted([3, 1, 2]), math.floor(1.5), json.dumps({'a': [1.0, None]}), re.sub('a+', 'b', 'caat'),
        counts.most_common(1), str(decimal.Decimal(1) / 3), 7 + 0, 'ABC'.lower(), isinstance(True, int), x
    )
"""
VICTIM_VALUE: Final = (
    "(3, [1, 2, 3], 1, '{\"a\": [1.0, null]}', 'cbt', [('a', 2)], '0.3333333333333333333333333333', 7, 'abc', True, {})"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attack:
    """One hostile program, and the statuses that are right for it; `status/limit` where only that limit is."""

    name: str
    program: str
    input: str
    gated: tuple[str, ...]
    ungated: tuple[str, ...]

    @classmethod
    def read(cls, path: Path, port: int) -> Self:
        """From a file whose first lines say what it is."""
        text = path.read_bytes().decode("utf-8", "surrogatepass")
        text = text.replace("{marker}", os.fspath(MARKER)).replace("{port}", str(port))
        _, gated, ungated, argument, program = text.split("\n", 4)
        return cls(
            name=f"{path.parent.name}/{path.stem}",
            program=program,
            input=argument.removeprefix("# input: ").removeprefix("# input:"),
            gated=tuple(gated.removeprefix("# gated: ").split()),
            ungated=tuple(ungated.removeprefix("# ungated: ").split()),
        )


def main() -> None:
    """Run them all and print what happened."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ungated", action="store_true")
    parser.add_argument("--refuse", default="")
    options = parser.parse_args()
    refuse([REFUSABLE[name] for name in options.refuse.split(",") if name])
    os.environ["AZR_HOSTILE_SECRET"] = "escaped"
    print(json.dumps(uvloop.run(attack(is_gated=not options.ungated)), indent=1))


def refuse(numbers: list[int]) -> None:
    """Make this host one that answers the system calls with EPERM."""
    if not numbers:
        return
    program = struct.pack("<HBBI", 0x20, 0, 0, 0)
    for number in numbers:
        program += struct.pack("<HBBI", 0x15, 0, 1, number) + struct.pack("<HBBI", 0x06, 0, 0, 0x00050001)
    program += struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.seccomp_filter(program)()


async def attack(*, is_gated: bool) -> dict[str, object]:
    """The active layers, every program with a wrong status, every victim that suffered, everything that got out."""
    imports = DEFAULT_IMPORTS if is_gated else (*DEFAULT_IMPORTS, *WANTED_BY_PROGRAMS.split())
    wrong: dict[str, str] = {}
    victims: list[str] = []
    escapes: list[str] = []
    with listening() as listeners:
        port = listeners[0].getsockname()[1]
        attacks = [Attack.read(path, port) for path in sorted(PROGRAMS.glob("*/*.program"))]
        async with SandboxPool(
            workers=2,
            wall_seconds=8.0,
            cpu_seconds=1.0,
            memory_mb=128,
            allowed_imports=imports,
            label=LABEL,
            is_gated=is_gated,
        ) as pool:
            slots = asyncio.Semaphore(12)

            async def one(number: int, attack: Attack) -> None:
                async with slots:
                    (outcome,) = await pool.run(attack.program, [attack.input], times=2)
                    right = attack.gated if is_gated else attack.ungated
                    found = f"{outcome.status}/{outcome.limit}"
                    if outcome.status not in right and found not in right:
                        wrong[attack.name] = f"{found} {outcome.error}{outcome.text}, not {' or '.join(right)}"
                    if "escaped" in outcome.text:
                        escapes.append(f"{attack.name}: {outcome.text}")
                    (victim,) = await pool.run(VICTIM, [str(number)], times=2)
                    if victim.text != VICTIM_VALUE.replace("{}", str(number)):
                        victims.append(f"after {attack.name}: {victim.status} {victim.error}{victim.text}")

            async with asyncio.TaskGroup() as group:
                for number, attack in enumerate(attacks):
                    group.create_task(one(number, attack))
            layers, restarts, statuses = pool.layers, pool.restarts, dict(pool.meter.statuses)
        escapes += [f"left behind: {path}" for path in LEFT_BEHIND if path.exists()]
        escapes += [f"left running: process {process}" for process in processes()]
        escapes += [f"connected to {listener}" for listener in listeners if was_called(listener)]
    return {
        "programs": len(attacks),
        "layers": layers,
        "restarts": restarts,
        "statuses": statuses,
        "wrong": wrong,
        "victims": victims,
        "escapes": escapes,
    }


@contextmanager
def listening() -> Iterator[list[socket.socket]]:
    """A TCP and a UDP socket on one port, which nobody should call."""
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(tcp.getsockname())
        tcp.setblocking(False)
        udp.setblocking(False)
        yield [tcp, udp]


def was_called(listener: socket.socket) -> bool:
    try:
        if listener.type == socket.SOCK_STREAM:
            listener.accept()[0].close()
        else:
            listener.recv(1)
    except BlockingIOError:
        return False
    return True


def processes() -> list[int]:
    """Processes of this run's sandbox that are still there."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and LABEL.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
