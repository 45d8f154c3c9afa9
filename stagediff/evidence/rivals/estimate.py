"""Sizes of the rivals for `stagediff plan`."""

from stagediff.estimate import Estimate
from stagediff.evidence.rivals.spec import BaselineSpec, CrosscoderSpec, DifferenceSpec, LatentsSpec, RivalsSpec
from stagediff.lm.estimate import activation_shape, spec_of
from stagediff.plan import Plan
from stagediff.sae.estimate import features_of

__all__ = ["baseline", "latents", "table", "training"]


def training(spec: CrosscoderSpec | DifferenceSpec, plan: Plan) -> Estimate:
    width, features = _width(spec, plan), spec.dictionary.features
    return Estimate(tokens=spec.budget.tokens, bytes=8 * width * features, flops=10.0 * width * features * spec.budget.tokens)


def latents(spec: LatentsSpec, plan: Plan) -> Estimate:
    """Encoded twice (counts and scores), decoded twice; a crosscoder's latent scaling is as much as four products of half the width."""
    n, _, _ = activation_shape(spec.base, plan)
    of = spec_of(spec.dictionary, plan)
    products = 12.0 if isinstance(of, CrosscoderSpec) else 8.0
    features = of.dictionary.features
    return Estimate(tokens=n, bytes=features * (8 * spec.top + 90), flops=products * _width(of, plan) * features * n)


def table(spec: RivalsSpec, plan: Plan) -> Estimate:
    return Estimate(bytes=8192, seconds=0.5)


def baseline(spec: BaselineSpec, plan: Plan) -> Estimate:
    """The region's and the random sample's cosines with every alive latent, in both diffs, and their examples' tokens."""
    diff = spec_of(spec.diff, plan)
    features = features_of(diff.dictionaries["S"], plan)
    _, d, _ = activation_shape(spec_of(diff.statistics["F_D"], plan).data, plan)
    named = diff.random_sample + features // 100
    return Estimate(bytes=4096, flops=4.0 * named * features * d, seconds=0.5 + 2e-5 * features)


def _width(spec: CrosscoderSpec | DifferenceSpec, plan: Plan) -> int:
    _, d, _ = activation_shape(spec.base, plan)
    return 2 * d if isinstance(spec, CrosscoderSpec) else d
