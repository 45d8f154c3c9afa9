"""Examples and histograms, unpacked here by a plain loop, are what the lookup and the table gave."""

import base64

import numpy as np
import pandas as pd
import pytest

from stagediff.diff.section.choice import Choice
from stagediff.diff.section.examples import pack_examples, pack_histograms, top_features
from stagediff.sae.spec import StatisticsSpec
from stagediff.spec import Ref
from stagediff.store import Store


def plain(packed: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["b64"]), dtype=packed["as"])


def choice(features: list[int], counts: list[int]) -> Choice:
    return Choice(np.array(features), np.array(counts), np.zeros(len(features), bool), np.zeros(len(features), bool))


@pytest.mark.parametrize("block", [1, 2, 100])
def test_every_window_comes_back_with_its_shades(builder, block):
    chosen = choice([3, 17, 500, 501], [20, 20, 2, 1])
    packed = pack_examples(chosen, lambda f, ranks: builder.fake_examples(None, None, f, 40, ranks), block)
    want = builder.fake_examples(None, None, [3, 17, 500, 501])
    words, tokens, shades = packed["words"], plain(packed["tokens"]), plain(packed["shades"])
    assert plain(packed["count"]).tolist() == [20, 20, 2, 1]
    example = token = 0
    for feature, count in zip([3, 17, 500, 501], [20, 20, 2, 1], strict=True):
        rows = want[want.feature == feature].sort_values("rank")
        strongest = rows.activation.max()
        for row in rows[:count].itertuples():
            length = plain(packed["length"])[example]
            assert [words[t] for t in tokens[token : token + length]] == row.tokens
            shade = shades[token : token + length] / 255
            assert np.abs(shade - np.array(row.activations) / strongest).max() <= 1 / 255
            assert ((shade > 0) == (np.array(row.activations) > 0)).all()
            assert plain(packed["row"])[example] == row.row
            assert plain(packed["position"])[example] == row.position
            assert bool(plain(packed["is_new"])[example]) == row.is_new
            assert plain(packed["activation"])[example] == np.float32(row.activation)
            assert plain(packed["peak"])[example] == np.argmax(row.activations)
            example, token = example + 1, token + length
    assert token == len(tokens)


def test_a_feature_without_examples_has_none():
    nothing = pd.DataFrame({c: [] for c in ("feature", "rank", "activation", "row", "position", "is_new", "tokens", "activations")})
    packed = pack_examples(choice([5, 6], [20, 20]), lambda f, ranks: nothing)
    assert plain(packed["count"]).tolist() == [0, 0]
    assert packed["words"] == []


def test_histograms_hold_the_chosen_features_only(tmp_path):
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.4, (2, 300, 8))
    feature, bin_ = np.nonzero(counts.any(0))
    store = Store(str(tmp_path))
    spec = StatisticsSpec(dictionary=Ref(f"dictionaries/{1:020x}"), data={"base": f"activations/{2:020x}", "rows": 1})
    with store.write(spec) as writer:
        table = pd.DataFrame(
            {
                "feature": feature.astype(np.int32),
                "bin": bin_.astype(np.int16),
                "base": counts[0, feature, bin_],
                "new": counts[1, feature, bin_],
            }
        )
        writer.write_table("histogram.parquet", table)
        writer.write_json("histogram.json", {"edges": list(range(9)), "unit": "activation"})
        writer.commit(figures={}, numerics={})
    chosen = np.array([0, 7, 130, 299])
    packed = pack_histograms(store.artifact(spec.ref), chosen)
    for i, name in enumerate(("base", "new")):
        assert np.array_equal(plain(packed[name]).reshape(4, 8), counts[i, chosen])


def test_the_foremost_features_come_in_the_order_of_their_score(made, builder):
    top = top_features(made.table, lambda f, ranks: builder.fake_examples(None, None, f, 40, ranks), count=5)
    want = made.table[made.table.selected].sort_values("score").feature[:5].tolist()
    assert [t["feature"] for t in top] == want
    assert all(max(t["weights"]) == 1.0 and f" I{t['feature']}" in t["tokens"] for t in top)
