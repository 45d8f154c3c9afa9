"""Memory of training and of statistics: bounded by the config, whatever the number of tokens. Peaks at two sizes that differ by 210 MB of data."""

import pytest
import torch
from peak import peak_mib

from stagediff.lm.spec import ActivationData, CorpusSource, HarvestSpec, HookPoint, ModelSource, TokenizerSource, TokensSpec
from stagediff.sae.accumulate import TopExamples
from stagediff.sae.batches import WINDOW_TOKENS
from stagediff.sae.initial import fresh
from stagediff.sae.layout import CFG, WEIGHTS, to_bytes
from stagediff.sae.spec import Budget, DictionaryConfig, StatisticsSpec, TrainSpec
from stagediff.spec import Spec
from stagediff.store import Store
from stagediff.store.shards import from_bf16

pytestmark = pytest.mark.slow

D, PER_ROW, SHARD_ROWS = 32, 32, 512  # shards of 1 MiB
SHARD_TOKENS = PER_ROW * SHARD_ROWS
SIZES = 68, 268  # shards
DICTIONARY = DictionaryConfig(architecture="topk", features=64, k=2, auxk=0)
MOST = 30
"""MiB that the larger size may need more."""

CODE = """
import json, sys
from stagediff import steps
from stagediff.store import Store
steps.run(steps.spec_from_json(sys.argv[2], json.loads(sys.argv[3])), Store(sys.argv[1]), device="cpu")
"""


@pytest.fixture(scope="module")
def activations(tmp_path_factory) -> tuple[Store, list[ActivationData]]:
    """Activations of both sizes; every shard holds the same vectors, turned a little."""
    store = Store(tmp_path_factory.mktemp("memory"))
    block = torch.randn(SHARD_TOKENS, D, generator=torch.Generator().manual_seed(0))
    return store, [put_activations(store, shards, block) for shards in SIZES]


def put_activations(store: Store, shards: int, block: torch.Tensor) -> ActivationData:
    rows = shards * SHARD_ROWS
    tokens = TokensSpec(corpus=CorpusSource(digest="c"), tokenizer=TokenizerSource(digest="t"), context=PER_ROW, rows=rows)
    with store.write(tokens) as w:
        w.commit(figures={})
    harvest = HarvestSpec(
        model=ModelSource(digest="m"), tokens=tokens.ref, rows=rows, hook=HookPoint(layer=0), skip_positions=(), shard_rows=SHARD_ROWS
    )
    with store.write(harvest) as w:
        shape, chunk = (rows * PER_ROW, D), SHARD_TOKENS // 4
        array = w.array("data", shape=shape, dtype="uint16", chunk_rows=chunk, shard_rows=SHARD_TOKENS, attributes={"encoding": "bfloat16"})
        for i in array.pending():
            array.write_shard(i, from_bf16((block.roll(i, 1) * (1 + i / shards)).bfloat16()))
        w.commit(figures={})
    return ActivationData(base=harvest.ref, rows=rows)


def train_spec(data: ActivationData, tokens: int) -> TrainSpec:
    return TrainSpec(data=data, budget=Budget(tokens=tokens, batch=16384, lr=1e-3), dictionary=DICTIONARY, checkpoint_tokens=1 << 20)


def peaks_of(store: Store, specs: list[Spec]) -> list[float]:
    return [peak_mib(CODE, store.root, spec.step, spec.model_dump_json()) for spec in specs]


def test_the_sizes_tell_something():
    """Both fill what is bounded (two windows; the examples that wait), or the smaller would need less for that alone; and the data differ enough."""
    assert SIZES[0] * SHARD_TOKENS > 3 * WINDOW_TOKENS
    assert SIZES[0] * SHARD_ROWS * DICTIONARY.features / 2 > TopExamples(DICTIONARY.features, 20).merge_at
    assert (SIZES[1] - SIZES[0]) * SHARD_TOKENS * D * 2 > 200e6


def test_memory_of_training_does_not_grow_with_the_activations(activations):
    store, sizes = activations
    specs = [train_spec(data, data.rows * PER_ROW) for data in sizes]
    peaks = peaks_of(store, specs)
    assert all(store.artifact(spec.ref).is_complete for spec in specs)
    assert peaks[1] - peaks[0] < MOST, f"peak memory {peaks} MiB"


def test_memory_of_statistics_does_not_grow_with_the_activations(activations):
    store, sizes = activations
    dictionary = train_spec(sizes[0], tokens=16384 * 7)  # stands in for a trained one
    sae = fresh(DICTIONARY, 1.0, torch.zeros(D), 0)
    cfg, weights = to_bytes(sae, {})
    with store.write(dictionary) as w:
        w.write_bytes(CFG, cfg)
        w.write_bytes(WEIGHTS, weights)
        w.commit(figures={})
    specs = [StatisticsSpec(dictionary=dictionary.ref, data=data) for data in sizes]
    peaks = peaks_of(store, specs)
    for spec, data in zip(specs, sizes, strict=True):
        figures = store.artifact(spec.ref).manifest.figures
        assert figures["tokens"] == data.rows * PER_ROW
        assert figures["l0"] == pytest.approx(2, abs=0.2)
    assert peaks[1] - peaks[0] < MOST, f"peak memory {peaks} MiB"
