"""Faint noise: strengths against a loop, and through the step patterns what is named differently because of it, and what is not."""

import numpy as np
import pandas as pd
import pytest
import torch

from stagediff import steps
from stagediff.store import Store
from stagediff.track.faint import faint, strength
from stagediff.track.spec import KINDS, KindRule, KindsSpec, PatternRule, PatternsSpec

ROWS, CONTEXT, EXAMPLES = 64, 5, 6

#          kind and strength at four checkpoints
LIVES = {
    "born at a waiting index": (("noise", 1.0), ("noise", 1.0), ("token", 8.0), ("token", 10.0)),
    "vanishes and leaves a rest": (("concept", 10.0), ("concept", 4.0), ("noise", 1.0), ("dead", 1.0)),
    "groups": (("noise", 9.0), ("noise", 4.0), ("concept", 10.0), ("concept", 10.0)),
    "loses": (("token", 10.0), ("noise", 4.0), ("noise", 4.0), ("noise", 10.0)),
    "waits, then dies": (("token", 10.0), ("noise", 1.0), ("noise", 2.0), ("dead", 0.0)),
    "means something, if faintly": (("token", 1.0), ("token", 1.0), ("concept", 1.0), ("concept", 10.0)),
    "was strong only while dead": (("dead", 50.0), ("noise", 2.0), ("noise", 1.9), ("concept", 2.0)),
    "gains its norm": (("noise", 9.0), ("noise", 9.0), ("token", 9.0), ("token", 9.0)),  # decoder rows of norm 0.1, 0.1, 1, 1
}
EXPECTED = [
    ("faint or dead at both", "appearing", "maintaining"),
    ("maintaining", "vanishing", "faint or dead at both"),
    ("maintaining", "grouping", "maintaining"),
    ("losing", "maintaining", "maintaining"),
    ("vanishing", "faint or dead at both", "faint or dead at both"),
    ("maintaining", "token_to_concept", "maintaining"),
    ("appearing", "maintaining", "grouping"),
    ("faint or dead at both", "appearing", "maintaining"),
]
PUBLISHED = [
    ("maintaining", "grouping", "maintaining"),
    ("maintaining", "losing", "vanishing"),
    EXPECTED[2],
    EXPECTED[3],
    ("losing", "maintaining", "vanishing"),
    EXPECTED[5],
    EXPECTED[6],
    ("maintaining", "grouping", "maintaining"),
]
F, STEPS = len(LIVES), (0, 1, 5, 9)


def examples_of(t: int) -> pd.DataFrame:
    """EXAMPLES + 2 places per feature, whose EXAMPLES strongest have the given mean; the two others are far weaker."""
    parts = []
    for i, life in enumerate(LIVES.values()):
        activation = life[t][1] * np.r_[np.linspace(1.2, 0.8, EXAMPLES), 0.1, 0.1]
        parts.append(pd.DataFrame({"feature": i, "activation": activation, "row": np.arange(EXAMPLES + 2) + 8 * (i % 8), "position": 1}))
    return pd.concat(parts, ignore_index=True)


def decoder(t: int) -> torch.Tensor:
    rows = torch.eye(F)
    rows[-1] *= (0.1, 0.1, 1.0, 1.0)[t]
    return rows


@pytest.fixture(scope="module")
def chain(probe_chain, tmp_path_factory):
    """(store, spec of the patterns)"""
    store = Store(str(tmp_path_factory.mktemp("faint")))
    words = probe_chain.word_tokenizer(tmp_path_factory.mktemp("tokenizer"), ["a", "b"])
    made = probe_chain.ProbeChain(store, np.zeros((ROWS, CONTEXT)), torch.randn(ROWS * (CONTEXT - 1), 4), words)
    points = tuple(made.point(step, examples_of(t), np.full(F, 40), decoder(t)) for t, step in enumerate(STEPS))
    kinds = KindsSpec(points=points, tokenizer=words, reference=made.reference, rule=KindRule(examples=EXAMPLES))
    frames = [
        pd.DataFrame({"feature": np.arange(F, dtype=np.int32), "step": step, "kind": [life[t][0] for life in LIVES.values()], "token": "a"})
        for t, step in enumerate(STEPS)
    ]
    with store.write(kinds) as w:
        w.write_table("kinds.parquet", pd.concat(frames, ignore_index=True))
        w.commit(figures={})
    return store, PatternsSpec(points=points, kinds=kinds.ref)


def patterns(chain, rule: PatternRule) -> tuple[pd.DataFrame, dict]:
    store, spec = chain
    artifact = store.artifact(steps.run(spec.model_copy(update={"rule": rule}), store, device="cpu"))
    return artifact.read_table("patterns.parquet"), artifact.manifest.figures


def named(table: pd.DataFrame) -> list[tuple[str, ...]]:
    text = table.assign(what=table.pattern.fillna(table.reason)).pivot(index="feature", columns="from_step", values="what")
    return [tuple(row) for row in text.to_numpy()]


def test_faint_noise_is_no_feature_and_strong_noise_and_faint_meanings_are(chain):
    table, figures = patterns(chain, PatternRule())
    assert named(table) == EXPECTED
    assert figures["faint"] == 7


def test_without_the_rule_patterns_are_those_of_the_kinds_alone(chain):
    table, figures = patterns(chain, PatternRule(faint=0))
    assert named(table) == PUBLISHED
    assert figures["faint"] == 0


def test_strengths_are_shares_of_a_features_own_largest_while_alive(chain):
    table, _ = patterns(chain, PatternRule())
    for i, life in enumerate(LIVES.values()):
        own = table[table.feature == i]
        norm = (0.1, 0.1, 1.0, 1.0) if i == F - 1 else (1.0,) * 4
        absolute = [np.nan if kind == "dead" else value * norm[t] for t, (kind, value) in enumerate(life)]
        expected = np.array(absolute) / np.nanmax(absolute)
        np.testing.assert_allclose(own.from_strength, expected[:-1], rtol=1e-6)
        np.testing.assert_allclose(own.to_strength, expected[1:], rtol=1e-6)


def test_strength_equals_a_loop_over_the_strongest_examples(probe_chain, tmp_path):
    rng, store = np.random.default_rng(0), Store(str(tmp_path))
    words = probe_chain.word_tokenizer(tmp_path / "t", ["a", "b"])
    made = probe_chain.ProbeChain(store, np.zeros((ROWS, CONTEXT)), torch.randn(ROWS * (CONTEXT - 1), 4), words)
    parts = [
        pd.DataFrame({"feature": i, "activation": rng.exponential(size=n), "row": rng.choice(ROWS, n, replace=False), "position": 1})
        for i, n in enumerate([12, 3, 0, 7, 1])
    ]
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    point = made.point(0, pd.concat(parts).sample(frac=1, random_state=0), np.full(6, 40), rows)
    expected = [
        np.mean(sorted(p.activation, reverse=True)[:5]) * np.linalg.norm(rows[i].double()) if len(p) else 0.0 for i, p in enumerate(parts)
    ]
    np.testing.assert_allclose(strength(store.artifact(point.statistics), 5, 6), [*expected, 0.0], rtol=1e-6)


def test_a_feature_that_is_never_alive_or_never_fires_is_not_faint():
    kind = np.array([[KINDS.index("dead"), KINDS.index("noise"), -1]] * 2)
    relative = np.array([[np.nan, np.nan, 0.1]] * 2)
    assert not faint(kind, relative, 0.33).any()
