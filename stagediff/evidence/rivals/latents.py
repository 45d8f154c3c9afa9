"""The rival-latents step: what every latent of a crosscoder or a difference SAE does on held-out rows of the mix, and the scores that rank it.

Whether a latent carries the new data is told by the rule that all methods share: at least half of its top examples are new rows (method.md, section 5).
Scores need no labels and are low for what is found, as x + y is:

crosscoder         relative_base_norm = ||W_dec base|| / (||W_dec base|| + ||W_dec finetuned||), in units where both models' activations have one size;
                   nu and its variants (`scaling`)
difference SAE     strength_low = - mean activation where active x decoder norm: how far the difference goes when the latent fires;
                   energy_low = - mean square of it over all tokens: what the latent explains
"""

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from stagediff.diff.rotations import new_share_of_examples
from stagediff.errors import UserError
from stagediff.evidence.rivals.crosscoder import from_raw_units
from stagediff.evidence.rivals.readers import Differences, SideBySide
from stagediff.evidence.rivals.scaling import TARGETS, LatentScaling
from stagediff.evidence.rivals.spec import CrosscoderSpec, DifferenceSpec, LatentsSpec
from stagediff.evidence.rivals.train import SCALES
from stagediff.sae.dictionary import SAE
from stagediff.sae.spec import StatisticsSpec
from stagediff.sae.statistics import BLOCK_ELEMENTS, Pass

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["COLUMNS", "CROSSCODER_SCORES", "DIFFERENCE_SCORES", "compute"]

SAVE_SECONDS = 60.0
CROSSCODER_SCORES = ("relative_base_norm", *TARGETS)
DIFFERENCE_SCORES = ("strength_low", "energy_low")

COLUMNS = {
    "feature": ("index", "latent of the rival"),
    "firings": ("tokens", "held-out tokens on which it is active"),
    "density": ("share", "firings per token"),
    "alive": ("flag", "enough firings"),
    "new_mass": ("share", "activation mass on new rows (empty: never fires)"),
    "new_top": ("share", "new rows among its top examples (empty: never fires)"),
    "norm_base": ("norm", "crosscoder: decoder row of the base model, scaled units"),
    "norm_finetuned": ("norm", "crosscoder: of the finetuned model; difference SAE: its decoder row"),
    "relative_base_norm": ("share", "crosscoder: norm_base / (norm_base + norm_finetuned); low is the finetuned model's own"),
    "nu": ("ratio", "crosscoder: latent scaling of the activations, base / finetuned; low is the finetuned model's own"),
    "nu_reconstruction": ("ratio", "the same of the reconstructions"),
    "nu_error": ("ratio", "the same of what the other latents leave unexplained"),
    "strength_low": ("scaled units", "difference SAE: - mean activation where active x decoder norm"),
    "energy_low": ("scaled units squared", "difference SAE: - mean square of activation x decoder norm over all tokens"),
}


def compute(spec: LatentsSpec, job: "Job") -> dict[str, Any]:
    """Writes latents.parquet (COLUMNS) and examples.parquet (as the statistics step). Raises UserError for a dictionary that is no rival's."""
    began = time.monotonic()
    artifact = job.artifact(spec.dictionary)
    training = artifact.spec()
    if not isinstance(training, (CrosscoderSpec, DifferenceSpec)):
        raise UserError(f"{spec.dictionary} comes from the step {training.step!r}; a crosscoder or a difference SAE was expected.")
    sae = SAE.load(artifact).to(job.device)
    is_crosscoder = isinstance(training, CrosscoderSpec)
    reader = (SideBySide if is_crosscoder else Differences)(job.store, spec.base, spec.finetuned)
    if reader.d != sae.d:
        raise UserError(
            f"{spec.dictionary} reads {sae.d} numbers per token, the held-out activations give {reader.d}: they are of another hook point."
        )
    scale = torch.ones(1, device=job.device)
    scaling, scaled = None, sae
    if is_crosscoder:
        apart = artifact.read_json(SCALES)
        scale = torch.tensor([apart["base"], apart["finetuned"]]).repeat_interleave(sae.d // 2).to(job.device)
        scaled = from_raw_units(sae, scale)
        scaling = LatentScaling(scaled)
    squares = torch.zeros(sae.features, dtype=torch.float64, device=job.device)
    as_statistics = StatisticsSpec(dictionary=spec.dictionary, data=spec.base, top=spec.top, batch=spec.batch)
    run = Pass(sae, reader.d, reader.tokens_per_row, as_statistics, job.device)
    first = 0
    if latest := job.writer.training.latest():
        first, tensors, _ = latest
        run.load_state(tensors)
        squares.copy_(tensors["squares"])
        if scaling:
            scaling.load_state(tensors)
    at_once = max(1, min(spec.batch, BLOCK_ELEMENTS[torch.device(job.device).type] // sae.features))
    saved = time.monotonic()
    with (
        torch.no_grad(),
        job.progress.task("rival-latents", reader.n_tokens, "tokens", done=sum(map(reader.shard_tokens, range(first)))) as task,
    ):
        for i in range(first, reader.n_shards):
            shard = reader.read_shard(i)
            run.add(shard, *reader.locate(i))
            for part in shard.split(at_once):
                x = part.to(job.device).float()
                f = sae.encode(x).float()
                squares += f.square().sum(0, dtype=torch.float64)
                if scaling:
                    scaling.add(x * scale, f)
            task.advance(len(shard))
            if time.monotonic() - saved > SAVE_SECONDS:
                more = scaling.state() if scaling else {}
                job.writer.training.save(i + 1, {**run.state(), **more, "squares": squares.cpu()}, {})
                saved = time.monotonic()
    examples = pd.DataFrame(run.examples.table())
    table = _table(run, examples, spec.alive_firings)
    if scaling:
        table = _crosscoder(table, scaled, scaling)
    else:
        table = _difference(table, sae, squares.cpu().numpy(), reader.n_tokens)
    table = table.reindex(columns=list(COLUMNS))
    job.writer.write_table("latents.parquet", table, columns=COLUMNS)
    job.writer.write_table("examples.parquet", examples)
    job.notes["seconds"] = round(time.monotonic() - began, 2)
    quality = run.figures()
    carrying = int((table.alive & (table.new_top >= 0.5)).sum())
    return {**{n: quality[n] for n in ("explained_variance", "l0", "dead_share")}, "alive": int(table.alive.sum()), "carrying": carrying}


def _table(run: Pass, examples: pd.DataFrame, alive_firings: int) -> pd.DataFrame:
    measured = run.table(np.zeros(run.features))
    total = measured.mass_base + measured.mass_new
    return measured[["feature", "firings", "density", "mean"]].assign(
        alive=measured.firings >= alive_firings,
        new_mass=(measured.mass_new / total.where(total > 0)).to_numpy(float),
        new_top=new_share_of_examples(examples, run.features),
    )


def _crosscoder(table: pd.DataFrame, scaled: SAE, scaling: LatentScaling) -> pd.DataFrame:
    norms = scaled.W_dec.double().view(scaled.features, 2, -1).norm(dim=2).cpu().numpy()
    base, finetuned = norms[:, 0], norms[:, 1]
    with np.errstate(invalid="ignore"):
        relative = base / (base + finetuned)
    ratios = {name: value.numpy() for name, value in scaling.ratios().items()}
    return table.assign(norm_base=base, norm_finetuned=finetuned, relative_base_norm=relative, **ratios)


def _difference(table: pd.DataFrame, sae: SAE, squares: np.ndarray, tokens: int) -> pd.DataFrame:
    norms = sae.W_dec.double().norm(dim=1).cpu().numpy()
    return table.assign(norm_finetuned=norms, strength_low=-table["mean"].to_numpy(float) * norms, energy_low=-squares * norms**2 / tokens)
