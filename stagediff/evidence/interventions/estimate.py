"""Sizes of the steps steer and ablate for `stagediff plan`: tokens that pass through a whole model. Prompts are counted at half the context."""

from stagediff.estimate import Estimate
from stagediff.evidence.interventions.spec import AblateSpec, Intervention, SteerSpec
from stagediff.lm.estimate import activation_shape, layer_flops, model_dims
from stagediff.plan import Plan
from stagediff.sae.estimate import features_of

__all__ = ["ablate", "steer"]


def steer(spec: SteerSpec, plan: Plan) -> Estimate:
    """Every feature at every strength, with and without the trigger, through the finetuned model and again through the base model."""
    answers = 2 * (spec.candidates + spec.random) * len(spec.strengths) * (spec.dev_prompts + spec.test_prompts)
    return _estimate(spec, plan, tokens=2 * answers * _prompt(spec, plan), encoded=0)


def ablate(spec: AblateSpec, plan: Plan) -> Estimate:
    """Every set on every prompt and on the clean rows, each position encoded."""
    orders = len(spec.orders) + (spec.draws - 1 if "random" in spec.orders else 0)
    sets = 1 + spec.candidates + orders * len(spec.sizes)
    prompt = _prompt(spec, plan)
    tokens = sets * ((spec.dev_prompts + spec.test_prompts) * prompt + 2 * spec.rows * prompt)
    return _estimate(spec, plan, tokens=tokens, encoded=features_of(spec.dictionary, plan))


def _prompt(spec: Intervention, plan: Plan) -> int:
    return max(1, activation_shape(spec.data, plan)[2] // 2)


def _estimate(spec: Intervention, plan: Plan, *, tokens: int, encoded: int) -> Estimate:
    d, layers = model_dims(spec.model, plan)
    return Estimate(tokens=tokens, bytes=2**17, flops=tokens * (layers * layer_flops(d) + 2.0 * d * encoded))
