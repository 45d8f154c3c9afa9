"""How well a score ranks flagged features first, and whether a region holds more of them than chance: AUROC, average precision, Fisher's exact test."""

import math

import numpy as np

__all__ = ["auroc", "average_precision", "fisher_greater"]


def auroc(flagged: np.ndarray, score: np.ndarray) -> float | None:
    """Probability that a flagged entry has a higher score than another one, ties counted half. `flagged` [n] bool, `score` [n].

    None where there are only flagged entries or none.
    """
    flagged = np.asarray(flagged, bool)
    positives, negatives = int(flagged.sum()), int((~flagged).sum())
    if not positives or not negatives:
        return None
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    middle_rank = np.cumsum(count) - (count - 1) / 2
    return float((middle_rank[place][flagged].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(flagged: np.ndarray, score: np.ndarray) -> float | None:
    """Sum over thresholds of (recall gained) x precision, highest scores first; equal scores share one threshold. None where nothing is flagged."""
    flagged = np.asarray(flagged, bool)
    if not flagged.any():
        return None
    order = np.argsort(-np.asarray(score), kind="stable")
    sorted_score = np.asarray(score)[order]
    last_of_tie = np.r_[sorted_score[1:] != sorted_score[:-1], True]
    hits = np.cumsum(flagged[order])[last_of_tie]
    seen = np.arange(1, len(order) + 1)[last_of_tie]
    return float((np.diff(hits, prepend=0) * hits / seen).sum() / flagged.sum())


def fisher_greater(hits: int, size: int, other_hits: int, other_size: int) -> float:
    """One-sided p of Fisher's exact test: `hits` of `size` being as many or more, given the margins, if both groups had one rate. In exact integers."""
    all_hits, total = hits + other_hits, size + other_size
    ways = sum(math.comb(all_hits, i) * math.comb(total - all_hits, size - i) for i in range(hits, min(size, all_hits) + 1))
    return ways / math.comb(total, size)
