"""The statistics pass against plain float64 loops over every token and feature."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from stagediff.errors import UserError
from stagediff.lm.spec import ActivationData
from stagediff.sae.accumulate import Reconstruction, TopExamples, histogram_edges
from stagediff.sae.dictionary import SAE, resolved
from stagediff.sae.spec import DictionaryConfig, StatisticsSpec
from stagediff.sae.statistics import Pass
from stagediff.spec import Ref

D, F, WIDTH, ROWS = 12, 40, 9, 30


def spec(**more) -> StatisticsSpec:
    return StatisticsSpec(
        dictionary=Ref("dictionaries/" + "0" * 20), data=ActivationData(base=Ref("activations/" + "1" * 20), rows=ROWS), **more
    )


def dictionary(architecture: str = "relu", bias: float = -1.5, features: int = F) -> SAE:
    g = torch.Generator().manual_seed(1)
    config = resolved(DictionaryConfig(architecture=architecture, features=features, k=4), D)
    W = torch.randn(features, D, generator=g) / D**0.5
    b_enc = torch.full((features,), bias)
    b_enc[:3] = -100.0  # three dead features
    return SAE(W.T.contiguous(), b_enc, W, torch.randn(D, generator=g) * 0.1, config, input_scale=0.5)


def activations(rows: int = ROWS, seed: int = 0):
    """bf16 activations [rows * WIDTH, D] with row, position (from 1: position 0 is skipped) and is_new of each."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows * WIDTH, D, generator=g) * 3).bfloat16()
    row = np.repeat(np.arange(rows), WIDTH)
    return x, row, np.tile(np.arange(1, WIDTH + 1), rows), np.isin(row, [2, 7, 8, 21])


def run(sae: SAE, shards: list, statistics: StatisticsSpec, **more) -> Pass:
    result = Pass(sae, D, WIDTH, statistics, **more)
    for shard in shards:
        result.add(*shard)
    return result


def cut(data, *at: int) -> list:
    """The data as shards that end at these rows."""
    bounds = [0, *at, len(data[0]) // WIDTH]
    return [tuple(part[a * WIDTH : b * WIDTH] for part in data) for a, b in itertools.pairwise(bounds)]


def dense(sae: SAE, x: torch.Tensor) -> np.ndarray:
    return sae.encode(x.float()).double().numpy()


@pytest.mark.parametrize("base_rows_only", [False, True])
@pytest.mark.parametrize("block_elements", [None, 3 * WIDTH * F, 4 * F, 1])
@pytest.mark.parametrize("architecture", ["relu", "topk"])
def test_every_count_equals_a_loop_over_tokens(architecture, block_elements, base_rows_only):
    sae, data = dictionary(architecture), activations()
    result = run(sae, cut(data, 11, 12), spec(base_rows_only=base_rows_only), block_elements=block_elements)
    table = result.table(np.ones(F))
    f, new = dense(sae, data[0]), data[3]
    for i in range(F):
        line = table.iloc[i]
        for name, mask in (("base", ~new), ("new", new)):
            fired = [v for v in f[mask, i] if v > 0]
            assert line[f"firings_{name}"] == len(fired)
            assert line[f"mass_{name}"] == pytest.approx(sum(fired), rel=1e-6)
            assert line[f"max_{name}"] == pytest.approx(max(fired, default=0), rel=1e-6)
            assert line[f"density_{name}"] == pytest.approx(len(fired) / mask.sum())
        own = [v for v in f[~new if base_rows_only else slice(None), i] if v > 0]
        assert line.firings == len(own)
        assert line["mean"] == pytest.approx(sum(own) / len(own) if own else 0, rel=1e-6)
        assert line["max"] == pytest.approx(max(own, default=0), rel=1e-6)
        assert line.density == pytest.approx(len(own) / (len(new) - (new.sum() if base_rows_only else 0)))


@pytest.mark.parametrize("block_elements", [None, 4 * F])
def test_histogram_equals_numpys_with_open_ends(block_elements):
    sae, data = dictionary(), activations()
    result = run(sae, cut(data, 4), spec(bins=8), block_elements=block_elements)
    table, edges, f, new = result.histogram(), result.edges.copy(), dense(sae, data[0]).astype(np.float32), data[3]
    edges[0], edges[-1] = 0, np.inf
    found = np.zeros((2, F, 8), int)
    for line in table.itertuples():
        assert line.base + line.new > 0
        found[:, line.feature, line.bin] = line.base, line.new
    for i in range(F):
        for k, mask in enumerate((~new, new)):
            values = f[mask, i][f[mask, i] > 0]
            assert found[k, i].tolist() == np.histogram(values, edges)[0].tolist()


def test_activations_beyond_the_histogram_are_counted_in_its_open_ends():
    from stagediff.sae.accumulate import FeatureCounts

    counts = FeatureCounts(2, histogram_edges(64))
    counts.add(np.array([0, 1, 1]), np.array([1e-9, 1e9, 1e-3], np.float32), np.array([False, False, True]))
    assert counts.histogram[0, 0, 0] == 1
    assert counts.histogram[0, 1, 63] == 1
    assert counts.histogram[1, 1, 0] == 1


@pytest.mark.parametrize("block_elements", [None, 2 * WIDTH * F, 4 * F, 1])
def test_top_examples_are_the_rows_maxima_in_order(block_elements):
    sae, data = dictionary(), activations()
    table = pd.DataFrame(run(sae, cut(data, 3, 20), spec(top=5), block_elements=block_elements).examples.table())
    x, row, position, new = data
    f = dense(sae, x)
    for i in range(F):
        maxima = []
        for r in range(ROWS):
            best = max((t for t in range(len(row)) if row[t] == r), key=lambda t: (f[t, i], -t))
            if f[best, i] > 0:
                maxima.append((f[best, i], r, position[best], new[best]))
        expected = sorted(maxima, key=lambda m: (-m[0], m[1]))[:5]
        got = table[table.feature == i]
        assert got["rank"].tolist() == list(range(len(expected)))
        assert got.activation.tolist() == pytest.approx([m[0] for m in expected], rel=1e-6)
        assert list(zip(got.row, got.position, got.is_new, strict=False)) == [m[1:] for m in expected]


def test_equal_maxima_go_to_the_smaller_row_and_position():
    sae, (x, row, position, new) = dictionary(), activations()
    # small fractions of two, so that sums are exact: a matrix product may round equal rows differently in different places of a block
    sae.input_scale = 1.0
    sae.W_enc, sae.b_enc = (sae.W_enc * 16).round() / 16, (sae.b_enc * 16).round() / 16
    same = ((x[:1].float() * 4).round() / 4).to(x.dtype).expand(len(x), D).contiguous()
    for block_elements in (None, WIDTH * F, 2 * F):
        table = pd.DataFrame(run(sae, [(same, row, position, new)], spec(top=4), block_elements=block_elements).examples.table())
        assert len(table)
        for _, one in table.groupby("feature"):
            assert one.row.tolist() == [0, 1, 2, 3]
            assert set(one.position) == {1}


@pytest.mark.parametrize("merge_at", [1, 50, 10**6])
def test_examples_do_not_depend_on_when_they_are_merged(merge_at):
    rng = np.random.default_rng(0)
    examples, everything = TopExamples(6, 3, merge_at), []
    for row in range(200):
        feature = np.flatnonzero(rng.random(6) < 0.6)
        value = rng.integers(1, 20, len(feature)).astype(np.float32)  # many ties
        examples.add(feature, value, np.full(len(feature), row), feature * 0, feature < 0)
        everything += [(f, -v, row) for f, v in zip(feature, value, strict=False)]
    table = examples.table()
    expected = [e for f in range(6) for e in sorted(e for e in everything if e[0] == f)[:3]]
    assert list(zip(table["feature"], -table["activation"], table["row"], strict=False)) == expected


@pytest.mark.parametrize("bias", [-1.5, 3.0])
@pytest.mark.parametrize("base_rows_only", [False, True])
def test_quality_is_that_of_the_stages_own_rows(base_rows_only, bias):
    sae, data = dictionary(bias=bias), activations()
    figures = run(sae, cut(data, 5), spec(base_rows_only=base_rows_only), block_elements=4 * WIDTH * F).figures()
    own = ~data[3] if base_rows_only else np.ones(len(data[3]), bool)
    x = data[0].double().numpy()[own]
    f = dense(sae, data[0])[own]
    x_hat = (f @ sae.W_dec.double().numpy() + sae.b_dec.double().numpy()) / sae.input_scale
    assert figures["explained_variance"] == pytest.approx(1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-5)
    assert figures["l0"] == pytest.approx((f > 0).sum(1).mean())
    assert figures["dead_share"] == pytest.approx((f > 0).any(0).__invert__().mean())
    assert figures["tokens"] == own.sum()
    assert figures["tokens_base"] + figures["tokens_new"] == len(own)


def test_variance_survives_massive_coordinates():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 4, generator=g, dtype=torch.float64)
    x[:, 0] += 1e7
    quality = Reconstruction(4)
    for part in x.split(77):
        quality.add(part, part * 0, 1)
    assert quality.spread == pytest.approx(float((x - x.mean(0)).square().sum()), rel=1e-9)


def test_a_pass_continued_from_its_state_gives_the_same_bytes():
    sae, shards = dictionary(), cut(activations(), 6, 13, 22)
    whole = run(sae, shards, spec())
    first = run(sae, shards[:2], spec())
    rest = Pass(sae, D, WIDTH, spec())
    rest.load_state({name: t.clone() for name, t in first.state().items()})
    for shard in shards[2:]:
        rest.add(*shard)
    assert rest.figures() == whole.figures()
    norms = np.ones(F)
    pd.testing.assert_frame_equal(rest.table(norms), whole.table(norms), check_exact=True)
    pd.testing.assert_frame_equal(rest.histogram(), whole.histogram(), check_exact=True)
    pd.testing.assert_frame_equal(pd.DataFrame(rest.examples.table()), pd.DataFrame(whole.examples.table()), check_exact=True)


def test_stage_without_new_rows_has_undefined_new_densities():
    sae, (x, row, position, new) = dictionary(), activations()
    table = run(sae, [(x, row, position, new & False)], spec()).table(np.ones(F))
    assert table.density_new.isna().all()
    assert (table.firings_new == 0).all()
    assert (table.firings == table.firings_base).all()


def test_activations_that_are_not_finite_are_refused():
    x, *where = activations()
    x[17] = float("nan")
    with pytest.raises(UserError, match="NaN or infinity"):
        run(dictionary(), [(x, *where)], spec())
