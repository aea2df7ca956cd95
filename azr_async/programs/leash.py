"""Starts a program of a run on a leash: `python -m azr_async.programs.leash LAUNCHER_PID MODULE ...`.

Programs import for seconds. From before that on the kernel kills this one when its launcher dies, however that happens.
"""

import ctypes
import os
import runpy
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def main() -> int:
    """Become the program; returns only when there is no launcher any more."""
    launcher_pid, module = int(sys.argv[1]), sys.argv[2]
    die_with_parent()
    if os.getppid() != launcher_pid:
        print(f"{module}: the launcher of this run is gone. Start the run again with `python run.py`.", file=sys.stderr)
        return 1
    del sys.argv[:2]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies. One that is dead already tells nothing: ask for it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
