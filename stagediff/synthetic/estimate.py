"""Sizes of the planted steps, as `stagediff plan` shows those of real ones (docs/results.md, "What the analysis costs")."""

from stagediff.estimate import Estimate
from stagediff.lm.estimate import spec_of
from stagediff.plan import Plan
from stagediff.synthetic.diff_spec import PlantedDiffHarvestSpec, PlantedDiffTokensSpec
from stagediff.synthetic.spec import PlantedHarvestSpec, PlantedTokensSpec, PlantedTrackSpec

__all__ = ["harvest", "tokens", "track"]


def tokens(spec: PlantedTokensSpec | PlantedDiffTokensSpec, plan: Plan) -> Estimate:
    n = spec.rows * spec.context
    return Estimate(tokens=n, bytes=8 * n, seconds=0.2 + 2e-6 * n)


def harvest(spec: PlantedHarvestSpec | PlantedDiffHarvestSpec, plan: Plan) -> Estimate:
    n = spec.rows * spec.world.context
    return Estimate(tokens=n, bytes=2 * n * spec.world.d, seconds=0.2 + 5e-6 * n)


def track(spec: PlantedTrackSpec, plan: Plan) -> Estimate:
    """Scoring walks the probe rows of every checkpoint."""
    rows = spec_of(spec.tokens, plan)
    n = rows.rows * rows.context
    checkpoints, features = len(spec.dictionaries), spec.world.features
    return Estimate(tokens=n, bytes=8 * checkpoints * features + 2**16, seconds=1.0 + 5e-6 * n * checkpoints)
