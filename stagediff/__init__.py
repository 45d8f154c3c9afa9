"""stagediff: which features of a language model a finetune or a stretch of training changed, with proof.

The library knows nothing of Prefect; `tasks/` and `flows/` build the pipeline on top of it. Start at `stagediff.spec`
(what determines a result), `stagediff.steps` (how a step runs) and `stagediff.store` (where results live).
"""

import os

# Before torch is imported. Threads that spin for long while they wait make two processes on two cores many times slower than one. A thousand
# turns bridge the gaps between a small step's operations and halve its time (batch 128); beside a second process it then takes 1.6 times as long.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
