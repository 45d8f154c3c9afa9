"""Computes the steps crosscoder and difference-sae with the project's own trainer: fp32 master weights, the stages' order of rows, and resumable at
training checkpoints with the same bytes.
"""

import time
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from stagediff.errors import UserError
from stagediff.evidence.rivals.crosscoder import for_raw_units, gradient, measure_apart, start, tie
from stagediff.evidence.rivals.readers import Differences, SideBySide
from stagediff.evidence.rivals.spec import CrosscoderSpec, DifferenceSpec
from stagediff.sae.batches import Order, batches, shard_sizes
from stagediff.sae.dictionary import SAE
from stagediff.sae.gradients import Gradient
from stagediff.sae.initial import fresh, measure
from stagediff.sae.layout import CFG, WEIGHTS, to_bytes
from stagediff.sae.trainer import Trainer
from stagediff.steps import Job

__all__ = ["CURVE", "CURVE_COLUMNS", "SCALES", "compute", "compute_difference"]

CURVE = "curve.parquet"
CURVE_ROWS = 200
CURVE_COLUMNS = {
    "step": ("steps", "steps done"),
    "tokens": ("tokens", "tokens read"),
    "loss": ("scaled units", "what is minimised (a focus aside), mean per token of this step's batch"),
    "error": ("scaled units squared", "squared error per token of this step's batch"),
    "sparsity": ("scaled units", "the sparsity term without its weight (relu), 0 (batchtopk)"),
    "l0": ("latents", "active latents per token of this step's batch"),
    "dead": ("1", "share of latents without a firing in the last dead_after tokens, or since the start where that is less"),
}
SCALES = "scales.json"
"""crosscoder: what each model's activations are multiplied with."""


def compute(spec: CrosscoderSpec, job: Job) -> dict[str, Any]:
    """The crosscoder, as a dictionary over both models' raw activations side by side (SAELens' layout), scales.json and curve.parquet.

    Raises UserError for an architecture that no crosscoder has, for a budget under one batch, and where rows do not pair or the loss is not finite.
    """
    architecture = spec.dictionary.architecture
    if architecture not in ("relu", "batchtopk"):
        raise UserError(f"A crosscoder is relu or batchtopk; dictionary.architecture is {architecture}. Choose one of the two.")
    data = SideBySide(job.store, spec.base, spec.finetuned, job.device)
    scale, mean = measure_apart(data)
    shared = round(spec.shared * spec.dictionary.features) if architecture == "relu" else 0
    sae = start(spec.dictionary, scale, mean, spec.seed).to(job.device)
    on_device = scale.to(job.device)
    own = partial(gradient, shared=shared, shared_weight=spec.shared_l1) if architecture == "relu" else None
    trainer = Trainer(sae, spec.budget, _steps(spec), True, _dtype(spec.compute), gradient=own)

    def step(x: Tensor) -> Gradient:
        outcome = trainer.train_on(x.float() * on_device)
        tie(trainer.parameters["W_dec"], shared)
        return outcome

    curve = _train(spec, job, trainer, data, step)
    made = trainer.dictionary().to("cpu")
    d = data.d // 2
    _write(made, for_raw_units(made, scale), spec, data.base, job, curve)
    job.writer.write_json(SCALES, {"base": float(scale[0]), "finetuned": float(scale[d])})
    norms = made.W_dec.view(-1, 2, d).norm(dim=2)
    relative = norms[:, 1] / norms.sum(1).clamp_min(1e-12)
    return {
        **_figures(trainer, curve),
        "shared": shared,
        "scale_base": float(scale[0]),
        "scale_finetuned": float(scale[d]),
        "relative_norm_min": float(relative.min()),
        "relative_norm_max": float(relative.max()),
    }


def compute_difference(spec: DifferenceSpec, job: Job) -> dict[str, Any]:
    """A dictionary of the differences, in SAELens' layout and raw units; curve.parquet. Raises as `compute`, and where both models are the same."""
    data = Differences(job.store, spec.base, spec.finetuned, job.device)
    try:
        scale, mean = measure(data)
    except UserError:
        raise UserError(
            f"The activations {spec.base.base} and {spec.finetuned.base} do not differ anywhere (or are not finite), so there is no difference to learn a "
            "dictionary of. Two different models were expected."
        ) from None
    trainer = Trainer(fresh(spec.dictionary, scale, mean, spec.seed).to(job.device), spec.budget, _steps(spec), True, _dtype(spec.compute))
    curve = _train(spec, job, trainer, data, trainer.train_on)
    made = trainer.dictionary().to("cpu")
    _write(made, made, spec, data.base, job, curve)
    return {**_figures(trainer, curve), "input_scale": scale}


def _steps(spec: CrosscoderSpec | DifferenceSpec) -> int:
    budget = spec.budget
    if budget.tokens < budget.batch:
        raise UserError(
            f"A rival's training budget is {budget.tokens:,} tokens, less than one batch of {budget.batch:,}. Raise rivals.tokens, or lower train.batch."
        )
    return budget.tokens // budget.batch


def _train(spec: CrosscoderSpec | DifferenceSpec, job: Job, trainer: Trainer, data: Any, train_on: Any) -> list[list[float]]:
    """Runs the steps that are left of a training; returns the curve."""
    curve: list[list[float]] = []
    if saved := job.writer.training.latest():
        step, tensors, _ = saved
        curve = tensors.pop("curve").tolist()
        trainer.restore(step, tensors)
    budget, steps, first = spec.budget, trainer.steps, trainer.step
    keep = max(1, spec.checkpoint_tokens // budget.batch)
    order = Order(spec.order_seed, shard_sizes(data))
    began = time.perf_counter()
    with job.progress.task(spec.step, steps * budget.batch, "tokens", done=first * budget.batch) as task:
        for x in batches(data, order, budget.batch, first, steps, job.device):
            outcome = train_on(x)
            step = trainer.step
            if step % max(1, steps // CURVE_ROWS) == 0 or step in (1, steps):
                curve.append(_row(trainer, outcome))
                task.note = f"loss {curve[-1][2]:.3g}"
            task.advance(len(x))
            if step % keep == 0 and step < steps:
                _require_finite(float(outcome.loss), step)
                rows = torch.tensor(curve, dtype=torch.float64).reshape(-1, len(CURVE_COLUMNS))
                job.writer.training.save(step, {**trainer.state(), "curve": rows}, {})
            del outcome  # its gradients, or they would lie beside the next step's
    seconds, done = time.perf_counter() - began, (steps - first) * budget.batch
    job.notes.update(tokens_this_run=done, training_seconds=round(seconds, 3), tokens_per_second=round(done / seconds) if done else 0)
    return curve


def _row(trainer: Trainer, outcome: Gradient) -> list[float]:
    values = torch.stack([v.double() for v in (outcome.loss, outcome.error, outcome.sparsity, outcome.l0, trainer.silent_share())]).tolist()
    _require_finite(values[0], trainer.step)
    return [trainer.step, trainer.step * trainer.budget.batch, *values]


def _require_finite(loss: float, step: int) -> None:
    if not abs(loss) < float("inf"):
        raise UserError(f"The training loss became {loss} by step {step}. A finite loss was expected: lower train.lr, or compute in fp32.")


def _write(made: SAE, raw: SAE, spec: CrosscoderSpec | DifferenceSpec, reader: Any, job: Job, curve: list[list[float]]) -> None:
    of = "base and finetuned side by side" if isinstance(spec, CrosscoderSpec) else "finetuned minus base"
    hook = f"blocks.{reader.hook.layer}.hook_{reader.hook.site}"
    cfg, weights = to_bytes(raw, {"hook_name": hook, "context_size": reader.context, "activations": of})
    frame = pd.DataFrame(curve, columns=list(CURVE_COLUMNS)).astype({"step": "int64", "tokens": "int64"})
    job.writer.write_table(CURVE, frame, columns=CURVE_COLUMNS)
    job.writer.write_bytes(WEIGHTS, weights)
    job.writer.write_bytes(CFG, cfg)


def _figures(trainer: Trainer, curve: list[list[float]]) -> dict[str, Any]:
    last = dict(zip(CURVE_COLUMNS, curve[-1], strict=True))
    return {"tokens": trainer.steps * trainer.budget.batch, **{name: last[name] for name in ("loss", "l0", "dead")}}


def _dtype(compute: str) -> torch.dtype:
    return torch.bfloat16 if compute == "bf16" else torch.float32
