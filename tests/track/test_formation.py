"""The formation step: progress, formation times and their bootstrap against scipy and plain loops; planted times; what is said where nothing can be; resume."""

import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peak import peak_mib
from scipy import stats
from scipy.spatial.distance import cdist

from stagediff import steps
from stagediff.errors import UserError
from stagediff.lm.spec import HookPoint, TokenizerSource
from stagediff.progress import Progress
from stagediff.sae.dictionary import SAE
from stagediff.store import Store
from stagediff.track import formation as module
from stagediff.track import regions as regions_module
from stagediff.track.bootstrap import resamples
from stagediff.track.datapoints import Datapoints
from stagediff.track.formation_tables import correlation
from stagediff.track.formation_times import Walk, pair_weights
from stagediff.track.spec import MEASURES, SETS, FormationRule, FormationSpec, KindsSpec

STEPS = (0, 10, 20, 40, 80)
T = len(STEPS)
ROWS, CONTEXT, D, F = 80, 9, 24, 16
PER_ROW = CONTEXT - 1
PLANTED = {i: i % T for i in range(10)}
"""Feature -> checkpoint from which its positions are alike."""
ONE, THREE, UNALIKE, SILENT = 11, 12, 13, 14
RULE = FormationRule(datapoints=10, random=20, bootstrap=20, smallest_m=0.3)
KIND = ["token", "concept"] * 5 + [None, "token", "dead", "noise", "dead", "dead"]


def planted_world(seed=0):
    """(encoder [D, F], activations of every checkpoint). A position belongs to one feature at most: before the feature's time it holds a vector of the
    directions that no feature reads, from then on the feature's direction.
    """
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(D, D)))[0]
    encoder, spare = basis[:, :F], basis[:, F:]
    n = ROWS * PER_ROW
    owner = np.full(n, -1)
    free = rng.permutation(n)
    for i in PLANTED:
        owner[free[50 * i : 50 * (i + 1)]] = i
    owner[free[500]] = ONE
    owner[free[501]], owner[free[502 + np.flatnonzero(free[502:520] // PER_ROW != free[501] // PER_ROW)[:2]]] = THREE, THREE
    owner[free[520:600]] = UNALIKE
    amplitude = 1 + 2 * rng.random(n)
    alone = spare @ rng.normal(size=(D - F, n))
    x = []
    for t in range(T):
        vectors = alone.T.copy()
        for p in np.flatnonzero(owner >= 0):
            if owner[p] == UNALIKE:
                vectors[p] = 0.9 * encoder[:, UNALIKE] + 6 * alone[:, p] / np.linalg.norm(alone[:, p])
            elif t >= PLANTED.get(int(owner[p]), 0):
                vectors[p] = amplitude[p] * encoder[:, owner[p]]
        x.append(torch.from_numpy(vectors + 0.08 * rng.normal(size=vectors.shape)).float())
    return torch.from_numpy(encoder).float(), x


def make_chain(probe_chain, encoded_chain, store):
    """(chain, points, dictionaries): a dictionary whose encoder wanders a little, and a feature that is silent."""
    encoder, x = planted_world()
    chain = probe_chain.ProbeChain(
        store, np.zeros((ROWS, CONTEXT)), torch.zeros(ROWS * PER_ROW, 2), TokenizerSource(digest="t"), shard_rows=16
    )
    points = []
    for t, step in enumerate(STEPS):
        g = torch.Generator().manual_seed(t)
        bias = torch.full((F,), -0.5)
        bias[[10, SILENT, 15]] = -100.0
        sae = encoded_chain.dictionary(encoder + 0.03 * torch.randn(D, F, generator=g), bias)
        points.append(encoded_chain.add_point(chain, step, x[t], sae))
    return chain, tuple(points)


def write_kinds(chain, points, kinds=KIND):
    """A kinds artifact that says `kinds` at the last checkpoint, and noise before."""
    spec = KindsSpec(points=points, tokenizer=chain.tokenizer, reference=chain.reference)
    n = len(kinds)
    parts = [pd.DataFrame({"feature": np.arange(n), "step": p.step, "kind": "noise"}) for p in points[:-1]]
    parts.append(pd.DataFrame({"feature": np.arange(n), "step": points[-1].step, "kind": kinds}))
    with chain.store.write(spec) as w:
        w.write_table("kinds.parquet", pd.concat(parts, ignore_index=True))
        w.commit(figures={})
    return spec.ref


def run(spec, store, **settings):
    steps.run(spec, store, device="cpu", progress=Progress(interactive=False), **settings)
    return store.artifact(spec.ref)


@pytest.fixture(scope="module")
def made(probe_chain, encoded_chain, tmp_path_factory):
    """(chain, spec, finished artifact). Read only."""
    chain, points = make_chain(probe_chain, encoded_chain, Store(str(tmp_path_factory.mktemp("formation"))))
    spec = FormationSpec(points=points, rule=RULE, kinds=write_kinds(chain, points))
    return chain, spec, run(spec, chain.store)


@pytest.fixture(scope="module")
def vectors(made, encoded_chain):
    """[(activations [n, D], codes [n, F])] of every checkpoint in float64, from what is stored."""
    chain, spec, _ = made
    found = []
    for point in spec.points:
        stored = chain.store.artifact(point.probe).array("data").read_rows(0, ROWS * PER_ROW)
        x = torch.from_numpy(stored.astype(np.int32) << 16).view(torch.float32).double().numpy()  # bfloat16 is a float32's upper half
        found.append((x, encoded_chain.plain_codes(SAE.load(chain.store.artifact(point.dictionary)), x)))
    return found


def similarity_matrices(x, f):
    """[4, n, n] by scipy. Weighted Jaccard from the Bray-Curtis distance b = sum |p - q| / sum (p + q): (1 - b) / (1 + b)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = cdist(f, f, "braycurtis")
        found = (1 - cdist(x, x, "cosine"), 1 - cdist(f, f, "cosine"), 1 - cdist(f != 0, f != 0, "jaccard"), (1 - apart) / (1 + apart))
    either = f.any(1)[:, None] | f.any(1)
    return np.stack([found[0], *(np.where(either, np.nan_to_num(s), 0.0) for s in found[1:])])


def mean_of_pairs(matrix, drawn):
    """Mean over ordered pairs of draws that are different datapoints."""
    pairs = [(a, b) for a, b in combinations(drawn, 2) if a != b]
    return np.mean([matrix[..., a, b] for a, b in pairs], axis=0)


def first_to_stay(m, share):
    """By the definition, from the first checkpoint on; T where never."""
    return next((t for t in range(len(m)) if all(v >= share * m[-1] for v in m[t:])), len(m))


@pytest.fixture(scope="module")
def expected(made, vectors):
    """(set, feature) -> {m [4, T], replicates [R, 4, T]}, and the baseline [T, 4]: all by loops over pairs."""
    _, spec, artifact = made
    random = artifact.read_table("random.parquet")
    at_random = (random.row * PER_ROW + random.position - 1).to_numpy()
    baseline = np.stack([mean_of_pairs(similarity_matrices(x[at_random], f[at_random]), range(len(at_random))) for x, f in vectors])
    found = {}
    for (which, feature), of in artifact.read_table("regions.parquet").groupby(["set", "feature"], observed=True):
        at, n = (of.row * PER_ROW + of.position - 1).to_numpy(), len(of)
        if n < 2:
            continue
        matrices = np.stack([similarity_matrices(x[at], f[at]) for x, f in vectors])  # [T, 4, n, n]
        rng = np.random.default_rng([spec.seed, n])
        draws = rng.integers(n, size=(spec.rule.bootstrap, n))
        for i in range(len(draws)):
            while len(set(draws[i])) == 1 and n > 2:
                draws[i] = rng.integers(n, size=n)
        m = (mean_of_pairs(matrices, range(n)) - baseline).T
        found[which, feature] = m, None if n == 2 else np.stack([(mean_of_pairs(matrices, d) - baseline).T for d in draws])
    return found, baseline


def test_baseline_is_the_similarity_of_the_same_random_positions_at_every_checkpoint(made, expected):
    table = made[2].read_table("baseline.parquet")
    assert table.step.tolist() == [s for s in STEPS for _ in MEASURES]
    assert table.measure.tolist() == list(MEASURES) * T
    np.testing.assert_allclose(table.similarity.to_numpy().reshape(T, 4), expected[1], atol=1e-5)


def test_progress_agrees_with_scipy_and_loops_for_every_set_measure_and_checkpoint(made, expected):
    table = made[2].read_table("formation.parquet")
    assert len(table) == len(SETS) * F * T
    for (which, feature), of in table.groupby(["set", "feature"], observed=True):
        assert of.step.tolist() == list(STEPS)
        found = of[[f"m_{m}" for m in MEASURES]].to_numpy().T
        if (which, feature) in expected[0]:
            np.testing.assert_allclose(found, expected[0][which, feature][0], atol=1e-5)
            assert of.reason.isna().all()
        else:
            assert np.isnan(found).all()
            assert set(of.reason) == {"fewer datapoints than asked: 1" if feature == ONE else "never active"}


def test_formation_times_and_intervals_agree_with_the_definition_resample_by_resample(made, expected):
    table = made[2].read_table("formed.parquet").set_index(["set", "feature", "measure"])
    at_step = [*STEPS, np.nan]
    checked, wide = 0, 0
    for (which, feature), (m, replicates) in expected[0].items():
        for i, measure in enumerate(MEASURES):
            row = table.loc[(which, feature, measure)]
            assert row.final_m == pytest.approx(m[i, -1], abs=1e-5)
            if m[i, -1] < RULE.smallest_m:
                assert np.isnan(row.formed_step)
                continue
            assert row.formed_step == STEPS[first_to_stay(m[i], RULE.share)]
            first = np.sort([first_to_stay(r[i], RULE.share) if r[i, -1] >= RULE.smallest_m else T for r in replicates])
            assert row.formed_share == pytest.approx((first < T).mean())
            low = np.quantile(first, 0.05, method="lower")
            high = np.quantile(first, 0.95, method="higher")
            np.testing.assert_array_equal([row.low, row.high], [at_step[low], at_step[high]])
            checked, wide = checked + 1, wide + (low < high)
    assert checked > 80
    assert wide > 0  # else the intervals show nothing


def test_planted_times_are_found_in_both_spaces_and_sets(made):
    table = made[2].read_table("formed.parquet")
    of = table[table.feature.isin(list(PLANTED)) & table.measure.isin(["activation_cosine", "feature_cosine"])]
    assert len(of) == 10 * 2 * 2
    assert (of.formed_step == of.feature.map(lambda i: STEPS[PLANTED[i]])).all()
    assert (of.datapoints == 10).all()


def test_what_cannot_be_said_has_a_reason(made):
    table = made[2].read_table("formed.parquet")
    assert len(table) == F * len(SETS) * len(MEASURES)
    for column in ("formed_step", "low", "high", "formed_share", "final_m"):
        assert table.reason[table[column].isna()].notna().all()
    of = table[(table["set"] == "top") & (table.measure == "activation_cosine")].set_index("feature")
    assert of.reason[SILENT] == "never active"
    assert of.reason[ONE] == "fewer datapoints than asked: 1"
    assert of.reason[THREE].startswith("fewer datapoints than asked: 3; formed at the first checkpoint")
    assert of.reason[UNALIKE] == "final M too small"
    assert np.isnan(of.formed_step[UNALIKE])
    assert abs(of.final_m[UNALIKE]) < RULE.smallest_m
    assert of.reason[0] == of.reason[5] == "formed at the first checkpoint"
    assert of.reason[[1, 2, 3, 4]].isna().all()
    assert of.datapoints[[SILENT, ONE, THREE, 0]].tolist() == [0, 1, 3, 10]


def test_an_interval_is_open_where_resamples_do_not_form():
    rule = FormationRule(bootstrap=10, smallest_m=0.5)
    walk = Walk(1, 3, rule)
    for t, m in ((2, [0.6, *[0.55] * 8, 0.4, 0.4]), (1, [0.5] * 11), (0, [0.4, 0.4, *[0.1] * 9])):
        walk.update(t, np.array([0]), np.tile(np.array(m, np.float32), (4, 1, 1)))
    found = walk.found()
    assert found.at[0].tolist() == [0]
    assert (found.low[0, 0], found.high[0, 0]) == (0, 3)  # 3: later than all
    assert found.unformed[0, 0] == pytest.approx(0.2)


def test_progress_that_falls_again_has_not_formed_before():
    walk = Walk(1, 5, FormationRule(bootstrap=1))
    for t, m in reversed(list(enumerate([0.9, 0.9, 0.1, 0.5, 0.8]))):
        walk.update(t, np.array([0]), np.full((4, 1, 2), m, np.float32))
    assert walk.found().at.tolist() == [[3]] * 4


def test_pair_weights_are_those_of_the_draws():
    n, repeats = 6, 40
    weights = pair_weights(n, repeats, 3)
    matrix = np.random.default_rng(0).random((n, n))
    matrix += matrix.T
    pairs = matrix[np.triu_indices(n, 1)]
    draws = np.random.default_rng([3, n]).integers(n, size=(repeats, n))
    assert pairs @ weights[:, 0] == pytest.approx(pairs.mean())
    for r, drawn in enumerate(draws):
        assert pairs @ weights[:, 1 + r] == pytest.approx(mean_of_pairs(matrix, drawn))
    two = pair_weights(2, 50, 0)
    assert (two == 1).all()  # draws of one datapoint alone are drawn again


def test_means_by_kind_with_a_bootstrap_over_features(made):
    _, spec, artifact = made
    m, by_kind = artifact.read_table("formation.parquet"), artifact.read_table("by_kind.parquet")
    assert set(by_kind.kind) == {"token", "concept", "noise"}
    m["kind"] = m.feature.map(dict(enumerate(KIND)))
    for r in by_kind.itertuples():
        of = m[(m["set"] == r.set) & (m.step == r.step) & (m.kind == r.kind)][f"m_{r.measure}"].dropna()
        assert r.features == len(of)
        assert r.m == pytest.approx(of.mean(), abs=1e-6)
        (counts,) = resamples(len(of), RULE.bootstrap, spec.seed)
        means = [np.repeat(of.to_numpy(float), drawn).mean() for drawn in counts]
        np.testing.assert_allclose([r.low, r.high], np.quantile(means, [0.05, 0.95]), atol=1e-6)
    assert by_kind[by_kind.kind == "token"].features.unique().tolist() == [5]  # not the one with a single datapoint


def test_agreement_of_measures_against_scipy(made):
    m, formed = made[2].read_table("formation.parquet"), made[2].read_table("formed.parquet")
    alive = [*PLANTED, UNALIKE]
    table = made[2].read_table("agreement.parquet")
    assert len(table) == len(SETS) * 6
    for r in table.itertuples():
        of = m[(m["set"] == r.set) & m.feature.isin(alive)]
        assert r.features == len(alive)
        assert r.m_correlation == pytest.approx(stats.pearsonr(of[f"m_{r.measure_a}"], of[f"m_{r.measure_b}"])[0], abs=1e-5)
        times = formed[(formed["set"] == r.set) & formed.feature.isin(alive)].pivot_table(
            index="feature", columns="measure", values="formed_step", observed=True
        )
        both = times[[r.measure_a, r.measure_b]].dropna()
        assert r.formed == len(both)
        assert r.time_correlation == pytest.approx(stats.spearmanr(both[r.measure_a], both[r.measure_b])[0], abs=1e-9)


def test_a_correlation_of_what_does_not_vary_is_none():
    assert np.isnan(correlation(np.ones(5), np.arange(5.0)))
    assert np.isnan(correlation(np.arange(2.0), np.arange(2.0)))
    assert correlation(np.arange(5.0), -np.arange(5.0)) == pytest.approx(-1)


def test_without_kinds_there_is_no_table_by_kind(made, tmp_path):
    chain, spec, whole = made
    store = copied(chain.store, spec, tmp_path)
    artifact = run(spec.model_copy(update={"kinds": None}), store)
    assert "by_kind.parquet" not in artifact.names()
    pd.testing.assert_frame_equal(artifact.read_table("formed.parquet"), whole.read_table("formed.parquet"))


def test_computing_again_gives_the_same_bytes_also_in_small_blocks(made, tmp_path, monkeypatch):
    chain, spec, whole = made
    store = copied(chain.store, spec, tmp_path, keep=True)
    assert run(spec, store, force=True).manifest.same_bytes
    monkeypatch.setattr(module, "VECTOR_BYTES", 37 * 2 * D)
    monkeypatch.setattr(module, "CODE_BYTES", {"cpu": 21 * 4 * F})
    asked = []
    similarities = module.similarities
    monkeypatch.setattr(module, "similarities", lambda x, f: asked.append(x.shape) or similarities(x, f))
    small = run(spec, store, force=True)
    assert all(b == 1 or b * n <= 21 for b, n, _ in asked)
    for name in ("formation", "formed"):
        pd.testing.assert_frame_equal(small.read_table(f"{name}.parquet"), whole.read_table(f"{name}.parquet"), atol=1e-6)


def test_blocks_hold_every_set_with_a_pair_once_and_keep_to_their_size():
    rng = np.random.default_rng(0)
    size = rng.integers(0, 7, 2 * 40)
    of = np.repeat(np.arange(80), size)
    table = pd.DataFrame(
        {"feature": of % 40, "set": np.array(SETS)[of // 40], "rank": np.arange(len(of)), "row": 0, "position": np.arange(len(of))}
    )

    class Flat:
        def flat(self, row, position):
            return np.asarray(position, np.int64)

    datapoints = Datapoints(table.sample(frac=1, random_state=0), Flat(), 40)
    np.testing.assert_array_equal(datapoints.size, size)
    blocks = list(datapoints.blocks(positions=30, at_once=13))
    assert sorted(s for block in blocks for group in block for s in group.tolist()) == np.flatnonzero(size > 1).tolist()
    for block in blocks:
        assert sum(datapoints.at(group).size for group in block) <= 30
        for group in block:
            assert datapoints.at(group).size <= 13
            for s, at in zip(group, datapoints.at(group), strict=True):
                assert at.tolist() == np.flatnonzero(of == s).tolist()
    assert [len(g) for g in next(iter(datapoints.blocks(positions=1, at_once=1)))] == [1]


def copied(store, spec, folder, keep=False):
    """A copy of the store, without the artifact of this spec unless it is to be kept."""
    path = Path(folder) / "copy"
    shutil.copytree(store.root, path)
    if not keep:
        shutil.rmtree(path / spec.ref)
    return Store(str(path))


@pytest.mark.parametrize("checkpoints", [0, 1, 3])
def test_a_killed_step_goes_on_after_its_last_checkpoint_to_the_same_bytes(made, tmp_path, monkeypatch, checkpoints):
    chain, spec, _ = made
    monkeypatch.setattr(module, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 60)
    calls, similarities, kill_at = [], module.similarities, [0]

    def counted(x, f):
        calls.append(1)
        if len(calls) == kill_at[0]:
            raise KeyboardInterrupt
        return similarities(x, f)

    monkeypatch.setattr(module, "similarities", counted)
    undisturbed = run(spec, copied(chain.store, spec, tmp_path / "undisturbed"))
    each = len(calls) // T
    assert each > 3

    store = copied(chain.store, spec, tmp_path)
    calls.clear()
    kill_at[0] = each * checkpoints + 3  # in the middle of the next one
    with pytest.raises(KeyboardInterrupt):
        run(spec, store)
    calls.clear()
    kill_at[0] = 0
    monkeypatch.setattr(module, "regions", None)  # they were written: they must not be looked for again
    again = run(spec, store)
    assert len(calls) == each * (T - checkpoints)
    assert again.manifest.data() == undisturbed.manifest.data()


def test_a_step_killed_while_it_looks_for_datapoints_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch):
    chain, spec, whole = made
    store = copied(chain.store, spec, tmp_path)
    monkeypatch.setattr(regions_module, "SAVE_SECONDS", -1.0)
    add, shards = regions_module.LevelSample.add, []

    def killed(self, feature, value, at):
        shards.append(int(at.min()))
        if len(shards) == 4:
            raise KeyboardInterrupt
        add(self, feature, value, at)

    monkeypatch.setattr(regions_module.LevelSample, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        run(spec, store)
    again = run(spec, store)
    assert shards[4] // (16 * PER_ROW) == 3  # the fourth shard, in which it was killed
    assert again.manifest.data() == whole.manifest.data()


def wrong(made, encoded_chain, name):
    """A spec of this fault, and what its error says."""
    chain, spec, _ = made
    points = spec.points
    first, x = points[0], torch.randn(ROWS * PER_ROW, D, generator=torch.Generator().manual_seed(0))
    changed = lambda point, **fields: spec.model_copy(update={"points": (*points[:-1], point.model_copy(update=fields))})  # noqa: E731
    if name == "other dictionary":
        return changed(points[-1], dictionary=first.dictionary), "were expected"
    if name == "no statistics":
        return changed(points[-1], statistics=first.probe), "was made by step 'harvest'"
    if name == "no probe":
        return changed(points[-1], probe=first.dictionary), "activations were expected"
    if name == "fewer rows":
        short = encoded_chain.add_point(chain, 99, x, encoded_chain.dictionary(torch.randn(D, F), -0.5), rows=40)
        return spec.model_copy(update={"points": (*points, short)}), "different numbers of probe rows"
    if name == "other positions":
        probe = chain.harvest(torch.randn(ROWS * (CONTEXT - 2), D), HookPoint(layer=3), model="m99", skip=(0, 1))
        statistics = chain.store.artifact(first.statistics).spec()
        data = statistics.data.model_copy(update={"base": probe})
        steps.run(other := statistics.model_copy(update={"data": data}), chain.store, device="cpu", progress=Progress(False))
        return spec.model_copy(
            update={"points": (first.model_copy(update={"probe": probe, "statistics": other.ref}), *points[1:])}
        ), "harvest the same rows"
    if name == "other features":
        wide = encoded_chain.add_point(chain, 98, x, encoded_chain.dictionary(torch.randn(D, F + 1), -0.5))
        return spec.model_copy(update={"points": (*points, wide)}), "one shape"
    if name == "other width":
        half = encoded_chain.add_point(chain, 97, x[:, :8], encoded_chain.dictionary(torch.randn(8, F), -0.5))
        return spec.model_copy(update={"points": (half, *points[1:])}), "one shape"
    if name == "few positions":
        return spec.model_copy(update={"rule": RULE.model_copy(update={"random": 10_000})}), "10000 random positions are asked"
    if name == "many datapoints":
        return spec.model_copy(update={"rule": RULE.model_copy(update={"datapoints": 26})}), "kept 25 examples"
    kinds = write_kinds(chain, points[1:], kinds=["token"] * (F - 1))
    return spec.model_copy(update={"kinds": kinds}), "another chain"


@pytest.mark.parametrize(
    "name",
    [
        "other dictionary",
        "no statistics",
        "no probe",
        "fewer rows",
        "other positions",
        "other features",
        "other width",
        "few positions",
        "many datapoints",
        "kinds",
    ],
)
def test_wrong_input_is_refused_in_words(made, encoded_chain, name):
    spec, says = wrong(made, encoded_chain, name)
    with pytest.raises(UserError, match=says):
        run(spec, made[0].store)


def test_a_checkpoint_of_another_width_is_refused(made, encoded_chain):
    chain, spec, _ = made
    probe = chain.harvest(torch.randn(ROWS * PER_ROW, 8), HookPoint(layer=3), model="thin")
    from stagediff.track.probe import Probe

    known = Probe(spec.points, type("J", (), {"store": chain.store, "artifact": staticmethod(chain.store.artifact)}))
    with pytest.raises(UserError, match="8 numbers per token"):
        known.vectors(spec.points[0].model_copy(update={"probe": probe}), np.arange(4))


MEASURE = """
import sys, torch
torch.set_num_threads(1)
from stagediff import steps
from stagediff.progress import Progress
from stagediff.store import Store
from stagediff.track.spec import FormationSpec
spec = FormationSpec.model_validate_json(open(sys.argv[2]).read())
steps.run(spec, Store(sys.argv[1]), device="cpu", progress=Progress(False))
"""


def test_memory_does_not_grow_with_the_tokens(probe_chain, encoded_chain, tmp_path):
    peaks = {}
    for rows in (200, 3200):  # 1.6 and 25 MiB of activations per checkpoint
        g = torch.Generator().manual_seed(0)
        store = Store(str(tmp_path / f"store{rows}"))
        blank = np.zeros((rows, CONTEXT)), torch.zeros(rows * PER_ROW, 2)
        chain = probe_chain.ProbeChain(store, *blank, TokenizerSource(digest="t"), shard_rows=100)
        sae = encoded_chain.dictionary(torch.randn(512, 32, generator=g), -40.0)  # some 4 % of pre-activations lie above
        x = torch.randn(rows * PER_ROW, 512, generator=g)
        points = tuple(encoded_chain.add_point(chain, t, x, sae) for t in (0, 1))
        spec = FormationSpec(points=points, rule=FormationRule(bootstrap=5))
        (tmp_path / "spec.json").write_text(spec.model_dump_json())
        peaks[rows] = peak_mib(MEASURE, store.root, str(tmp_path / "spec.json"))
    assert peaks[3200] - peaks[200] < 10
