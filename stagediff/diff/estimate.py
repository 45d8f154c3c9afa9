"""Sizes of the diff, null and align steps for `stagediff plan`: passes over the decoders of all stages, tables, and the candidates' cosines
(docs/results.md, "What the analysis costs").
"""

from stagediff.diff.spec import ALIGNED_STAGES, PATHS, STAGES, AlignSpec, DiffSpec, NullSpec
from stagediff.estimate import Estimate
from stagediff.lm.estimate import activation_shape, spec_of
from stagediff.plan import Plan
from stagediff.sae.estimate import features_of

__all__ = ["align", "diff", "null"]


def diff(spec: DiffSpec, plan: Plan) -> Estimate:
    features = features_of(spec.dictionaries["S"], plan)
    _, d, _ = activation_shape(spec_of(spec.statistics["S"], plan).data, plan)
    examples = features * spec_of(spec.statistics["F_D"], plan).top
    seconds = 0.4 + 1.5e-8 * len(STAGES) * features * d + 2e-5 * features + 2e-7 * examples
    return Estimate(bytes=180 * features, seconds=seconds)


def align(spec: AlignSpec, plan: Plan) -> Estimate:
    """Candidates of three dictionaries against all of D and M, those of the two paths against the other two F, and against each other (some rounds, of fewer
    and fewer)."""
    features = features_of(spec.dictionaries["D"], plan)
    _, d, _ = activation_shape(spec_of(spec.statistics["F_D"], plan).data, plan)
    n = min(features, spec.candidates)
    examples = len(PATHS) * features * spec_of(spec.statistics["F_D"], plan).top
    seconds = 0.4 + 1.5e-8 * len(ALIGNED_STAGES) * features * d + 2e-5 * features + 2e-7 * examples
    return Estimate(bytes=134 * features, flops=2.0 * n * d * (10 * features + 6 * n), seconds=seconds)


def null(spec: NullSpec, plan: Plan) -> Estimate:
    """Two passes over the decoders per repeat and axis, and every candidate against all of D and M."""
    features = features_of(spec.dictionaries["D"], plan)
    _, d, _ = activation_shape(spec_of(spec.statistics["D"], plan).data, plan)
    repeats = 2 * len(spec.nulls["D"])
    n = min(features, spec.candidates)
    seconds = 0.4 + repeats * (4.5e-8 * features * d + 1e-5 * features)
    return Estimate(bytes=60 * features * repeats, flops=4.0 * repeats * n * d * features, seconds=seconds)
