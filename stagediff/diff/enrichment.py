"""Does the lower left carry the new data? Labels from held-out rows, and how much the lowest features are enriched in them.

A feature carries the new data when at least half of its top examples on held-out rows of the mix are new rows, averaged over both F
dictionaries (method.md, section 5). Every score is judged alike: its lowest 1 % against a random sample of alive features, and as a ranking of all
alive features. The direct finetune S -> F and the single steps stand beside x + y, since they are what it must beat.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from stagediff.diff.cuts import lowest, random_sample
from stagediff.diff.ranking import auroc, auroc_gain, auroc_interval, average_precision, fisher_greater

__all__ = ["COLUMNS", "carries_new_data", "enrichment", "headline"]

SCORES = ("score", "x", "y", "cos_s_d", "cos_s_m", "cos_s_f_direct")
CONTROL_PREFIX = "cos_control"
"""Further cosines that a later step may add (a null's): judged alike."""
REGION_SHARE, REGION_LEAST = 0.01, 10

COLUMNS = {
    "measure": ("name", "the score whose low end is the region: score is x + y; the others are columns of features.parquet"),
    "alive": ("features", "alive features with this score"),
    "flagged": ("features", "alive features that carry the new data (new_top >= 0.5)"),
    "region": ("features", "size of the region: the lowest 1 % of the alive features, at least 10"),
    "region_flagged": ("features", "features of the region that carry the new data"),
    "region_share": ("share", "region_flagged / region"),
    "random": ("features", "size of the random sample of alive features"),
    "random_flagged": ("features", "features of the random sample that carry the new data"),
    "random_share": ("share", "random_flagged / random"),
    "ratio": ("ratio", "region_share / random_share; infinite where the random sample has none, empty where neither has"),
    "p": ("probability", "Fisher's exact test, one-sided: region against random sample"),
    "auroc": ("probability", "that a feature that carries the new data has a lower score than one that does not"),
    "auroc_low": ("probability", "lower end of its 95 % interval"),
    "auroc_high": ("probability", "upper end"),
    "average_precision": ("precision", "of the ranking from the lowest score upwards; by chance it is flagged / alive"),
}


def carries_new_data(table: pd.DataFrame) -> np.ndarray:
    """[F] bool from the column new_top of a diff's features; False where a feature has no examples."""
    return (table["new_top"].to_numpy(float) >= 0.5).astype(bool)


def enrichment(table: pd.DataFrame, sample: int, seed: int, scores: Sequence[str] = SCORES) -> pd.DataFrame:
    """One row per score, low = found; `table` is a diff's features.parquet, `sample` the size of the random sample, `seed` its seed."""
    names = [*scores, *(c for c in table.columns if c.startswith(CONTROL_PREFIX))]
    return pd.DataFrame([_judge(table, name, sample, seed) for name in names], columns=list(COLUMNS))


def headline(table: pd.DataFrame, rows: pd.DataFrame) -> dict[str, Any]:
    """The key figures for the manifest: x + y's region and ranking, the direct finetune's ranking, and by how much the first beats the second, with 95 %
    intervals. None where undefined. `rows`: the enrichment of `table`.
    """
    by = rows.set_index("measure")
    score, direct = by.loc["score"], by.loc["cos_s_f_direct"]
    figures: dict[str, Any] = {
        f"enrichment_{n}": int(score[n]) for n in ("alive", "flagged", "region", "region_flagged", "random", "random_flagged")
    }
    figures |= {f"enrichment_{n}": _plain(score[n]) for n in ("region_share", "random_share", "ratio", "p")}
    for name, row in (("score", score), ("direct", direct), ("x", by.loc["x"]), ("y", by.loc["y"])):
        figures |= {f"auroc_{name}": _plain(row["auroc"]), f"average_precision_{name}": _plain(row["average_precision"])}
    figures |= {f"auroc_score_{end}": _plain(score[f"auroc_{end}"]) for end in ("low", "high")}
    x_y, direct_cosine = table["score"].to_numpy(float), table["cos_s_f_direct"].to_numpy(float)
    known = table["alive"].to_numpy(bool) & np.isfinite(x_y) & np.isfinite(direct_cosine)
    gain = auroc_gain(carries_new_data(table)[known], -x_y[known], -direct_cosine[known])
    figures |= dict(zip(("auroc_gain", "auroc_gain_low", "auroc_gain_high"), gain or (None, None, None), strict=True))
    return figures


def _judge(table: pd.DataFrame, name: str, sample: int, seed: int) -> dict[str, Any]:
    value = table[name].to_numpy(float)
    alive = table["alive"].to_numpy(bool) & np.isfinite(value)
    flagged = carries_new_data(table)
    region = lowest(value, alive, max(REGION_LEAST, int(REGION_SHARE * alive.sum())))
    chance = random_sample(alive, sample, seed)
    row: dict[str, Any] = {"measure": name, "alive": int(alive.sum()), "flagged": int((alive & flagged).sum())}
    for group, mask in (("region", region), ("random", chance)):
        size, hits = int(mask.sum()), int((mask & flagged).sum())
        row |= {group: size, f"{group}_flagged": hits, f"{group}_share": hits / size if size else float("nan")}
    with np.errstate(divide="ignore", invalid="ignore"):
        row["ratio"] = float(np.float64(row["region_share"]) / row["random_share"])
    row["p"] = fisher_greater(row["region_flagged"], row["region"], row["random_flagged"], row["random"])
    row["auroc"] = found = auroc(flagged[alive], -value[alive])
    row["auroc_low"], row["auroc_high"] = (
        (np.nan, np.nan) if found is None else auroc_interval(found, row["flagged"], row["alive"] - row["flagged"])
    )
    row["average_precision"] = average_precision(flagged[alive], -value[alive])
    return row


def _plain(value: Any) -> float | None:
    """A JSON number; None for what is undefined or infinite."""
    if value is None or not np.isfinite(value):
        return None
    return float(value)
