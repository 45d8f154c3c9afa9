"""The step patterns: every pair of kinds by hand, planted lives through the step."""

import numpy as np
import pandas as pd
import pytest
import torch

from stagediff import steps
from stagediff.errors import UserError
from stagediff.store import Store
from stagediff.track.patterns import REASONS, pattern_of
from stagediff.track.spec import KINDS, PATTERNS, KindsSpec, PatternsSpec

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
    (("noise", "a"), ("noise", "b"), ("concept", "b")),
    (("noise", "a"), ("noise", "b"), ("noise", "b")),
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
    ("maintaining", "maintaining"),
]
F = len(LIVES)


def decoder(step):
    rows = torch.eye(F, 2 * F) * torch.arange(1, F + 1)[:, None]
    if step >= 4:
        rows[2] = 3 * torch.eye(2 * F)[F]
    return rows


@pytest.fixture(scope="module")
def lives(probe_chain, tmp_path_factory):
    """(store, spec)"""
    store = Store(str(tmp_path_factory.mktemp("lives")))
    words = probe_chain.word_tokenizer(tmp_path_factory.mktemp("tokenizer"), ["a", "b"])
    chain = probe_chain.ProbeChain(store, np.zeros((ROWS, CONTEXT)), torch.randn(ROWS * (CONTEXT - 1), D), words)
    row = np.arange(4 * F)
    examples = pd.DataFrame({"feature": np.repeat(np.arange(F), 4), "activation": np.tile([4.0, 3, 2, 1], F), "row": row, "position": 1})
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


def test_counts_and_figures_add_up(artifact):
    counts = artifact.read_table("counts.parquet")
    for t, first in enumerate((0, 4)):
        own = counts[counts.from_step == first].set_index("pattern")
        named = [e[t] for e in EXPECTED if e[t] in PATTERNS]
        assert own["count"].to_dict() == {name: named.count(name) for name in PATTERNS}
        assert own.share.to_dict() == pytest.approx({name: named.count(name) / len(named) for name in PATTERNS})
    figures = artifact.manifest.figures
    assert sum(figures[name] for name in PATTERNS) + figures["without_pattern"] == 2 * F
    assert (figures["features"], figures["intervals"], figures["grouping"], figures["merge_blocks_cut"]) == (F, 2, 2, 0)


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
