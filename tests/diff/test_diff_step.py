"""The diff step on a small store: decoders and statistics written by hand, with features planted to turn, be born and die."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save

from stagediff import steps
from stagediff.diff.cuts import QUADRANTS
from stagediff.diff.spec import STAGES, Cut, DiffSpec
from stagediff.errors import UserError
from stagediff.lm.spec import ActivationData
from stagediff.sae.spec import Budget, DictionaryConfig, StatisticsSpec, TrainSpec
from stagediff.spec import Ref
from stagediff.store import Store

F, D = 400, 24
TURNED, BORN, DIED, DEAD = 0, 1, 2, range(390, 400)
DATA = ActivationData(base=Ref("activations/" + "1" * 20), rows=10)


def dictionary(store, W, seed) -> Ref:
    spec = TrainSpec(data=DATA, budget=Budget(tokens=1), dictionary=DictionaryConfig(features=len(W)), seed=seed)
    with store.write(spec) as w:
        w.write_bytes("sae_weights.safetensors", save({"W_dec": W.float().contiguous()}))
        w.commit(figures={}, numerics={})
    return spec.ref


def statistics(store, dictionary_ref, firings, new_share) -> Ref:
    """Statistics tables where a feature's mass and examples are new to the given share (examples: four of each alive feature)."""
    spec = StatisticsSpec(dictionary=dictionary_ref, data=DATA)
    fired = np.flatnonzero(firings)
    examples = pd.DataFrame({"feature": np.repeat(fired, 4), "is_new": np.concatenate([np.arange(4) < 4 * new_share[i] for i in fired])})
    features = pd.DataFrame(
        {"feature": np.arange(len(firings)), "firings": firings, "density": firings / 1000, "decoder_norm": np.full(len(firings), 1.5)}
    ).assign(mass_new=firings * new_share, mass_base=firings * (1 - new_share))
    with store.write(spec) as w:
        w.write_table("features.parquet", features)
        w.write_table("examples.parquet", examples)
        w.commit(figures={}, numerics={})
    return spec.ref


@pytest.fixture
def planted(tmp_path):
    store = Store(str(tmp_path))
    g = torch.Generator().manual_seed(0)
    base = torch.randn(F, D, generator=g, dtype=torch.float64)
    W = {s: base + 0.01 * torch.randn(F, D, generator=g) for s in STAGES}
    for stage, at in (("F_D", 10), ("F_M", 11)):
        W[stage][TURNED] = torch.randn(D, generator=torch.Generator().manual_seed(at), dtype=torch.float64)
    for stage in ("F_D", "F_M"):
        W[stage][BORN] = torch.ones(D)
    for stage in STAGES:  # dead features do not move, but one of them happens to be far off
        W[stage][list(DEAD)] = base[list(DEAD)]
    W["F_D"][DEAD[0]] = W["F_M"][DEAD[0]] = -base[DEAD[0]]
    firings = {s: np.full(F, 50) for s in STAGES}
    for s in STAGES:
        firings[s][list(DEAD)] = 9  # one too few
        if s in ("S", "D", "M"):
            firings[s][BORN] = 0
        if s in ("F_D", "F_M"):
            firings[s][DIED] = 3
    share = np.zeros(F)
    share[[TURNED, BORN]] = 1.0
    share[5] = 0.25
    dictionaries = {s: dictionary(store, W[s], i) for i, s in enumerate(STAGES)}
    measured = {s: statistics(store, dictionaries[s], firings[s], share) for s in STAGES}
    return store, DiffSpec(dictionaries=dictionaries, statistics=measured, random_sample=100), W


def compute(store, spec):
    artifact = store.artifact(steps.run(spec, store, device="cpu"))
    return artifact.read_table("features.parquet"), artifact


def test_the_table_has_the_designs_columns_with_units_and_meanings(planted):
    table, _ = compute(*planted[:2])
    expected = ["feature", "x", "y", "score", "cos_s_d", "cos_s_m", "cos_d_m", "cos_f_f", "cos_s_f_direct"]
    expected += [f"{kind}_{s}" for kind in ("norm", "density", "alive") for s in STAGES]
    expected += ["alive", "born", "new_mass", "new_top", "quadrant", "selected", "random"]
    assert list(table.columns) == expected
    assert all(unit and meaning for unit, meaning in table.attrs["columns"].values())
    assert set(table.attrs["columns"]) == set(expected)


def test_alive_dead_and_born_are_kept_apart(planted):
    table, artifact = compute(*planted[:2])
    assert not table.alive[[BORN, DIED, *DEAD]].any()
    assert table.alive.sum() == F - 12
    assert np.flatnonzero(table.born).tolist() == [BORN]
    figures = artifact.manifest.figures
    assert (figures["alive"], figures["born"], figures["died"], figures["dead"]) == (F - 12, 1, 1, 10)
    assert figures["alive_S"] == F - 11
    assert figures["alive_F_D"] == F - 11


def test_the_feature_that_turned_on_both_paths_is_selected_and_no_dead_one(planted):
    table, artifact = compute(planted[0], planted[1].model_copy(update={"cut": Cut(kind="absolute", value=0.7)}))
    assert np.flatnonzero(table.selected).tolist() == [TURNED]
    assert table.quadrant[TURNED] == "lower_left"
    assert table.quadrant[DEAD[0]] == ""
    assert table.score[DEAD[0]] == pytest.approx(-2)
    assert set(table.quadrant) <= {*QUADRANTS, ""}
    assert artifact.manifest.figures["p1_cut_both_below_0.7"] == 1
    assert artifact.read_json("cut.json") == {"kind": "absolute", "value": 0.7, "x": 0.7, "y": 0.7, "score": None}


def test_cosines_equal_float64_loops(planted):
    store, spec, W = planted
    table, _ = compute(store, spec)
    rows = {s: w.float().double().numpy() for s, w in W.items()}
    for name, (a, b) in {"x": ("D", "F_D"), "y": ("M", "F_M"), "cos_f_f": ("F_D", "F_M"), "cos_s_f_direct": ("S", "F_direct")}.items():
        for i in range(0, F, 37):
            u, v = rows[a][i], rows[b][i]
            assert table[name][i] == pytest.approx(u @ v / (np.linalg.norm(u) * np.linalg.norm(v)), abs=1e-12)
    assert np.array_equal(table.score, table.x + table.y)


def test_new_data_shows_in_mass_and_top_examples(planted):
    table, artifact = compute(*planted[:2])
    assert table.new_top[[TURNED, BORN, 5, 6]].tolist() == [1, 1, 0.25, 0]
    assert table.new_mass[[TURNED, 5, 6]].tolist() == pytest.approx([1, 0.25, 0])
    enriched = artifact.read_table("enrichment.parquet").set_index("measure").loc["score"]
    assert (enriched.alive, enriched.flagged, enriched.region, enriched.region_flagged) == (F - 12, 1, 10, 1)
    assert enriched.auroc == 1.0
    assert artifact.manifest.figures["auroc_score"] == 1.0


def test_births_are_matched_between_the_paths(planted):
    births = compute(*planted[:2])[1].read_table("births.parquet")
    assert births.feature.tolist() == [BORN]
    assert births.partner.tolist() == [BORN]
    assert births.cosine[0] == pytest.approx(1, abs=1e-6)


def test_a_missing_stage_is_named(planted):
    store, spec, _ = planted
    short = {s: r for s, r in spec.dictionaries.items() if s != "F_M"}
    with pytest.raises(UserError, match="missing: F_M"):
        steps.run(spec.model_copy(update={"dictionaries": short}), store, device="cpu")


def test_statistics_of_another_dictionary_are_refused(planted):
    store, spec, W = planted
    other = dictionary(store, W["S"][:7], 99)
    wrong = {**spec.statistics, "S": statistics(store, other, np.full(7, 50), np.zeros(7))}
    with pytest.raises(UserError, match="another dictionary"):
        steps.run(spec.model_copy(update={"statistics": wrong}), store, device="cpu")
