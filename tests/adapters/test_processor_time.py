"""CPU time of children, while they live and after they were waited for."""

import subprocess
import sys

from azr_async.adapters.processor_time import children_seconds

BUSY = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ninput()"


def test_the_cpu_time_of_a_child_counts_while_it_lives_and_after() -> None:
    before = children_seconds()
    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"done\n"
        alive = children_seconds()
        child.communicate(b"\n")
    assert alive - before >= 0.25
    assert children_seconds() >= alive - 0.02  # the kernel counts in hundredths of a second
