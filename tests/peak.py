"""Peak memory of a piece of code, run in a process of its own."""

import os
import subprocess
import sys

__all__ = ["peak_mib"]

# Not ru_maxrss: a child inherits its parent's, so that in a large test process it hides any growth.
TAIL = """
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(int(line.split()[1]) / 1024)
"""


def peak_mib(code: str, *arguments: str) -> float:
    """The largest resident set (MiB) of a process that runs `code` with these arguments in sys.argv[1:], on one thread. Linux only."""
    # What glibc would keep of freed memory (numerics.reuse_freed_memory leaves a user's setting alone) is no part of what the code needs.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": str(128 << 10)}
    done = subprocess.run([sys.executable, "-c", code + TAIL, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])
