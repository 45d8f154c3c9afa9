"""Enrichment against planted labels."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import fisher_exact
from sklearn.metrics import roc_auc_score

from stagediff.diff.enrichment import carries_new_data, enrichment, headline


def planted(features: int = 3000, carriers: int = 40, seed: int = 0) -> pd.DataFrame:
    """Carriers turned on both paths; x sees only half of them; the direct finetune is blind; the last 500 features are dead with cosine 1."""
    rng = np.random.default_rng(seed)
    flagged = np.zeros(features, bool)
    flagged[rng.choice(features - 500, carriers, replace=False)] = True
    near = lambda: 1 - np.abs(rng.normal(0, 0.01, features))  # noqa: E731
    x, y = near(), near()
    y[flagged] -= 0.3
    x[np.flatnonzero(flagged)[::2]] -= 0.3
    alive = np.arange(features) < features - 500
    table = pd.DataFrame({"x": x, "y": y, "cos_s_d": near(), "cos_s_m": near(), "cos_s_f_direct": near(), "alive": alive})
    table.loc[~alive, ["x", "y"]] = 1.0
    table["score"] = table.x + table.y
    table["new_top"] = np.where(flagged, 0.7, 0.05)
    table.loc[~alive, "new_top"] = np.nan
    return table


def test_labels_need_half_of_the_top_examples():
    assert carries_new_data(pd.DataFrame({"new_top": [0.5, 0.49, 1.0, np.nan, 0.0]})).tolist() == [True, False, True, False, False]


def test_the_region_is_the_lowest_percent_and_is_compared_with_scipy():
    table = planted()
    rows = enrichment(table, 500, 0).set_index("measure")
    score = rows.loc["score"]
    assert score.region == 25
    assert score.region_flagged == 25
    assert score.random == 500
    assert score.alive == 2500
    assert score.flagged == 40
    _, p = fisher_exact([[25, 0], [score.random_flagged, 500 - score.random_flagged]], alternative="greater")
    assert score.p == pytest.approx(p, rel=1e-6)
    assert score.ratio == pytest.approx(1 / (score.random_flagged / 500))
    alive = table.alive
    assert score.auroc == pytest.approx(roc_auc_score(carries_new_data(table)[alive], -table.score[alive]))
    assert score.auroc == pytest.approx(1.0)
    assert score.average_precision == pytest.approx(1.0)
    assert 0.3 < rows.loc["cos_s_f_direct"].auroc < 0.7 < rows.loc["x"].auroc < 0.95


def test_the_headline_gives_counts_as_whole_numbers_and_agrees_with_the_table():
    table = planted()
    rows = enrichment(table, 500, 0)
    figures, score = headline(table, rows), rows.set_index("measure").loc["score"]
    for name in ("alive", "flagged", "region", "region_flagged", "random", "random_flagged"):
        assert type(figures[f"enrichment_{name}"]) is int
        assert figures[f"enrichment_{name}"] == score[name]
    assert figures["enrichment_p"] == score.p
    assert figures["auroc_direct"] == rows.set_index("measure").loc["cos_s_f_direct"].auroc
    assert figures["auroc_gain"] == pytest.approx(figures["auroc_score"] - figures["auroc_direct"])
    assert 0 < figures["auroc_gain_low"] < figures["auroc_gain"] < figures["auroc_gain_high"]
    assert figures["auroc_score_low"] < figures["auroc_score"] == figures["auroc_score_high"] == 1


def test_the_region_has_at_least_ten_features():
    table = planted(features=800, carriers=10)
    assert (enrichment(table, 500, 0).region == 10).all()


def test_control_columns_are_judged_where_there_are_some():
    table = planted().assign(cos_control_x=np.linspace(0, 1, 3000))
    assert "cos_control_x" in set(enrichment(table, 500, 0).measure)


def test_without_carriers_nothing_is_enriched():
    table = planted().assign(new_top=0.0)
    rows = enrichment(table, 500, 0)
    assert (rows.p == 1).all()
    assert rows.auroc.isna().all()
    assert (rows.flagged == 0).all()
    figures = headline(table, rows)
    assert figures["auroc_score"] is None
    assert figures["auroc_gain"] is None
    assert figures["auroc_score_low"] is None
    assert figures["enrichment_ratio"] is None
    assert figures["enrichment_p"] == 1


def test_without_alive_features_the_figures_are_empty():
    table = planted().assign(alive=False)
    rows = enrichment(table, 500, 0)
    assert (rows.alive == 0).all()
    assert headline(table, rows)["enrichment_region_share"] is None


def test_a_feature_without_a_cosine_takes_no_part():
    table = planted()
    table.loc[3, ["x", "score"]] = np.nan
    assert enrichment(table, 500, 0).set_index("measure").loc["score"].alive == 2499
