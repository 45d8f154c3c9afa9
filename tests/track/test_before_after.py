"""Drift before and after formation against plain loops, and on planted movements where the answer is known."""

import numpy as np
import pytest

from stagediff.track.before_after import BEFORE_AFTER_COLUMNS, FEWEST, SAME_STEP_COLUMNS, before_after, headline, same_step

STEPS = np.array([0, 1, 2, 4, 8, 16, 32])
T = len(STEPS)


def random_drift(F: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drift = rng.gamma(2, 0.1, (F, T))
    drift[rng.random((F, T)) < 0.2] = np.nan
    drift[:, 0] = np.nan
    return drift


def test_the_means_equal_a_loop():
    drift = random_drift(300)
    formed = np.random.default_rng(1).choice([*STEPS.astype(float), np.nan], 300)
    table = before_after(drift, STEPS, formed, np.zeros(300))
    assert list(table.columns) == list(BEFORE_AFTER_COLUMNS)
    for i in range(300):
        groups = {"drift_before": [], "drift_after": []}
        for t in range(1, T):
            if np.isfinite(drift[i, t]) and not np.isnan(formed[i]):
                groups["drift_before" if STEPS[t] < formed[i] else "drift_after"].append(drift[i, t])
        for name, values in groups.items():
            assert table[name][i] == pytest.approx(np.mean(values) if values else np.nan, nan_ok=True)


def test_a_missing_value_has_a_reason_and_only_then():
    drift = np.full((5, T), 0.1)
    drift[:, 0] = np.nan
    drift[3, 1:3] = np.nan  # dead until step 2, formed at 4
    drift[4, 3:] = np.nan  # dead from step 4 on, where it formed
    table = before_after(drift, STEPS, np.array([4, np.nan, 1, 4, 4.0]), np.zeros(5))
    assert table.reason.fillna("").tolist() == [
        "",
        "never formed",
        "formed by the second checkpoint: no move before",
        "dead before formation",
        "dead after formation",
    ]
    assert np.isnan(table.drift_before).tolist() == [False, True, True, True, False]
    assert np.isnan(table.drift_after).tolist() == [False, True, False, False, True]


def settling(F: int, before: float, after: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features that move `before` into each checkpoint until they form and `after` from then on, with scatter."""
    rng = np.random.default_rng(seed)
    formed = rng.choice(STEPS[2:].astype(float), F)
    drift = np.where(formed[:, None] <= STEPS, after, before) * rng.lognormal(0, 0.3, (F, T))
    drift[:, 0] = np.nan
    return drift, formed


@pytest.mark.parametrize("seed", range(4))
def test_features_that_settle_are_told_from_the_null(seed):
    drift, formed = settling(400, 0.3, 0.05, seed)
    null = 0.05 * np.random.default_rng(seed + 100).lognormal(0, 0.3, 400)
    figures = headline(before_after(drift, STEPS, formed, null), seed)
    assert figures["features_compared"] == 400
    assert figures["drift_before_low"] < figures["drift_before"] < figures["drift_before_high"]
    assert figures["drift_before"] == pytest.approx(0.3, rel=0.1)
    assert figures["drift_after"] == pytest.approx(0.05, rel=0.1)
    assert figures["drift_null"] == pytest.approx(0.05, rel=0.1)
    assert figures["drift_change_high"] < 0
    assert figures["drift_smaller_after"] > 0.99
    assert abs(figures["drift_after_above_null"]) < 0.01


def test_paired_medians_are_those_of_the_differences():
    drift, formed = settling(101, 0.3, 0.1, 0)
    null = np.random.default_rng(5).gamma(2, 0.02, 101)
    null[:20] = np.nan
    table = before_after(drift, STEPS, formed, null)
    figures = headline(table, 0)
    assert figures["drift_change"] == pytest.approx(np.median(table.drift_after - table.drift_before))
    assert figures["drift_after_above_null"] == pytest.approx(np.median((table.drift_after - null)[20:]))
    assert figures["drift_null"] == pytest.approx(np.median(null[20:]))


@pytest.mark.parametrize("seed", range(4))
def test_moving_less_late_in_training_is_not_taken_for_settling(seed):
    """Everything moves less from checkpoint to checkpoint, formed or not: the comparison within features shows a fall, the one at the same step none."""
    rng = np.random.default_rng(seed)
    formed = rng.choice(STEPS[2:].astype(float), 600)
    drift = 0.5 ** np.arange(T) * rng.lognormal(0, 0.3, (600, T))
    drift[:, 0] = np.nan
    figures = headline(before_after(drift, STEPS, formed, np.full(600, np.nan)), seed)
    assert figures["drift_change_high"] < 0
    assert figures["drift_null"] is None
    assert figures["drift_after_above_null"] is None
    _, same = same_step(drift, STEPS, formed, seed)
    settled, formed = settling(600, 0.3, 0.1, seed)
    _, real = same_step(settled, STEPS, formed, seed)
    assert abs(same["same_step_difference"]) < 0.02
    assert real["same_step_difference"] == pytest.approx(-0.2, abs=0.03)
    assert real["same_step_difference_high"] < -0.15


def test_the_comparison_at_the_same_step_equals_a_loop():
    drift = random_drift(200, seed=3)
    formed = np.random.default_rng(4).choice([*STEPS.astype(float), np.nan], 200)
    table, figures = same_step(drift, STEPS, formed, 0)
    assert list(table.columns) == list(SAME_STEP_COLUMNS)
    differences = []
    for row, t in zip(table.itertuples(), range(1, T), strict=True):
        old = [drift[i, t] for i in range(200) if formed[i] <= STEPS[t] and np.isfinite(drift[i, t])]
        new = [drift[i, t] for i in range(200) if formed[i] > STEPS[t] and np.isfinite(drift[i, t])]
        assert (row.step, row.formed, row.unformed) == (STEPS[t], len(old), len(new))
        if min(len(old), len(new)) >= FEWEST:
            assert row.difference == pytest.approx(np.median(old) - np.median(new))
            assert row.low <= row.difference <= row.high
            differences.append(row.difference)
        else:
            assert np.isnan(row.difference)
    assert figures["same_step_steps"] == len(differences) == T - 2  # at the last step nothing is left to form
    assert figures["same_step_difference"] == pytest.approx(np.mean(differences))


def test_nothing_formed_gives_empty_figures():
    drift, formed = random_drift(30), np.full(30, np.nan)
    figures = headline(before_after(drift, STEPS, formed, np.full(30, 0.1)), 0)
    assert figures["features_compared"] == 0
    assert figures["drift_before"] is None
    assert figures["drift_change_low"] is None
    assert figures["drift_null"] == pytest.approx(0.1)
    table, same = same_step(drift, STEPS, formed, 0)
    assert (table.formed == 0).all()
    assert same == {
        "same_step_steps": 0,
        "same_step_difference": None,
        "same_step_difference_low": None,
        "same_step_difference_high": None,
    }
