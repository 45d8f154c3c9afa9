"""SAE-Track's part of the report: its numbers against the tables they come from, its words against the numbers, what is left out, and the page as a file.

What it does in a browser is tested in tests/integration.
"""

import base64
import importlib.util
import io
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from stagediff.sections import ReportContext
from stagediff.store import Store
from stagediff.track.section import choice as choices
from stagediff.track.section import section, words
from stagediff.track.section.choice import choose, drifts, occurred
from stagediff.track.section.overview import summarise
from stagediff.track.section.run import NODES, NONE, open_run
from stagediff.track.section.series import NEVER, pack_angles, pack_bytes, pack_decades, pack_features
from stagediff.track.section.windows import Windows
from stagediff.track.spec import KINDS, MEASURES, PATTERNS

F, T = 120, 7


def load_fakes() -> ModuleType:
    if "track_fake_tables" not in sys.modules:
        spec = importlib.util.spec_from_file_location("track_fake_tables", Path(__file__).with_name("fake_tables.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules["track_fake_tables"] = module
        spec.loader.exec_module(module)
    return sys.modules["track_fake_tables"]


@pytest.fixture(scope="module")
def fakes() -> ModuleType:
    return load_fakes()


@pytest.fixture(scope="module")
def made(fakes, tmp_path_factory) -> SimpleNamespace:
    """A run, its context, its tables, and its sections without still pictures."""
    run = fakes.write_track(Store(str(tmp_path_factory.mktemp("track") / "store")), F, T)
    context = fakes.context_of(run)
    opened = open_run(context)
    sections = without_pictures(context)
    tables = {
        (node, name.removesuffix(".parquet")): opened.artifacts[node].read_table(name) for node in NODES for name in opened.artifacts[node].names()
        if name.endswith(".parquet")
    }  # fmt: skip
    return SimpleNamespace(fake=run, context=context, run=opened, parts=summarise(opened), sections=sections, tables=tables)


def without_pictures(context: ReportContext) -> list:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stagediff.track.section.overview_files", lambda *_: {})
        patch.setattr("stagediff.track.section.feature_files", lambda *_: {})
        return section(context)


def unpack(packed: dict) -> np.ndarray:
    """What the script's decoder does, written apart from it."""
    kind = {"uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32, "int32": np.int32, "float32": np.float32}
    raw = np.frombuffer(base64.b64decode(packed["b64"]), kind.get(packed["as"], np.uint16))
    if packed["as"] == "linear":
        return np.where(raw == 65535, np.nan, packed["low"] + packed["span"] * raw / 65534)
    if packed["as"] == "log":
        return np.where(raw == 65535, np.nan, np.where(raw == 0, 0.0, np.exp(packed["low"] + packed["span"] * (raw - 1.0) / 65533)))
    if "low" not in packed:
        return raw
    values = packed["low"] + packed["span"] * raw / 254
    if packed.get("turn") == "cosine":
        values = np.cos(values)
    if packed.get("turn") == "decades":
        values = np.where(values < 0.5, 0.0, 10 ** (packed["from"] + packed["step"] * (values - 1)))
    return np.where(raw == NEVER, np.nan, values)


def pivot(table: pd.DataFrame, column: str, at: str = "step") -> np.ndarray:
    return table.pivot(index="feature", columns=at, values=column).to_numpy()


# --- reading the tables


def test_grids_are_the_tables_whatever_the_order_of_rows(made, tmp_path, monkeypatch):
    for node, name, column in (("drift", "features", "cos_final"), ("drift", "features", "cos_previous"), ("drift", "trajectories", "pc2")):
        want = pivot(made.tables[node, name], column).astype(float)
        np.testing.assert_allclose(made.run.grid(node, name, column), want, rtol=1e-6)
    monkeypatch.setattr("stagediff.track.section.run.BATCH", 100)
    formation = made.tables["formation", "formation"]
    for which in ("top", "levels"):
        want = pivot(formation[formation.set == which], "m_feature_jaccard").astype(float)
        np.testing.assert_allclose(made.run.progress(which, "feature_jaccard"), want, rtol=1e-5)


def test_kinds_patterns_and_tokens_are_the_tables(made):
    kind = pivot(made.tables["kinds", "kinds"], "kind")
    got = np.array([*KINDS, *[None] * (NONE - len(KINDS) + 1)], dtype=object)[made.run.kind]
    assert np.array_equal(got, np.where(pd.isna(kind), None, kind))
    pattern = pivot(made.tables["patterns", "patterns"], "pattern", "to_step")
    got = np.array([*PATTERNS, *[None] * (NONE - len(PATTERNS) + 1)], dtype=object)[made.run.pattern]
    assert all(v is None for v in got[:, 0])
    assert np.array_equal(got[:, 1:], np.where(pd.isna(pattern), None, pattern))
    token = pivot(made.tables["kinds", "kinds"], "token")
    codes = made.run.token
    texts = list(made.run.words.index)
    got = np.array([[texts[i] if i >= 0 else None for i in row] for row in codes], dtype=object)
    assert np.array_equal(got, np.where(pd.isna(token), None, token))


def test_formation_is_an_index_into_the_checkpoints_and_t_for_never(made):
    table = made.tables["formation", "formed"]
    part = table[(table.set == "top") & (table.measure == MEASURES[0])].set_index("feature").formed_step
    want = [T if np.isnan(s) else made.run.steps.index(int(s)) for s in part]
    assert made.run.formed("top", MEASURES[0]).tolist() == want
    assert T in want


def test_kinds_and_patterns_fit_their_packing():
    assert len(KINDS) < NONE
    assert len(PATTERNS) <= 8


# --- packing


def test_bytes_angles_and_decades_decode_within_their_stated_errors():
    rng = np.random.default_rng(0)
    values = np.append(rng.normal(size=500), np.nan)
    span = np.nanmax(values) - np.nanmin(values)
    np.testing.assert_allclose(unpack(pack_bytes(values)), values, atol=span / 508 * 1.001)
    cosines = np.cos(rng.uniform(0, np.pi, 400))
    decoded = unpack(pack_angles(np.append(cosines, np.nan)))
    assert np.isnan(decoded[-1])
    assert np.abs(np.arccos(np.clip(decoded[:-1], -1, 1)) - np.arccos(cosines)).max() <= np.pi / 508 * 1.001
    for cosine, error in ((1.0, 2e-5), (0.998, 5e-4), (0.0, 7e-3)):
        near = np.clip(cosine + np.linspace(-1e-5, 0, 20), -1, 1)
        assert np.abs(unpack(pack_angles(near)) - near).max() <= error
    densities = np.concatenate([[0.0], 10 ** rng.uniform(-6, -1, 300), [np.nan]])
    got = unpack(pack_decades(densities))
    assert got[0] == 0
    assert np.isnan(got[-1])
    np.testing.assert_allclose(got[1:-1], densities[1:-1], rtol=10 ** (5 / 252 / 2) - 1 + 1e-6)


@pytest.mark.parametrize("values", [np.full(3, np.nan), np.zeros(4), np.zeros(0)])
def test_empty_and_constant_columns_pack(values):
    for packer in (pack_bytes, pack_decades):
        np.testing.assert_array_equal(unpack(packer(values)), values)


@pytest.mark.parametrize("fine", [True, False])
def test_packed_features_are_the_run(made, monkeypatch, fine):
    monkeypatch.setattr("stagediff.track.section.series.FULL_CELLS", 10**6 if fine else 0)
    data = pack_features(made.run, choose(made.run, 20, 0))
    run, curves, full = made.run, data["curves"], data["full"]
    nibbles = unpack(curves["kind_pattern"]).reshape(F, T)
    assert np.array_equal(nibbles & 15, run.kind)
    assert np.array_equal(nibbles >> 4, run.pattern)
    angles = [np.arccos(np.clip(c, -1, 1)) for c in (unpack(curves["cos_final"]).reshape(F, T), run.cos_final)]
    if fine:
        np.testing.assert_allclose(unpack(curves["cos_final"]).reshape(F, T), run.cos_final, atol=2e-5)
    else:
        np.testing.assert_allclose(*angles, atol=np.pi / 508 * 1.01)
    tolerance = 1e-4 if fine else 6e-3
    np.testing.assert_allclose(unpack(curves["m"]).reshape(F, T), run.main_progress, atol=tolerance)
    for which in ("top", "levels"):
        for measure in MEASURES:
            np.testing.assert_allclose(unpack(full[f"m_{which}_{measure}"]).reshape(F, T), run.progress(which, measure), atol=tolerance)
    assert np.array_equal(unpack(curves["token"]).reshape(F, T).astype(int) - 1, run.token)
    table = data["table"]
    assert np.array_equal(np.where(unpack(table["formed"]) == NEVER, T, unpack(table["formed"])), run.formed("top", run.measure))
    np.testing.assert_allclose(unpack(table["drift"]), drifts(run), atol=1e-4)
    np.testing.assert_allclose(unpack(table["density"]), run.density[:, -1], rtol=1e-3)


# --- what is shown of how many


def test_a_large_run_keeps_what_stands_out_and_a_random_sample(made, monkeypatch):
    monkeypatch.setattr(choices, "CURVE_CELLS", 60 * T)
    monkeypatch.setattr(choices, "FULL_CELLS", 40 * T)
    monkeypatch.setattr(choices, "EXAMPLE_FEATURES", 30)
    got = choose(made.run, 12, seed=3)
    assert len(got.curves) == 60
    assert len(got.full) == 40
    assert set(got.outstanding) <= set(got.full) <= set(got.curves)
    assert set(got.outstanding) <= set(got.examples)
    assert len(got.examples) <= 24
    umap = set(made.tables["umap", "features"].feature)
    assert umap <= set(got.outstanding.tolist())
    again, other = choose(made.run, 12, seed=3), choose(made.run, 12, seed=4)
    assert np.array_equal(got.full, again.full)
    assert not np.array_equal(got.random, other.random)
    dead = np.flatnonzero((made.run.kind == KINDS.index("dead")).all(1))
    assert not set(dead) & set(got.random.tolist())
    data = pack_features(made.run, got)
    assert unpack(data["curves"]["feature"]).tolist() == got.curves.tolist()
    assert unpack(data["full"]["feature"]).tolist() == got.full.tolist()
    assert data["full"]["pc1"]["n"] == 40 * T
    assert "curves of 60, all measures and paths of 40 and examples" in words.cut_words(made.run, 60, 40, 24).replace(" and all", ", all")


def test_the_strongest_of_each_kind_stand_out(made):
    order = choose(made.run, 40, seed=0).outstanding
    last = made.run.main_progress[:, -1]
    for code in (0, 1):
        members = np.flatnonzero(made.run.kind[:, -1] == code)
        assert members[np.nanargmax(last[members])] in order[:20]


def test_drift_of_a_feature_is_the_mean_over_what_is_alive_at_both_ends(made):
    got = drifts(made.run)
    for i in range(F):
        both = [k for k in range(1, T) if made.run.alive[i, k] and made.run.alive[i, k - 1]]
        want = np.mean([1 - made.run.cos_previous[i, k] for k in both]) if both else np.nan
        np.testing.assert_allclose(got[i], want, atol=1e-6)


def test_patterns_that_occurred_are_bits(made):
    table, bits = made.tables["patterns", "patterns"], occurred(made.run)
    for code, name in enumerate(PATTERNS):
        assert set(np.flatnonzero(bits & (1 << code))) == set(table[table.pattern == name].feature)


# --- figures about the whole run


def test_shares_and_counts_are_the_tables(made):
    kinds, counts = made.tables["kinds", "kinds"], made.tables["patterns", "counts"]
    for k, step in enumerate(made.run.steps):
        part = kinds[kinds.step == step]
        assert {n: made.parts["shares"][n][k] for n in KINDS} == {n: int((part.kind == n).sum()) for n in KINDS}
        assert made.parts["shares"]["unclear"][k] == int(part.kind.isna().sum())
        for row in counts[counts.to_step == step].itertuples():
            assert made.parts["counts"][row.pattern][k] == row.count


def test_formation_times_count_the_features_that_formed_by_each_checkpoint(made):
    formed, kind = made.run.formed("top", made.run.measure), made.run.kind[:, -1]
    for code, name in enumerate(KINDS[:3]):
        part, mine = made.parts["formed"][name], formed[kind == code]
        assert part["formed"] == pytest.approx([np.mean(mine <= k) for k in range(T)], abs=1e-5)
        assert part["ever"] == int((mine < T).sum())
        if part["ever"]:
            assert part["median"] == np.percentile(mine[mine < T], 50, method="lower")


def test_quartiles_of_cosines_leave_dead_features_out(made):
    alive = made.run.alive
    for code, name in enumerate(KINDS[:3]):
        members = (made.run.kind[:, -1] == code) & alive[:, -1]
        for k in range(T):
            values = made.run.cos_final[members & alive[:, k], k].astype(float)
            want = np.quantile(values, (0.25, 0.5, 0.75)) if len(values) else [None] * 3
            got = [made.parts["cosines"][name][q][k] for q in ("low", "median", "high")]
            assert got == pytest.approx(list(want), abs=1e-4)


def test_turns_are_medians_over_features_with_both_and_their_intervals_hold_them(made):
    table = made.tables["drift", "before_after"].dropna(subset=["drift_before", "drift_after"])
    got = made.parts["turns"]["all"]
    assert got["features"] == len(table)
    for key, column in (("before", "drift_before"), ("after", "drift_after"), ("null", "null")):
        middle, low, high = got[key]
        assert middle == pytest.approx(table[column].median(), rel=1e-4)
        assert low <= middle <= high


def test_the_null_band_is_the_nulls_quantiles_over_alive_features(made):
    table = made.tables["drift", "null"]
    table = table[made.run.alive[table.feature, -1]]
    got = made.parts["null"]
    assert got["previous"] == pytest.approx(list(np.quantile(table.cos_previous, (0.05, 0.5, 0.95))), abs=1e-4)
    second = table[table.repeat == 2].cos_start
    assert got["start"][1] == pytest.approx(list(np.quantile(second, (0.05, 0.5, 0.95))), abs=1e-4)


def test_agreement_is_symmetric_with_ones_on_the_diagonal(made):
    table = made.tables["formation", "agreement"]
    for which, found in made.parts["agreement"].items():
        square = np.array(found["m"])
        assert np.allclose(square, square.T)
        assert np.all(np.diag(square) == 1)
        row = table[(table.set == which) & (table.measure_a == MEASURES[0]) & (table.measure_b == MEASURES[2])].iloc[0]
        assert square[0, 2] == pytest.approx(row.m_correlation, abs=1e-4)


def test_histograms_keep_every_count(made):
    table = made.tables["drift", "histogram"]
    for against in ("final", "previous", "null"):
        got = made.parts["histograms"][against]
        assert len(got["edges"]) == 101
        for k, step in enumerate(made.run.steps):
            part = table[(table.against == against) & (table.step == step)].sort_values("low")
            repeats = 2 if against == "null" else 1  # the null's are means over its repeats
            assert (got["counts"][k] or []) == pytest.approx((part["count"] / repeats).tolist(), rel=1e-4)


# --- words


def test_the_words_say_what_the_tables_say(made):
    html = words.headline_html(made.run, made.parts)
    last = made.run.kind[:, -1]
    known = int((last < 3).sum())
    assert f"At the end {known} features are alive with a kind: {100 * (last == 0).sum() / known:.3g} % token-level" in html
    formed = made.parts["formed"]
    assert f"{formed['token']['ever']} of {formed['token']['features']} token-level features have formed" in html
    table = made.tables["patterns", "patterns"]
    assert f"{table[table.pattern == 'token_to_concept'].feature.nunique()} went from token to concept" in html
    assert f"and {made.tables['patterns', 'merges'].feature.nunique()} merged with another" in html


@pytest.mark.parametrize(
    ("token", "concept", "said"),
    [(1, 4, "token-level features form first"), (4, 1, "concept-level features form first"), (2, 2, "both form at the same checkpoint")],
)
def test_who_forms_first_follows_from_the_medians(made, token, concept, said):
    parts = {"formed": {n: {"ever": 5, "features": 9, "median": m, "formed": []} for n, m in (("token", token), ("concept", concept))}}
    assert said in words.headline_html(made.run, parts)


@pytest.mark.parametrize(
    ("before", "after", "null", "said"),
    [
        ([0.02, 0.018, 0.022], [0.004, 0.003, 0.005], [0.01, 0.009, 0.011], ("turn less", "less than training alone")),
        ([0.01, 0.009, 0.012], [0.03, 0.02, 0.04], [0.01, 0.009, 0.011], ("turn more", "more than training alone")),
        ([0.01, 0.008, 0.012], [0.011, 0.009, 0.013], [0.011, 0.01, 0.012], ("keep turning as much", "as much as training alone")),
        ([0.02, 0.018, 0.022], [0.004, 0.003, 0.005], [None] * 3, ("turn less", "no null to compare with")),
    ],
)
def test_drift_is_told_beside_the_null(made, before, after, null, said):
    html = words.headline_html(made.run, {"turns": {"all": {"before": before, "after": after, "null": null, "features": 9}}})
    assert all(s in html for s in said)


def test_boundaries_that_all_axes_share_are_counted(made):
    def boundary(at, low, high):
        return {"at": at, "low": low, "high": high}

    same = {"index": [boundary(1, 1, 2), boundary(4, 3, 5)], "step": [boundary(2, 1, 3), boundary(6, 6, 6)]}
    said = words.phase_words(made.run, {"phases": {"boundaries": same, "series": {}}})
    assert "1 of the 2 boundaries lies at the same checkpoint, or within each other's intervals" in said
    apart = {"index": [boundary(1, 1, 1)], "step": [boundary(4, 4, 4)]}
    assert "None of the 1 boundaries lie" in words.phase_words(made.run, {"phases": {"boundaries": apart, "series": {}}})


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        ((0.01, 0.0), "at least as much as"),
        ((0.01, -0.03), "up to 0.030 less than"),
        ((-0.02, -0.05), "between 0.020 and 0.050 less than"),
    ],
)
def test_whether_the_following_budget_is_enough_is_told_by_the_gaps(made, gaps, said):
    compared = [{"step": s, "how": "scratch_full", "ev_gap": g} for s, g in enumerate(gaps)]
    text = words.efficiency_words(made.run, {"quality": made.parts["efficiency"]["quality"], "compared": compared})
    assert f"the chain explains {said} a dictionary trained from scratch with the first budget" in text
    assert "200,000 training tokens, 5 % of the first one's 4,000,000" in text


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ({"index": (0.7, 0.4, 0.5), "step": (0.6, 0.4, 0.5)}, "On every axis the phases explain more"),
        ({"index": (0.7, 0.4, 0.5), "step": (0.45, 0.4, 0.5)}, "On the axis of the checkpoints the phases explain more"),
        ({"index": (0.3, 0.4, 0.2), "step": (0.45, 0.4, 0.5)}, "the cut is no evidence of phases"),
        ({"index": (0.3, 0.4, None)}, "the cut is no evidence of phases"),
    ],
)
def test_phases_are_claimed_only_above_chance_and_trend(made, gains, said):
    named = {axis: dict(zip(("gain", "gain_shuffled", "gain_trend"), values, strict=True)) for axis, values in gains.items()}
    parts = {"phases": {"boundaries": {"index": [{"at": 2, "low": 1, "high": 3}]}, "gains": named, "series": {}, "reason": None}}
    assert said in words.phase_words(made.run, parts)
    assert words.gains_html(parts).count("<tr>") == 1 + len(gains)


def test_a_chain_too_short_for_phases_says_so(made):
    parts = {"phases": {"boundaries": {}, "gains": {}, "series": {}, "reason": "4 checkpoints are too few for 3 phases"}}
    assert "No phases were found: 4 checkpoints are too few" in words.phase_words(made.run, parts)
    assert words.gains_html(parts) == ""


@pytest.mark.parametrize(
    ("mean", "said"),
    [
        ([-0.002, -0.003, -0.001], "that have formed turn less than those that form later (difference −0.0020"),
        ([0.002, 0.001, 0.003], "turn more than"),
        ([0.001, -0.001, 0.003], "turn as much as"),
    ],
)
def test_formed_and_not_yet_formed_features_are_compared_at_the_same_checkpoint(made, mean, said):
    turns = {"all": {"before": [0.02, 0.018, 0.022], "after": [0.004, 0.003, 0.005], "null": [0.01, 0.009, 0.011], "features": 9}}
    assert said in words.headline_html(made.run, {"turns": turns, "same_step": {"mean": mean}})


# --- the page as a file


def test_a_run_of_another_kind_has_no_section(made):
    nodes = {"tokens": made.context.nodes["tokens"]}
    assert section(ReportContext(made.context.store, nodes, {}, 10, 0)) is None


FIGURES_OF = {
    "kinds": ('id="shares"',),
    "formation": ('id="progress"', 'id="formed"', 'id="agreement-tables"'),
    "drift": ('id="heat"', 'id="cosines"', 'id="turns"', 'id="same-step"', 'id="paths"'),
    "patterns": ('id="patterns"', 'id="track-pattern"'),
    "phases": ('id="drift-series"',),
    "umap": ('id="umaps"',),
    "efficiency": ('id="efficiency-l0"',),
}


@pytest.mark.parametrize(
    "left_out", [(n,) for n in NODES] + [tuple(n for n in NODES if n != kept) for kept in ("efficiency", "drift", "kinds")]
)
def test_figures_of_steps_that_the_run_lacks_are_left_out(made, left_out):
    nodes = {name: ref for name, ref in made.context.nodes.items() if name not in left_out}
    html = "".join(s.html for s in without_pictures(ReportContext(made.context.store, nodes, made.context.config, 20, 0)))
    for node, figures in FIGURES_OF.items():
        for figure in figures:
            if node in left_out:
                assert figure not in html
            elif len(left_out) == 1:
                assert figure in html


def test_data_is_plain_and_holds_texts_as_they_are(made):
    names = {s.name: s.data for s in made.sections}
    assert json.loads(json.dumps(names, allow_nan=False)) == names
    assert set(load_fakes().NASTY) <= set(names["track-features"]["words"])
    examples = names["track-features"]["examples"]
    alive = set(np.flatnonzero(made.run.alive.any(1)))
    assert set(unpack(examples["feature"])) == alive
    assert unpack(examples["count"]).max() == 10
    texts = names["track-features"]["words"]
    tokens, shades, length = (unpack(examples[n]) for n in ("tokens", "shades", "length"))
    assert len(tokens) == len(shades) == length.sum()
    from stagediff.sae.examples import feature_examples

    first = int(unpack(examples["feature"])[0])
    want = feature_examples(made.context.store, made.run.points[-1].statistics, [first], window=32, ranks=1).iloc[0]
    assert [texts[i] for i in tokens[: length[0]]] == want.tokens


def test_regions_are_the_levels_sets_datapoints_strongest_level_first(made):
    packed = next(s for s in made.sections if s.name == "track-features").data["levels"]
    table = made.tables["formation", "regions"]
    table = table[table.set == "levels"]
    features, count = unpack(packed["feature"]), unpack(packed["count"])
    start = 0
    for feature, n in list(zip(features, count, strict=True))[:10]:
        mine = table[table.feature == feature].sort_values(["level", "activation"], ascending=False)
        assert unpack(packed["level"])[start : start + n].tolist() == mine.level.tolist()
        np.testing.assert_allclose(unpack(packed["activation"])[start : start + n], mine.activation, rtol=1e-6)
        start += n


def test_windows_stop_at_the_rows_ends():
    from stagediff.track.section.run import Words

    known = Words()
    ids = np.arange(20).reshape(2, 10)
    windows = Windows(lambda rows: ids[rows], lambda i: f"t{i}", 10, known)
    got = windows.around(np.array([1, 0, 1]), np.array([0, 9, 5]), around=2)
    texts = list(known.index)
    said = [[texts[i] if i >= 0 else None for i in row] for row in got]
    assert said == [[None, None, "t10", "t11", "t12"], ["t7", "t8", "t9", None, None], ["t13", "t14", "t15", "t16", "t17"]]


def test_a_run_without_readable_texts_shows_places_instead(fakes, tmp_path):
    run = fakes.write_track(Store(str(tmp_path)), 40, 4, texts=False)
    data = {s.name: s.data for s in without_pictures(fakes.context_of(run))}["track-features"]
    assert unpack(data["examples"]["length"]).sum() == 0
    assert unpack(data["examples"]["count"]).max() == 10
    assert "tokens" not in data["levels"]


@pytest.fixture(scope="module")
def whole(fakes, made) -> list:
    return section(made.context)


@pytest.mark.slow
def test_still_pictures_are_pictures_and_every_link_has_its_file(whole):
    files = {name: body for s in whole for name, body in s.figures.items()}
    linked = set(re.findall(r'href="(track-[^"#]+)"', "".join(s.html for s in whole)))
    assert linked == set(files)
    assert {n.removesuffix(".svg") for n in files if n.endswith(".svg")} == {n.removesuffix(".png") for n in files if n.endswith(".png")}
    assert len(files) == 24
    for name, body in files.items():
        if name.endswith(".svg"):
            assert ET.fromstring(body).tag.endswith("svg")
            assert len(body) < 1_000_000
        else:
            colours = np.asarray(Image.open(io.BytesIO(body)).convert("L"))
            assert (colours < 200).mean() > 0.001, name


def test_the_same_run_gives_the_same_bytes(made):
    again = without_pictures(made.context)
    assert [(s.name, s.html, s.data) for s in again] == [(s.name, s.html, s.data) for s in made.sections]


def test_the_page_is_inert_and_whole(made, fakes):
    from stagediff.report.page import build

    html = build(made.fake.spec, made.context, made.sections)
    body = re.sub(r"<script.*?</script>|<style.*?</style>", "", html, flags=re.S)
    assert "<img" not in body
    assert "Toy &lt;b&gt;track&lt;/b&gt;" in body
    assert not re.search(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg)", html.replace(base64.b64encode(b"x").decode(), ""))
    ids = re.findall(r'\bid="([^"]+)"', body)
    assert len(ids) == len(set(ids))
    for used in set(re.findall(r'(?:at|getElementById)\("([a-z0-9-]+)"\)', "".join(s for sec in made.sections for s in sec.scripts))):
        assert used in ids, used
