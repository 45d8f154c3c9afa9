"""Stored activations of two models on the same rows, with a direction that only the finetuned one has."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from stagediff.lm.spec import ActivationData, CorpusSource, HarvestSpec, HookPoint, MixSpec, ModelSource, TokenizerSource, TokensSpec
from stagediff.progress import Progress
from stagediff.store import Store
from stagediff.store.shards import from_bf16

PER_ROW = 8
SHARE = 16
"""One row in so many is new."""


def write_tokens(store: Store, rows: int, name: str) -> TokensSpec:
    spec = TokensSpec(
        corpus=CorpusSource(builtin="stdlib", digest=name), tokenizer=TokenizerSource(digest="t"), context=PER_ROW + 1, rows=rows
    )
    if not store.artifact(spec.ref).is_complete:
        with store.write(spec) as w:
            array = w.array("rows", shape=(rows, PER_ROW + 1), dtype="int32", chunk_rows=rows, shard_rows=rows)
            for i in array.pending():
                array.write_shard(i, np.zeros((rows, PER_ROW + 1), np.int32))
            w.commit(figures={})
    return spec


def write_activations(store: Store, tokens: TokensSpec, x: Tensor, model: str, shard_rows: int = 64) -> HarvestSpec:
    spec = HarvestSpec(
        model=ModelSource(digest=model), tokens=tokens.ref, rows=tokens.rows, hook=HookPoint(layer=3), shard_rows=shard_rows, batch_rows=1
    )
    size = shard_rows * PER_ROW
    with store.write(spec) as w:
        array = w.array("data", shape=tuple(x.shape), dtype="uint16", chunk_rows=size, shard_rows=size, attributes={"encoding": "bfloat16"})
        for i in array.pending():
            array.write_shard(i, from_bf16(x[i * size : (i + 1) * size].to(torch.bfloat16)))
        w.commit(figures={})
    return spec


def write_pair(store: Store, rows: int = 1024, d: int = 16, features: int = 20, seed: int = 0) -> SimpleNamespace:
    """base, finetuned (ActivationData of one mix), directions [features, d] of both models, own [d]: the finetuned model's, on new rows only.

    Activations are sums of few directions; one token in four of a new row has `own` in the finetuned model, and nothing of it in the base model.
    """
    g = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(d, d, generator=g))[0]
    own, shared = directions[0], torch.nn.functional.normalize(torch.randn(features, d, generator=g), dim=1)
    new_rows = rows // SHARE

    def draw(n: int, with_own: bool) -> tuple[Tensor, Tensor]:
        on = torch.rand(n, features, generator=g) < 2.0 / features
        x = (on * (1 + torch.rand(n, features, generator=g))) @ shared + 0.02 * torch.randn(n, d, generator=g)
        more = (torch.rand(n, generator=g) < 0.25).float()[:, None] * (2 + torch.rand(n, 1, generator=g)) * own if with_own else 0
        return x, x + more

    base_tokens, new_tokens = write_tokens(store, rows, f"base{seed}"), write_tokens(store, new_rows, f"new{seed}")
    mix = MixSpec(base=base_tokens.ref, new=new_tokens.ref, rows=rows, share=1 / SHARE, seed=0)
    with store.write(mix) as w:
        at = np.arange(new_rows) * SHARE + 3
        w.write_table("overlay.parquet", pd.DataFrame({"row": at, "new_row": np.arange(new_rows)}))
        w.commit(figures={})
    base_x, new_x = draw(rows * PER_ROW, False), draw(new_rows * PER_ROW, True)
    data = []
    for i, model in enumerate(("base", "finetuned")):
        old, new = write_activations(store, base_tokens, base_x[i], model), write_activations(store, new_tokens, new_x[i], model)
        data.append(ActivationData(base=old.ref, rows=rows, mix=mix.ref, new=new.ref))
    return SimpleNamespace(base=data[0], finetuned=data[1], directions=shared, own=own, d=d)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def paired():
    return write_pair


@pytest.fixture
def quiet() -> Progress:
    return Progress(interactive=False)


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small are slower with several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
