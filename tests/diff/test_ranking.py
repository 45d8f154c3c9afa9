"""Rankings and Fisher's test against scikit-learn, scipy and plain loops."""

import numpy as np
import pytest
from scipy.stats import fisher_exact, norm
from sklearn.metrics import average_precision_score, roc_auc_score

from stagediff.diff.ranking import auroc, auroc_gain, auroc_interval, average_precision, fisher_greater


@pytest.mark.parametrize("levels", [3, 10, 10**6])
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_rankings_equal_scikit_learns_with_and_without_ties(levels, share):
    rng = np.random.default_rng(levels)
    flagged = rng.random(500) < share
    flagged[:2] = True, False
    score = np.round(rng.normal(size=500) + flagged, 3) if levels == 10**6 else rng.integers(0, levels, 500) + flagged * 1.0
    assert auroc(flagged, score) == pytest.approx(roc_auc_score(flagged, score), abs=1e-12)
    assert average_precision(flagged, score) == pytest.approx(average_precision_score(flagged, score), abs=1e-12)


def test_auroc_is_the_share_of_pairs_in_order():
    flagged, score = np.array([1, 0, 1, 0, 0], bool), np.array([3.0, 3.0, 1.0, 0.0, 2.0])
    pairs = [(a > b) + (a == b) / 2 for a in score[flagged] for b in score[~flagged]]
    assert auroc(flagged, score) == pytest.approx(sum(pairs) / len(pairs))


def draws(rng, positives: int, shift: float, other: float, shared: float):
    """Flags and two scores of 300 entries; `shared`: how much of their noise is the same."""
    flagged = np.arange(300) < positives
    noise = rng.normal(size=(3, 300))
    scores = [np.sqrt(shared) * noise[0] + np.sqrt(1 - shared) * noise[i] + s * flagged for i, s in ((1, shift), (2, other))]
    return flagged, *scores


@pytest.mark.parametrize(("positives", "shift"), [(10, 2.0), (25, 1.0), (100, 0.0)])
def test_the_interval_of_an_auroc_holds_the_truth_as_often_as_it_says(positives, shift):
    """Two normal scores, whose AUROC is known: Phi(shift / sqrt 2)."""
    rng, truth, inside = np.random.default_rng(positives), norm.cdf(shift / np.sqrt(2)), 0
    for _ in range(600):
        flagged, score, _ = draws(rng, positives, shift, 0, 0)
        low, high = auroc_interval(auroc(flagged, score), positives, 300 - positives)
        inside += low <= truth <= high
    assert 0.925 <= inside / 600 <= 0.985


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_interval_of_a_perfect_ranking_has_a_width(value):
    low, high = auroc_interval(value, 8, 500)
    assert low <= value <= high
    assert 0.05 < high - low < 0.4
    narrow = auroc_interval(value, 80, 500)
    assert narrow[1] - narrow[0] < (high - low) / 3


@pytest.mark.parametrize(("other", "shared"), [(1.5, 0.0), (1.5, 0.8), (0.5, 0.5)])
def test_the_gain_over_another_score_holds_the_truth_as_often_as_it_says(other, shared):
    rng, inside = np.random.default_rng(7), 0
    truth = norm.cdf(1.5 / np.sqrt(2)) - norm.cdf(other / np.sqrt(2))
    for _ in range(600):
        flagged, a, b = draws(rng, 30, 1.5, other, shared)
        gain, low, high = auroc_gain(flagged, a, b)
        inside += low <= truth <= high
    assert gain == pytest.approx(auroc(flagged, a) - auroc(flagged, b), abs=1e-12)
    assert 0.92 <= inside / 600 <= 0.98


def test_the_gains_error_is_delongs():
    """Against the double sums of the paper (with ties)."""
    rng = np.random.default_rng(0)
    flagged, a, b = draws(rng, 12, 1.0, 0.5, 0.5)
    a, b = np.round(a, 1), np.round(b, 1)
    _, low, high = auroc_gain(flagged, a, b)
    wins = [np.array([[(p > n) + (p == n) / 2 for n in s[~flagged]] for p in s[flagged]]) for s in (a, b)]
    by_positive, by_negative = (np.stack([w.mean(axis) for w in wins]) for axis in (1, 0))
    covariance = np.cov(by_positive) / 12 + np.cov(by_negative) / 288
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert (high - low) / 2 == pytest.approx(1.959964 * error)
    assert auroc_gain(np.arange(300) < 1, a, b) is None


def test_rankings_are_undefined_without_both_kinds():
    nothing, all_ = np.zeros(4, bool), np.ones(4, bool)
    assert auroc(nothing, np.arange(4)) is None
    assert auroc(all_, np.arange(4)) is None
    assert average_precision(nothing, np.arange(4)) is None
    assert average_precision(all_, np.arange(4)) == 1.0


@pytest.mark.parametrize("table", [(8, 10, 9, 500), (0, 10, 0, 500), (10, 10, 0, 500), (300, 2621, 12, 500), (0, 1, 5, 9), (3, 3, 5, 5)])
def test_fisher_equals_scipys(table):
    hits, size, other_hits, other_size = table
    _, p = fisher_exact([[hits, size - hits], [other_hits, other_size - other_hits]], alternative="greater")
    assert fisher_greater(*table) == pytest.approx(p, rel=1e-6)
