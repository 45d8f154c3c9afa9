"""The align step on a small store: newborns planted at different indices of the two paths, which the published score cannot see."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save
from sklearn.metrics import average_precision_score

from stagediff import steps
from stagediff.diff.aligned import COLUMNS, contrast
from stagediff.diff.spec import ALIGNED_STAGES, STAGES, AlignSpec, DiffSpec, NullSpec
from stagediff.errors import UserError
from stagediff.lm.spec import ActivationData
from stagediff.sae.spec import Budget, DictionaryConfig, StatisticsSpec, TrainSpec
from stagediff.spec import Ref
from stagediff.store import Store

F, D, BASE_TOKENS, NEW_TOKENS = 300, 32, 900, 100
BORN = {"F_D": [10, 11, 12, 13], "F_M": [50, 11, 52, 53]}
"""The same four features on both paths; only the second has one index. What else lies at these indices stays put."""
DATA_ONLY, DEAD = 20, 290
FINETUNED = ActivationData(base=Ref("activations/" + "1" * 20), rows=10)
BASE = ActivationData(base=Ref("activations/" + "2" * 20), rows=10)


def dictionary(store, W, seed) -> Ref:
    spec = TrainSpec(data=FINETUNED, budget=Budget(tokens=1), dictionary=DictionaryConfig(features=len(W)), seed=seed)
    with store.write(spec) as w:
        w.write_bytes("sae_weights.safetensors", save({"W_dec": W.float().contiguous()}))
        w.commit(figures={}, numerics={})
    return spec.ref


def statistics(store, of: Ref, firings, mass_base, mass_new, data=FINETUNED) -> Ref:
    spec = StatisticsSpec(dictionary=of, data=data)
    share = mass_new / np.maximum(mass_base + mass_new, 1e-9)
    examples = pd.DataFrame({"feature": np.repeat(np.arange(F), 4), "is_new": (np.arange(4) < 4 * share[:, None]).ravel()})
    features = pd.DataFrame({"feature": np.arange(F), "firings": firings, "density": firings / 1000, "decoder_norm": np.ones(F)})
    with store.write(spec) as w:
        w.write_table("features.parquet", features.assign(mass_base=mass_base, mass_new=mass_new))
        w.write_table("examples.parquet", examples)
        w.commit(figures={"tokens_base": BASE_TOKENS, "tokens_new": NEW_TOKENS}, numerics={})
    return spec.ref


def retrained(store, table: pd.DataFrame) -> Ref:
    """A retrain null of these novelties."""
    spec = NullSpec(dictionaries={}, statistics={}, nulls={}, null_statistics={})
    with store.write(spec) as w:
        w.write_table("null.parquet", table)
        w.commit(figures={})
    return spec.ref


@pytest.fixture
def planted(tmp_path):
    """Newborns fire on the finetuned model's new rows only; DATA_ONLY is new in D, so in every later stage too, and fires in both models' new rows."""
    store = Store(str(tmp_path))
    g = torch.Generator().manual_seed(0)
    old = torch.randn(F, D, generator=g, dtype=torch.float64)
    W = {s: old + 0.02 * torch.randn(F, D, generator=g, dtype=torch.float64) for s in STAGES}
    new = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64))[0]
    for stage, at in BORN.items():
        W[stage][at] = 2 * new[:4] + 0.02 * torch.randn(4, D, generator=g, dtype=torch.float64)
    W["F_direct"][BORN["F_D"]] = new[:4]
    for stage in STAGES[1:]:
        if stage != "M":
            W[stage][DATA_ONLY] = new[5]
    W["F_D"][DEAD], W["F_M"][DEAD] = new[6], new[6]  # far off and alive in neither
    dictionaries = {s: dictionary(store, W[s], i) for i, s in enumerate(STAGES)}
    firings = np.where(np.arange(F) == DEAD, 3, 200)
    measured, on_base = {}, {}
    for s in STAGES:
        mass_base, mass_new = np.full(F, 90.0), np.full(F, 10.0)
        fresh = [*BORN.get(s, []), DATA_ONLY]
        mass_base[fresh], mass_new[fresh] = 0.0, 40.0
        measured[s] = statistics(store, dictionaries[s], firings, mass_base, mass_new)
        if s in BORN:
            silent = mass_new.copy()
            silent[BORN[s]] = 0.0
            on_base[s] = statistics(store, dictionaries[s], firings, mass_base, silent, BASE)
    diff = DiffSpec(dictionaries=dictionaries, statistics=measured, random_sample=50)
    spec = AlignSpec(
        diff=diff.ref,
        dictionaries={s: dictionaries[s] for s in ALIGNED_STAGES},
        statistics={s: measured[s] for s in ("F_D", "F_M", "F_direct")},
        base_statistics=on_base,
    )
    steps.run(diff, store, device="cpu")
    return store, spec, W


def compute(store, spec):
    artifact = store.artifact(steps.run(spec, store, device="cpu"))
    return artifact.read_table("features.parquet"), artifact


def largest(rows, *others) -> float:
    """Largest cosine of a vector with any row of some matrices, by a loop."""
    return max(float(rows @ v / rows.norm() / v.norm()) for W in others for v in W)


def test_newborns_at_different_indices_are_paired_and_rank_first(planted):
    store, spec, _ = planted
    table, artifact = compute(store, spec)
    born = table.set_index("feature").loc[BORN["F_D"]]
    assert born.partner.tolist() == BORN["F_M"]
    assert born.same_index.tolist() == [False, True, False, False]
    assert set(table.nsmallest(4, "pair_novelty").feature) == set(BORN["F_D"])
    figures = artifact.manifest.figures
    assert [figures[f"newborn_{s}"] for s in ("F_D", "F_M", "F_direct")] == [4, 4, 4]
    assert figures["newborn_pairs"] == 4
    assert figures["newborn_same_index_rate"] == 0.25
    assert figures["births_saturated"] is True
    assert born.y[[10, 12, 13]].min() > 0.99  # the published y at these indices is another feature's, which stayed


def test_novelty_is_the_largest_cosine_with_any_latent_of_d_or_m(planted):
    store, spec, W = planted
    table, _ = compute(store, spec)
    W = {s: w.float().double() for s, w in W.items()}
    for i in (0, 10, 20, 51, 200):
        assert table.novelty_F_D[i] == pytest.approx(largest(W["F_D"][i], W["D"], W["M"]), abs=1e-6)
    for i in (0, 50, 53):
        assert table.novelty_F_M[i] == pytest.approx(largest(W["F_M"][i], W["D"], W["M"]), abs=1e-6)
    j = table.partner[10]
    assert table.pair_novelty[10] == pytest.approx(table.novelty_F_D[10] + table.novelty_F_M[j])
    assert table.pair_cos[10] == pytest.approx(largest(W["F_D"][10], W["F_M"][j : j + 1]), abs=1e-6)
    assert table.paired_x_y[10] == pytest.approx(table.x[10] + table.y[j])


def test_agreement_is_the_largest_cosine_with_an_alive_latent_of_another_training(planted):
    store, spec, W = planted
    table, _ = compute(store, spec)
    W = {s: w.float().double()[np.arange(F) != DEAD] for s, w in W.items()}
    for i in (0, 10, 51, 200):
        assert table.agreement_F_D[i] == pytest.approx(largest(W["F_D"][i], W["F_M"], W["F_direct"]), abs=1e-6)
        assert table.agreement_F_M[i] == pytest.approx(largest(W["F_M"][i], W["F_D"], W["F_direct"]), abs=1e-6)


def test_what_no_other_training_has_falls_behind_what_is_born_everywhere(planted):
    """A latent that each path turned by chance is newer than the newborns, and dead latents of its direction say nothing for it."""
    store, spec, W = planted
    g = torch.Generator().manual_seed(5)
    turned = {s: W[s].clone() for s in ("F_D", "F_M")}
    for rows in turned.values():
        rows[100:106] = 2 * torch.randn(6, D, generator=g, dtype=torch.float64)
    turned["F_M"][DEAD] = turned["F_D"][100]
    # The newborns are less new than that: they have half of a direction that D and M have.
    for stage, at in BORN.items():
        turned[stage][at] += 1.2 * W["D"][:4] / W["D"][:4].norm(dim=1, keepdim=True)
    dictionaries = {**spec.dictionaries, **{s: dictionary(store, rows, 90 + i) for i, (s, rows) in enumerate(turned.items())}}
    still = pd.DataFrame({"axis": np.repeat(["x", "y"], F), "repeat": 0, "feature": np.tile(np.arange(F), 2), "novelty": 0.99})
    table, _ = compute(store, spec.model_copy(update={"dictionaries": dictionaries, "null": retrained(store, still)}))
    assert set(table.nlargest(4, "pair_agreed").feature) == set(BORN["F_D"])
    assert set(table.nlargest(4, "pair_excess").feature) != set(BORN["F_D"])
    assert table.agreement_F_D[100] < 0.9, "its only twin is dead"


def test_the_contrast_tells_what_needs_model_and_data_from_what_the_data_explain(planted):
    table, _ = compute(*planted[:2])
    assert table.contrast_F_D[BORN["F_D"]].tolist() == pytest.approx([1.0] * 4)
    assert table.contrast_F_M[BORN["F_M"]].tolist() == pytest.approx([1.0] * 4)
    assert table.contrast_F_D[DATA_ONLY] == pytest.approx(0)
    assert table.contrast_F_D[0] == pytest.approx(0)  # 0.1 per token in every cell
    assert set(table.nlargest(4, "aligned").feature) == set(BORN["F_D"])
    row = table.loc[12]
    expected = (1 - row.novelty_F_D) * row.contrast_F_D + (1 - table.novelty_F_M[52]) * table.contrast_F_M[52]
    assert row.aligned == pytest.approx(expected)
    assert row.pair_contrast == pytest.approx(row.contrast_F_D + table.contrast_F_M[52])
    assert table[["pair_agreed", "agreed_contrast"]].isna().all(axis=None)  # without a retrain null


def test_the_contrast_of_means_in_four_cells():
    c = contrast(np.array([1.0, 0, 0, 2]), np.array([3.0, 0, 1, 1]), np.array([1.0, 0, 0, 1]), np.array([2.0, 0, 3, 0]))
    assert c[[0, 2, 3]].tolist() == pytest.approx([1 / 7, -0.5, -0.25])
    assert np.isnan(c[1])


def test_dead_latents_take_no_part(planted):
    table, _ = compute(*planted[:2])
    assert np.isnan(table.novelty_F_D[DEAD])
    assert table.partner[DEAD] == -1
    assert DEAD not in set(table.partner)
    assert not table.alive_F_D[DEAD]


def test_every_score_is_judged_on_the_same_pairs_as_scikit_learn_does(planted):
    table, artifact = compute(*planted[:2])
    judged = artifact.read_table("enrichment.parquet").set_index("measure")
    assert list(judged.index) == ["pair_novelty", "aligned_low", "contrast_low", "paired_x_y", "score"]
    assert judged.alive.nunique() == judged.flagged.nunique() == 1
    matched = table[table.partner >= 0]
    flagged = (matched.new_top_F_D.to_numpy() + table.new_top_F_M[matched.partner].to_numpy()) / 2 >= 0.5
    assert judged.flagged.iloc[0] == flagged.sum() == 5
    lows = {
        "pair_novelty": matched.pair_novelty,
        "aligned_low": -matched.aligned,
        "contrast_low": -matched.pair_contrast,
        "score": matched.score,
    }
    for name, low in lows.items():
        assert judged.average_precision[name] == pytest.approx(average_precision_score(flagged, -low))


def test_a_path_that_lacks_what_the_others_have_has_not_saturated(planted):
    store, spec, W = planted
    short = W["F_M"].clone()
    short[BORN["F_M"][2:]] = W["M"][BORN["F_M"][2:]]
    dictionaries = {**spec.dictionaries, "F_M": dictionary(store, short, 77)}
    _, artifact = compute(store, spec.model_copy(update={"dictionaries": dictionaries}))
    figures = artifact.manifest.figures
    assert figures["coverage_F_M"] == pytest.approx(0.5)  # of four newborns of F via D
    assert figures["coverage_F_D"] == 1
    assert figures["births_saturated"] is False


def test_newborns_that_do_not_carry_the_new_data_say_nothing_about_saturation(planted):
    store, spec, W = planted
    drifted = W["F_D"].clone()
    drifted[100:104] = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(8), dtype=torch.float64))[0][:4]
    dictionaries = {**spec.dictionaries, "F_D": dictionary(store, drifted, 78)}
    _, artifact = compute(store, spec.model_copy(update={"dictionaries": dictionaries}))
    figures = artifact.manifest.figures
    assert figures["newborn_F_D"] > figures["newborn_new_F_D"] == 4
    assert figures["coverage_F_M"] == 1


def test_without_births_nothing_is_said_about_saturation(planted):
    store, spec, _ = planted
    still = {s: spec.dictionaries["D"] for s in ("F_D", "F_M", "F_direct")}
    _, artifact = compute(store, spec.model_copy(update={"dictionaries": {**spec.dictionaries, **still}}))
    assert artifact.manifest.figures["births_saturated"] is None


def test_a_newborn_is_found_at_an_index_that_retraining_leaves_empty_too(planted):
    """Index 10 holds nothing after retraining; at 60 retraining makes something as new every time, which is no news."""
    store, spec, _ = planted
    usual = np.random.default_rng(0).uniform(0.99, 1.0, (2, 2, F))  # axis, repeat, feature
    usual[0, :, 10] = usual[1, :, 50] = np.nan
    usual[:, :, 60] = 0.3
    at = np.stack(np.meshgrid(range(2), range(2), range(F), indexing="ij"), -1).reshape(-1, 3)
    null = pd.DataFrame({"axis": np.array(["x", "y"])[at[:, 0]], "repeat": at[:, 1], "feature": at[:, 2], "novelty": usual.ravel()})
    table, artifact = compute(store, spec.model_copy(update={"null": retrained(store, null)}))
    assert set(table.sort_values("pair_excess", ascending=False).feature.head(4)) == set(BORN["F_D"])
    angle = np.arccos(usual)
    median = np.median(angle[0][np.isfinite(angle[0])])
    assert table.excess_F_D[10] == pytest.approx(np.arccos(table.novelty_F_D[10]) - median)
    assert table.excess_F_D[30] == pytest.approx(np.arccos(table.novelty_F_D[30]) - np.sqrt((angle[0, :, 30] ** 2).mean()))
    assert table.pair_excess[60] < -1
    assert table.pair_agreed[60] == table.pair_excess[60], "what is below 0 is not made less so"
    assert table.agreed_contrast[60] == 0
    partner = table.partner[10]
    positive = max(table.contrast_F_D[10], 0) + max(table.contrast_F_M[partner], 0)
    agreed = table.excess_F_D[10] * table.agreement_F_D[10] ** 2 + table.excess_F_M[partner] * table.agreement_F_M[partner] ** 2
    assert table.pair_agreed[10] == pytest.approx(agreed)
    assert table.agreed_contrast[10] == pytest.approx(agreed * positive)
    for score in ("pair_agreed", "agreed_contrast"):
        assert set(table.nlargest(4, score).feature) == set(BORN["F_D"])
    assert {"excess_low", "agreed_low", "agreed_contrast_low"} <= set(artifact.read_table("enrichment.parquet").measure)
    among = np.sort(angle[0][np.isfinite(angle[0])])
    expected = (1 + (among >= np.arccos(table.novelty_F_D[10])).sum()) / (1 + len(among))
    assert table.p_F_D[10] == pytest.approx(expected)


def test_of_many_latents_those_that_turned_most_are_matched_and_the_rest_is_bounded(planted):
    store, spec, _ = planted
    whole, _ = compute(store, spec)
    table, artifact = compute(store, spec.model_copy(update={"candidates": 20}))
    assert table.novelty_F_D.notna().sum() == 20
    kept = table.novelty_F_D.notna()
    np.testing.assert_allclose(table.novelty_F_D[kept], whole.novelty_F_D[kept], atol=1e-6)
    figures = artifact.manifest.figures
    assert figures["left_out"] == 2 * (F - 1 - 20)
    left_out = ~kept & whole.alive_F_D
    assert whole.novelty_F_D[left_out].min() >= figures["left_out_novelty_at_least"] - 1e-6
    assert set(table.nsmallest(4, "pair_novelty").feature) == set(BORN["F_D"])


def test_without_statistics_on_the_base_model_there_is_no_contrast(planted):
    store, spec, _ = planted
    table, artifact = compute(store, spec.model_copy(update={"base_statistics": {}}))
    assert table.contrast_F_D.isna().all()
    assert table.aligned.isna().all()
    assert table.pair_contrast.isna().all()
    assert list(artifact.read_table("enrichment.parquet").measure) == ["pair_novelty", "paired_x_y", "score"]


def test_columns_say_their_units_and_meanings(planted):
    table, _ = compute(*planted[:2])
    assert list(table.columns) == list(COLUMNS)
    assert all(unit and meaning for unit, meaning in table.attrs["columns"].values())


def test_missing_stages_are_named(planted):
    store, spec, _ = planted
    short = {s: r for s, r in spec.dictionaries.items() if s != "F_M"}
    with pytest.raises(UserError, match="missing: F_M"):
        steps.run(spec.model_copy(update={"dictionaries": short}), store, device="cpu")
    with pytest.raises(UserError, match="on the base model .*missing: F_D"):
        steps.run(spec.model_copy(update={"base_statistics": {"F_M": spec.base_statistics["F_M"]}}), store, device="cpu")
