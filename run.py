"""The main command: `python run.py --help`. It starts the programs of one training run and watches over them."""

import os
import sys


def run() -> int:
    """Returns the exit status. Importing takes a moment in which Ctrl-C should be as quiet as later."""
    try:
        from azr_async.programs.commandline import main

        return main(sys.argv[1:], env=dict(os.environ))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(run())
