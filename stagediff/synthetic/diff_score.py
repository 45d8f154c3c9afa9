"""Scores a ranking of candidates against the planted features that model and data explain together.

A latent represents a target feature when its decoder row's cosine with that feature's direction (finetuned model, new rows) is at least `represents` and no
other direction of the world is nearer. A candidate is one latent, the same index of both F dictionaries, or a matched pair: it is a hit when any of
its latents represents a target. Beside AUROC and average precision over candidates everything is counted per planted feature, where a feature that
no latent represents counts as never found: a ranking cannot look good by leaving features unborn.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from stagediff.diff.decoders import unit_rows
from stagediff.diff.ranking import auroc, average_precision
from stagediff.synthetic.diff_world import PlantedDiff

__all__ = ["COLUMNS", "Judged", "Ranking", "found_at", "judge", "represented", "truth"]


@dataclass(frozen=True)
class Ranking:
    """Candidates of one score."""

    score: np.ndarray
    """[n] high = found."""
    hits: np.ndarray
    """[k, n] the target that each of a candidate's k latents represents, -1: none."""
    feature: np.ndarray
    """[n] latent by which a candidate is named: of F via D (of F direct or of a rival for their own)."""


def truth(planted: PlantedDiff, of_difference: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Unit directions of the targets on new rows of the finetuned model [n, d], and of everything else in that model [m, d].

    `of_difference`: of what the finetuned model writes beyond the base model.
    """
    new, base = planted.directions["finetuned", "new"], planted.directions["finetuned", "base"]
    if of_difference:
        new, base = (_unit(rows - planted.directions["base", data]) for rows, data in ((new, "new"), (base, "base")))
    is_target = np.zeros(len(planted), bool)
    is_target[planted.targets] = True
    elsewhere = base[planted.classes != "appears"]  # which has no direction but that on new rows
    return new[is_target], np.concatenate([elsewhere, new[~is_target]])


def _unit(rows: np.ndarray) -> np.ndarray:
    return unit_rows(torch.from_numpy(rows)).nan_to_num(0.0).numpy()


def represented(latents: np.ndarray, targets: np.ndarray, others: np.ndarray, smallest: float) -> np.ndarray:
    """[F] index of the target that each latent represents; -1: none.

    Parameters: latents [F, d], targets [n, d], others [m, d]: unit rows (0 for what has no direction). `smallest`: cosine from which one counts.
    """
    cosine = latents @ targets.T
    nearest, best = cosine.argmax(1), cosine.max(1)
    rival = (latents @ others.T).max(1) if len(others) else np.full(len(latents), -1.0)
    return np.where((best >= smallest) & (best > rival), nearest, -1)


@dataclass(frozen=True)
class Judged:
    """How well a score finds the planted features of some classes."""

    candidates: int
    hits: int
    """Candidates that represent one of these features."""
    planted: int
    auroc: float | None
    average_precision: float | None
    """Over candidates."""
    feature_precision: float
    """Over planted features: the precision at the rank where each is first found, 0 for those never found, averaged."""
    recall_n: float
    """Share of the planted features among the first n candidates, n planted features."""
    recall_2n: float

    def row(self) -> dict[str, Any]:
        return asdict(self)


def judge(score: np.ndarray, hits: np.ndarray, wanted: np.ndarray) -> Judged:
    """Judges `score` [n], high = found.

    Parameters: hits [k, n]: the target that each of a candidate's k latents represents, -1 for none. wanted [targets] bool: the targets asked for;
    candidates that represent another one only take no part.
    """
    known = hits >= 0
    mine = np.where(known, wanted[np.maximum(hits, 0)], False)
    is_hit = np.asarray(mine.any(axis=0))
    part = np.isfinite(score) & (is_hit | ~known.any(0))
    score, is_hit, hits, mine = score[part], is_hit[part], hits[:, part], mine[:, part]
    order = np.argsort(-score, kind="stable")
    first = found_at(hits[:, order], mine[:, order], len(wanted))[wanted]
    so_far = np.cumsum(is_hit[order])
    there = np.isfinite(first)
    at = first[there].astype(int)
    n = int(wanted.sum())
    return Judged(
        candidates=len(score),
        hits=int(is_hit.sum()),
        planted=n,
        auroc=auroc(is_hit, score),
        average_precision=average_precision(is_hit, score) if is_hit.any() else 0.0,
        feature_precision=float((so_far[at] / (at + 1)).sum() / n),
        recall_n=float((first < n).mean()),
        recall_2n=float((first < 2 * n).mean()),
    )


def found_at(hits: np.ndarray, counts: np.ndarray, targets: int) -> np.ndarray:
    """[targets] the place (from 0) in the ranking where each target is first found; infinite where it never is.

    Parameters: hits [k, n] in the ranking's order, counts [k, n] bool: which of them count.
    """
    first = np.full(targets, np.inf)
    place = np.broadcast_to(np.arange(hits.shape[1], dtype=float), hits.shape)
    np.minimum.at(first, hits[counts], place[counts])
    return first


COLUMNS = {
    "score": ("name", "what ranks the candidates"),
    "class": ("name", "of the planted features asked for; all: every target"),
    "candidates": ("candidates", "ranked: latents, indices or pairs; those of other target classes are left out"),
    "hits": ("candidates", "that represent one of these features"),
    "planted": ("features", "planted features of the class"),
    "auroc": ("probability", "that a hit ranks before another candidate"),
    "average_precision": ("precision", "over candidates"),
    "feature_precision": ("precision", "over planted features, at the rank where each is first found; 0 where never"),
    "recall_n": ("share", "of the planted features, among as many candidates as there are planted features"),
    "recall_2n": ("share", "the same among twice as many"),
}
