"""Size of the diff step for `stagediff plan`: a pass over the decoders of all stages, and one table (docs/results.md, "What the analysis costs")."""

from stagediff.diff.spec import STAGES, DiffSpec
from stagediff.estimate import Estimate
from stagediff.lm.estimate import activation_shape, spec_of
from stagediff.plan import Plan
from stagediff.sae.estimate import features_of

__all__ = ["diff"]


def diff(spec: DiffSpec, plan: Plan) -> Estimate:
    features = features_of(spec.dictionaries["S"], plan)
    _, d, _ = activation_shape(spec_of(spec.statistics["S"], plan).data, plan)
    examples = features * spec_of(spec.statistics["F_D"], plan).top
    seconds = 0.4 + 1.5e-8 * len(STAGES) * features * d + 2e-5 * features + 2e-7 * examples
    return Estimate(bytes=180 * features, seconds=seconds)
