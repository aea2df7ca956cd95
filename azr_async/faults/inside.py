"""Runs inside of a program that is to be broken, as its `sitecustomize`: gives it a view of the wires of its own, and
a wall clock that can jump. Knows the standard library only; lies, copied, in the `site` folder beside what it reads.

<folder>/site/sitecustomize.py   this file
<folder>/wires/<program>/        where the program finds its wires, if that folder is there
<folder>/<program>.clock         seconds by which the program's wall clock jumps, once the file is there
"""

import os
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

VIEW_DESCRIPTOR = 900
"""Every program finds its own folder behind it, so that an address means another socket in each of them."""
REAL = "real"
"""In a program's folder of wires: the one that the launcher has made."""
FROM_THE_LAUNCHER = ("launcher.pid",)
LOOK_SECONDS = 0.02


def program_of(command: list[str]) -> str:
    """`inference-1`, `selfplay`, `learner-0`; empty for what is no program of a run."""
    modules = [word for word in command if word.startswith("azr_async.programs.")]  # the leash comes first
    module = modules[-1].rpartition(".")[2] if modules else ""
    if module not in ("inference", "selfplay", "learner"):
        return ""
    numbers = [value for option, value in pairwise(command) if option in ("--index", "--rank")]
    return "-".join([module, *numbers])


def take_view(view: Path, program: str, arguments: list[str]) -> None:
    """Have the program find its wires in `view`, and the launcher find there what the program leaves for it."""
    position = arguments.index("--wires") + 1
    real = Path(arguments[position])
    # The last words of a program that was started before lie behind the same links.
    links = {REAL: real, f"{program}.failed": real / f"{program}.failed"}
    links |= {name: real / name for name in FROM_THE_LAUNCHER}
    for name, target in links.items():
        with suppress(FileExistsError):
            (view / name).symlink_to(target)
    descriptor = os.open(view, os.O_RDONLY | os.O_DIRECTORY)
    os.dup2(descriptor, VIEW_DESCRIPTOR, inheritable=False)
    os.close(descriptor)
    arguments[position] = f"/proc/self/fd/{VIEW_DESCRIPTOR}"


def let_clock_jump(trigger: Path) -> None:
    """From the moment on when `trigger` is there, `time.time` and `time.time_ns` are off by what it says."""
    now, now_ns, monotonic = time.time, time.time_ns, time.monotonic
    state = {"seconds": 0.0, "looked": 0.0}

    def shift() -> float:
        if not state["seconds"] and monotonic() - state["looked"] > LOOK_SECONDS:
            state["looked"] = monotonic()
            with suppress(OSError, ValueError):
                state["seconds"] = float(trigger.read_text(encoding="ascii"))
        return state["seconds"]

    def shifted_time() -> float:
        return now() + shift()

    def shifted_time_ns() -> int:
        return now_ns() + int(1e9 * shift())

    time.time, time.time_ns = shifted_time, shifted_time_ns


def prepare(folder: Path) -> None:
    """Do to this process what its folder says."""
    program = program_of(sys.orig_argv)
    if not program:
        return
    let_clock_jump(folder / f"{program}.clock")
    view = folder / "wires" / program
    if view.is_dir():
        take_view(view, program, sys.argv)


if __name__ == "sitecustomize":
    prepare(Path(__file__).parents[1])
