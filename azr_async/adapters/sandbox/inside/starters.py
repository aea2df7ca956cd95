"""Which functions start processes and threads: they say so before they ask the kernel, which ends the program for it.

So the verdict can name the limit. That is a label and no layer: whoever goes another way is ended for a forbidden call.
"""

import sys
from collections.abc import Callable
from typing import Any, Final

from azr_async.adapters.sandbox.inside.layers import RESULT_FD
from azr_async.adapters.sandbox.inside.wire import NOTE, write_frame

_STARTERS: Final = {
    "_thread": "start_new_thread start_new",
    "threading": "_start_new_thread",
    "posix": "fork forkpty posix_spawn posix_spawnp system",
    "os": "fork forkpty posix_spawn posix_spawnp system",
    "_posixsubprocess": "fork_exec",
    "subprocess": "_fork_exec",
}


def note_starters() -> None:
    """Replace them in all modules that are loaded, for this process and its forks; `layers.real_fork` stays."""
    notes: list[bytes] = [NOTE]
    for name, functions in _STARTERS.items():
        module = sys.modules.get(name)
        for function in functions.split():
            if hasattr(module, function):
                setattr(module, function, _noted(getattr(module, function), notes))


def _noted(start: Callable[..., Any], notes: list[bytes]) -> Callable[..., Any]:
    def noted(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        if notes:  # once for each process: a flood of them would be no clearer
            write_frame(RESULT_FD, notes.pop())
        return start(*arguments, **named)

    return noted
