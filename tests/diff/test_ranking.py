"""Rankings and Fisher's test against scikit-learn, scipy and plain loops."""

import numpy as np
import pytest
from scipy.stats import fisher_exact
from sklearn.metrics import average_precision_score, roc_auc_score

from stagediff.diff.ranking import auroc, average_precision, fisher_greater


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
