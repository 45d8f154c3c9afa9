"""stagediff: which features of a language model a finetune or a stretch of training changed, with proof.

The library knows nothing of Prefect; `tasks/` and `flows/` build the pipeline on top of it. Start at `stagediff.spec`
(what determines a result), `stagediff.steps` (how a step runs) and `stagediff.store` (where results live).
"""

__version__ = "0.1.0"
