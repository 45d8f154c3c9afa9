"""Computes the train and finetune steps: data in, dictionary and training curve out, continued from the newest training checkpoint.

Recipe: Anthropic's April 2024 update (method.md, section 1) for relu; the others as their papers. A finetune starts from a copy of another
dictionary, with its indices, input scale and sparsity weight, and a fresh optimiser; where its spec asks for it, with a scale measured anew,
carried over from another checkpoint, with the other's optimiser state, or with new weights for dead features. A killed run that is continued
gives the same bytes as an undisturbed one: everything a step depends on is in the checkpoint or is a function of spec, store and step number.
"""

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor

from stagediff.errors import UserError
from stagediff.lm.activations import ActivationReader
from stagediff.numerics import has_bf16_products
from stagediff.sae.batches import Activations, Order, batches, shard_sizes
from stagediff.sae.dictionary import SAE
from stagediff.sae.gradients import Gradient
from stagediff.sae.initial import MEASURED_TOKENS, fresh, measure
from stagediff.sae.layout import CFG, OPTIMISER, WEIGHTS, optimiser_state, to_bytes
from stagediff.sae.metrics import evaluate, explained_variance
from stagediff.sae.revive import REVIVED, REVIVED_COLUMNS, resample
from stagediff.sae.sharded import team_of
from stagediff.sae.spec import FinetuneSpec, TrainSpec
from stagediff.sae.trainer import Trainer
from stagediff.sae.transport import fit, moments, transport
from stagediff.steps import Job
from stagediff.store import Store

__all__ = ["CURVE", "CURVE_COLUMNS", "CURVE_ROWS", "EVALUATED_TOKENS", "assist", "compute"]

CURVE = "curve.parquet"
CURVE_ROWS = 200
"""Rows of the curve, at most about; spaced evenly in steps."""
CURVE_COLUMNS = {
    "step": ("steps", "steps done"),
    "tokens": ("tokens", "tokens read"),
    "loss": ("scaled units", "what is minimised (a focus aside), mean per token of this step's batch"),
    "mse": ("raw units squared", "||x - x_hat||^2, summed over d, mean per token of this step's batch"),
    "l1": ("scaled units", "sum_i f_i ||W_dec_i|| per token (relu), L0 (jumprelu), 0 (topk, batchtopk), without its weight"),
    "explained_variance": ("1", "of this step's batch, relative to the batch's mean"),
    "l0": ("features", "active features per token of this step's batch"),
    "dead": ("1", "share of features without a firing in the last dead_after tokens, or since the start where that is less"),
}
EVALUATED_TOKENS = 1 << 17
"""Training tokens on which the finished dictionary's figures are taken."""
EVALUATED_VALUES = 1 << 22
"""Activations held at once while they are (or FEWEST_TOKENS' ones): small enough on a CPU that their memory is used again."""
FEWEST_TOKENS = 1024


@dataclass
class _Record:
    """What a training leaves besides weights; it lies in every training checkpoint."""

    curve: list[list[float]]
    """Rows of CURVE_COLUMNS."""
    revived: list[list[float]]
    """Rows of REVIVED_COLUMNS (whole numbers below 2^53 are exact)."""
    figures: dict[str, Any]
    """Of the transport at its beginning."""

    def tensors(self) -> dict[str, Tensor]:
        pairs = (("curve", self.curve, CURVE_COLUMNS), ("revived", self.revived, REVIVED_COLUMNS))
        return {name: torch.tensor(rows, dtype=torch.float64).reshape(-1, len(columns)) for name, rows, columns in pairs}


def compute(spec: TrainSpec | FinetuneSpec, job: Job) -> dict[str, Any]:
    """Fills a `dictionaries` artifact: cfg.json, sae_weights.safetensors, curve.parquet; where asked for, optimiser.safetensors, revived.parquet.

    Figures: tokens, loss (last row of the curve; an anchor's penalty is no part of it), input_scale, revived (dead features resampled; one
    that died twice is counted twice), where the start was transported the shares of variance that its maps explain (transport_forward,
    transport_backward), ev, l0, dead (share that never fired), over the first EVALUATED_TOKENS tokens of the training order, and
    decoder_norm_mean / _min / _max in scaled units. Raises UserError when the budget is under one batch, when start and data do not fit, when
    the start lacks what the spec takes from it, when the paired activations are not of the same rows, and when data or loss are not finite.
    """
    data = ActivationReader(job.store, spec.data, job.device)
    budget = spec.budget
    steps = _steps(spec)
    order = Order(spec.order_seed, shard_sizes(data))
    trainer, record = _begin(spec, job, data)
    trainer.team.agree(trainer)
    _train(spec, job, trainer, data, order, record)
    kept = trainer.team.whole(trainer.optimiser_state()) if spec.keep_optimiser else {}
    sae = trainer.team.dictionary(trainer)
    assert sae is not None, "the first rank gets it"
    del trainer  # its moments and copies, or a dictionary split over ranks would find no room at the first one
    gc.collect()  # what was imported on the way may hold it in a cycle
    sae = sae.to(job.device)
    figures = _figures(sae, data, order, spec, job.device)
    cfg, weights = to_bytes(sae, {"hook_name": f"blocks.{data.hook.layer}.hook_{data.hook.site}", "context_size": data.context})
    job.writer.write_table(CURVE, _curve(record.curve), columns=CURVE_COLUMNS)
    if isinstance(spec, FinetuneSpec) and spec.revive == "resample":
        job.writer.write_table(REVIVED, _revived(record.revived), columns=REVIVED_COLUMNS)
    if spec.keep_optimiser:
        file = job.writer.scratch() / OPTIMISER
        save_file({name: value.contiguous() for name, value in kept.items()}, file)
        job.writer.write_file(OPTIMISER, file)
    job.writer.write_bytes(WEIGHTS, weights)
    job.writer.write_bytes(CFG, cfg)
    begun = {"input_scale": sae.input_scale, "revived": len(record.revived), **record.figures}
    return {"tokens": steps * budget.batch, "loss": record.curve[-1][2], **begun, **figures}


def assist(spec: TrainSpec | FinetuneSpec, store: Store, device: str) -> None:
    """What every rank but the first does of `compute`: its slice of every batch, or its features, from where the first stands. Writes nothing."""
    data = ActivationReader(store, spec.data, device)
    order = Order(spec.order_seed, shard_sizes(data))
    trainer = _trainer(spec, _start(spec, store, data), device)
    trainer.team.agree(trainer)
    revivals = _revivals(spec, trainer.steps)
    for x in batches(data, order, spec.budget.batch, trainer.step, trainer.steps, device):
        if trainer.step in revivals:  # the first one resamples
            trainer.team.agree(trainer)
        outcome = trainer.train_on(x)
        if _is_row(trainer):
            _row(trainer, x, outcome)
        if trainer.team.splits_features and _is_checkpoint(spec, trainer):
            _require_finite(float(outcome.loss), trainer)
            trainer.team.whole(trainer.state())
        del outcome  # as in _train
    if trainer.team.splits_features:
        if spec.keep_optimiser:
            trainer.team.whole(trainer.optimiser_state())
        trainer.team.dictionary(trainer)


def _steps(spec: TrainSpec | FinetuneSpec) -> int:
    budget = spec.budget
    if budget.tokens < budget.batch:
        raise UserError(
            f"The training budget is {budget.tokens:,} tokens, less than one batch of {budget.batch:,}. Give more tokens, or a smaller batch."
        )
    return budget.tokens // budget.batch


def _trainer(spec: TrainSpec | FinetuneSpec, sae: SAE, device: str) -> Trainer:
    """A training from `sae` on, at step 0."""
    team = team_of(spec, sae.architecture, sae.features)
    sae = team.own(sae).to(device)
    anchor = spec.anchor if isinstance(spec, FinetuneSpec) else 0.0
    dtype = _dtype(spec.compute, sae.W_dec.device)
    return Trainer(sae, spec.budget, _steps(spec), isinstance(spec, TrainSpec), dtype, anchor, team)


def _begin(spec: TrainSpec | FinetuneSpec, job: Job, data: Activations) -> tuple[Trainer, _Record]:
    """The training where it was left, or at step 0."""
    saved = job.writer.training.latest()
    sae = _start(spec, job.store, data)
    if saved is not None:
        step, tensors, meta = saved
        record = _Record(tensors.pop("curve").tolist(), tensors.pop("revived", torch.zeros(0)).tolist(), meta)
        trainer = _trainer(spec, sae, job.device)
        trainer.team.resume(trainer, step, tensors)
        return trainer, record
    record = _Record([], [], {})
    if isinstance(spec, TrainSpec):
        return _trainer(spec, sae, job.device), record
    carried = optimiser_state(job.artifact(spec.start)) if spec.optimiser == "carried" else None
    if spec.paired is not None:
        sae, record.figures = _transported(spec, job, data, sae.to(job.device))
    trainer = _trainer(spec, sae, job.device)
    if carried is not None:
        trainer.carry(carried)
    return trainer, record


def _start(spec: TrainSpec | FinetuneSpec, store: Store, data: Activations) -> SAE:
    """The dictionary that is trained, or trained on."""
    if isinstance(spec, TrainSpec):
        scale, mean = measure(data)
        return fresh(spec.dictionary, scale, mean, spec.seed)
    sae = SAE.load(store.artifact(spec.start).require())
    if sae.d != data.d:
        raise UserError(
            f"The dictionary {spec.start} reads vectors of width {sae.d}, the activations {spec.data.base} have width {data.d}. "
            "Start from a dictionary of this hook point, or train one from scratch."
        )
    if not spec.rescale:
        return sae
    if sae.input_scale == 1.0:  # taken in from elsewhere: no scale was ever measured
        raise UserError(
            f"The input scale is to be measured anew (rescale), but the start dictionary {spec.start} has none: it was made elsewhere, for "
            "activations as they are, so its weights have no units that could follow. Leave rescale out, or train a dictionary here."
        )
    return replace(sae, input_scale=measure(data)[0])


def _transported(spec: FinetuneSpec, job: Job, data: Activations, sae: SAE) -> tuple[SAE, dict[str, Any]]:
    """The start, which still has the scale it ends up with, in the coordinates of this data; and what the maps explain."""
    assert spec.paired is not None
    before, scale = ActivationReader(job.store, spec.paired, job.device), SAE.load(job.artifact(spec.start)).input_scale
    assert isinstance(data, ActivationReader)
    if not before.is_paired_with(data):
        raise UserError(
            f"The activations {spec.paired.base} of the start's own checkpoint and {spec.data.base} are not of the same token rows and "
            "positions, so no map between the two checkpoints can be fitted. Harvest both on the same rows."
        )
    tokens = min(MEASURED_TOKENS, data.n_tokens)
    with job.progress.task("transport", tokens, "tokens") as task:

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            left = tokens
            for i in range(data.n_shards):
                x = data.read_shard(i)[:left].to(job.device)
                yield before.read_shard(i)[:left].to(job.device), x
                task.advance(len(x))
                left -= len(x)
                if not left:
                    return

        maps = fit(moments(pairs(), scale, sae.input_scale))
    figures = {"transport_forward": maps.explained_forward, "transport_backward": maps.explained_backward}
    return transport(sae, maps, sae.input_scale), figures


def _revive(spec: FinetuneSpec, job: Job, data: Activations, order: Order, trainer: Trainer, record: _Record) -> None:
    """Resamples the features that are dead now."""
    sae = trainer.dictionary()
    tokens = min(spec.revive_tokens, data.n_tokens)
    size = _at_once(tokens, sae.features)
    with job.progress.task("revive", 2 * tokens, "tokens") as task:  # read twice

        def read() -> Iterator[Tensor]:
            left = tokens
            for x in batches(data, order, size, 0, -(-tokens // size), job.device):
                yield x[:left]
                task.advance(min(left, size))
                left -= size

        sae, table = resample(sae, read, spec.seed, trainer.step)
    record.revived += table[list(REVIVED_COLUMNS)].to_numpy(dtype="float64").tolist()
    trainer.renew(sae, torch.from_numpy(table.feature.to_numpy(copy=True)))


def _revivals(spec: TrainSpec | FinetuneSpec, steps: int) -> set[int]:
    """Before which steps dead features are resampled."""
    return {int(share * steps) for share in spec.revive_at} if isinstance(spec, FinetuneSpec) and spec.revive == "resample" else set()


def _train(spec: TrainSpec | FinetuneSpec, job: Job, trainer: Trainer, data: Activations, order: Order, record: _Record) -> None:
    """Runs the steps that are left; adds to the record."""
    budget, steps, rows = spec.budget, trainer.steps, record.curve
    revivals = _revivals(spec, steps)
    first, begin = trainer.step, time.perf_counter()
    stream = batches(data, order, budget.batch, first, steps, job.device)
    with job.progress.task(spec.step, steps * budget.batch, "tokens", done=first * budget.batch) as task:
        for x in stream:
            if trainer.step in revivals:
                assert isinstance(spec, FinetuneSpec)
                _revive(spec, job, data, order, trainer, record)
                trainer.team.agree(trainer)
            outcome = trainer.train_on(x)
            step = trainer.step
            if _is_row(trainer):
                rows.append(_row(trainer, x, outcome))
                task.note = f"loss {rows[-1][2]:.3g} ev {rows[-1][5]:.3f}"
            task.advance(len(x))
            if _is_checkpoint(spec, trainer):
                _require_finite(float(outcome.loss), trainer)
                job.writer.training.save(step, {**trainer.team.whole(trainer.state()), **record.tensors()}, record.figures)
            del outcome  # its gradients, or they would lie beside the next step's
    seconds = time.perf_counter() - begin
    done = (steps - first) * budget.batch
    if trainer.kernels:
        job.notes.update(kernels=trainer.kernels)
    job.notes.update(tokens_this_run=done, training_seconds=round(seconds, 3), tokens_per_second=round(done / seconds) if done else 0)


def _is_checkpoint(spec: TrainSpec | FinetuneSpec, trainer: Trainer) -> bool:
    """Whether the state after the step just done is kept."""
    return trainer.step % max(1, spec.checkpoint_tokens // spec.budget.batch) == 0 and trainer.step < trainer.steps


def _is_row(trainer: Trainer) -> bool:
    """Whether the step just done has a row in the curve."""
    return trainer.step % max(1, trainer.steps // CURVE_ROWS) == 0 or trainer.step in (1, trainer.steps)


def _row(trainer: Trainer, x: Tensor, outcome: Gradient) -> list[float]:
    """A row of the curve. Waits for the device, and for the other ranks: each of them makes it."""
    x = x.float()
    scale = trainer.input_scale
    variance = (x - x.mean(0)).square().sum() / len(x)
    l0 = trainer.team.l0(outcome)
    values = torch.stack([v.double() for v in (outcome.loss, outcome.error, outcome.sparsity, variance, l0, trainer.silent_share())])
    loss, error, sparsity, total, active, dead = values.tolist()
    _require_finite(loss, trainer)
    mse = error / scale**2
    return [trainer.step, trainer.step * trainer.budget.batch, loss, mse, sparsity, explained_variance(mse, total), active, dead]


def _require_finite(loss: float, trainer: Trainer) -> None:
    advice = "lower the learning rate (budget.lr), keep the gradient clip on (budget.clip), or compute in fp32."
    if not abs(loss) < float("inf"):
        raise UserError(
            f"The training loss became {loss} by step {trainer.step}, although the activations are finite. A finite loss was expected: {advice}"
        )
    if not trainer.is_finite():
        raise UserError(
            f"Weights became NaN or infinite by step {trainer.step}, although the loss is finite. Finite ones were expected: {advice}"
        )


def _figures(sae: SAE, data: Activations, order: Order, spec: TrainSpec | FinetuneSpec, device: str) -> dict[str, Any]:
    tokens = min(EVALUATED_TOKENS, data.n_tokens)
    size = _at_once(tokens, sae.features)
    quality = evaluate(sae, batches(data, order, size, 0, tokens // size, device))
    return {"ev": quality.explained_variance, "l0": quality.l0, "dead": quality.dead, **sae.norm_figures()}


def _at_once(tokens: int, features: int) -> int:
    """Tokens that are encoded at once, where `tokens` are looked at."""
    return min(tokens, max(FEWEST_TOKENS, EVALUATED_VALUES // features))


def _curve(rows: list[list[float]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=list(CURVE_COLUMNS))
    return frame.astype({"step": "int64", "tokens": "int64"})


def _revived(rows: list[list[float]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=list(REVIVED_COLUMNS))
    return frame.astype({"step": "int64", "feature": "int64", "token": "int64", "token_loss": "float64"})


def _dtype(compute: str, device: torch.device) -> torch.dtype:
    """Of the matrix products: fp32 where bf16 ones would take longer."""
    return torch.bfloat16 if compute == "bf16" and has_bf16_products(str(device)) else torch.float32
