"""The efficiency step: is the following budget enough? Quality of every dictionary of the chain beside those trained from scratch.

arXiv 2412.17626 trains each following dictionary with about 1/20 of the first budget and shows no quality; here it stands beside from-scratch
dictionaries with the first budget (scratch_full) and with the following one (scratch_short), at every checkpoint that has them. All figures are
those of the upstream artifacts, on the probe rows.
"""

from typing import TYPE_CHECKING, Any

import pandas as pd

from stagediff.errors import UserError
from stagediff.track.spec import EfficiencyRow, EfficiencySpec

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["compute"]

QUALITY_COLUMNS = {
    "step": ("steps", "training step of the model"),
    "how": ("name", "chained; scratch_full: from scratch, first budget; scratch_short: from scratch, following budget"),
    "tokens": ("tokens", "spent in training for this dictionary at this checkpoint"),
    "explained_variance": ("1", "of the probe rows' activations"),
    "l0": ("features", "active per token, probe rows"),
    "dead": ("share", "of features that never fire on the probe rows"),
    "loss_recovered": ("1", "(mean - spliced) / (mean - clean) of the language model's loss, all rows"),
    "input_scale": ("1", "what the dictionary multiplies activations by (empty: not recorded)"),
    "revived": ("features", "dead ones that were resampled before or during the training (empty: not recorded)"),
    "reason": ("", "why explained_variance or loss_recovered is empty"),
}
COMPARED_COLUMNS = {
    "step": ("steps", "training step of the model"),
    "how": ("name", "what the chain is compared with: scratch_full or scratch_short"),
    "ev_chained": ("1", "explained variance of the chain's dictionary"),
    "ev_other": ("1", "explained variance of the one from scratch"),
    "ev_gap": ("1", "ev_chained - ev_other: below 0, the chain is worse"),
    "loss_recovered_gap": ("1", "the same of loss recovered"),
}


def compute(spec: EfficiencySpec, job: "Job") -> dict[str, Any]:
    """Writes quality.parquet and compared.parquet.

    Figures, each with its `_step`: ev_lowest_chained; dead_largest_chained; ev_gap_largest, the most that the chain lies below scratch_full
    after its first dictionary (negative: it lies above everywhere), and ev_gap_largest_short, below scratch_short. tokens_chained, and
    tokens_share of what full training at each of the chain's checkpoints would take.
    """
    _check(spec.rows)
    with job.progress.task("quality", len(spec.rows), "dictionaries") as task:
        rows = []
        for row in spec.rows:
            rows.append(_measured(row, job))
            task.advance(1)
    quality = pd.DataFrame(rows, columns=list(QUALITY_COLUMNS)).astype(_NUMBERS).sort_values(["step", "how"], ignore_index=True)
    compared = _compared(quality)
    job.writer.write_table("quality.parquet", quality, columns=QUALITY_COLUMNS)
    job.writer.write_table("compared.parquet", compared, columns=COMPARED_COLUMNS)
    return _figures(quality, compared)


_NUMBERS = {name: "float64" for name in ("explained_variance", "l0", "dead", "loss_recovered", "input_scale")} | {"revived": "Int64"}


def _check(rows: tuple[EfficiencyRow, ...]) -> None:
    seen = set()
    for row in rows:
        if (row.step, row.how) in seen:
            raise UserError(f"Step {row.step} has two dictionaries of the sort {row.how}; name one of them.")
        seen.add((row.step, row.how))
    if not seen:
        raise UserError("There is no dictionary to compare: name at least those of the chain.")


def _measured(row: EfficiencyRow, job: "Job") -> dict[str, Any]:
    statistics = job.artifact(row.statistics).manifest.figures
    made = job.artifact(row.dictionary).manifest.figures
    table = job.artifact(row.quality).read_table("quality.parquet", columns=["group", "loss_recovered"])
    recovered = table.loc[table["group"] == "all", "loss_recovered"]
    if len(recovered) != 1:
        raise UserError(
            f"The quality artifact {row.quality} of step {row.step} ({row.how}) has no row for all groups. Compute it again with --force."
        )
    loss_recovered = float("nan") if pd.isna(recovered.iloc[0]) else float(recovered.iloc[0])
    reasons = []
    if statistics.get("explained_variance") is None:
        reasons.append("the activations do not vary")
    if pd.isna(loss_recovered):
        reasons.append("replacing the activations by their mean costs the model nothing")
    return {
        "step": row.step,
        "how": row.how,
        "tokens": row.tokens,
        "explained_variance": statistics.get("explained_variance"),
        "l0": statistics.get("l0"),
        "dead": statistics.get("dead_share"),
        "loss_recovered": loss_recovered,
        "input_scale": made.get("input_scale"),
        "revived": made.get("revived"),
        "reason": "; ".join(reasons) or None,
    }


def _compared(quality: pd.DataFrame) -> pd.DataFrame:
    columns = ["step", "how", "explained_variance", "loss_recovered"]
    chained = quality.loc[quality["how"] == "chained", columns].drop(columns="how")
    both = quality.loc[quality["how"] != "chained", columns].merge(chained, on="step", suffixes=("_other", "_chained"))
    return pd.DataFrame(
        {
            "step": both["step"],
            "how": both["how"],
            "ev_chained": both["explained_variance_chained"],
            "ev_other": both["explained_variance_other"],
            "ev_gap": both["explained_variance_chained"] - both["explained_variance_other"],
            "loss_recovered_gap": both["loss_recovered_chained"] - both["loss_recovered_other"],
        }
    )


def _figures(quality: pd.DataFrame, compared: pd.DataFrame) -> dict[str, Any]:
    chained, full = (quality[quality["how"] == how] for how in ("chained", "scratch_full"))
    figures: dict[str, Any] = {"dictionaries": len(quality)}
    figures |= _extreme("ev_lowest_chained", chained, "explained_variance", smallest=True)
    figures |= _extreme("dead_largest_chained", chained, "dead", smallest=False)
    first_budget = int((full if len(full) else chained)["tokens"].max()) if len(chained) else 0
    begun = chained.loc[chained["tokens"] >= first_budget, "step"]  # there the chain itself is from scratch
    for name, how in (("ev_gap_largest", "scratch_full"), ("ev_gap_largest_short", "scratch_short")):
        part = compared[(compared["how"] == how) & ~compared["step"].isin(begun)]
        figures |= _extreme(name, part.assign(below=0.0 - part["ev_gap"]), "below", smallest=False)
    spent = int(chained["tokens"].sum())
    figures["tokens_chained"] = spent
    figures["tokens_share"] = spent / (first_budget * len(chained)) if first_budget else None
    return figures


def _extreme(name: str, table: pd.DataFrame, column: str, *, smallest: bool) -> dict[str, Any]:
    """The column's extreme value and the step that has it; None where there is none."""
    known = table[table[column].notna()]
    if known.empty:
        return {name: None, f"{name}_step": None}
    row = known.loc[known[column].idxmin() if smallest else known[column].idxmax()]
    return {name: float(row[column]), f"{name}_step": int(row["step"])}
