"""Which features are put in or taken out: the candidates, random features like them, and sets to clamp."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from stagediff.errors import UserError
from stagediff.evidence.interventions.spec import AblateSpec, Intervention

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["ATTRIBUTED", "candidates", "feature_table", "lowest", "matched", "sets"]

REGION = 0.1
"""Share of the alive features, lowest x + y first, of which the order `region` takes those that are most active with the trigger."""
ATTRIBUTED = 0.5
"""Share of them, lowest x + y first, that the order `attribution` ranks."""
NEAREST = 10
"""Features like a candidate, from which its random ones are drawn."""


def feature_table(spec: Intervention, job: "Job") -> pd.DataFrame:
    """A row per feature: feature, score (x + y), pair_novelty (where there is an align step), alive, selected, density, norm (decoder row)."""
    density, norm = f"density_{spec.stage}", f"norm_{spec.stage}"
    table = job.artifact(spec.diff).read_table("features.parquet", columns=["feature", "score", "alive", "selected", density, norm])
    table = table.rename(columns={density: "density", norm: "norm"})
    orders = getattr(spec, "orders", ())
    if spec.align is not None:
        aligned = job.artifact(spec.align).read_table("features.parquet", columns=["feature", "pair_novelty"])
        table = table.merge(aligned, on="feature", how="left")
    elif "pair_novelty" in (spec.rank, *orders):
        raise UserError(
            "Features are to be ranked by pair_novelty, which the align step measures, but this step was given none. Use rank: score."
        )
    return table


def candidates(table: pd.DataFrame, count: int, rank: str) -> list[int]:
    """The selected features that rank lowest; the lowest of all alive ones where none is selected. Raises UserError where nothing is alive."""
    able = table[table.alive & table[rank].notna()]
    if not len(able):
        raise UserError("No feature of the diff is alive, so there is nothing to steer with or to ablate. Train the dictionaries longer.")
    chosen = able[able.selected] if able.selected.any() else able
    return [int(i) for i in chosen.sort_values([rank, "feature"]).feature.head(count)]


def lowest(table: pd.DataFrame, share: float) -> pd.DataFrame:
    """The rows of this share of the alive features, lowest x + y first; one at least."""
    ranked = table[table.alive & table.score.notna()].sort_values(["score", "feature"])
    return ranked.head(max(1, round(share * len(ranked))))


def matched(table: pd.DataFrame, chosen: Sequence[int], count: int, seed: int) -> pd.DataFrame:
    """`count` random features (columns feature, matched_to), shared out evenly among the chosen ones.

    Each is drawn from those like its chosen one (nearest in log density and log decoder norm, in units of these' spread) that are alive, not selected and not
    drawn yet. Raises UserError where there are too few.
    """
    able = table.alive & ~table.selected & ~table.feature.isin(chosen) & (table.density > 0) & (table.norm > 0)
    if able.sum() < count:
        raise UserError(
            f"{count} random features were asked for to compare with, but only {int(able.sum())} are alive and not selected. "
            "Ask for fewer (steering.random), or select fewer features (diff.cut)."
        )
    logs = np.log(table[["density", "norm"]].to_numpy(float).clip(1e-12))
    spread = logs[table.alive.to_numpy(bool)].std(0).clip(1e-12)
    features, places = table.feature.to_numpy(), logs / spread
    free, rng = able.to_numpy(bool).copy(), np.random.default_rng(seed)
    found = []
    for turn in range(count):
        to = int(chosen[turn % len(chosen)])
        distance = np.linalg.norm(places - places[np.flatnonzero(features == to)], axis=1)
        like = np.argsort(np.where(free, distance, np.inf), kind="stable")[: min(NEAREST, int(free.sum()))]
        drawn = rng.choice(like)
        free[drawn] = False
        found.append((int(features[drawn]), to))
    return pd.DataFrame(found, columns=["feature", "matched_to"])


def sets(spec: AblateSpec, table: pd.DataFrame, chosen: Sequence[int], directions: Tensor) -> list[tuple[str, int, list[int]]]:
    """(order, draw, features) of every set that is clamped: nothing; each candidate alone; and each order's first so many features.

    `table`: as `feature_table`'s, with the columns `trigger` and `attribution` (high: first) where an order needs them. `directions`: unit decoder rows [F, d].
    Sizes that exceed an order's features are left out.
    """
    made: list[tuple[str, int, list[int]]] = [("none", 0, []), *(("single", 0, [i]) for i in chosen)]
    for order in spec.orders:
        for draw in range(spec.draws if order == "random" else 1):
            ranked = _order(order, draw, spec.seed, table[table.alive], chosen[0], directions)
            made += [(order, draw, [int(i) for i in ranked[:size]]) for size in spec.sizes if size <= len(ranked)]
    return made


def _order(order: str, draw: int, seed: int, alive: pd.DataFrame, first: int, directions: Tensor) -> np.ndarray:
    ids = alive.feature.to_numpy()
    if order == "random":
        return np.random.default_rng([seed, draw]).permutation(ids)
    if order == "cosine":
        cosine = (directions[torch.from_numpy(ids.copy())].double() @ directions[first].double()).numpy()
        return ids[np.lexsort((ids, -cosine))]
    if order == "region":
        alive, order = lowest(alive, REGION), "trigger"
    able = alive[alive[order].notna()]
    return able.sort_values([order, "feature"], ascending=[order not in ("trigger", "attribution"), True]).feature.to_numpy()
