"""Resampling by counts against really copying the drawn values."""

import numpy as np
import pytest

from stagediff.track.bootstrap import COUNTS_AT_ONCE, Median, interval, resamples


def test_every_resample_draws_as_many_as_there_are_and_the_seed_fixes_them():
    first = np.concatenate(list(resamples(50, 20, seed=3)))
    assert first.shape == (20, 50)
    assert (first.sum(1) == 50).all()
    assert np.array_equal(first, np.concatenate(list(resamples(50, 20, seed=3))))
    assert not np.array_equal(first, np.concatenate(list(resamples(50, 20, seed=4))))


def test_memory_is_bounded_by_a_few_resamples_at_a_time():
    sizes = [part.size for part in resamples(COUNTS_AT_ONCE // 3, 7, seed=0)]
    assert len(sizes) == 3
    assert max(sizes) <= COUNTS_AT_ONCE


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_medians_of_resamples_equal_numpys_of_the_copied_values(n):
    rng = np.random.default_rng(n)
    values = rng.normal(size=n).round(1)  # with ties
    values[rng.random(n) < 0.2] = np.nan
    for counts in resamples(n, 60, seed=n):
        for count, mine in zip(counts, Median(values).of(counts), strict=True):
            drawn = np.repeat(values, count)
            drawn = drawn[np.isfinite(drawn)]
            assert mine == (np.median(drawn) if len(drawn) else pytest.approx(np.nan, nan_ok=True))


def test_a_median_of_nothing_is_nan():
    assert np.isnan(Median(np.full(4, np.nan)).of(np.ones((2, 4), np.int32))).all()


def test_intervals_are_percentiles_of_what_is_there():
    samples = np.stack([np.arange(101.0), np.full(101, np.nan), np.r_[np.arange(11.0), np.full(90, np.nan)]], axis=1)
    low, high = interval(samples)
    assert low == pytest.approx([5, np.nan, 0.5], nan_ok=True)
    assert high == pytest.approx([95, np.nan, 9.5], nan_ok=True)


def test_the_interval_of_a_median_covers_the_truth_as_often_as_it_says():
    """200 samples of 60 normal values: a 90 % interval holds the true median in 90 %, give or take three standard errors."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        values = rng.normal(size=60)
        samples = np.concatenate([Median(values).of(c) for c in resamples(60, 200, seed)])
        low, high = interval(samples)
        held += low <= 0 <= high
    assert 0.836 <= held / 200 <= 0.964
