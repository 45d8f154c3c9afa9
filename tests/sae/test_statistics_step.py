"""The statistics step and the example texts on a small store: token rows, a mix, activations and a dictionary written by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from stagediff import steps
from stagediff.errors import UserError
from stagediff.lm.spec import (
    ActivationData,
    CorpusSource,
    HarvestSpec,
    HookPoint,
    MixSpec,
    ModelSource,
    TokenizerSource,
    TokenizerSpec,
    TokensSpec,
)
from stagediff.sae import statistics
from stagediff.sae.dictionary import SAE, resolved
from stagediff.sae.examples import feature_examples
from stagediff.sae.layout import CFG, WEIGHTS, to_bytes
from stagediff.sae.spec import Budget, DictionaryConfig, StatisticsSpec, TrainSpec
from stagediff.store import Store
from stagediff.store.shards import from_bf16

D, F, CONTEXT, ROWS, NEW_ROWS, SHARD_ROWS = 8, 24, 12, 22, 3, 5
SKIP = (0,)
WIDTH = CONTEXT - len(SKIP)
REPLACED = [4, 9, 17]


class Run:
    """What the store holds, and the same as plain arrays."""

    def __init__(self, store: Store, architecture: str = "relu"):
        self.store, rng = store, np.random.default_rng(5)
        corpus = CorpusSource(builtin="stdlib", digest="a" * 64)
        tokenizer = TokenizerSpec(corpus=corpus, vocab=30)
        vocabulary = Tokenizer(models.WordLevel({f"w{i}": i for i in range(30)}, unk_token="w0"))
        vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
        with store.write(tokenizer) as w:
            w.write_bytes("tokenizer.json", vocabulary.to_str().encode())
            w.write_json("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"})
            w.commit(figures={}, numerics={})
        source = TokenizerSource(artifact=tokenizer.ref)
        base = TokensSpec(corpus=corpus, tokenizer=source, context=CONTEXT, rows=ROWS)
        new = TokensSpec(corpus=corpus, tokenizer=source, context=CONTEXT, rows=NEW_ROWS, is_new=True)
        mix = MixSpec(base=base.ref, new=new.ref, rows=ROWS, share=NEW_ROWS / ROWS)
        with store.write(mix) as w:
            w.write_table("overlay.parquet", pd.DataFrame({"row": REPLACED, "new_row": range(NEW_ROWS)}))
            w.commit(figures={}, numerics={})
        harvests, parts = [], []
        for spec in (base, new):
            ids = rng.integers(0, 30, (spec.rows, CONTEXT)).astype(np.int32)
            x = torch.from_numpy(rng.normal(size=(spec.rows * WIDTH, D)) * 3).bfloat16()
            harvest = HarvestSpec(
                model=ModelSource(name="m", digest="b" * 64),
                tokens=spec.ref,
                rows=spec.rows,
                hook=HookPoint(layer=0),
                skip_positions=SKIP,
                shard_rows=SHARD_ROWS,
            )
            self._array(spec, "rows", ids, 4, 8, {})
            self._array(harvest, "data", from_bf16(x), WIDTH, SHARD_ROWS * WIDTH, {"encoding": "bfloat16"})
            harvests.append(harvest)
            parts.append((ids, x.float().numpy().reshape(spec.rows, WIDTH, D)))
        self.data = ActivationData(base=harvests[0].ref, rows=ROWS, mix=mix.ref, new=harvests[1].ref)
        self.ids, self.x = (a.copy() for a in parts[0])
        self.ids[REPLACED], self.x[REPLACED] = parts[1]
        g = torch.Generator().manual_seed(1)
        W = torch.randn(F, D, generator=g) / D**0.5
        config = resolved(DictionaryConfig(architecture=architecture, features=F, k=3), D)
        self.sae = SAE(W.T.contiguous(), torch.full((F,), -1.0), W * 2, torch.randn(D, generator=g) * 0.1, config, input_scale=0.5)
        train = TrainSpec(data=self.data, budget=Budget(tokens=1), dictionary=config)
        with store.write(train) as w:
            cfg, weights = to_bytes(self.sae)
            w.write_bytes(CFG, cfg)
            w.write_bytes(WEIGHTS, weights)
            w.commit(figures={}, numerics={})
        self.spec = StatisticsSpec(dictionary=train.ref, data=self.data, top=4)

    def _array(self, spec, name, values, chunk, shard, attributes):
        with self.store.write(spec) as w:
            array = w.array(name, shape=values.shape, dtype=str(values.dtype), chunk_rows=chunk, shard_rows=shard, attributes=attributes)
            for i in array.pending(part=(0, 1)):
                array.write_shard(i, values[i * shard : (i + 1) * shard])
            w.commit(figures={}, numerics={})

    def activations(self) -> np.ndarray:
        """[ROWS, WIDTH, F], float64."""
        return self.sae.encode(torch.from_numpy(self.x.reshape(-1, D))).double().numpy().reshape(ROWS, WIDTH, F)


@pytest.fixture(params=["relu", "topk"])
def run(request, tmp_path) -> Run:
    return Run(Store(str(tmp_path)), request.param)


def test_the_step_counts_the_mix_row_by_row(run):
    ref = steps.run(run.spec, run.store, device="cpu")
    artifact, f = run.store.artifact(ref), run.activations()
    table = artifact.read_table("features.parquet")
    is_new = np.isin(np.arange(ROWS), REPLACED)
    assert table.firings_new.tolist() == (f[is_new] > 0).sum((0, 1)).tolist()
    assert table.firings_base.tolist() == (f[~is_new] > 0).sum((0, 1)).tolist()
    assert np.allclose(table.mass_new, f[is_new].sum((0, 1)), rtol=1e-5)
    assert np.allclose(table.decoder_norm, run.sae.W_dec.norm(dim=1), rtol=1e-6)
    assert table.attrs["columns"]["density"][0] == "share"
    figures = artifact.manifest.figures
    assert figures["tokens"] == ROWS * WIDTH
    assert figures["tokens_new"] == len(REPLACED) * WIDTH
    assert figures["l0"] == pytest.approx((f > 0).sum() / (ROWS * WIDTH))
    histogram = artifact.read_table("histogram.parquet")
    assert histogram.base.sum() + histogram.new.sum() == (f > 0).sum()
    assert len(artifact.read_json("histogram.json")["edges"]) == run.spec.bins + 1


@pytest.mark.parametrize("window", [5, 40])
def test_examples_read_back_are_the_tokens_and_activations_around_the_maximum(run, window):
    ref = steps.run(run.spec, run.store, device="cpu")
    f = run.activations()
    alive = np.flatnonzero(f.max((0, 1)) > 0)
    wanted = [int(i) for i in alive[::3]]
    found = feature_examples(run.store, ref, wanted[::-1], window=window)
    stored = run.store.artifact(ref).read_table("examples.parquet")
    stored = stored[stored.feature.isin(wanted)]
    assert len(found) == len(stored)
    assert list(found.feature.unique()) == sorted(wanted)
    for example, kept in zip(found.itertuples(), stored.sort_values(["feature", "rank"]).itertuples(), strict=True):
        assert (example.feature, example.rank, example.row, example.position) == (kept.feature, kept.rank, kept.row, kept.position)
        assert example.is_new == (example.row in REPLACED)
        size = min(window, CONTEXT)
        assert len(example.tokens) == len(example.activations) == size
        assert example.start <= example.position < example.start + size
        for j in range(size):
            place = example.start + j
            assert example.tokens[j] == f"w{run.ids[example.row, place]}"
            expected = 0 if place in SKIP else f[example.row, place - 1, example.feature]
            assert example.activations[j] == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert example.activations[example.position - example.start] == pytest.approx(example.activation, rel=1e-6)
        assert example.text.split() == example.tokens
        assert example.activation == pytest.approx(f[example.row, :, example.feature].max(), rel=1e-6)


def test_fewer_ranks_may_be_asked_for(run):
    ref = steps.run(run.spec, run.store, device="cpu")
    found = feature_examples(run.store, ref, range(F), ranks=2)
    assert found["rank"].max() == 1
    assert found.groupby("feature").size().max() == 2


def test_no_features_give_no_examples(run):
    assert len(feature_examples(run.store, steps.run(run.spec, run.store, device="cpu"), [])) == 0


def test_a_feature_that_does_not_exist_is_refused(run):
    ref = steps.run(run.spec, run.store, device="cpu")
    with pytest.raises(UserError, match="features 0 to 23"):
        feature_examples(run.store, ref, [3, F])


def test_a_killed_pass_continues_after_its_last_saved_shard_with_the_same_bytes(run, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "SAVE_SECONDS", 0.0)
    from stagediff.lm.activations import ActivationReader

    read, seen = ActivationReader.read_shard, []

    def failing(self, i):
        seen.append(i)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return read(self, i)

    monkeypatch.setattr(ActivationReader, "read_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        steps.run(run.spec, run.store, device="cpu")
    ref = steps.run(run.spec, run.store, device="cpu")
    assert seen == [0, 1, 2, 2, 3, 4]  # two shards were saved; the third is read again, the first two are not
    undisturbed = Run(Store(str(tmp_path / "other")), run.sae.architecture)
    steps.run(undisturbed.spec, undisturbed.store, device="cpu")
    for name in ("features.parquet", "histogram.parquet", "examples.parquet"):
        assert run.store.artifact(ref).read_bytes(name) == undisturbed.store.artifact(ref).read_bytes(name)
    assert run.store.artifact(ref).manifest.figures == undisturbed.store.artifact(ref).manifest.figures


def test_a_dictionary_of_another_width_is_refused(run):
    config = resolved(DictionaryConfig(features=4), D + 1)
    other = TrainSpec(data=run.data, budget=Budget(tokens=2), dictionary=config)
    W = torch.randn(4, D + 1)
    with run.store.write(other) as w:
        cfg, weights = to_bytes(SAE(W.T.contiguous(), torch.zeros(4), W, torch.zeros(D + 1), config))
        w.write_bytes(CFG, cfg)
        w.write_bytes(WEIGHTS, weights)
        w.commit(figures={}, numerics={})
    with pytest.raises(UserError, match="another model or hook point"):
        steps.run(run.spec.model_copy(update={"dictionary": other.ref}), run.store, device="cpu")
