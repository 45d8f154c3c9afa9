"""How far the scatter's groups mix along one path: planted groups whose answer is known, and the interval against a plain bootstrap."""

import numpy as np
import pandas as pd
import pytest

from stagediff import steps
from stagediff.diff.cuts import QUADRANTS
from stagediff.diff.spec import DiffSpec
from stagediff.evidence.decomposition.figure import figure_files
from stagediff.evidence.decomposition.mixing import COLUMNS, _interval, mixing, separable
from stagediff.evidence.decomposition.section import section
from stagediff.evidence.decomposition.spec import DecompositionSpec
from stagediff.sections import ReportContext


def planted(n: int = 100, seed: int = 0) -> pd.DataFrame:
    """Four groups of n features. The data path shows x and the data's own move: lower left and upper left are the same there; along the model path lower
    left and lower right are."""
    rng = np.random.default_rng(seed)
    parts = []
    for name in QUADRANTS:
        x_low, y_low = name in ("lower_left", "upper_left"), name in ("lower_left", "lower_right")
        low = lambda on: rng.normal(0.4 if on else 0.95, 0.01, n)  # noqa: E731
        parts.append(pd.DataFrame({"x": low(x_low), "y": low(y_low), "cos_s_d": low(False), "cos_s_m": low(False), "quadrant": name}))
    dead = pd.DataFrame({"x": 1.0, "y": 1.0, "cos_s_d": 1.0, "cos_s_m": 1.0, "quadrant": [""] * 20})
    table = pd.concat([*parts, dead], ignore_index=True)
    return table.assign(new_top=np.where(table.quadrant == "lower_left", 0.9, 0.0))


def row(table: pd.DataFrame, view: str, group: str, against: str):
    return table[(table.view == view) & (table.group == group) & (table.against == against)].iloc[0]


def test_only_both_paths_tell_the_lower_left_apart():
    table = mixing(planted(), draws=100, seed=0)
    assert list(table.columns) == list(COLUMNS)
    assert row(table, "both", "lower_left", "others").auroc == 1.0
    assert row(table, "both", "lower_left", "others").separable == 1.0
    assert row(table, "data_path", "lower_left", "upper_left").auroc == pytest.approx(0.5, abs=0.1)
    assert row(table, "data_path", "lower_left", "lower_right").auroc == 1.0
    assert row(table, "model_path", "lower_left", "lower_right").auroc == pytest.approx(0.5, abs=0.1)
    assert row(table, "data_path", "lower_left", "others").separable < 0.1
    carriers, group = (row(table, "model_path", g, "others") for g in ("carriers", "lower_left"))
    assert (carriers.auroc, carriers.features, carriers.others) == (group.auroc, 100, 300)  # dead features take no part


def test_the_interval_is_a_bootstraps():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 60), rng.normal(0.8, 1, 90).round(1)
    low, high = _interval(a, b, 4000, np.random.default_rng(1))
    again = np.random.default_rng(2)
    plain = []
    for _ in range(4000):
        mine, other = again.choice(a, len(a)), again.choice(b, len(b))
        plain.append((mine[:, None] < other).mean() + (mine[:, None] == other).mean() / 2)
    assert (low, high) == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])), abs=0.006)


def test_the_separable_share_counts_what_lies_below_the_lowest_hundredth_of_the_others():
    others = np.arange(1000.0)
    assert separable(np.array([-5.0, 5.0, 20.0, 500.0]), others) == 0.5
    assert np.isnan(separable(np.array([]), others))


def test_an_empty_group_has_no_numbers():
    features = planted()
    features = features[features.quadrant != "lower_left"]
    empty = row(mixing(features, draws=100, seed=0), "both", "lower_left", "others")
    assert (empty.features, np.isnan(empty.auroc), np.isnan(empty.low), np.isnan(empty.separable)) == (0, True, True, True)


def test_the_same_table_gives_the_same_numbers_and_picture():
    features = planted()
    pd.testing.assert_frame_equal(mixing(features, 100, 3), mixing(features, 100, 3))
    one, again = figure_files(features), figure_files(features)
    assert one == again
    assert b"cos(S, D)" in one["decomposition.svg"]
    assert b"cos(S, M)" in one["decomposition.svg"]


def test_the_step_names_the_neighbour_that_each_path_mixes_with_and_its_section_says_so(store, quiet):
    spec = DecompositionSpec(diff=DiffSpec(dictionaries={}, statistics={}).ref, draws=100)
    with store.write(DiffSpec(dictionaries={}, statistics={})) as w:
        w.write_table("features.parquet", planted())
        w.commit(figures={}, numerics={})
    figures = store.artifact(steps.run(spec, store, device="cpu", progress=quiet)).manifest.figures
    assert figures["auroc_data_path_upper_left"] == pytest.approx(0.5, abs=0.1)
    assert figures["auroc_model_path_lower_right"] == pytest.approx(0.5, abs=0.1)
    assert figures["auroc_both"] == 1.0
    said = section(ReportContext(store, {"diff": spec.diff, "decomposition": spec.ref}, {}, 10, 0))
    assert f"to {figures['auroc_data_path_upper_left']:.3f}. Along the model path" in said.html
    assert set(said.figures) == {"decomposition.svg", "decomposition.png"}
