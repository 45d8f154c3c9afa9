"""`stagediff compare`: which runs are meant, how far they agree, and the page."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from scipy.stats import ks_2samp
from track import fake_tables
from typer.testing import CliRunner

from stagediff.errors import UserError
from stagediff.store import Store
from stagediff.track.compare import command, compare_page, open_sources
from stagediff.track.section.comparison import Compared, agreement, progress_of
from stagediff.track.spec import PATTERNS

F, T = 150, 8


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> list:
    """Finished runs: two alike, and one in which everything happens later, with other checkpoints; the first two in one store."""
    folder = tmp_path_factory.mktemp("compare")
    runs = [
        fake_tables.write_track(Store(str(folder / "a")), F, T, seed=1, name="small"),
        fake_tables.write_track(Store(str(folder / "a")), F, T, seed=2, name="middle"),
        fake_tables.write_track(Store(str(folder / "b")), F + 30, T + 2, seed=3, name="small", slower=0.25),
    ]
    for run in runs:
        fake_tables.finish(run)
    return runs


def store_of(run) -> str:
    return run.store.root


def made_up(steps: list[int], **parts) -> Compared:
    return Compared("made up", SimpleNamespace(steps=steps, features=10, measure="activation_cosine"), parts)


def between(a: Compared, b: Compared) -> dict:
    return agreement([a, b])[0]


# --- which runs


def test_a_store_gives_all_its_tracked_runs_and_equal_names_are_told_apart(three):
    found = open_sources([store_of(three[0]), store_of(three[2])])
    assert [name for name, _ in found] == ["middle", f"small in {store_of(three[0])}", f"small in {store_of(three[2])}"]
    same = open_sources([store_of(three[0]), store_of(three[0])])
    assert len({name for name, _ in same}) == 4


def test_of_two_reports_with_one_title_the_newest_counts(three, tmp_path):
    store = Store(str(tmp_path))
    for seed in (1, 2):
        fake_tables.finish(fake_tables.write_track(store, 60, 5, seed=seed, name="grown"))
    newest = max(store.refs("reports"), key=lambda ref: store.artifact(ref).manifest.created)
    found = open_sources([str(tmp_path), store_of(three[2])])
    assert [name for name, _ in found] == ["grown", "small"]
    assert found[0][1].nodes == store.artifact(newest).spec().nodes


def test_one_run_is_too_few(three):
    with pytest.raises(UserError, match="holds 1 finished tracked run; a comparison needs at least two"):
        open_sources([store_of(three[2])])


def test_a_store_without_a_finished_tracked_run_is_refused(three, tmp_path):
    Store(str(tmp_path / "empty"))
    (tmp_path / "empty").mkdir(exist_ok=True)
    with pytest.raises(UserError, match="no finished report about a tracked run"):
        open_sources([str(tmp_path / "empty"), store_of(three[0])])
    with pytest.raises(UserError, match="There is no store"):
        open_sources([str(tmp_path / "nowhere"), store_of(three[0])])


def test_a_config_of_another_kind_and_an_unfinished_run_are_refused(tmp_path, monkeypatch):
    import yaml

    from stagediff.plan import Plan
    from stagediff.track.spec import EfficiencySpec

    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"kind": "stagewise"}))
    loaded = SimpleNamespace(store=str(tmp_path / "s"), kind="stagewise")
    plan = Plan("run")
    monkeypatch.setattr("stagediff.config.load_config", lambda path: loaded)
    monkeypatch.setattr("stagediff.config.make_plan", lambda *_: plan)
    with pytest.raises(UserError, match=r"run.yaml is a run of kind 'stagewise', which follows no training"):
        open_sources([str(config)])
    plan.add("efficiency", EfficiencySpec(rows=()))
    with pytest.raises(UserError, match=r"is not finished; missing: efficiency"):
        open_sources([str(config)])


# --- how far they agree


def test_a_run_agrees_with_itself(three):
    _, rows = compare_page([(n, c) for n, c in zip("ab", [open_sources([store_of(three[0])])[0][1]] * 2, strict=True)])
    row = rows[0]
    for name in (
        "share_difference",
        "pattern_difference",
        "cosine_difference",
        "boundary_difference",
        "formation_token",
        "formation_concept",
        "median_token",
        "ev_difference",
        "ev_last",
    ):
        assert row[name] == pytest.approx(0, abs=1e-12), name
    assert row["share_correlation"] == pytest.approx(1)
    assert row["boundary_correlation"] == pytest.approx(1)
    assert row["boundary_overlap"] == 1


def test_a_later_run_forms_later_and_is_farther_away_than_one_alike(three):
    by_name = dict(open_sources([store_of(three[0]), store_of(three[2])]))
    alike, other = f"small in {store_of(three[0])}", f"small in {store_of(three[2])}"
    _, rows = compare_page([(n, by_name[n]) for n in ("middle", alike, other)])
    near, far = rows[0], rows[1]
    assert (near["a"], near["b"], far["b"]) == ("middle", alike, other)
    assert far["median_token"] > 0.05
    assert far["formation_token"] > 2 * near["formation_token"]
    assert far["share_difference"] > 2 * near["share_difference"]


def test_distance_of_formation_is_kolmogorov_smirnov_where_the_checkpoints_are_the_same():
    rng = np.random.default_rng(0)
    steps, draws = list(range(9)), [rng.integers(0, 9, 400), np.minimum(rng.integers(0, 12, 300), 8)]
    parts = []
    for draw in draws:
        hits = [float(np.mean(draw <= k)) for k in range(9)]
        parts.append({"formed": {"token": {"formed": hits, "ever": len(draw), "features": len(draw), "median": int(np.median(draw))}}})
    row = between(made_up(steps, **parts[0]), made_up(steps, **parts[1]))
    assert row["formation_token"] == pytest.approx(ks_2samp(*draws).statistic, abs=1e-9)
    assert row["formation_concept"] is None
    at = progress_of(np.array(steps, float))
    assert row["median_token"] == pytest.approx(at[int(np.median(draws[1]))] - at[int(np.median(draws[0]))])


def test_fewer_checkpoints_do_not_make_a_run_look_later():
    steps = list(range(0, 1001, 10))
    few = [s for s in steps if s % 50 == 0]
    runs = [
        made_up(s, formed={"token": {"formed": [v / 1000 for v in s], "ever": 10, "features": 10, "median": len(s) // 2}})
        for s in (steps, few)
    ]
    assert between(*runs)["formation_token"] < 0.06


def test_shares_are_compared_over_progress_among_alive_features_with_a_kind():
    steps = [0, 9, 99]
    a = {"token": [0, 5, 10], "concept": [0, 0, 0], "noise": [10, 5, 0], "dead": [0, 90, 7], "unclear": [3, 0, 1]}
    b = {"token": [5, 5, 5], "concept": [0, 0, 0], "noise": [5, 5, 5], "dead": [0, 0, 0], "unclear": [0, 0, 0]}
    row = between(made_up(steps, shares=a), made_up(steps, shares=b))
    # token and noise differ by |p - 1/2| at progress p, concept by nothing: (1/4 + 1/4 + 0) / 3
    assert row["share_difference"] == pytest.approx(1 / 6, abs=2e-3)
    assert between(made_up(steps, shares=a), made_up(steps))["share_difference"] is None


def test_patterns_are_compared_from_the_second_checkpoint_on():
    steps = [0, 1, 3, 7]  # progress 0, 1/3, 2/3, 1
    nothing = {name: [0] * 4 for name in PATTERNS}
    a = {**nothing, "maintaining": [0, 10, 10, 10]}
    b = {**nothing, "maintaining": [0, 10, 10, 0], "grouping": [0, 0, 0, 5]}
    row = between(made_up(steps, counts=a), made_up(steps, counts=b))
    # two of eight patterns differ by 0 up to progress 2/3, and by up to 1 at the end: a triangle over half of what is compared
    assert row["pattern_difference"] == pytest.approx(2 / 8 / 2 / 2, abs=1e-3)
    assert between(made_up(steps, counts=a), made_up(steps))["pattern_difference"] is None


def test_drift_is_the_mean_gap_of_median_cosines():
    steps = [0, 1, 3, 7]
    parts = [{"cosines": {"all": {"median": m}}} for m in ([0.2, 0.6, 0.8, 1.0], [0.4, 0.6, 0.8, 1.0])]
    row = between(*(made_up(steps, **p) for p in parts))
    assert row["cosine_difference"] == pytest.approx(0.2 / 3 / 2, abs=1e-3)
    assert between(made_up(steps, **parts[0]), made_up(steps))["cosine_difference"] is None


def test_boundaries_are_paired_by_axis_and_order():
    def boundary(at):
        return {"at": at, "low": max(at - 1, 0), "high": at + 1, "gain": None}

    steps = [0, 1, 3, 7, 15, 31, 63]
    places = ({"index": (1, 4), "step": (5,)}, {"index": (2, 4), "step": (2,)})
    parts = [{"phases": {"boundaries": {axis: [boundary(k) for k in at] for axis, at in p.items()}, "series": {}}} for p in places]
    row = between(*(made_up(steps, **p) for p in parts))
    assert row["boundaries"] == 3
    assert row["boundary_difference"] == pytest.approx((1 + 0 + 3) / 3 / 6)  # log2(1 + step) is the index: progress is index / 6
    assert row["boundary_overlap"] == pytest.approx(2 / 3)
    assert row["boundary_correlation"] == pytest.approx(np.corrcoef([1, 4, 5], [2, 4, 2])[0, 1])


def test_quality_is_the_mean_gap_over_progress():
    steps = [0, 1, 3, 7]
    quality = [
        {"efficiency": {"quality": {"chained": {"at": [0, 1, 2, 3], "explained_variance": ev}}}} for ev in ([0.8] * 4, [0.8, 0.8, 0.8, 0.9])
    ]
    row = between(*(made_up(steps, **q) for q in quality))
    assert row["ev_difference"] == pytest.approx(0.1 / 3 / 2, abs=1e-3)
    assert row["ev_last"] == pytest.approx(0.1)


# --- the command


@pytest.fixture
def run_command():
    app = typer.Typer()
    app.command()(command)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_the_command_writes_one_page_and_says_how_far_runs_agree(three, tmp_path, run_command):
    out = tmp_path / "c.html"
    result = run_command(store_of(three[0]), store_of(three[2]), "--out", str(out), "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.output)
    assert said["page"] == str(out)
    assert len(said["agreement"]) == 3
    html = out.read_text(encoding="utf-8")
    assert "default-src 'none'" in html
    for figure in ("kinds-figures", "boundaries", "formation-figures", "cosines", "quality-l0"):
        assert f'id="{figure}"' in html
    for number in ("share_difference", "pattern_difference", "cosine_difference"):
        assert f"{said['agreement'][0][number]:.3f}" in html
    assert "Model</th>" in html


def test_a_place_that_cannot_be_written_is_said(three, tmp_path, run_command):
    result = run_command(store_of(three[0]), "--out", str(tmp_path / "no" / "c.html"))
    assert isinstance(result.exception, UserError)
    assert "cannot be written" in str(result.exception)
