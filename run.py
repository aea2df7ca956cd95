"""The main command: `python run.py --help`. It starts the programs of one training run and watches over them."""

import os
import sys

from azr_async.programs.commandline import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], env=dict(os.environ)))
