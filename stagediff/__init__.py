"""stagediff: which features of a language model a finetune or a stretch of training changed, with proof.

The library knows nothing of Prefect; `tasks/` and `flows/` build the pipeline on top of it. Start at `stagediff.spec`
(what determines a result), `stagediff.steps` (how a step runs) and `stagediff.store` (where results live).
"""

import os

# Before torch is imported. Threads that spin while they wait make two processes on two cores ten times slower than one; sleeping ones do not.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
