"""`python -m azr_async TOOL`: the tools beside the main command, which is `python run.py`."""

import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Final

TOOLS: Final[Mapping[str, str]] = {
    "evaluate": "accuracy of a model on held-out tasks",
    "execute": "run untrusted programs in the sandbox",
    "faults": "break runs on purpose and check that nothing is lost",
    "judge": "judge answers to tasks",
    "workers": "add inference workers to a run that is going on, or remove some",
    "plan": "predict rate and staleness of other GPU splits from a run",
    "starter": "make the starter model again from nothing",
}
"""Each is a module of `azr_async.programs` with `main(arguments) -> exit status`."""


def main(arguments: Sequence[str]) -> int:
    """Find the tool and hand over the rest of the command line."""
    if not arguments or arguments[0] in ("--help", "-h"):
        print(usage())
        return 0
    tool, *rest = arguments
    if tool not in TOOLS:
        guesses = get_close_matches(tool, TOOLS, n=1)
        advice = f"Did you mean {guesses[0]}?" if guesses else f"There are {', '.join(TOOLS)}."
        print(f"azr_async: {tool} is not a tool. {advice}", file=sys.stderr)
        return 2
    # Only the wanted one: most of them load a lot.
    return int(import_module(f"azr_async.programs.{tool}").main(rest))


def usage() -> str:
    """The list of tools."""
    lines = (f"  {name:<10}{what}" for name, what in TOOLS.items())
    return "\n".join(["usage: python -m azr_async TOOL [--help]", *lines, "Training is `python run.py`."])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
