"""First code of a sandboxed process: `python -c BOOTSTRAP ROOT ROLE OPTIONS LABEL`, with an empty environment."""

import json
import os
import sys
from functools import partial

from azr_async.adapters.sandbox.inside import layers
from azr_async.adapters.sandbox.inside.wire import write_frame


def main() -> None:
    """Take the descriptors, tie this process to its parent, become what the command line says."""
    root, role = sys.argv[1:3]
    options: layers.Options = json.loads(sys.argv[3])
    _take_descriptors(options["fds"])
    try:
        layers.die_with(options["parent"])
        # Only now: a role imports what it needs, and no more.
        if role == "zygote":
            from azr_async.adapters.sandbox.inside.zygote import prepare
        else:
            from azr_async.adapters.sandbox.inside.parser import prepare
        sys.path.remove(root)
        message, serve = prepare(options)
    except layers.CannotFork as error:
        message, serve = {"no_fork": str(error.strerror)}, partial(os._exit, 1)
    except Exception as error:
        message, serve = {"failed": f"{type(error).__name__}: {error}"}, partial(os._exit, 1)
    # From here on the pool takes frames for answers: whatever fails now only ends this process.
    write_frame(layers.RESULT_FD, json.dumps(message).encode())
    serve()


def _take_descriptors(fds: list[int]) -> None:
    """Make the inherited `fds` descriptors 3, 4, ...; 0 to 2 become /dev/null; close every other one."""
    parking = max(3 + len(fds), *fds) + 1
    for number, fd in enumerate(fds):
        os.dup2(fd, parking + number)
    for number in range(len(fds)):
        os.dup2(parking + number, 3 + number)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(3 + len(fds), os.sysconf("SC_OPEN_MAX"))
