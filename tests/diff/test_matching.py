"""Matching latents by direction: against loops over all pairs, against scipy's assignment, and in bounded memory."""

import numpy as np
import pytest
import torch
from peak import peak_mib
from scipy.optimize import linear_sum_assignment

from stagediff.diff import matching
from stagediff.diff.matching import Held, candidates, largest_cosine, match

D = 24


def rows(n: int, seed: int, d: int = D) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_cosines(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    unit = [(v / v.norm(dim=1, keepdim=True)).numpy() for v in (a, b)]
    return unit[0] @ unit[1].T


def nearest_pair_first(cosine: np.ndarray) -> np.ndarray:
    """The definition: take the largest of all cosines that are left, strike out its row and column, and again."""
    left, partner = cosine.copy(), np.full(len(cosine), -1)
    for _ in range(min(cosine.shape)):
        i, j = np.unravel_index(left.argmax(), left.shape)
        partner[i] = j
        left[i], left[:, j] = -np.inf, -np.inf
    return partner


@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 55), (55, 40), (1, 30), (30, 1), (200, 190)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_matching_takes_the_nearest_pair_first(n, m, seed, monkeypatch):
    monkeypatch.setattr(matching, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(matching, "BLOCK", 11)
    a, b = rows(n, seed), rows(m, seed + 100)
    cosine = all_cosines(a, b)
    found = match(a, b)
    np.testing.assert_array_equal(found.partner, nearest_pair_first(cosine))
    has = found.partner >= 0
    assert has.sum() == min(n, m)
    np.testing.assert_allclose(found.cosine[has], cosine[np.flatnonzero(has), found.partner[has]], atol=1e-6)
    assert np.isnan(found.cosine[~has]).all()
    each_others = (cosine.argmax(1)[:, None] == np.arange(m)) & (cosine.argmax(0)[None] == np.arange(n)[:, None])
    np.testing.assert_array_equal(found.mutual, each_others.any(1))


def test_shuffled_and_noisy_latents_are_matched_as_scipys_assignment_does():
    a = rows(300, 5)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(6))
    b = 3 * a[order] + 0.3 * rows(300, 7)
    found = match(a, b)
    np.testing.assert_array_equal(order.numpy()[found.partner], np.arange(300))
    np.testing.assert_array_equal(found.partner, linear_sum_assignment(-all_cosines(a, b))[1])


def test_equal_directions_are_shared_out_one_to_one():
    a = rows(5, 1).repeat(4, 1)
    found = match(a, 2 * a)
    assert sorted(found.partner) == list(range(20))
    np.testing.assert_allclose(found.cosine, 1, atol=1e-6)


def test_nothing_is_matched_with_nothing():
    assert match(rows(3, 0), torch.empty(0, D, dtype=torch.float64)).partner.tolist() == [-1] * 3
    assert match(torch.empty(0, D, dtype=torch.float64), rows(3, 0)).partner.tolist() == []


def test_the_largest_cosine_equals_a_loop_whatever_the_block(monkeypatch):
    monkeypatch.setattr(matching, "BLOCK", 13)
    monkeypatch.setattr(matching, "ROWS_AT_ONCE", 5)
    a, others = rows(17, 0), {"D": rows(40, 1), "M": rows(31, 2)}
    others["D"][3] = 0  # a latent without a direction is near to nothing
    found = largest_cosine(a, {name: Held(b) for name, b in others.items()})
    for name, b in others.items():
        kept = b[b.norm(dim=1) > 0]
        expected = [max(float(u @ v / u.norm() / v.norm()) for v in kept) for u in a]
        assert found[name].tolist() == pytest.approx(expected, abs=1e-6)


def test_candidates_are_the_alive_latents_with_the_smallest_bound():
    bound = np.array([0.9, 0.2, np.nan, 0.1, 0.5, 0.3])
    alive = np.array([True, True, True, False, True, True])
    assert candidates(bound, alive, 2).tolist() == [1, 5]
    assert candidates(bound, alive, 100).tolist() == [0, 1, 4, 5]


CODE = """
import sys, torch
from stagediff.diff.matching import Held, largest_cosine
n, m = map(int, sys.argv[1:])
a, b = torch.randn(n, 4), torch.randn(m, 4)
if n:
    largest_cosine(a, {"D": Held(b)})
"""


def test_memory_is_that_of_a_block_not_of_all_pairs():
    assert peak_mib(CODE, "20000", "40000") - peak_mib(CODE, "0", "40000") < 500  # all cosines at once: 3,052 MiB
