"""One rank of a step, as `python -m stagediff.ranks` is, and watched like the steps of `observed_steps.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import observed_steps  # noqa: F401  (its import is what watches)

from stagediff.ranks.__main__ import main

if __name__ == "__main__":
    main(Path(sys.argv[1]))
