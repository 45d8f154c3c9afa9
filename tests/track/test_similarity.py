"""Similarities of pairs, against scipy, scikit-learn and plain loops in float64."""

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine, jaccard
from sklearn.metrics.pairwise import cosine_similarity

from stagediff.track.similarity import similarities


def sparse_codes(rng, sets, n, features, active):
    """Codes [sets, n, features] that overlap: a few features are shared by most vectors of a set."""
    f = rng.gamma(2.0, size=(sets, n, features)) * (rng.random((sets, n, features)) < active / features)
    f[..., :3] += rng.gamma(2.0, size=(sets, n, 3)) * (rng.random((sets, n, 3)) < 0.7)
    return f


def reference(x, f):
    """[4, pairs] of one set, float64."""
    rows = []
    for a, b in combinations(range(len(x)), 2):
        union = np.logical_or(f[a] != 0, f[b] != 0).sum()
        rows.append(
            (
                1 - cosine(x[a], x[b]),
                1 - cosine(f[a], f[b]) if f[a].any() and f[b].any() else 0.0,
                (1 - jaccard(f[a] != 0, f[b] != 0)) * union / (union + 1e-8) if union else 0.0,
                sum(min(p, q) for p, q in zip(f[a], f[b], strict=True)) / (sum(max(p, q) for p, q in zip(f[a], f[b], strict=True)) + 1e-8),
            )
        )
    return np.array(rows).T


@pytest.mark.parametrize(("n", "features", "active"), [(2, 8, 3), (7, 40, 2), (25, 96, 60), (12, 300, 5)])
def test_all_measures_agree_with_scipy_and_loops(n, features, active):
    rng = np.random.default_rng(n)
    x, f = rng.normal(size=(5, n, 10)) + 0.5, sparse_codes(rng, 5, n, features, active)
    f[0, 0] = 0  # a vector on which nothing is active
    f[1] = 0  # and a set of such
    f[2] *= 1e3  # units must not matter
    found = similarities(torch.from_numpy(x).float(), torch.from_numpy(f).float()).numpy()
    expected = np.stack([reference(x[i], f[i].astype(np.float32).astype(float)) for i in range(5)], axis=1)
    np.testing.assert_allclose(found, expected, atol=3e-6)


def test_cosines_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    x, f = rng.normal(size=(2, 9, 30)), sparse_codes(rng, 2, 9, 50, 4)
    found = similarities(torch.from_numpy(x).float(), torch.from_numpy(f).float()).numpy()
    a, b = np.triu_indices(9, 1)
    for i in range(2):
        np.testing.assert_allclose(found[0, i], cosine_similarity(x[i])[a, b], atol=1e-6)
        np.testing.assert_allclose(found[1, i], cosine_similarity(f[i])[a, b], atol=1e-6)


def test_a_vector_without_active_features_is_like_nothing_and_equal_ones_are_alike():
    f = torch.zeros(1, 4, 6)
    f[0, 2:] = torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0, 0.0])
    found = similarities(torch.ones(1, 4, 3), f)
    pairs = list(combinations(range(4), 2))
    assert found[0].allclose(torch.ones(6))
    for measure in found[1:]:
        for value, pair in zip(measure[0].tolist(), pairs, strict=True):
            assert value == pytest.approx(1.0 if pair == (2, 3) else 0.0, abs=1e-6)
