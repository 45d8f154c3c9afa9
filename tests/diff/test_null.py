"""The retrain null on a small store: features that move as training alone moves them, and some that move farther on one axis or on both."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save
from scipy.stats import false_discovery_control

from stagediff import steps
from stagediff.diff.calibration import own_p_values, p_values
from stagediff.diff.null import COLUMNS
from stagediff.diff.spec import ALIGNED_STAGES, STAGES, AlignSpec, Cut, DiffSpec, NullSpec
from stagediff.errors import UserError
from stagediff.lm.spec import ActivationData
from stagediff.sae.spec import Budget, DictionaryConfig, StatisticsSpec, TrainSpec
from stagediff.spec import Ref
from stagediff.store import Store

F, D, REPEATS = 600, 48, 3
BOTH, ONE, DEAD = range(0, 12), range(12, 24), range(590, 600)
DATA = ActivationData(base=Ref("activations/" + "1" * 20), rows=10)
NULL_STAGES = ("S", "D", "M", "F_D", "F_M")


def moved(W: torch.Tensor, size: torch.Tensor, seed: int) -> torch.Tensor:
    """Rows turned by about `size` [F] radians, each its own way."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(W.shape, generator=g, dtype=torch.float64)
    noise /= noise.norm(dim=1, keepdim=True)
    return W / W.norm(dim=1, keepdim=True) + size[:, None] * (0.7 + 0.6 * torch.rand(len(W), 1, generator=g, dtype=torch.float64)) * noise


def dictionary(store, W, seed) -> Ref:
    spec = TrainSpec(data=DATA, budget=Budget(tokens=1), dictionary=DictionaryConfig(features=len(W)), seed=seed)
    with store.write(spec) as w:
        w.write_bytes("sae_weights.safetensors", save({"W_dec": W.float().contiguous()}))
        w.commit(figures={}, numerics={})
    return spec.ref


def statistics(store, of: Ref, density) -> Ref:
    spec = StatisticsSpec(dictionary=of, data=DATA)
    firings = (density * 1e6).astype(int)
    firings[list(DEAD)] = 0
    features = pd.DataFrame({"feature": np.arange(F), "firings": firings, "density": firings / 1e6, "decoder_norm": np.ones(F)})
    with store.write(spec) as w:
        w.write_table("features.parquet", features.assign(mass_base=1.0, mass_new=0.1))
        w.write_table("examples.parquet", pd.DataFrame({"feature": np.arange(F), "is_new": np.zeros(F, bool)}))
        w.commit(figures={"tokens_base": 900, "tokens_new": 100}, numerics={})
    return spec.ref


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Rare features move more. BOTH move four times as far on both axes, ONE on the first only."""
    store = Store(str(tmp_path_factory.mktemp("null") / "store"))
    density = 10 ** np.random.default_rng(0).uniform(-4, -1, F)
    usual = torch.from_numpy(0.02 * density**-0.2)
    far_x, far_y = usual.clone(), usual.clone()
    far_x[[*BOTH, *ONE]] *= 4
    far_y[list(BOTH)] *= 4
    W = {"S": torch.randn(F, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    W["D"], W["M"] = moved(W["S"], usual, 1), moved(W["S"], usual, 2)
    W["F_D"], W["F_M"], W["F_direct"] = moved(W["D"], far_x, 3), moved(W["M"], far_y, 4), moved(W["S"], far_x, 5)
    dictionaries = {s: dictionary(store, W[s], i) for i, s in enumerate(STAGES)}
    measured = {s: statistics(store, dictionaries[s], density) for s in STAGES}
    again = {s: [moved(W[s], usual, 100 + 10 * i + k) for k in range(REPEATS)] for i, s in enumerate(("D", "M"))}
    nulls = {s: tuple(dictionary(store, w, 1000 + 10 * i + k) for k, w in enumerate(of)) for i, (s, of) in enumerate(again.items())}
    spec = NullSpec(
        dictionaries={s: dictionaries[s] for s in NULL_STAGES},
        statistics={s: measured[s] for s in NULL_STAGES},
        nulls=nulls,
        null_statistics={s: tuple(statistics(store, ref, density) for ref in of) for s, of in nulls.items()},
    )
    artifact = store.artifact(steps.run(spec, store, device="cpu"))
    return store, spec, W, again, artifact, DiffSpec(dictionaries=dictionaries, statistics=measured)


def test_what_moved_farther_on_both_axes_is_called_and_hardly_anything_else(planted):
    table = planted[4].read_table("features.parquet")
    called = set(np.flatnonzero(table.q <= 0.1))
    assert set(BOTH) <= called
    assert len(called - set(BOTH)) <= 3
    assert (table.p_x[list(ONE)] < 0.01).all()
    assert (table.p[list(ONE)] > 0.01).mean() > 0.8


def test_null_cosines_are_those_of_the_retrained_dictionaries(planted):
    _, _, W, again, artifact, _ = planted
    null = artifact.read_table("null.parquet")
    assert len(null) == 2 * REPEATS * F
    for axis, stage in (("x", "D"), ("y", "M")):
        for repeat in range(REPEATS):
            of = null[(null.axis == axis) & (null.repeat == repeat)].set_index("feature")
            before, after = W[stage].float().double(), again[stage][repeat].float().double()
            for i in range(0, F, 97):
                assert of.cosine[i] == pytest.approx(float(before[i] @ after[i] / before[i].norm() / after[i].norm()))
                rows = torch.cat([W["D"], W["M"]]).float().double()
                largest = (rows @ after[i] / rows.norm(dim=1) / after[i].norm()).max()
                assert of.novelty[i] == pytest.approx(float(largest), abs=1e-6)


def test_p_is_the_larger_of_both_axes_and_q_is_scipys(planted):
    table, null = (planted[4].read_table(f"{name}.parquet") for name in ("features", "null"))
    alive = table.alive.to_numpy()
    np.testing.assert_array_equal(table.p[alive], np.maximum(table.p_x, table.p_y)[alive])
    np.testing.assert_allclose(table.q[alive], false_discovery_control(table.p[alive]))
    own = null[null.axis == "x"].set_index(["feature", "repeat"]).cosine.unstack().to_numpy()
    np.testing.assert_allclose(table.p_x, own_p_values(np.where(alive, np.arccos(table.x), np.nan), np.arccos(own)))


def test_with_one_repeat_like_is_compared_with_like(planted):
    store, spec, *_ = planted
    once = spec.model_copy(update={name: {s: r[:1] for s, r in getattr(spec, name).items()} for name in ("nulls", "null_statistics")})
    artifact = store.artifact(steps.run(once, store, device="cpu"))
    table, null = (artifact.read_table(f"{name}.parquet") for name in ("features", "null"))
    of = null[null.axis == "x"]
    like = [of.density_before.to_numpy(), of.norm_before.to_numpy()]
    expected = p_values(np.where(table.alive, np.arccos(table.x), np.nan), like, np.arccos(of.cosine.to_numpy()), like)
    np.testing.assert_allclose(table.p_x, expected)


def test_dead_features_take_no_part(planted):
    table, null = (planted[4].read_table(f"{name}.parquet") for name in ("features", "null"))
    assert table.loc[list(DEAD), ["p_x", "p_y", "p", "q"]].isna().all(axis=None)
    assert null[null.feature.isin(DEAD)].cosine.isna().all()
    assert planted[4].manifest.figures["null_values_x"] == REPEATS * (F - len(DEAD))


def test_figures_tell_the_smallest_p_and_that_nothing_is_called_where_nothing_changed(planted):
    figures = planted[4].manifest.figures
    assert figures["smallest_p"] == pytest.approx(1 / (1 + REPEATS * (F - len(DEAD))))
    assert figures["reaches_q_0.1"]
    assert figures["no_change_q_below_0.1"] <= 0.01
    assert figures["q_below_0.1"] >= len(BOTH)


def test_columns_say_their_units_and_meanings(planted):
    table = planted[4].read_table("features.parquet")
    assert list(table.columns) == list(COLUMNS)
    assert all(unit and meaning for unit, meaning in table.attrs["columns"].values())


def test_the_fdr_cut_selects_what_the_null_calls(planted):
    store, spec, *_, diff = planted
    cut = diff.model_copy(update={"cut": Cut(kind="fdr", value=0.1), "null": spec.ref})
    artifact = store.artifact(steps.run(cut, store, device="cpu"))
    selected = artifact.read_table("features.parquet").selected
    np.testing.assert_array_equal(selected, planted[4].read_table("features.parquet").q <= 0.1)


def test_the_fdr_cut_is_refused_where_the_null_cannot_reach_it_or_is_missing(planted):
    store, spec, *_, diff = planted
    strict = diff.model_copy(update={"cut": Cut(kind="fdr", value=1e-4), "null": spec.ref})
    with pytest.raises(UserError, match="cannot be reached"):
        steps.run(strict, store, device="cpu")
    with pytest.raises(UserError, match=r"evidence\.null_seeds"):
        steps.run(diff.model_copy(update={"cut": Cut(kind="fdr", value=0.1)}), store, device="cpu")


def test_aligned_pairs_have_p_and_q_too(planted):
    store, spec, *_, diff = planted
    steps.run(diff, store, device="cpu")
    align = AlignSpec(
        diff=diff.ref,
        dictionaries={s: diff.dictionaries[s] for s in ALIGNED_STAGES},
        statistics={s: diff.statistics[s] for s in ("F_D", "F_M", "F_direct")},
        null=spec.ref,
    )
    artifact = store.artifact(steps.run(align, store, device="cpu"))
    table = artifact.read_table("features.parquet")
    paired = table[table.partner >= 0]
    np.testing.assert_allclose(paired.pair_p, np.maximum(paired.p_F_D, table.p_F_M[paired.partner].to_numpy()))
    np.testing.assert_allclose(paired.pair_q, false_discovery_control(paired.pair_p))
    null = store.artifact(spec.ref).read_table("null.parquet").set_index(["axis", "feature", "repeat"]).novelty

    def excess(axis: str, feature: int, novelty: float) -> float:
        usual = np.sqrt(np.mean([np.arccos(null[axis, feature, k]) ** 2 for k in range(REPEATS)]))
        return np.arccos(novelty) - usual

    for i in (0, 5, 30, 300):
        j = table.partner[i]
        assert table.pair_excess[i] == pytest.approx(excess("x", i, table.novelty_F_D[i]) + excess("y", j, table.novelty_F_M[j]))
    foremost = paired.sort_values("pair_excess", ascending=False).feature.head(len(BOTH) + len(ONE))  # a sum: one axis alone goes far too
    assert len(set(foremost) & set(BOTH)) >= 11
    judged = set(artifact.read_table("enrichment.parquet").measure)
    assert {"excess_low", "agreed_low"} <= judged
    assert "agreed_contrast_low" not in judged  # without statistics on the base model
    called = set(paired.feature[paired.pair_q <= 0.1])
    assert len(set(BOTH) & called) >= 10
    assert len(called - set(BOTH)) <= 3
    assert artifact.manifest.figures["pairs_q_below_0.1"] == len(called)


def test_repeats_that_do_not_match_are_refused(planted):
    store, spec, *_ = planted
    with pytest.raises(UserError, match="as many repeats of D as of M"):
        steps.run(spec.model_copy(update={"nulls": {**spec.nulls, "M": spec.nulls["M"][:1]}}), store, device="cpu")
    short = {s: r for s, r in spec.dictionaries.items() if s != "F_M"}
    with pytest.raises(UserError, match="missing: F_M"):
        steps.run(spec.model_copy(update={"dictionaries": short}), store, device="cpu")
