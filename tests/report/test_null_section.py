"""The report's part about the retrain null."""

import re

import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control

from stagediff.diff.section.null import FOREMOST, section
from stagediff.diff.spec import NullSpec
from stagediff.sections import ReportContext
from stagediff.store import Store

FIGURES = {
    "repeats": 3,
    "alive": 190,
    "null_values_x": 570,
    "null_values_y": 565,
    "smallest_p": 1 / 566,
    "together_for_q_0.1": 4,
    "reaches_q_0.1": True,
    "q_below_0.1": 6,
    "no_change_q_below_0.1": 0.005,
    "x_median": 0.98,
    "y_median": 0.97,
    "null_x_median": 0.991,
    "null_y_median": 0.99,
}


@pytest.fixture
def said(tmp_path):
    """said(**figures) -> the section's HTML, and the table behind it."""

    def make(**figures):
        store = Store(str(tmp_path / str(len(figures))))
        rng = np.random.default_rng(0)
        table = pd.DataFrame(
            {"feature": np.arange(200), "x": rng.random(200), "y": rng.random(200), "p_x": rng.random(200), "p_y": rng.random(200)}
        )
        table.loc[190:, ["p_x", "p_y"]] = np.nan
        table["p"] = table[["p_x", "p_y"]].max(axis=1, skipna=False)
        table["q"] = np.nan
        table.loc[:189, "q"] = false_discovery_control(table.p[:190])
        spec = NullSpec(dictionaries={}, statistics={}, nulls={}, null_statistics={})
        with store.write(spec) as writer:
            writer.write_table("features.parquet", table)
            writer.commit(figures={**FIGURES, **figures}, numerics={})
        return section(ReportContext(store, {"retrain-null": spec.ref}, {}, 10, 0)).html, table

    return make


def test_features_with_the_smallest_p_are_listed(said):
    html, table = said()
    shown = [int(i) for i in re.findall(r'<tr><th scope="row">(\d+)</th>', html)]
    assert shown == table.sort_values("p").feature.head(FOREMOST).tolist()


def test_what_was_called_where_nothing_changed_and_the_smallest_p_are_said(said):
    html, _ = said()
    for text in ("0.5 %", "0.0018", "565 null values per axis", "0.991"):
        assert text in html
    assert "out of reach" not in html


def test_a_level_out_of_reach_is_warned_of(said):
    html, _ = said(**{"reaches_q_0.1": False, "together_for_q_0.1": 40})
    assert "out of reach" in html
    assert "At least 40 features" in html


def test_a_run_without_a_null_has_no_such_part(made):
    assert section(ReportContext(made.store, made.spec.nodes, made.spec.config, 10, 0)) is None
