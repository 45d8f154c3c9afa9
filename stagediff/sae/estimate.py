"""Sizes of trainings, statistics and quality measurements for `stagediff plan`."""

from stagediff.estimate import Estimate
from stagediff.lm.estimate import activation_shape, layer_flops, model_dims, spec_of
from stagediff.plan import Plan
from stagediff.sae.spec import FinetuneSpec, QualitySpec, StatisticsSpec, TrainSpec
from stagediff.spec import Ref

__all__ = ["features_of", "quality", "statistics", "training"]


def training(spec: TrainSpec | FinetuneSpec, plan: Plan) -> Estimate:
    _, d, _ = activation_shape(spec.data, plan)
    features = features_of(spec.ref, plan)
    stored = 24 if spec.keep_optimiser else 8  # fp32 encoder and decoder, and two moments of each
    return Estimate(tokens=spec.budget.tokens, bytes=stored * d * features, flops=10.0 * d * features * spec.budget.tokens)


def statistics(spec: StatisticsSpec, plan: Plan) -> Estimate:
    n, d, _ = activation_shape(spec.data, plan)
    features = features_of(spec.dictionary, plan)
    return Estimate(tokens=n, bytes=features * (8 * spec.top + 60), flops=4.0 * d * features * n)


def quality(spec: QualitySpec, plan: Plan) -> Estimate:
    _, _, per_row = activation_shape(spec.data, plan)
    d, layers = model_dims(spec.model, plan)
    read = spec.rows * per_row
    return Estimate(tokens=read, bytes=2**14, flops=3.0 * read * layers * layer_flops(d))


def features_of(ref: Ref, plan: Plan) -> int:
    """Width of the dictionary that `ref` names; 0 for an imported one, whose width the plan does not know."""
    spec = spec_of(ref, plan)
    while hasattr(spec, "start"):
        spec = spec_of(spec.start, plan)
    return spec.dictionary.features if hasattr(spec, "dictionary") else 0
