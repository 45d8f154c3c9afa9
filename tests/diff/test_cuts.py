"""Cuts, quadrants and the random sample."""

import numpy as np
import pytest

from stagediff.diff.cuts import random_sample, select
from stagediff.diff.spec import Cut


def test_absolute_cut_takes_what_is_below_on_both_axes():
    x = np.array([0.1, 0.69, 0.7, 0.1, 0.9, 0.1])
    y = np.array([0.2, 0.69, 0.1, 0.8, 0.9, 0.1])
    alive = np.array([True] * 5 + [False])
    found = select(x, y, alive, Cut(kind="absolute", value=0.7))
    assert found.selected.tolist() == [True, True, False, False, False, False]
    assert found.quadrant.tolist() == ["lower_left", "lower_left", "lower_right", "upper_left", "upper_right", ""]
    assert (found.x, found.y, found.score) == (0.7, 0.7, None)


def test_an_absolute_cut_may_select_nothing():
    found = select(np.full(5, 0.99), np.full(5, 0.99), np.ones(5, bool), Cut(kind="absolute", value=0.7))
    assert not found.selected.any()
    assert set(found.quadrant) == {"upper_right"}


@pytest.mark.parametrize(("share", "expected"), [(0.1, 9), (0.01, 1), (1.0, 90), (0.333, 29)])
def test_quantile_cut_takes_the_lowest_share_of_alive_features_by_the_sum(share, expected):
    rng = np.random.default_rng(0)
    x, y, alive = rng.random(100), rng.random(100), np.arange(100) >= 10
    x[:10] = y[:10] = 0.0  # dead features, lowest of all
    found = select(x, y, alive, Cut(kind="quantile", value=share))
    ranked = sorted(range(10, 100), key=lambda i: x[i] + y[i])
    assert sorted(np.flatnonzero(found.selected)) == sorted(ranked[:expected])
    assert found.score == pytest.approx(max((x + y)[i] for i in ranked[:expected]))


def test_quantile_cut_selects_at_least_one_and_never_a_dead_feature():
    x, y = np.array([0.0, 0.5, 0.9]), np.array([0.0, 0.5, 0.9])
    found = select(x, y, np.array([False, True, True]), Cut(kind="quantile", value=0.001))
    assert found.selected.tolist() == [False, True, False]


def test_quadrants_of_a_quantile_cut_take_the_share_along_each_axis_by_itself():
    # feature 0 is lowest along x, feature 1 along y, feature 2 lowest by the sum but lowest along neither axis
    x, y = np.array([0.1, 0.9, 0.2, 0.8, 0.8]), np.array([0.9, 0.1, 0.2, 0.8, 0.8])
    found = select(x, y, np.ones(5, bool), Cut(kind="quantile", value=0.2))
    assert found.quadrant.tolist() == ["upper_left", "lower_right", "upper_right", "upper_right", "upper_right"]
    assert found.selected.tolist() == [False, False, True, False, False]
    assert (found.x, found.y, found.score) == (0.1, 0.1, 0.4)


def test_equal_scores_are_cut_by_index():
    found = select(np.full(10, 0.5), np.full(10, 0.5), np.ones(10, bool), Cut(kind="quantile", value=0.3))
    assert np.flatnonzero(found.selected).tolist() == [0, 1, 2]


def test_undefined_cosines_are_never_selected():
    x, y = np.array([np.nan, 0.5, 0.9]), np.array([0.1, 0.5, 0.9])
    found = select(x, y, np.ones(3, bool), Cut(kind="quantile", value=0.4))
    assert found.selected.tolist() == [False, True, False]
    assert found.quadrant[0] == ""


def test_nothing_alive_selects_nothing():
    found = select(np.ones(3), np.ones(3), np.zeros(3, bool), Cut())
    assert not found.selected.any()
    assert found.x is None
    assert set(found.quadrant) == {""}


def test_random_sample_is_seeded_alive_and_as_large_as_asked():
    alive = np.arange(1000) % 3 == 0
    one, again, other = (random_sample(alive, 50, seed) for seed in (1, 1, 2))
    assert one.sum() == 50
    assert not (one & ~alive).any()
    assert (one == again).all()
    assert (one != other).any()
    assert random_sample(alive, 10**6, 0).sum() == alive.sum()


def test_random_sample_draws_every_alive_feature_equally_often():
    alive = np.arange(20) >= 10
    drawn = sum(random_sample(alive, 5, seed).astype(int) for seed in range(2000))
    assert (drawn[:10] == 0).all()
    assert np.abs(drawn[10:] - 1000).max() < 5 * np.sqrt(2000 * 0.25)
