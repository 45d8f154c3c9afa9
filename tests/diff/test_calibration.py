"""p- and q-values: against scipy, against loops, and on nulls that are known."""

import numpy as np
import pytest
from scipy.stats import false_discovery_control, kstest

from stagediff.diff.calibration import benjamini_hochberg, own_p_values, p_values, reach
from stagediff.diff.cuts import check_reach, select
from stagediff.diff.spec import Cut
from stagediff.errors import UserError


@pytest.mark.parametrize("seed", range(4))
def test_q_values_equal_scipys(seed):
    rng = np.random.default_rng(seed)
    p = np.round(rng.random(300) ** 2, 3 if seed % 2 else 12).clip(1e-6)  # with ties and without
    np.testing.assert_allclose(benjamini_hochberg(p), false_discovery_control(p), rtol=1e-12)


def test_undefined_p_values_are_no_tests():
    p = np.array([0.01, np.nan, 0.04, 0.03, np.nan])
    q = benjamini_hochberg(p)
    assert np.isnan(q[[1, 4]]).all()
    np.testing.assert_allclose(q[[0, 2, 3]], false_discovery_control(p[[0, 2, 3]]))
    assert np.isnan(benjamini_hochberg(np.full(3, np.nan))).all()


def drawn(n: int, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Angles whose size and spread depend on density and norm, as features' do."""
    rng = np.random.default_rng(seed)
    density, norm = 10 ** rng.uniform(-4, -1, n), rng.lognormal(0, 0.3, n)
    usual = 0.05 * density**-0.25 * norm**-0.5
    return usual * (1 + 0.3 * np.abs(rng.standard_normal(n))), [density, norm]


def test_p_is_even_where_nothing_changed_and_alike_for_rare_and_frequent_features():
    angle, like = drawn(3000, 1)
    p = p_values(angle, like, *drawn(9000, 2))
    assert kstest(p, "uniform").statistic < 0.04
    for rare in (like[0] < 1e-3, like[0] > 1e-2):
        assert (p[rare] < 0.05).mean() == pytest.approx(0.05, abs=0.02)
    raw = np.array([(drawn(9000, 2)[0] >= a).mean() for a in angle])
    assert (raw[like[0] > 1e-2] < 0.05).mean() < 0.005  # without comparing like with like, frequent features are never called


def test_p_counts_the_null_values_at_least_as_large():
    """Where all null values are neighbours, p is a plain count."""
    rng = np.random.default_rng(0)
    null, angle = rng.random(150), np.array([0.0, 0.3, 0.9, 2.0])
    p = p_values(angle, [rng.random(4)], null, [rng.random(150)])
    expected = [(1 + sum(v >= a for v in null)) / 151 for a in angle]
    np.testing.assert_allclose(p, expected)
    assert p[3] == pytest.approx(1 / 151)


def own_drawn(n: int, repeats: int, seed: int) -> np.ndarray:
    """[n, repeats] angles: each feature has a size of its own, over two orders of magnitude, and one in fifty moves far every time."""
    rng = np.random.default_rng(seed)
    size = 10 ** rng.uniform(-2.5, -0.5, n)
    size[::50] = 1.0
    return size[:, None] * rng.lognormal(0, 0.2, (n, repeats))


def test_own_p_is_even_where_nothing_changed_whatever_a_features_size():
    every = own_drawn(10_000, 4, 1)
    p = own_p_values(every[:, 0], every[:, 1:])
    assert kstest(p, "uniform").statistic < 0.05
    stands_still = every.mean(1) < np.median(every)
    for some in (stands_still, ~stands_still, np.arange(10_000) % 50 == 0):
        assert (p[some] < 0.05).mean() < 0.1
    assert (benjamini_hochberg(p) <= 0.1).sum() <= 5


def test_features_that_always_move_do_not_hide_those_that_moved_this_time():
    every = own_drawn(2000, 4, 2)
    moved = np.setdiff1d(np.arange(0, 400, 20), np.arange(0, 2000, 50))
    every[moved, 0] = 0.6  # less far than one in fifty moves every time
    own = benjamini_hochberg(own_p_values(every[:, 0], every[:, 1:]))
    assert (own[moved] <= 0.1).mean() > 0.6
    assert (np.delete(own, moved) <= 0.1).sum() <= 3
    pooled = benjamini_hochberg(p_values(every[:, 0], [], every[:, 1:].ravel(), []))
    assert not (pooled[moved] <= 0.1).any()


def test_own_p_equals_a_plain_loop():
    every = own_drawn(40, 4, 3)
    every[[3, 5], [1, 0]] = np.nan
    every[7, 1:] = np.nan
    every[8, 2:] = np.nan
    angle, null = every[:, 0], every[:, 1:]
    floor = np.median(null[np.isfinite(null)])

    def size(a):
        return np.sqrt(a**2 + floor**2)

    def against(value, others):
        return np.log(size(value) / np.sqrt(np.mean([size(o) ** 2 for o in others])))

    own = [[v for v in row if np.isfinite(v)] for row in null]
    null_t = [against(v, row[:k] + row[k + 1 :]) for row in own if len(row) > 1 for k, v in enumerate(row)]
    for i, found in enumerate(own_p_values(angle, null)):
        if not np.isfinite(angle[i]):
            assert np.isnan(found)
        elif len(own[i]) < 2:
            assert found == 1.0
        else:
            t = np.median([against(angle[i], own[i][:k] + own[i][k + 1 :]) for k in range(len(own[i]))])
            assert found == pytest.approx((1 + sum(v >= t for v in null_t)) / (1 + len(null_t)))


def test_undefined_angles_have_no_p_and_undefined_null_values_do_not_count():
    p = p_values(np.array([np.nan, 5.0]), [np.ones(2)], np.array([1.0, np.nan, 2.0]), [np.ones(3)])
    assert np.isnan(p[0])
    assert p[1] == pytest.approx(1 / 3)
    assert p_values(np.array([5.0]), [np.ones(1)], np.empty(0), [np.empty(0)]).tolist() == [1.0]


def test_the_smallest_p_is_what_the_count_allows_and_says_how_many_must_pass_together():
    can = reach(2999, 1000, 0.1)
    assert can.smallest_p == pytest.approx(1 / 3000)
    p = np.ones(1000)
    p[: can.together] = can.smallest_p
    assert (false_discovery_control(p)[: can.together] <= 0.1).all()
    p[can.together - 1] = 1
    assert false_discovery_control(p).min() > 0.1
    assert can.is_enough


@pytest.mark.parametrize(
    ("null_values", "features", "level", "enough"), [(1000, 1000, 0.1, True), (500, 1000, 0.1, False), (3000, 1000, 0.01, False)]
)
def test_a_level_out_of_reach_is_refused_with_an_explanation(null_values, features, level, enough):
    assert reach(null_values, features, level).is_enough is enough
    if enough:
        check_reach(null_values, features, level)
    else:
        with pytest.raises(UserError, match=r"smallest p is .* would have to lie beyond every null value at once.*null_seeds"):
            check_reach(null_values, features, level)


def test_the_fdr_cut_selects_by_q_and_its_quadrants_agree():
    import pandas as pd

    rng = np.random.default_rng(3)
    null = pd.DataFrame({"p_x": rng.random(200), "p_y": rng.random(200)})
    null.loc[:9, ["p_x", "p_y"]] = 1e-4
    null.loc[10:14, "p_x"] = 1e-5  # along one axis alone
    null["p"] = null.max(axis=1)
    null["q"] = false_discovery_control(null.p)
    alive = np.arange(200) != 3
    cosine = rng.random(200)
    found = select(cosine, cosine, alive, Cut(kind="fdr", value=0.05), null)
    assert np.flatnonzero(found.selected).tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert ((found.quadrant == "lower_left") == found.selected).all()
    assert set(found.quadrant[10:15]) == {"upper_left"}
    nothing = select(cosine, cosine, alive, Cut(kind="fdr", value=1e-9), null)
    assert not nothing.selected.any()
    assert set(nothing.quadrant[alive]) == {"upper_right"}
