"""What a dictionary keeps of the language model: cross-entropy with the reconstruction spliced in at the hook point (loss recovered).

Four losses on the same token rows: clean; with the dictionary's reconstruction in place of the activation; with the rows' mean activation in its place;
with zeros. loss_recovered = (mean - spliced) / (mean - clean): 1 is perfect, 0 no better than a constant. Skipped positions (the first, by default)
are left as they are in every variant, and the prediction made at them is not counted, since no dictionary is involved.
Base and new rows are measured apart, as many of each as there are up to `rows`; "all" weighs them by their shares in the data.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stagediff.errors import UserError
from stagediff.lm import hooks
from stagediff.lm.activations import ActivationReader
from stagediff.lm.models import LoadedModel, load_model
from stagediff.sae.spec import QualitySpec

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["VARIANTS", "compute", "losses"]

VARIANTS = ("clean", "spliced", "mean", "zero")
LOGIT_BYTES = {"cuda": 256 << 20, "cpu": 24 << 20}
"""Logits at once; on a CPU so few that their memory is used again instead of being mapped anew."""

Transform = Callable[[Tensor], Tensor]


def compute(spec: QualitySpec, job: "Job") -> dict[str, Any]:
    """Writes quality.parquet, a row per group (all, base, new) that has rows; returns the same figures."""
    import pandas as pd

    from stagediff.sae.dictionary import SAE

    reader = ActivationReader(job.store, spec.data, job.device)
    if reader.model.identity() != spec.model.identity():
        raise UserError(
            f"The quality step names another model than the one its activations {spec.data.base} come from. Plan the run again so that "
            "both come from one config."
        )
    sae = SAE.load(job.artifact(spec.dictionary)).to(job.device)
    groups, shares = _groups(reader, spec)
    loaded = load_model(spec.model, job.store, precision=reader.spec.precision, device=job.device)
    rows = np.concatenate(list(groups.values()))
    per_row: dict[str, np.ndarray] = {}
    with job.progress.task("quality", total=len(VARIANTS) * len(rows), unit="rows") as task:
        per_row["clean"], mean = _clean_and_mean(loaded, reader, rows, task.advance)

        def reconstruct(x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[-1]).float()
            return sae.decode(sae.encode(flat)).reshape(x.shape)

        variants: dict[str, Transform] = {
            "spliced": reconstruct,
            "mean": lambda x: mean.to(x.device, x.dtype).expand_as(x),
            "zero": torch.zeros_like,
        }
        for name, fn in variants.items():
            per_row[name] = losses(loaded, reader, rows, fn, task.advance)
    table = pd.DataFrame(_rows_of_table(per_row, groups, shares))
    job.writer.write_table("quality.parquet", table, columns=_COLUMNS)
    figures: dict[str, Any] = {}
    for row in table.to_dict("records"):
        suffix = "" if row["group"] == "all" else f"_{row['group']}"
        figures |= {f"{name}{suffix}": value for name, value in row.items() if name != "group"}
    return figures


def losses(
    loaded: LoadedModel, reader: ActivationReader, rows: np.ndarray, fn: Transform | None, advance: Callable[[int], None] | None = None
) -> np.ndarray:
    """Mean next-token cross-entropy (nats) of each token row at its kept positions, float64 [len(rows)].

    Parameters: fn: what replaces the activations [rows, kept positions, d] at the hook point; None: the model as it is.
    """
    kept = torch.from_numpy(reader.positions.astype(np.int64))
    predicting = kept[kept < reader.context - 1]  # the last position predicts nothing within the row
    batch = max(1, LOGIT_BYTES[loaded.device.type] // (reader.context * loaded.vocab * 4))
    out = []

    def splice(x: Tensor) -> Tensor:
        assert fn is not None
        x, at = x.clone(), kept.to(x.device)
        x[:, at] = fn(x[:, at]).to(x.dtype)
        return x

    for low in range(0, len(rows), batch):
        ids = torch.from_numpy(reader.token_ids(rows[low : low + batch]).astype(np.int64)).to(loaded.device)
        with torch.no_grad():
            if fn is None:
                logits = loaded.model(input_ids=ids, use_cache=False).logits
            else:
                with hooks.intervene(loaded.model, reader.hook, splice):
                    logits = loaded.model(input_ids=ids, use_cache=False).logits
            at = predicting.to(logits.device)
            targets = ids.to(logits.device)[:, at + 1]
            chosen = logits[:, at].float()
            loss = torch.nn.functional.cross_entropy(chosen.flatten(0, 1), targets.flatten(), reduction="none")
        out.append(loss.view(len(ids), -1).double().mean(dim=1).cpu().numpy())
        if advance is not None:
            advance(len(ids))
    return np.concatenate(out)


def _clean_and_mean(
    loaded: LoadedModel, reader: ActivationReader, rows: np.ndarray, advance: Callable[[int], None]
) -> tuple[np.ndarray, Tensor]:
    """Clean losses, and the mean activation [d] (float32) over the rows' kept positions, from one pass."""
    total = torch.zeros(reader.d, dtype=torch.float64)
    count = 0

    def watch(x: Tensor) -> Tensor:
        nonlocal count
        flat = x.reshape(-1, x.shape[-1])
        total.add_(flat.double().sum(dim=0).cpu())
        count += len(flat)
        return x

    clean = losses(loaded, reader, rows, watch, advance)
    return clean, (total / count).float()


def _groups(reader: ActivationReader, spec: QualitySpec) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Token rows of each group, and the groups' shares in the data."""
    every = np.arange(spec.data.rows, dtype=np.int64)
    new = reader.is_new(every)
    wanted = {"base": every[~new], "new": every[new]}
    if spec.data.only != "all":
        wanted = {spec.data.only: wanted[spec.data.only]}
    whole = sum(len(rows) for rows in wanted.values())
    groups = {name: rows[: spec.rows] for name, rows in wanted.items() if len(rows)}
    if not groups:
        raise UserError(
            f"The data has no rows of the kind {spec.data.only!r} to measure quality on. Use a larger share of new rows, or only: all."
        )
    return groups, {name: len(wanted[name]) / whole for name in groups}


def _rows_of_table(per_row: dict[str, np.ndarray], groups: dict[str, np.ndarray], shares: dict[str, float]) -> list[dict[str, Any]]:
    by_group: dict[str, dict[str, float]] = {}
    low = 0
    for name, rows in groups.items():
        by_group[name] = {v: float(per_row[v][low : low + len(rows)].mean()) for v in VARIANTS}
        low += len(rows)
    by_group = {"all": {v: sum(shares[g] * by_group[g][v] for g in groups) for v in VARIANTS}, **by_group}
    counts = {"all": sum(len(r) for r in groups.values()), **{g: len(r) for g, r in groups.items()}}
    return [
        {
            "group": g,
            "rows": counts[g],
            **{f"ce_{v}": x[v] for v in VARIANTS},
            "loss_recovered": _recovered(x, "mean"),
            "loss_recovered_zero": _recovered(x, "zero"),
        }
        for g, x in by_group.items()
    ]


def _recovered(ce: dict[str, float], ablation: str) -> float | None:
    """None where ablating costs nothing, so that there is nothing to recover."""
    gap = ce[ablation] - ce["clean"]
    return (ce[ablation] - ce["spliced"]) / gap if gap > 0 else None


_COLUMNS = {
    "group": ("", "all rows (weighted by the groups' shares in the data), base rows, or new rows"),
    "rows": ("rows", "token rows measured"),
    "ce_clean": ("nats", "mean next-token cross-entropy at the kept positions, model as it is"),
    "ce_spliced": ("nats", "the same with the dictionary's reconstruction in place of the activations"),
    "ce_mean": ("nats", "the same with the mean activation in their place"),
    "ce_zero": ("nats", "the same with zeros in their place"),
    "loss_recovered": ("", "(ce_mean - ce_spliced) / (ce_mean - ce_clean)"),
    "loss_recovered_zero": ("", "(ce_zero - ce_spliced) / (ce_zero - ce_clean)"),
}
