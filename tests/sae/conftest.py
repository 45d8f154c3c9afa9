"""Activations for the dictionary tests: planted ones (known features), a reader of tensors, and stored ones as the harvest leaves them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from stagediff.lm.spec import ActivationData, CorpusSource, HarvestSpec, HookPoint, ModelSource, TokenizerSource, TokensSpec
from stagediff.progress import Progress
from stagediff.store import Store
from stagediff.store.shards import from_bf16

PER_ROW = 8


class TensorReader:
    """The ActivationReader's interface over a tensor in memory; notes which shards were read."""

    def __init__(self, x: Tensor, shard: int):
        self.x, self.shard = x.to(torch.bfloat16), shard
        self.reads: list[int] = []

    d = property(lambda self: self.x.shape[1])
    n_tokens = property(lambda self: len(self.x))
    n_shards = property(lambda self: -(-len(self.x) // self.shard))

    def shard_tokens(self, i: int) -> int:
        return min(self.shard, len(self.x) - i * self.shard)

    def read_shard(self, i: int) -> Tensor:
        self.reads.append(i)
        return self.x[i * self.shard : (i + 1) * self.shard].clone()


def planted_activations(
    tokens: int, d: int, features: int, seed: int = 0, active: float = 3.0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Sums of a few unit directions with positive weights, around a mean: (activations [tokens, d], directions [features, d])."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(features, d, generator=g)
    directions /= directions.norm(dim=1, keepdim=True)
    on = torch.rand(tokens, features, generator=g) < active / features
    codes = on * (1 + torch.rand(tokens, features, generator=g))
    noise = 0.02 * torch.randn(tokens, d, generator=g)
    return scale * (codes @ directions + noise + 0.5 * torch.randn(d, generator=g) / d**0.5), directions


def store_activations(store: Store, x: Tensor, shard_rows: int = 64, name: str = "a", hook: HookPoint | None = None) -> ActivationData:
    """Puts activations into a store as a harvest would; `name` tells artifacts apart."""
    rows = len(x) // PER_ROW
    tokens = TokensSpec(
        corpus=CorpusSource(builtin="stdlib", digest=name), tokenizer=TokenizerSource(digest="t"), context=PER_ROW + 1, rows=rows
    )
    with store.write(tokens) as w:
        if not store.artifact(tokens.ref).is_complete:
            array = w.array("rows", shape=(rows, PER_ROW + 1), dtype="int32", chunk_rows=rows, shard_rows=rows)
            for i in array.pending():
                array.write_shard(i, np.zeros((rows, PER_ROW + 1), np.int32))
            w.commit(figures={})
    harvest = HarvestSpec(
        model=ModelSource(digest="m"), tokens=tokens.ref, rows=rows, hook=hook or HookPoint(layer=3), shard_rows=shard_rows, batch_rows=1
    )
    with store.write(harvest) as w:
        per_shard = shard_rows * PER_ROW
        array = w.array(
            "data",
            shape=(rows * PER_ROW, x.shape[1]),
            dtype="uint16",
            chunk_rows=per_shard,
            shard_rows=per_shard,
            attributes={"encoding": "bfloat16"},
        )
        for i in array.pending():
            array.write_shard(i, from_bf16(x[i * per_shard : (i + 1) * per_shard].to(torch.bfloat16)))
        w.commit(figures={})
    return ActivationData(base=harvest.ref, rows=rows)


@pytest.fixture
def reader() -> Callable[..., TensorReader]:
    return TensorReader


@pytest.fixture
def planted() -> Callable[..., tuple[Tensor, Tensor]]:
    return planted_activations


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def stored() -> Callable[..., ActivationData]:
    return store_activations


@pytest.fixture
def quiet() -> Progress:
    return Progress(interactive=False)
