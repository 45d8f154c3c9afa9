"""The drift step on chains of written decoders, against float64 loops; with features that never move, die, vanish and form at known steps."""

import numpy as np
import pytest
import torch
from peak import peak_mib

from stagediff import steps
from stagediff.errors import UserError
from stagediff.progress import Progress
from stagediff.sae.dictionary import SAE, resolved
from stagediff.sae.layout import CFG, WEIGHTS, to_bytes
from stagediff.sae.spec import Budget, DictionaryConfig, TrainSpec
from stagediff.store import Store
from stagediff.track import decoders
from stagediff.track.spec import DriftSpec

STEPS = [0, 1, 10, 100, 1000]
F, T, D = 60, len(STEPS), 16
STILL, DEAD, ZERO, NEVER = 0, 1, 2, 3


def run(spec, store):
    return store.artifact(steps.run(spec, store, device="cpu", progress=Progress(interactive=False)))


def cosine(u, v):
    return u @ v / np.sqrt((u @ u) * (v @ v))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """One for all tests: what one of them computes the others read."""
    return Store(str(tmp_path_factory.mktemp("drift") / "store"))


@pytest.fixture(scope="module")
def chain(store, bare_chain):
    """Decoders [T, F, D] as stored, firings [T, F], formation steps [F], null decoders [3, F, D], and the spec."""
    rng = np.random.default_rng(0)
    W = rng.normal(size=(1, F, D)) + np.cumsum(rng.normal(scale=0.3, size=(T, F, D)), 0)
    W[:, STILL] = W[0, STILL]
    W[2, ZERO] = 0
    W = W.astype(np.float32).astype(float)
    firings = rng.choice([9, 10, 50], (T, F), p=[0.2, 0.1, 0.7])
    firings[:, [STILL, ZERO, NEVER]] = 50
    firings[:, DEAD] = 9
    formed = rng.choice(np.array(STEPS, float), F)
    formed[NEVER] = np.nan
    points = tuple(bare_chain.point(store, step, W[t], firings[t]) for t, step in enumerate(STEPS))
    null = np.cumsum([W[3], *rng.normal(scale=0.1, size=(2, F, D))], axis=0).astype(np.float32).astype(float)
    refs = (points[3].dictionary, *(bare_chain.dictionary(store, null[r], 10_000 + r) for r in (1, 2)))
    spec = DriftSpec(points=points, formation=bare_chain.formed(store, points, formed), null=refs, null_step=100)
    return W, firings, formed, null, spec


def test_features_equal_float64_loops(chain, store):
    W, firings, formed, _, spec = chain
    table = run(spec, store).read_table("features.parquet")
    assert table.feature.tolist() == [i for i in range(F) for _ in range(T)]
    assert table.step.tolist() == STEPS * F
    for row in table.itertuples():
        i, t = row.feature, STEPS.index(row.step)
        zero = i == ZERO and t == 2
        assert row.cos_final == pytest.approx(np.nan if zero else cosine(W[t, i], W[-1, i]), abs=1e-7, nan_ok=True)
        near_zero = i == ZERO and t in (2, 3)
        expected = np.nan if t == 0 or near_zero else cosine(W[t, i], W[t - 1, i])
        assert row.cos_previous == pytest.approx(expected, abs=1e-7, nan_ok=True)
        assert row.norm == pytest.approx(np.linalg.norm(W[t, i]), rel=1e-6)
        assert row.density == pytest.approx(firings[t, i] / 1000)
        assert row.alive == (firings[t, i] >= 10)
        assert row.formed is (None if np.isnan(formed[i]) else bool(STEPS[t] >= formed[i]))
        assert (row.reason == "zero decoder row") == near_zero


def test_a_feature_that_does_not_move_has_cosine_exactly_one(chain, store):
    artifact = run(chain[-1], store)
    table = artifact.read_table("features.parquet").set_index("feature").loc[STILL]
    assert (table.cos_final == 1).all()
    assert (table.cos_previous[1:] == 1).all()
    path = artifact.read_table("trajectory.parquet").set_index("feature")
    assert path.length[STILL] == 0
    assert np.isnan(path.explained[STILL])
    assert path.reason[STILL] == "did not move"
    assert path.reason[ZERO] == "zero decoder row"
    assert path.reason.drop([STILL, ZERO]).isna().all()
    assert path.drop([STILL, ZERO]).explained.between(0, 1).all()


def test_histograms_count_features_alive_at_both_ends(chain, store):
    W, firings, _, null, spec = chain
    table = run(spec, store).read_table("histogram.parquet")
    alive = firings >= 10
    assert set(table.against) == {"final", "previous", "null"}
    assert table.groupby(["step", "against"]).size().unique().tolist() == [100]

    def check(step, against, values):
        part = table[(table.step == step) & (table.against == against)]
        for bin_ in part.itertuples():
            inside = [v for v in values if bin_.low <= v and (v < bin_.high or bin_.high == 1)]
            assert bin_.count == len(inside)
        assert part["count"].sum() == len(values)

    for t, step in enumerate(STEPS):
        check(step, "final", [cosine(W[t, i], W[-1, i]) for i in range(F) if alive[t, i] and alive[-1, i] and W[t, i].any()])
        if t:
            both = [i for i in range(F) if alive[t, i] and alive[t - 1, i] and W[t, i].any() and W[t - 1, i].any()]
            check(step, "previous", [cosine(W[t, i], W[t - 1, i]) for i in both])
    check(100, "null", [cosine(null[r, i], null[r - 1, i]) for i in range(F) if alive[3, i] for r in (1, 2)])
    assert set(table.step[table.against == "null"]) == {100}


def test_the_null_is_measured_along_the_frozen_checkpoint(chain, store):
    _, _, _, null, spec = chain
    table = run(spec, store).read_table("null.parquet")
    assert len(table) == 2 * F
    for row in table.itertuples():
        assert row.cos_start == pytest.approx(cosine(null[row.repeat, row.feature], null[0, row.feature]), abs=1e-7)
        assert row.cos_previous == pytest.approx(cosine(null[row.repeat, row.feature], null[row.repeat - 1, row.feature]), abs=1e-7)


def test_before_and_after_leave_out_moves_of_dead_features(chain, store):
    W, firings, formed, null, spec = chain
    artifact = run(spec, store)
    table = artifact.read_table("before_after.parquet")
    alive = firings >= 10
    for row in table.itertuples():
        i = row.feature
        moves = {t: 1 - cosine(W[t, i], W[t - 1, i]) for t in range(1, T) if alive[t, i] and alive[t - 1, i] and i != ZERO}
        before = [m for t, m in moves.items() if STEPS[t] < formed[i]]
        after = [m for t, m in moves.items() if STEPS[t] >= formed[i]]
        if i != ZERO:
            assert row.drift_before == pytest.approx(np.mean(before) if before else np.nan, nan_ok=True, abs=1e-12)
            assert row.drift_after == pytest.approx(np.mean(after) if after else np.nan, nan_ok=True, abs=1e-12)
        drift = np.mean([1 - cosine(null[r, i], null[r - 1, i]) for r in (1, 2)]) if alive[3, i] else np.nan
        assert row.null == pytest.approx(drift, nan_ok=True, abs=1e-12)
    assert table.reason[NEVER] == "never formed"
    assert np.isnan(table.loc[DEAD, ["drift_before", "drift_after", "null"]].astype(float)).all()
    figures = artifact.manifest.figures
    both = table.drift_before.notna() & table.drift_after.notna()
    assert figures["features_compared"] == both.sum()
    assert figures["drift_before"] == pytest.approx(table.drift_before[both].median())
    assert figures["drift_null"] == pytest.approx(table.null.median())
    assert figures["formed"] == F - 1


def test_trajectories_follow_the_step_order_and_carry_the_flag(chain, store):
    W, _, _, _, spec = chain
    artifact = run(spec, store)
    table = artifact.read_table("trajectories.parquet")
    features = artifact.read_table("features.parquet")
    assert table[["feature", "step"]].equals(features[["feature", "step"]])
    assert table.formed.tolist() == features.formed.tolist()
    explained = artifact.read_table("trajectory.parquet").explained
    for i in (5, 6, 7):
        unit = W[:, i] / np.linalg.norm(W[:, i], axis=1, keepdims=True)
        centred = unit - unit.mean(0)
        u, s, _ = np.linalg.svd(centred, full_matrices=False)
        pc = table.loc[table.feature == i, ["pc1", "pc2"]].to_numpy()
        assert np.abs(pc) == pytest.approx(np.abs(u[:, :2] * s[:2]), abs=1e-6)
        assert explained[i] == pytest.approx((s[:2] ** 2).sum() / (s**2).sum(), abs=1e-9)


def test_every_column_has_a_meaning(chain, store):
    artifact = run(chain[-1], store)
    for name in artifact.names():
        if name.endswith(".parquet"):
            table = artifact.read_table(name)
            assert list(table.attrs["columns"]) == list(table.columns)
            assert all(meaning for _, meaning in table.attrs["columns"].values())


@pytest.mark.parametrize("features", [1, 7, F])
def test_the_cut_into_blocks_does_not_matter(chain, store, features):
    class Job:
        artifact = staticmethod(store.artifact)

    W, *_, spec = chain
    chained = decoders.ChainDecoders(Job, [p.dictionary for p in spec.points])
    seen = 0
    for start, stop, rows in chained.blocks(block_bytes=features * T * D * 8):
        assert (start, stop) == (seen, min(seen + features, F))
        assert np.array_equal(rows.numpy(), W[:, start:stop].transpose(1, 0, 2))
        seen = stop
    assert seen == F


def test_without_formation_and_null_the_rest_is_there(chain, store):
    spec = chain[-1].model_copy(update={"formation": None, "null": (), "null_step": None})
    artifact = run(spec, store)
    assert artifact.read_table("features.parquet").formed.isna().all()
    assert len(artifact.read_table("null.parquet")) == 0
    assert set(artifact.read_table("histogram.parquet").against) == {"final", "previous"}
    table = artifact.read_table("before_after.parquet")
    assert table[["drift_before", "drift_after", "null"]].isna().all(axis=None)
    assert set(table.reason) == {"formation was not computed"}
    assert artifact.manifest.figures["drift_before"] is None


def test_a_null_without_repeats_is_no_null(chain, store):
    spec = chain[-1].model_copy(update={"null": chain[-1].null[:1]})
    artifact = run(spec, store)
    assert len(artifact.read_table("null.parquet")) == 0
    assert artifact.read_table("before_after.parquet").null.isna().all()


def test_the_input_scale_of_a_checkpoint_does_not_turn_a_feature(store, bare_chain):
    """Dictionaries as the layout stores them: the rows are divided by each checkpoint's own scale, in fp32."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(8, D, generator=g)
    config = resolved(DictionaryConfig(features=8), D)
    points = []
    for t, scale in enumerate((1.0, 0.37, 11.3)):
        cfg, weights = to_bytes(SAE(W.T.contiguous(), torch.zeros(8), W, torch.zeros(D), config, scale))
        point = bare_chain.point(store, t, np.ones((8, D)), np.full(8, 50))
        spec = TrainSpec(data=bare_chain.DATA, budget=Budget(tokens=1), dictionary=DictionaryConfig(features=8), seed=500 + t)
        with store.write(spec) as w:
            w.write_bytes(CFG, cfg)
            w.write_bytes(WEIGHTS, weights)
            w.commit(figures={}, numerics={})
        points.append(point.model_copy(update={"dictionary": spec.ref}))
    artifact = run(DriftSpec(points=tuple(points)), store)
    table = artifact.read_table("features.parquet")
    assert (1 - table.cos_previous.dropna()).abs().max() < 1e-12
    assert set(artifact.read_table("trajectory.parquet").reason) == {"did not move"}


def test_the_same_spec_gives_the_same_bytes(chain, store):
    spec = chain[-1]
    run(spec, store)
    steps.run(spec, store, device="cpu", progress=Progress(interactive=False), force=True)
    assert store.artifact(spec.ref).manifest.same_bytes is True


def test_dictionaries_of_another_shape_are_refused(chain, store, bare_chain):
    spec = chain[-1]
    other = bare_chain.dictionary(store, np.ones((F, D + 1)), 99)
    points = (*spec.points[:-1], spec.points[-1].model_copy(update={"dictionary": other}))
    with pytest.raises(UserError, match="one shape"):
        run(spec.model_copy(update={"points": points, "formation": None}), store)
    wrong = (*spec.null[:1], other, other)
    with pytest.raises(UserError, match="one shape"):
        run(spec.model_copy(update={"null": wrong}), store)


def test_statistics_of_another_dictionary_are_refused(chain, store, bare_chain):
    spec = chain[-1]
    other = bare_chain.point(store, 7, np.ones((5, D)), np.full(5, 50))
    points = (*spec.points[:-1], spec.points[-1].model_copy(update={"statistics": other.statistics}))
    with pytest.raises(UserError, match="5 features, its dictionary has 60"):
        run(spec.model_copy(update={"points": points}), store)


def test_a_null_that_is_not_the_chains_is_refused(chain, store):
    spec = chain[-1]
    with pytest.raises(UserError, match="no checkpoint of the chain"):
        run(spec.model_copy(update={"null_step": 5}), store)
    with pytest.raises(UserError, match="no checkpoint of the chain"):
        run(spec.model_copy(update={"null_step": None}), store)
    with pytest.raises(UserError, match="List the chain's own dictionary first"):
        run(spec.model_copy(update={"null_step": 10}), store)


def test_formation_of_another_chain_is_refused(chain, store, bare_chain):
    spec = chain[-1]
    with pytest.raises(UserError, match="belongs to another chain"):
        run(spec.model_copy(update={"measure": "feature_cosine"}), store)
    other = bare_chain.formed(store, spec.points[:2], np.zeros(F + 1))
    with pytest.raises(UserError, match="belongs to another chain"):
        run(spec.model_copy(update={"formation": other}), store)


def test_tables_hold_numbers_in_the_declared_types(chain, store):
    types = run(chain[-1], store).read_table("features.parquet").dtypes.astype(str)
    assert types[["feature", "step", "cos_final", "cos_previous", "alive"]].tolist() == ["int32", "int64", "float32", "float32", "bool"]


MEASURE = """
import sys
from stagediff import steps
from stagediff.progress import Progress
from stagediff.store import Store
from stagediff.track.spec import DriftSpec

steps.run(DriftSpec.model_validate_json(open(sys.argv[2]).read()), Store(sys.argv[1]), device="cpu", progress=Progress(interactive=False))
"""


def test_memory_is_bounded_by_a_block_of_features(tmp_path, bare_chain):
    """Four decoders of 8,192 x 1,024 are 256 MiB in float64, and their PCA would hold as much again twice; of width 64 they are 16 MiB."""
    peaks = []
    for d in (64, 1024):
        store = Store(str(tmp_path / str(d)))
        rng = np.random.default_rng(0)
        points = tuple(bare_chain.point(store, t, rng.standard_normal((8192, d), np.float32), np.full(8192, 50)) for t in range(4))
        (tmp_path / "spec.json").write_text(DriftSpec(points=points).model_dump_json())
        peaks.append(peak_mib(MEASURE, str(store.root), str(tmp_path / "spec.json")))
    assert peaks[1] - peaks[0] < 220
