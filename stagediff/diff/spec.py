"""Spec of the diff step."""

from typing import Literal

from stagediff.spec import Ref, Spec, Value

__all__ = ["STAGES", "Cut", "DiffSpec"]

STAGES = ("S", "D", "M", "F_D", "F_M", "F_direct")
"""The dictionaries of a run: F_D is F via D, F_M is F via M, F_direct the direct finetune S -> F with the whole path's budget."""


class Cut(Value):
    """Which features are selected (lower left of the scatter)."""

    kind: Literal["absolute", "quantile"] = "quantile"
    value: float = 0.1
    """absolute: x and y both below it (P1: 0.7). quantile: the lowest share of alive features by x + y."""


class DiffSpec(Spec):
    """Compares the decoders of all stages feature by feature."""

    step = "diff"
    kind = "diffs"
    dictionaries: dict[str, Ref]
    """Stage -> dictionary, all of STAGES."""
    statistics: dict[str, Ref]
    """Stage -> statistics on held-out rows, all of STAGES."""
    cut: Cut = Cut()
    random_sample: int = 500
    seed: int = 0
    alive_firings: int = 10
    """Firings in a stage's statistics rows from which a feature counts as alive there."""
