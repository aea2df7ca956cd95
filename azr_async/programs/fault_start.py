"""`python -m azr_async.programs.fault_start FOLDER OPTIONS`: the main command, whose programs do what FOLDER says."""

import os
import sys
from pathlib import Path

from azr_async.programs.commandline import main

if __name__ == "__main__":
    folder, *options = sys.argv[1:]
    env = dict(os.environ)
    paths = [str(Path(folder) / "site"), env.get("PYTHONPATH", "")]
    sys.exit(main(options, env=env | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}))
