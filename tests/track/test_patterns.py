"""The step patterns: every pair of kinds by hand, merges against float64 loops over sets, planted lives through the step."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import normalize

from stagediff import steps
from stagediff.errors import UserError
from stagediff.store import Store
from stagediff.track import merges
from stagediff.track.merges import find_merges, shared_positions, top_positions
from stagediff.track.patterns import REASONS, pattern_of
from stagediff.track.spec import KINDS, PATTERNS, KindsSpec, PatternRule, PatternsSpec

ROWS, CONTEXT, D = 64, 5, 8
STEPS = (0, 4, 16)


# --- the rule -----------------------------------------------------------------------------------------------------------------------------

OF_KINDS = {
    ("token", "token"): "maintaining",
    ("token", "concept"): "token_to_concept",
    ("token", "noise"): "losing",
    ("token", "dead"): "vanishing",
    ("token", None): "no kind at to_step",
    ("concept", "token"): "concept_to_token",
    ("concept", "concept"): "maintaining",
    ("concept", "noise"): "losing",
    ("concept", "dead"): "vanishing",
    ("concept", None): "no kind at to_step",
    ("noise", "token"): "grouping",
    ("noise", "concept"): "grouping",
    ("noise", "noise"): "maintaining",
    ("noise", "dead"): "vanishing",
    ("noise", None): "no kind at to_step",
    ("dead", "token"): "appearing",
    ("dead", "concept"): "appearing",
    ("dead", "noise"): "appearing",
    ("dead", "dead"): "dead at both",
    ("dead", None): "appearing",
    (None, "token"): "no kind at from_step",
    (None, "concept"): "no kind at from_step",
    (None, "noise"): "no kind at from_step",
    (None, "dead"): "vanishing",
    (None, None): "no kind at both",
}


def pattern(before, after, same_token=True, cosine=0.9):
    code = {**{name: i for i, name in enumerate(KINDS)}, None: -1}
    found, reason = pattern_of(*(np.array([v]) for v in (code[before], code[after], same_token, cosine)), 0.5)
    assert (found[0] >= 0) != (reason[0] >= 0)
    return PATTERNS[found[0]] if found[0] >= 0 else REASONS[reason[0]]


@pytest.mark.parametrize(("kinds", "expected"), OF_KINDS.items())
def test_the_pattern_of_every_pair_of_kinds(kinds, expected):
    assert pattern(*kinds) == expected


def test_a_token_feature_maintains_only_its_own_token():
    assert pattern("token", "token", same_token=False) == "token_to_token"
    assert pattern("token", "token", same_token=True, cosine=-1.0) == "maintaining"
    assert pattern("concept", "concept", same_token=False) == "maintaining"


@pytest.mark.parametrize(("cosine", "expected"), [(0.5, "maintaining"), (0.49, "concept turned"), (np.nan, "concept turned")])
def test_a_concept_whose_decoder_turned_may_be_another_one(cosine, expected):
    assert pattern("concept", "concept", cosine=cosine) == expected
    assert pattern("noise", "noise", cosine=cosine) == "maintaining"
    assert pattern("concept", "token", cosine=cosine) == "concept_to_token"


# --- merges -------------------------------------------------------------------------------------------------------------------------------


def crowded(seed, n=90, d=6, groups=12, places=9):
    """Decoders that move towards a few directions while others are already there, and top positions that overlap."""
    g, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    group = torch.randint(groups, (n,), generator=g)
    centre = torch.randn(groups, d, generator=g)
    near = torch.rand(n, 1, generator=g) < 0.5
    own = torch.randn(n, d, generator=g)
    before = normalize(torch.where(near, centre[group], own) + 0.3 * torch.randn(n, d, generator=g))
    after = normalize(centre[group] + 0.45 * torch.randn(n, d, generator=g))
    positions = np.full((n, places), -1)
    for i in range(n):
        mine = rng.choice(14, rng.integers(0, places + 1), replace=False) + 20 * int(group[i])
        positions[i, : len(mine)] = mine
    return before, after, positions


def merged_by_loops(before, after, positions, rule):
    b, a = before.double().numpy(), after.double().numpy()
    found = {}
    for i in range(len(a)):
        for j in range(len(a)):
            mine, other = set(positions[i]) - {-1}, set(positions[j]) - {-1}
            shared = len(mine & other) / len(mine | other) if mine | other else 0.0
            cosines = [m[i] @ m[j] / np.linalg.norm(m[i]) / np.linalg.norm(m[j]) for m in (b, a)]
            is_merge = cosines[0] < rule.merge_cosine <= cosines[1] and shared >= rule.merge_shared
            if i != j and is_merge and (i not in found or cosines[1] > found[i][2]):
                found[i] = (j, *cosines, shared)
    return pd.DataFrame([(i, *found[i]) for i in sorted(found)], columns=list(merges.FIELDS))


@pytest.mark.parametrize("block", [7, 64, 4096])
@pytest.mark.parametrize("seed", range(3))
def test_merges_equal_loops_whatever_the_block(seed, block):
    before, after, positions = crowded(seed)
    rule = PatternRule()
    expected = merged_by_loops(before, after, positions, rule)
    assert 10 < len(expected) < 80
    found, cut = find_merges(before, after, positions, rule, block=block)
    assert cut == 0
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, atol=1e-6)


def test_a_collapsed_dictionary_gives_one_partner_per_feature_and_says_that_blocks_were_cut(monkeypatch):
    monkeypatch.setattr(merges, "PER_ROW", 3)
    n = 300
    g = torch.Generator().manual_seed(0)
    before = normalize(torch.randn(n, 40, generator=g))
    after = normalize(torch.ones(n, 40) + 0.01 * torch.randn(n, 40, generator=g))
    held = []
    original = merges._checked
    monkeypatch.setattr(merges, "_checked", lambda a, *rest: held.append(len(a)) or original(a, *rest))
    found, cut = find_merges(before, after, np.tile(np.arange(5), (n, 1)), PatternRule(), block=100)
    assert cut == 6  # the blocks of the upper triangle
    assert max(held) <= 3 * 100
    assert found.feature.tolist() == [*range(n)]
    assert (found.partner != found.feature).all()
    assert (found.cos_after >= 0.7).all()
    assert (found.cos_before < 0.7).all()


def test_pairs_that_were_together_before_do_not_crowd_out_merges(monkeypatch):
    """40 features of one direction, at both checkpoints; two others come together."""
    monkeypatch.setattr(merges, "PER_ROW", 2)
    together, apart = torch.eye(8)[[0] * 40], torch.eye(8)[[1, 2]]
    before = torch.cat([together, apart])
    after = torch.cat([together, torch.eye(8)[[3, 3]]])
    found, cut = find_merges(before, after, np.zeros((42, 1), np.int64), PatternRule())
    assert (found.feature.tolist(), found.partner.tolist(), cut) == ([40, 41], [41, 40], 0)


def test_features_without_a_direction_or_without_examples_never_merge():
    before = normalize(torch.tensor([[1.0, 0], [0, 1], [0, 0]]))
    after = normalize(torch.tensor([[1.0, 0], [1, 0], [0, 0]]))
    same = np.array([[4, 5, -1]] * 3)
    assert find_merges(before, after, same, PatternRule())[0].feature.tolist() == [0, 1]
    assert find_merges(before, after, np.full((3, 3), -1), PatternRule())[0].empty
    assert find_merges(before[:0], after[:0], same[:0], PatternRule())[0].empty


def test_shared_positions_equal_jaccard_of_sets(monkeypatch):
    monkeypatch.setattr(merges, "PAIRS_AT_ONCE", 7)
    rng = np.random.default_rng(0)

    def places():
        return np.stack([np.where(rng.random(6) < 0.3, -1, rng.choice(12, 6, replace=False)) for _ in range(40)])

    a, b = places(), places()
    a[0] = b[0] = -1
    sets = [(set(x) - {-1}, set(y) - {-1}) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert shared_positions(a, b) == pytest.approx([len(x & y) / len(x | y) if x | y else 0 for x, y in sets])


# --- the step -----------------------------------------------------------------------------------------------------------------------------

#          step 0    token   step 4   token     step 16    token
LIVES = [
    (("token", "a"), ("token", "a"), ("token", "b")),
    (("token", "a"), ("concept", "a"), ("concept", "b")),  # keeps its direction
    (("concept", "a"), ("concept", "a"), ("token", "a")),  # turns between steps 0 and 4
    (("noise", "a"), ("concept", "a"), ("noise", "b")),
    (("dead", None), ("noise", "a"), ("noise", "b")),
    (("token", "a"), ("dead", None), ("dead", None)),
    ((None, None), ("token", "a"), (None, None)),
    (("noise", "a"), ("noise", "b"), ("concept", "b")),  # 7 and 8 come together at step 4
    (("noise", "a"), ("noise", "b"), ("concept", "b")),
    (("dead", None), ("noise", "b"), ("noise", "b")),  # comes to them too, but was dead
    (("noise", "a"), ("noise", "b"), ("noise", "b")),  # and this one has examples of its own
]
EXPECTED = [
    ("maintaining", "token_to_token"),
    ("token_to_concept", "maintaining"),
    ("concept turned", "concept_to_token"),
    ("grouping", "losing"),
    ("appearing", "maintaining"),
    ("vanishing", "dead at both"),
    ("no kind at from_step", "no kind at to_step"),
    ("maintaining", "grouping"),
    ("maintaining", "grouping"),
    ("appearing", "maintaining"),
    ("maintaining", "maintaining"),
]
F = len(LIVES)


def decoder(step):
    rows, norms = torch.eye(F, 2 * F), torch.arange(1, F + 1)[:, None]
    if step >= 4:
        rows[2] = torch.eye(2 * F)[F]
        rows[[7, 8, 9, 10]] = torch.eye(2 * F)[F + 1] + 0.4 * rows[[7, 8, 9, 10]]
    return normalize(rows) * norms


@pytest.fixture(scope="module")
def lives(probe_chain, tmp_path_factory):
    """(store, spec)"""
    store = Store(str(tmp_path_factory.mktemp("lives")))
    words = probe_chain.word_tokenizer(tmp_path_factory.mktemp("tokenizer"), ["a", "b"])
    chain = probe_chain.ProbeChain(store, np.zeros((ROWS, CONTEXT)), torch.randn(ROWS * (CONTEXT - 1), D), words)
    row = np.array([[4 * i + k if i not in (8, 9) else 28 + k for k in range(4)] for i in range(F)])  # 7, 8, 9 fire at the same places
    row[8, 3] = 60
    examples = pd.DataFrame(
        {"feature": np.repeat(np.arange(F), 4), "activation": np.tile([4.0, 3, 2, 1], F), "row": row.ravel(), "position": 1}
    )
    points = tuple(chain.point(step, examples, np.full(F, 40), decoder(step)) for step in STEPS)
    kinds = KindsSpec(points=points, tokenizer=words, reference=chain.reference)
    frames = []
    for t, step in enumerate(STEPS):
        kind, token = zip(*(life[t] for life in LIVES), strict=True)
        frames.append(pd.DataFrame({"feature": np.arange(F, dtype=np.int32), "step": step, "kind": kind, "token": token}))
    with store.write(kinds) as w:
        w.write_table("kinds.parquet", pd.concat(frames[::-1], ignore_index=True))
        w.commit(figures={})
    return store, PatternsSpec(points=points, kinds=kinds.ref)


@pytest.fixture(scope="module")
def artifact(lives):
    store, spec = lives
    return store.artifact(steps.run(spec, store, device="cpu"))


def test_every_feature_has_a_pattern_or_a_reason_for_every_interval(artifact):
    table = artifact.read_table("patterns.parquet")
    ends = [f"{end}_{what}" for what in ("kind", "token", "strength") for end in ("from", "to")]
    columns = ["feature", "from_step", "to_step", "pattern", *ends, "cosine", "reason"]
    assert list(table.columns) == columns
    assert set(table.attrs["columns"]) == set(columns)
    for t, (first, second) in enumerate([(0, 4), (4, 16)]):
        own = table[(table.from_step == first) & (table.to_step == second)]
        assert own.feature.tolist() == [*range(F)]
        assert (own.pattern.isna() == own.reason.notna()).all()
        assert own.pattern.fillna(own.reason).tolist() == [e[t] for e in EXPECTED]
        for name, at in (("from", t), ("to", t + 1)):
            pairs = zip(own[f"{name}_kind"], own[f"{name}_token"], strict=True)
            assert [tuple(None if pd.isna(v) else v for v in pair) for pair in pairs] == [life[at] for life in LIVES]
    cosine = table[table.from_step == 0].cosine
    assert cosine[[0, 2]].tolist() == pytest.approx([1, 0])
    a, b = decoder(0)[7].double(), decoder(4)[7].double()
    assert cosine[7] == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-7)


def test_merges_are_of_features_alive_at_both_that_share_examples(artifact):
    merged = artifact.read_table("merges.parquet")
    assert list(merged.columns) == ["feature", "partner", "from_step", "to_step", "cos_before", "cos_after", "shared"]
    assert merged[["feature", "partner", "from_step", "to_step"]].to_numpy().tolist() == [[7, 8, 0, 4], [8, 7, 0, 4]]
    a, b = decoder(4)[7].double(), decoder(4)[8].double()
    assert merged.cos_after.tolist() == pytest.approx([float(a @ b / a.norm() / b.norm())] * 2, abs=1e-6)
    assert merged.cos_before.tolist() == pytest.approx([0, 0])
    assert merged.shared.tolist() == pytest.approx([3 / 5] * 2)
    assert artifact.manifest.figures["merged"] == 2


def test_counts_and_figures_add_up(artifact):
    counts = artifact.read_table("counts.parquet")
    for t, first in enumerate((0, 4)):
        own = counts[counts.from_step == first].set_index("pattern")
        named = [e[t] for e in EXPECTED if e[t] in PATTERNS]
        assert own["count"].to_dict() == {name: named.count(name) for name in PATTERNS}
        assert own.share.to_dict() == pytest.approx({name: named.count(name) / len(named) for name in PATTERNS})
    figures = artifact.manifest.figures
    assert sum(figures[name] for name in PATTERNS) + figures["without_pattern"] == 2 * F
    assert (figures["features"], figures["intervals"], figures["grouping"], figures["merge_blocks_cut"]) == (F, 2, 3, 0)


def test_top_positions_are_the_rules_strongest_examples(lives):
    store, spec = lives
    statistics = store.artifact(spec.points[0].statistics)
    top = top_positions(statistics, 3, F + 1)
    assert top[8].tolist() == [(r << 32) + 1 for r in (28, 29, 30)]
    assert top_positions(statistics, 5, F)[8].tolist() == [*((r << 32) + 1 for r in (28, 29, 30, 60)), -1]
    assert (top[F] == -1).all()


def test_kinds_of_other_checkpoints_are_refused(lives):
    store, spec = lives
    with pytest.raises(UserError, match=r"the patterns of steps \[0, 16\]"):
        steps.run(spec.model_copy(update={"points": spec.points[::2]}), store, device="cpu")
    with pytest.raises(UserError, match="alive_firings 10, the patterns .* with 3"):
        steps.run(spec.model_copy(update={"alive_firings": 3}), store, device="cpu")


def test_what_is_not_kinds_is_named(lives):
    store, spec = lives
    with pytest.raises(UserError, match="was made by step 'statistics'"):
        steps.run(spec.model_copy(update={"kinds": spec.points[0].statistics}), store, device="cpu")


def test_kinds_of_another_number_of_features_are_refused(lives):
    store, spec = lives
    kinds = store.artifact(spec.kinds).spec().model_copy(update={"seed": 5})
    table = store.artifact(spec.kinds).read_table("kinds.parquet")
    with store.write(kinds) as w:
        w.write_table("kinds.parquet", table[table.feature < 4].reset_index(drop=True))
        w.commit(figures={})
    with pytest.raises(UserError, match=f"have {F} features, but the kinds .* are of 4"):
        steps.run(spec.model_copy(update={"kinds": kinds.ref}), store, device="cpu")
