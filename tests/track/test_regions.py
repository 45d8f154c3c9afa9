"""Datapoints: what lies in a feature's region, which examples are the strongest, and how the sample across levels is drawn; against plain loops."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from stagediff.errors import UserError
from stagediff.lm.spec import HookPoint, TokenizerSource
from stagediff.progress import Progress
from stagediff.store import Store
from stagediff.track import regions as module
from stagediff.track.probe import Probe
from stagediff.track.regions import LevelSample, random_positions, regions
from stagediff.track.spec import FormationRule, FormationSpec

ROWS, CONTEXT, D, F = 60, 9, 12, 20
PER_ROW = CONTEXT - 1
ASKED = 10
SILENT = 7
"""A feature whose bias keeps it off everywhere."""


def job_of(store):
    """What `regions` needs of a job; saved states are kept in `saves`."""
    saves = []
    writer = SimpleNamespace(
        training=SimpleNamespace(save=lambda step, tensors, meta: saves.append((step, {k: v.clone() for k, v in tensors.items()})))
    )
    return SimpleNamespace(
        store=store, artifact=lambda ref: store.artifact(ref).require(), device="cpu", writer=writer, progress=Progress(False), saves=saves
    )


@pytest.fixture(scope="module")
def chain(probe_chain, tmp_path_factory):
    store = Store(str(tmp_path_factory.mktemp("regions")))
    return probe_chain.ProbeChain(
        store, np.zeros((ROWS, CONTEXT)), torch.zeros(ROWS * PER_ROW, 2), TokenizerSource(digest="t"), shard_rows=16
    )


@pytest.fixture(scope="module")
def made(chain, encoded_chain):
    """architecture -> (spec, dictionary, activations as stored)."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS * PER_ROW, D, generator=g).to(torch.bfloat16).float()
    encoder = torch.randn(D, F, generator=g) / D**0.5
    bias = torch.full((F,), -0.6)
    bias[SILENT] = -100.0
    found = {}
    for i, name in enumerate(("relu", "topk", "jumprelu")):
        sae = encoded_chain.dictionary(encoder, bias, name, k=3, threshold=0.4)
        points = tuple(encoded_chain.add_point(chain, 10 * i + step, x, sae) for step in (0, 1))
        found[name] = FormationSpec(points=points, rule=FormationRule(datapoints=ASKED, random=30)), sae, x
    return found


def table_of(chain, spec):
    job = job_of(chain.store)
    return regions(spec, job, Probe(spec.points, job), None)


def plain_activations(name, sae, x):
    """[tokens, F] float64, written out from the definitions."""
    pre = x.double().numpy() @ sae.W_enc.double().numpy() + sae.b_enc.double().numpy()
    if name == "topk":
        keep = pre >= np.sort(pre, axis=1)[:, [-sae.config.k]]
        return np.where(keep, np.maximum(pre, 0), 0)
    return np.where(pre > (0.4 if name == "jumprelu" else 0), pre, 0)


@pytest.mark.parametrize("name", ["relu", "topk", "jumprelu"])
def test_every_datapoint_lies_in_its_features_region(chain, made, name):
    spec, sae, x = made[name]
    f = plain_activations(name, sae, x)
    table = table_of(chain, spec)
    at = table.row * PER_ROW + table.position - 1
    np.testing.assert_allclose(table.activation, f[at, table.feature], rtol=1e-5)
    assert (table.activation > 0).all()
    assert not table.duplicated(["feature", "set", "row", "position"]).any()
    assert set(table.feature) == set(range(F)) - {SILENT}
    for _, of in table.groupby(["feature", "set"], observed=True):
        assert of["rank"].tolist() == list(range(len(of)))
        assert (np.diff(of.activation) <= 0).all()


@pytest.mark.parametrize("name", ["relu", "topk", "jumprelu"])
def test_top_datapoints_are_the_strongest_rows(chain, made, name):
    spec, sae, x = made[name]
    f = plain_activations(name, sae, x).reshape(ROWS, PER_ROW, F)
    table = table_of(chain, spec)
    top = table[table["set"] == "top"]
    for i in range(F):
        best = sorted(((f[r, :, i].max(), -r) for r in range(ROWS) if f[r, :, i].any()), reverse=True)[:ASKED]
        of = top[top.feature == i]
        assert of.row.tolist() == [-r for _, r in best]
        assert [int(f[r, :, i].argmax()) + 1 for r in of.row] == of.position.tolist()


@pytest.mark.parametrize("name", ["relu", "jumprelu"])
def test_levels_cover_every_band_as_evenly_as_the_bands_allow(chain, made, name):
    spec, sae, x = made[name]
    f, smallest = plain_activations(name, sae, x), 0.4 if name == "jumprelu" else 0.0
    table = table_of(chain, spec)
    levels = table[table["set"] == "levels"]
    evenly = 0
    for i in set(range(F)) - {SILENT}:
        values = f[f[:, i] > 0, i]
        edges = np.linspace(smallest, values.max(), spec.rule.levels + 1)
        held = Counter(np.clip(np.searchsorted(edges, values, side="right") - 1, 0, spec.rule.levels - 1).tolist())
        expected = [0] * spec.rule.levels
        while sum(expected) < min(ASKED, len(values)):
            for band in reversed(range(spec.rule.levels)):
                if expected[band] < held[band] and sum(expected) < ASKED:
                    expected[band] += 1
        of = levels[levels.feature == i]
        assert np.bincount(of.level, minlength=spec.rule.levels).tolist() == expected
        assert ((of.activation >= edges[of.level] - 1e-6) & (of.activation <= edges[of.level + 1] + 1e-6)).all()
        evenly += expected == [2] * 5
    assert evenly >= 5  # else the case shows nothing


def firings(rng, n, features, positions):
    """n distinct (feature, position) with activations in (0, 1]."""
    cell = rng.choice(features * positions, n, replace=False)
    return cell // positions, (1 - rng.random(n)).astype(np.float32), cell % positions


def sample_of(features, rule, seed, positions, **settings):
    return LevelSample(np.zeros(features), np.ones(features), rule, seed, positions, **settings)


def test_the_sample_depends_on_neither_order_nor_blocks():
    rng, rule = np.random.default_rng(0), FormationRule(datapoints=6, levels=3)
    feature, value, at = firings(rng, 5000, 8, 4000)
    whole = sample_of(8, rule, 0, 4000)
    whole.add(feature, value, at)
    shuffled = rng.permutation(5000)
    pieces = sample_of(8, rule, 0, 4000, merge_at=300)
    for part in np.array_split(shuffled, 37):
        pieces.add(feature[part], value[part], at[part])
    pd.testing.assert_frame_equal(whole.table(), pieces.table())
    other = sample_of(8, rule, 1, 4000)
    other.add(feature, value, at)
    assert not whole.table().equals(other.table())


def test_every_firing_of_a_band_is_as_likely_to_be_drawn():
    rule, drawn = FormationRule(datapoints=4, levels=2), Counter()
    value = np.r_[np.full(40, 0.2), np.full(10, 0.9)].astype(np.float32)
    for seed in range(600):
        sample = sample_of(3, rule, seed, 50)
        sample.add(np.full(50, 1), value, np.arange(50))
        table = sample.table()
        assert table.level.tolist() == [1, 1, 0, 0]
        drawn.update(table["at"].tolist())
    weak, strong = [drawn[i] for i in range(40)], [drawn[i] for i in range(40, 50)]
    assert sum(weak) == sum(strong) == 1200
    assert stats.chisquare(weak).pvalue > 1e-3
    assert stats.chisquare(strong).pvalue > 1e-3


def test_what_a_band_lacks_is_taken_from_the_others():
    rule = FormationRule(datapoints=9, levels=3)
    sample = sample_of(1, rule, 0, 101)
    value = np.r_[np.full(50, 0.1), np.full(1, 0.5), np.full(50, 0.99)].astype(np.float32)
    sample.add(np.zeros(101, np.int64), value, np.arange(101))
    assert np.bincount(sample.table().level).tolist() == [4, 1, 4]
    few = sample_of(1, rule, 0, 100)
    few.add(np.zeros(5, np.int64), value[48:53], np.arange(5))
    assert len(few.table()) == 5


def test_the_sample_holds_no_more_than_features_times_bands_times_datapoints():
    rule, rng = FormationRule(datapoints=5, levels=4), np.random.default_rng(0)
    sample = sample_of(30, rule, 0, 1 << 20, merge_at=1000)
    held = 0
    for i in range(100):
        n = 5000
        sample.add(rng.integers(30, size=n), (1 - rng.random(n)).astype(np.float32), np.arange(n) + i * n)
        held = max(held, sample._n_waiting + len(sample._kept[0]))
    assert held <= 30 * 4 * 5 + 1000 + 5000


def test_a_killed_pass_goes_on_to_the_same_datapoints(chain, made, monkeypatch):
    spec = made["relu"][0]
    monkeypatch.setattr(module, "SAVE_SECONDS", -1.0)
    job = job_of(chain.store)
    probe = Probe(spec.points, job)
    whole = regions(spec, job, probe, None)
    assert [step for step, _ in job.saves] == [1, 2, 3, 4]
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", {"cpu": 7 * F})
    pd.testing.assert_frame_equal(regions(spec, job, probe, job.saves[1]), whole)


def test_random_positions_are_distinct_and_the_seeds(chain, made):
    spec, job = made["relu"][0], job_of(chain.store)
    probe = Probe(spec.points, job)
    at = random_positions(probe, spec.rule, 0)
    assert len(set(at.tolist())) == 30
    assert (np.diff(at) > 0).all()
    assert 0 <= at[0] <= at[-1] < ROWS * PER_ROW
    np.testing.assert_array_equal(at, random_positions(probe, spec.rule, 0))
    assert not np.array_equal(at, random_positions(probe, spec.rule, 1))
    row, position = probe.place(at)
    np.testing.assert_array_equal(probe.flat(row, position), at)
    assert set(position.tolist()) <= set(range(1, CONTEXT))
    with pytest.raises(UserError, match="481 random positions are asked of probe rows that hold 480"):
        random_positions(probe, FormationRule(random=481), 0)


def test_statistics_with_too_few_examples_are_refused(chain, made, encoded_chain):
    spec, sae, x = made["relu"]
    few = encoded_chain.add_point(chain, 99, x, sae, top=4)
    with pytest.raises(UserError, match="kept 4 examples"):
        table_of(chain, spec.model_copy(update={"points": (*spec.points, few)}))


def test_activations_that_are_not_finite_are_refused(chain, made):
    spec, _, x = made["relu"]
    bad = x.clone()
    bad[77, 3] = float("nan")
    probe = chain.harvest(bad, HookPoint(layer=3), model="broken")
    job = job_of(chain.store)
    known = Probe(spec.points, job)
    broken = spec.points[-1].model_copy(update={"probe": probe})
    with pytest.raises(UserError, match="NaN or infinity"):
        regions(spec.model_copy(update={"points": (spec.points[0], broken)}), job, known, None)
    with pytest.raises(UserError, match="NaN or infinity"):
        known.vectors(broken, np.array([76, 77]))
