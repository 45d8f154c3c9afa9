"""Spec of the verdict step, and its settings."""

from pydantic import Field

from stagediff.spec import Ref, Spec, Value

__all__ = ["VerdictConfig", "VerdictSpec"]


class VerdictConfig(Value):
    """`verdict: {}` in a stage-wise config adds the step. It joins what the run's other settings measure, and measures nothing itself."""

    level: float = Field(0.1, gt=0, lt=1)
    """False discovery rate up to which a feature counts as moved against the retrain null."""
    chance: float = Field(0.05, gt=0, lt=1)
    """How often a random feature may do as well where a claim is made against random features."""


class VerdictSpec(Spec):
    """Joins what was measured of the features that a diff selects, and says of each what is shown against its null or its random features."""

    step = "verdict"
    kind = "evidence"
    reads_bulk = False
    diff: Ref
    statistics: dict[str, Ref]
    """Stage -> statistics on held-out rows: the diff's."""
    align: Ref | None = None
    null: Ref | None = None
    labels: Ref | None = None
    steer: Ref | None = None
    ablate: Ref | None = None
    """Each of these: None where the run has no such step."""
    level: float = Field(0.1, gt=0, lt=1)
    chance: float = Field(0.05, gt=0, lt=1)
