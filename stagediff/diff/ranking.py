"""How well a score ranks flagged features first, and whether a region holds more of them than chance: AUROC with its interval, what it gains over another
score's, average precision, Fisher's exact test.
"""

import math

import numpy as np

__all__ = ["auroc", "auroc_gain", "auroc_interval", "average_precision", "fisher_greater"]

Z95 = 1.959964


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


def auroc_interval(value: float, positives: int, negatives: int) -> tuple[float, float]:
    """95 % interval of an AUROC: all values whose standard error (Hanley and McNeil 1982) reaches `value`.

    Newcombe 2006, "Confidence intervals for an effect size measure based on the Mann-Whitney statistic", part 2, method 5: it holds its level with
    a handful of positives, and has a width where `value` is 0 or 1.
    """
    extra = (positives + negatives) / 2 - 1

    def reaches(theta: float) -> bool:
        spread = 1 + extra * (1 - theta) / (2 - theta) + extra * theta / (1 + theta)
        return abs(value - theta) <= Z95 * math.sqrt(theta * (1 - theta) * spread / (positives * negatives))

    def end(outside: float) -> float:
        inside = value
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if reaches(middle) else (inside, middle)
        return inside

    return end(0.0), end(1.0)


def auroc_gain(flagged: np.ndarray, score: np.ndarray, other: np.ndarray) -> tuple[float, float, float] | None:
    """By how much the AUROC of `score` exceeds that of `other` [n] on the same entries, and the difference's 95 % interval.

    DeLong, DeLong and Clarke-Pearson 1988: both rankings are of the same entries, so their errors go together. None with fewer than two flagged
    or two other entries.
    """
    flagged = np.asarray(flagged, bool)
    if min(flagged.sum(), (~flagged).sum()) < 2:
        return None
    parts = [_placements(flagged, np.asarray(values, float)) for values in (score, other)]
    of_flagged, of_others = (parts[0][i] - parts[1][i] for i in range(2))
    gain = float(of_flagged.mean())
    error = math.sqrt(of_flagged.var(ddof=1) / len(of_flagged) + of_others.var(ddof=1) / len(of_others))
    return gain, gain - Z95 * error, gain + Z95 * error


def _placements(flagged: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each flagged entry the share of others that it exceeds, for each other one the share of flagged entries that exceed it; ties counted half."""
    a, b = np.sort(score[flagged]), np.sort(score[~flagged])

    def below(sorted_values: np.ndarray, x: np.ndarray) -> np.ndarray:
        return (np.searchsorted(sorted_values, x, "left") + np.searchsorted(sorted_values, x, "right")) / (2 * len(sorted_values))

    return below(b, score[flagged]), 1 - below(a, score[~flagged])


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
