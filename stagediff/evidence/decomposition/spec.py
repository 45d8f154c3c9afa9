"""Spec of the decomposition step, and its settings."""

from pydantic import Field

from stagediff.spec import Ref, Spec, Value

__all__ = ["DecompositionConfig", "DecompositionSpec"]


class DecompositionConfig(Value):
    """`decomposition: {}` in a stage-wise config adds the step."""

    draws: int = Field(1000, ge=100)
    """Bootstrap draws behind each interval."""


class DecompositionSpec(Spec):
    """How far the groups of the run's cut can be told apart along one path alone. Reads the diff's own table."""

    step = "decomposition"
    kind = "evidence"
    reads_bulk = False
    diff: Ref
    draws: int = Field(1000, ge=100)
    seed: int = 0
