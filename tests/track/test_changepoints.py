"""Exact segmentation against trying every cut, and what the gain says of phases, trends and scatter."""

from itertools import combinations

import numpy as np
import pytest

from stagediff.track.changepoints import AXES, SHORTEST, axis_weights, coordinates, segment, shuffled_gain, trend_gain

PYTHIA = np.array([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 4000, 8000, 16000, 33000, 63000, 103000, 143000])


def plain_cost(series: np.ndarray, weights: np.ndarray, starts: tuple[int, ...]) -> float:
    """Weighted squared error around segment means of the standardised series, one value at a time."""
    T, S = series.shape
    cost = 0.0
    for s in range(S):
        known = [t for t in range(T) if np.isfinite(series[t, s])]
        mean = sum(weights[t] * series[t, s] for t in known) / sum(weights[t] for t in known)
        spread = np.sqrt(sum(weights[t] * (series[t, s] - mean) ** 2 for t in known) / sum(weights[t] for t in known))
        if not spread > 1e-9:
            continue
        for low, high in zip((0, *starts), (*starts, T), strict=True):
            inside = [t for t in known if low <= t < high]
            if inside:
                middle = sum(weights[t] * series[t, s] for t in inside) / sum(weights[t] for t in inside)
                cost += sum(weights[t] * ((series[t, s] - middle) / spread) ** 2 for t in inside)
    return cost


def every_cut(T: int, segments: int) -> list[tuple[int, ...]]:
    cuts = combinations(range(1, T), segments - 1)
    return [c for c in cuts if min(np.diff([0, *c, T])) >= SHORTEST]


@pytest.mark.parametrize("segments", [2, 3, 4])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("seed", range(3))
def test_the_cut_is_the_best_of_all(segments, axis, seed):
    rng = np.random.default_rng(seed)
    T = 11
    steps = np.sort(rng.choice(np.arange(1, 200), T, replace=False)) - 1
    series = rng.normal(size=(T, 4)) * [1, 100, 0.01, 1] + [0, 5, -3, 1]
    series[0, 1] = np.nan
    series[4:6, 2] = np.nan
    series[:, 3] = 0.7  # constant: has no say
    weights = axis_weights(steps, axis)
    costs = {cut: plain_cost(series, weights, cut) for cut in every_cut(T, segments)}
    found = segment(series, weights, segments)
    best = min(costs, key=costs.get)
    assert found.starts == best
    fewer = min(plain_cost(series, weights, cut) for cut in every_cut(T, segments - 1))
    assert found.gain == pytest.approx(1 - costs[best] / fewer, abs=1e-9)


@pytest.mark.parametrize("axis", AXES)
def test_weights_are_the_stretch_nearest_to_each_checkpoint(axis):
    """Counted on a fine grid of the axis."""
    x = coordinates(PYTHIA, axis)
    grid = np.linspace(x[0], x[-1], 2_000_001)
    nearest = np.bincount(np.abs(np.searchsorted((x[1:] + x[:-1]) / 2, grid)), minlength=len(x)) / len(grid)
    weights = axis_weights(PYTHIA, axis)
    assert weights.mean() == pytest.approx(1)
    if axis == "index":
        assert (weights == 1).all()
    else:
        assert weights / len(x) == pytest.approx(nearest, abs=2e-6)


def planted(starts: tuple[int, ...], noise: float, seed: int, series: int = 4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    levels = rng.choice([-1.0, 1.0], (len(starts) + 1, series)).cumsum(0) * rng.uniform(0.5, 2, series)
    phase = np.searchsorted(starts, np.arange(len(PYTHIA)), side="right")
    return levels[phase] + noise * rng.normal(size=(len(PYTHIA), series))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("axis", ["index", "log_step"])
def test_planted_phases_are_found_and_stand_out(axis, seed):
    series = planted((7, 14), 0.15, seed)
    weights = axis_weights(PYTHIA, axis)
    found = segment(series, weights, 3)
    assert np.abs(np.array(found.starts) - (7, 14)).max() <= 1
    assert found.gain > max(shuffled_gain(series, weights, 3, 100, seed), trend_gain(PYTHIA, axis, 3))


@pytest.mark.parametrize("seed", range(4))
def test_on_the_step_axis_a_phase_of_few_steps_weighs_little(seed):
    """Of three changes, at step 16, at 2,000 and at 63,000, two can be told: by checkpoints all weigh alike, by steps the late ones count."""
    rng = np.random.default_rng(seed)
    level = np.searchsorted([16, 2000, 63000], PYTHIA, side="right").astype(float)
    series = level[:, None] + 0.05 * rng.normal(size=(len(PYTHIA), 1))
    by_step = PYTHIA[list(segment(series, axis_weights(PYTHIA, "step"), 2).starts)]
    by_index = PYTHIA[list(segment(series, axis_weights(PYTHIA, "index"), 2).starts)]
    assert by_step[0] == 63000
    assert by_index[0] < 63000


def test_scatter_alone_gains_no_more_than_its_shuffles():
    """Of 60 scattered series about 1 in 20 passes the 95 % quantile."""
    weights = axis_weights(PYTHIA, "index")
    passed = 0
    for seed in range(60):
        series = np.random.default_rng(seed).normal(size=(len(PYTHIA), 3))
        passed += segment(series, weights, 3).gain > shuffled_gain(series, weights, 3, 60, seed)
    assert passed <= 9


def test_a_straight_line_gains_what_arithmetic_says():
    """n equal parts of a line leave 1/n^2 of its variation: two leave 1/4, three 1/9, so the third gains 1 - 4/9. Of few points nearly so."""
    assert trend_gain(np.arange(600), "index", 2) == pytest.approx(1 - 1 / 4, abs=1e-3)
    assert trend_gain(np.arange(600), "step", 3) == pytest.approx(1 - 4 / 9, abs=1e-3)


def test_what_does_not_vary_has_no_gain():
    flat = np.tile([0.3, 1.3, 2.3], (8, 1))
    assert np.isnan(segment(flat, np.ones(8), 3).gain)
    assert np.isnan(shuffled_gain(flat, np.ones(8), 3, 5, 0))


def test_a_third_phase_of_two_clean_ones_gains_nothing():
    series = np.repeat([0.0, 1.0], 5)[:, None]
    assert segment(series, np.ones(10), 2).gain == pytest.approx(1)
    assert segment(series, np.ones(10), 2).starts == (5,)
    assert segment(series, np.ones(10), 3).gain == 0


@pytest.mark.parametrize(("points", "segments"), [(5, 3), (3, 2), (10, 1)])
def test_too_few_points_are_refused(points, segments):
    with pytest.raises(ValueError, match="cannot be cut"):
        segment(np.zeros((points, 1)), np.ones(points), segments)
