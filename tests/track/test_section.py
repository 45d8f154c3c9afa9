"""SAE-Track's part of the report: its numbers against the tables they come from, its words against the numbers, what is left out, and the page as a file.

What it does in a browser is tested in tests/integration.
"""

import base64
import io
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from track import fake_tables
from track.fake_lives import NASTY

from stagediff.sections import ReportContext
from stagediff.store import Store
from stagediff.track.section import choice as choices
from stagediff.track.section import section, words
from stagediff.track.section.choice import choose, drifts, occurred
from stagediff.track.section.run import NODES, NONE
from stagediff.track.section.series import NEVER, pack_angles, pack_bytes, pack_decades, pack_features
from stagediff.track.section.windows import Windows
from stagediff.track.spec import KINDS, MEASURES, PATTERNS

F, T = 120, 7


@pytest.fixture(scope="module")
def made(reported_track) -> fake_tables.Reported:
    return reported_track


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
    html = "".join(s.html for s in fake_tables.sections_of(ReportContext(made.context.store, nodes, made.context.config, 20, 0)))
    for node, figures in FIGURES_OF.items():
        for figure in figures:
            if node in left_out:
                assert figure not in html
            elif len(left_out) == 1:
                assert figure in html


def test_data_is_plain_and_holds_texts_as_they_are(made):
    names = {s.name: s.data for s in made.sections}
    assert json.loads(json.dumps(names, allow_nan=False)) == names
    assert set(NASTY) <= set(names["track-features"]["words"])
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


def test_a_run_without_readable_texts_shows_places_instead(tmp_path):
    run = fake_tables.write_track(Store(str(tmp_path)), 40, 4, texts=False)
    data = {s.name: s.data for s in fake_tables.sections_of(fake_tables.context_of(run))}["track-features"]
    assert unpack(data["examples"]["length"]).sum() == 0
    assert unpack(data["examples"]["count"]).max() == 10
    assert "tokens" not in data["levels"]


@pytest.fixture(scope="module")
def whole(made) -> list:
    return fake_tables.sections_of(made.context, pictures=True)


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
    again = fake_tables.sections_of(made.context)
    assert [(s.name, s.html, s.data) for s in again] == [(s.name, s.html, s.data) for s in made.sections]


def test_the_page_is_inert_and_whole(made):
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
