"""Merges: the rule against float64 loops over pairs, firing shares against plain encodings, and planted pairs through the step patterns."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import normalize

from stagediff import steps
from stagediff.lm.spec import TokenizerSource
from stagediff.track import firing, merges
from stagediff.track.firing import firing_shares
from stagediff.track.merges import FIELDS, find_merges, strongest_places
from stagediff.track.probe import Probe
from stagediff.track.spec import KindsSpec, PatternRule, PatternsSpec

ROWS, CONTEXT, D = 64, 5, 8
N = ROWS * (CONTEXT - 1)


# --- the rule -----------------------------------------------------------------------------------------------------------------------------


def crowded(seed, n=90, d=6, groups=12):
    """Decoders that move towards a few directions while others are already there, and shares [2, n, n] (earlier, later) of x's firing at y's places."""
    g, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    group = torch.randint(groups, (n,), generator=g)
    centre = torch.randn(groups, d, generator=g)
    near = torch.rand(n, 1, generator=g) < 0.5
    own = torch.randn(n, d, generator=g)
    before = normalize(torch.where(near, centre[group], own) + 0.3 * torch.randn(n, d, generator=g))
    after = normalize(centre[group] + 0.45 * torch.randn(n, d, generator=g))
    later = rng.random((n, n)) ** 4
    return before, after, np.stack([later * rng.random((n, n)), later])


def asked_of(table):
    return lambda is_later, x, y: table[int(is_later), x, y]


def merged_by_loops(before, after, shares, rule):
    decoders = [m.double().numpy() for m in (before, after)]
    found = {}
    for i in range(len(after)):
        for j in range(len(after)):
            if i == j:
                continue
            cosine = [m[i] @ m[j] / np.linalg.norm(m[i]) / np.linalg.norm(m[j]) for m in decoders]
            shared = [max(shares[t, i, j], shares[t, j, i]) for t in (0, 1)]
            together = [cosine[t] >= rule.merge_cosine and shared[t] >= rule.merge_shared for t in (0, 1)]
            grew = cosine[1] >= 2 * cosine[0] or shared[1] >= 2 * shared[0]
            if together == [False, True] and grew and (i not in found or cosine[1] > found[i][2]):
                found[i] = (j, *cosine, *shared)
    return pd.DataFrame([(i, *found[i]) for i in sorted(found)], columns=list(FIELDS))


@pytest.mark.parametrize("block", [7, 64, 4096])
@pytest.mark.parametrize("seed", range(3))
def test_merges_equal_loops_whatever_the_block(monkeypatch, seed, block):
    monkeypatch.setattr(merges, "PER_ROW", 90)
    before, after, shares = crowded(seed)
    rule = PatternRule(merge_cosine=0.7, merge_shared=0.6)
    expected = merged_by_loops(before, after, shares, rule)
    assert 10 < len(expected) < 80
    assert (expected.cos_before >= 0.7).any()  # their places joined, not their directions
    found, cut = find_merges(before, after, asked_of(shares), rule, block=block)
    assert cut == 0
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, atol=1e-6)


def test_a_collapsed_dictionary_gives_one_partner_per_feature_and_says_that_blocks_were_cut(monkeypatch):
    monkeypatch.setattr(merges, "PER_ROW", 3)
    n, asked = 300, []
    g = torch.Generator().manual_seed(0)
    before = normalize(torch.randn(n, 40, generator=g))
    after = normalize(torch.ones(n, 40) + 0.01 * torch.randn(n, 40, generator=g))

    def always(is_later, x, y):
        asked.append(len(x))
        return np.ones(len(x))

    found, cut = find_merges(before, after, always, PatternRule(merge_cosine=0.7), block=100)
    assert cut >= 6  # the blocks of the upper triangle
    assert max(asked) <= 2 * 3 * n
    assert (found.partner != found.feature).all()
    assert len(found) > 0.95 * n
    assert (found.cos_after >= 0.7).all()
    assert (found.cos_before < 0.7).all()


def test_pairs_that_were_together_before_do_not_crowd_out_merges(monkeypatch):
    """40 features of one direction, at both checkpoints; two others come together."""
    monkeypatch.setattr(merges, "PER_ROW", 2)
    together, apart = torch.eye(8)[[0] * 40], torch.eye(8)[[1, 2]]
    before = torch.cat([together, apart])
    after = torch.cat([together, torch.eye(8)[[3, 3]]])
    found, _ = find_merges(before, after, lambda is_later, x, y: np.ones(len(x)), PatternRule())
    assert (found.feature.tolist(), found.partner.tolist()) == ([40, 41], [41, 40])


@pytest.mark.parametrize(
    ("cos_before", "shared_before", "is_merge"),
    [
        (0.0, 0.9, True),  # directions came together
        (0.79, 0.4, True),  # places did
        (0.79, 0.49, False),  # they hover about the threshold
        (0.45, 0.49, False),
        (0.6, 0.5, False),  # together before
        (0.3, 0.5, True),
    ],
)
def test_a_merge_is_a_clear_change(cos_before, shared_before, is_merge):
    before = torch.tensor([[1.0, 0], [cos_before, (1 - cos_before**2) ** 0.5]])
    after = torch.tensor([[1.0, 0], [0.8, 0.6]])
    found, _ = find_merges(before, after, lambda is_later, x, y: np.full(len(x), 0.9 if is_later else shared_before), PatternRule())
    assert found.feature.tolist() == ([0, 1] if is_merge else [])


def test_features_without_a_direction_never_merge_and_none_at_all_are_no_error():
    before = normalize(torch.tensor([[1.0, 0], [0, 1], [0, 0]]))
    after = normalize(torch.tensor([[1.0, 0], [1, 0], [0, 0]]))

    def shares(value):
        return lambda is_later, x, y: np.full(len(x), value)

    assert find_merges(before, after, shares(1.0), PatternRule())[0].feature.tolist() == [0, 1]
    assert find_merges(before, after, shares(0.49), PatternRule())[0].empty
    assert find_merges(before[:0], after[:0], shares(1.0), PatternRule())[0].empty


# --- where features fire ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def chain(probe_chain, store):
    return probe_chain.ProbeChain(store, np.zeros((ROWS, CONTEXT)), torch.zeros(N, 2), TokenizerSource(digest="t"), shard_rows=16)


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "batchtopk", "topk"])
@pytest.mark.parametrize("small", [False, True])
def test_firing_shares_equal_loops_over_plain_codes(chain, encoded_chain, monkeypatch, architecture, small):
    if small:  # several blocks, each of several groups
        monkeypatch.setattr(firing, "VECTOR_BYTES", 2 * D * 6 * 5)
        monkeypatch.setattr(firing, "ROWS_AT_ONCE", 12)
    g, rng, features = torch.Generator().manual_seed(0), np.random.default_rng(0), 20
    x = torch.randn(N, D, generator=g).bfloat16()
    sae = encoded_chain.dictionary(torch.randn(D, features, generator=g), torch.randn(features, generator=g), architecture, 4, 0.7)
    points = tuple(encoded_chain.add_point(chain, step, x.float(), sae) for step in (0, 1))
    places = np.stack([rng.choice(N, 6, replace=False) for _ in range(features)])
    places[rng.random(places.shape) < 0.2] = -1
    places[3] = -1

    pre = x.double().numpy() @ sae.W_enc.double().numpy() + sae.b_enc.double().numpy()
    if architecture == "topk":
        active = (pre > 0) & (pre >= np.sort(pre, axis=1)[:, -4:-3])
    else:
        active = pre > (0.0 if architecture == "relu" else 0.7)
    a, b = rng.integers(0, features, (2, 200))
    expected = [np.mean([active[p, i] for p in places[j] if p >= 0]) if (places[j] >= 0).any() else 0.0 for i, j in zip(a, b, strict=True)]
    job = steps.Job(chain.store, None, None)
    found = firing_shares(a, b, places, points[0], sae, Probe(points, job))
    assert found == pytest.approx(expected)
    assert 0.05 < found.mean() < 0.95


# --- through the step ---------------------------------------------------------------------------------------------------------------------

F = 5
"""0: always e0. 1: e1, then on the way to e0. 2: goes there too, but is dead. 3: always near e0, and fires where 0 does. 4: writes near e0 from step 4 on,
and fires where it always did."""
UNIT = torch.eye(D)
MOVED = 0.8 * UNIT[0] + 0.6 * UNIT[1]
NEAR = 0.9 * UNIT[0] + 0.19**0.5 * UNIT[3]


@pytest.fixture
def merging(chain, encoded_chain):
    """(store, spec of the patterns). A position is feature 0's, 1's, 4's, or nobody's."""
    rng = np.random.default_rng(0)
    owner = rng.permutation(np.repeat([0, 1, 4, 7], N // 4))
    amplitude = torch.from_numpy(1 + 2 * rng.random(N)).float()[:, None]
    points = []
    for step in (0, 4, 16):
        direction = UNIT.clone()
        direction[1] = MOVED if step else UNIT[1]
        encoder = torch.stack([UNIT[0], direction[1], direction[1], NEAR, UNIT[4]])
        sae = encoded_chain.dictionary(encoder.T.contiguous(), torch.tensor([-0.5, -0.5, -100, -0.5, -0.5]))
        sae.W_dec[4] = 0.8 * UNIT[0] + 0.6 * UNIT[4] if step else UNIT[4]
        points.append(encoded_chain.add_point(chain, step, amplitude * direction[owner], sae))
    kinds = KindsSpec(points=tuple(points), tokenizer=chain.tokenizer, reference=chain.reference)
    kind = ["concept", "concept", "dead", "concept", "concept"]
    frames = [pd.DataFrame({"feature": np.arange(F), "step": p.step, "kind": kind, "token": "a"}) for p in points]
    with chain.store.write(kinds) as w:
        w.write_table("kinds.parquet", pd.concat(frames, ignore_index=True))
        w.commit(figures={})
    return chain.store, PatternsSpec(points=tuple(points), kinds=kinds.ref)


def test_merged_are_those_that_come_together_in_direction_and_places(merging):
    store, spec = merging
    artifact = store.artifact(steps.run(spec, store, device="cpu"))
    table = artifact.read_table("merges.parquet")
    assert list(table.columns) == ["feature", "partner", "from_step", "to_step", "cos_before", "cos_after", "shared_before", "shared"]
    assert set(table.attrs["columns"]) == set(table.columns)
    assert table[["feature", "partner", "from_step", "to_step"]].to_numpy().tolist() == [[0, 1, 0, 4], [1, 0, 0, 4], [3, 1, 0, 4]]
    assert table.cos_after.tolist() == pytest.approx([0.8, 0.8, 0.72], abs=1e-6)
    assert table.cos_before.tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert table.shared.tolist() == [1, 1, 1]
    assert table.shared_before.tolist() == [0, 0, 0]
    assert (artifact.manifest.figures["merged"], artifact.manifest.figures["merge_blocks_cut"]) == (3, 0)


def test_strongest_places_are_the_statistics_first_examples(merging):
    store, spec = merging
    probe = Probe(spec.points, steps.Job(store, None, None))
    statistics = store.artifact(spec.points[0].statistics)
    found = strongest_places(statistics, 3, F + 1, probe)
    table = statistics.read_table("examples.parquet")
    for i in (0, 1, 3, 4):
        own = table[table.feature == i].nlargest(3, "activation")
        assert found[i].tolist() == (own.row * (CONTEXT - 1) + own.position - 1).tolist()
    assert (found[[2, F]] == -1).all()
