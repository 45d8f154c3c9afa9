"""Sizes of token rows and harvests for `stagediff plan`, and the model shapes they rest on."""

from stagediff.estimate import Estimate
from stagediff.lm.sources import model_config, n_layers, width
from stagediff.lm.spec import ActivationData, HarvestSpec, ModelSource, TokensSpec
from stagediff.plan import Plan
from stagediff.spec import Ref

__all__ = ["activation_shape", "harvest", "layer_flops", "model_dims", "reading_flops", "spec_of", "tokens"]


def tokens(spec: TokensSpec, plan: Plan) -> Estimate:
    n = spec.rows * spec.context
    return Estimate(tokens=n, bytes=4 * n)


def harvest(spec: HarvestSpec, plan: Plan) -> Estimate:
    d, _ = model_dims(spec.model, plan)
    context = spec_of(spec.tokens, plan).context
    if not spec.stored:
        n = min(spec.rows, spec.shard_rows) * context
        return Estimate(tokens=n, flops=n * spec.hook.layer * layer_flops(d))
    n = spec.rows * context
    kept = spec.rows * (context - len(spec.skip_positions))
    return Estimate(tokens=n, bytes=2 * kept * d, flops=n * spec.hook.layer * layer_flops(d))


def reading_flops(data: ActivationData, plan: Plan) -> float:
    """Operations per token that reading takes: the model's, where activations are not stored."""
    spec = spec_of(data.base, plan)
    return spec.hook.layer * layer_flops(model_dims(spec.model, plan)[0]) if spec.is_made_by_readers else 0.0


def activation_shape(data: ActivationData, plan: Plan) -> tuple[int, int, int]:
    """(activations, width, tokens per row) of what a dictionary reads."""
    spec = spec_of(data.base, plan)
    d = spec.width or model_dims(spec.model, plan)[0]
    per_row = spec_of(spec.tokens, plan).context - len(spec.skip_positions)
    return data.rows * per_row, d, per_row


def model_dims(model: ModelSource, plan: Plan) -> tuple[int, int]:
    """(width, layers), from the plan for models that are made in it."""
    if model.artifact is not None:
        spec = spec_of(model.artifact, plan)
        while hasattr(spec, "base"):  # a finetune has its base's shape
            if spec.base.artifact is None:
                return model_dims(spec.base, plan)
            spec = spec_of(spec.base.artifact, plan)
        return spec.architecture.width, spec.architecture.layers
    config = model_config(model)
    assert config is not None
    return width(config), n_layers(config)


def layer_flops(d: int) -> float:
    """Forward operations per token of one transformer block (weights only)."""
    return 24.0 * d * d


def spec_of(ref: Ref, plan: Plan):
    """The spec in this plan that makes `ref`."""
    return next(node.spec for node in plan if node.ref == ref)
