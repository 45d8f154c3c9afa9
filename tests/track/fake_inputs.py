"""What the analysis steps of a made-up tracking run read (see fake_tables): tokenizer, token rows, probe activations, dictionaries, statistics."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from track.fake_lives import CONTEXT, DEAD, ROWS, TOP, D, Lives

from stagediff.lm.spec import (
    ActivationData,
    CorpusSource,
    HarvestSpec,
    HookPoint,
    ModelSource,
    TokenizerSource,
    TokenizerSpec,
    TokensSpec,
)
from stagediff.sae.dictionary import SAE, resolved
from stagediff.sae.layout import CFG, WEIGHTS, to_bytes
from stagediff.sae.spec import Budget, DictionaryConfig, FinetuneSpec, StatisticsSpec, TrainSpec
from stagediff.spec import Ref, Spec
from stagediff.store import Store
from stagediff.store.shards import from_bf16
from stagediff.track.spec import Point

__all__ = ["commit", "write_inputs"]


def commit(store: Store, spec: Spec, figures: dict[str, Any] | None = None) -> Ref:
    with store.write(spec) as writer:
        if not store.artifact(spec.ref).is_complete:
            writer.commit(figures=figures or {}, numerics={})
    return spec.ref


def write_inputs(
    store: Store, lives: Lives, words: list[str], rng: np.random.Generator, nodes: dict[str, Ref], texts: bool, name: str
) -> tuple[tuple[Point, ...], Ref, TokenizerSource]:
    """Tokenizer, token rows, probe activations, dictionaries and statistics of every checkpoint; the last ones are whole, the others manifests."""
    F, T = lives.kind.shape
    corpus = CorpusSource(builtin="stdlib", digest=name)
    tokenizer = TokenizerSpec(corpus=corpus, vocab=300)
    _write_tokenizer(store, tokenizer, words)
    source = TokenizerSource(artifact=tokenizer.ref) if texts else TokenizerSource(digest="unknown")
    tokens = TokensSpec(corpus=corpus, tokenizer=source, context=CONTEXT, rows=ROWS)
    with store.write(tokens) as writer:
        array = writer.array("rows", shape=(ROWS, CONTEXT), dtype="int32", chunk_rows=ROWS, shard_rows=ROWS)
        for i in array.pending():
            array.write_shard(i, rng.integers(0, len(words), (ROWS, CONTEXT)).astype(np.int32))
        writer.commit(figures={}, numerics={})
    nodes |= {"tokenizer": tokenizer.ref, "tokens": tokens.ref}
    points, before = [], None
    for k, step in enumerate(lives.steps):
        probe = HarvestSpec(
            model=ModelSource(digest=f"step{step}"), tokens=tokens.ref, rows=ROWS, hook=HookPoint(layer=4), shard_rows=ROWS, batch_rows=1
        )
        data = ActivationData(base=probe.ref, rows=ROWS)
        if before is None:
            dictionary: Any = TrainSpec(data=data, budget=Budget(tokens=4_000_000), dictionary=DictionaryConfig(features=F))
        else:
            dictionary = FinetuneSpec(start=before, data=data, budget=Budget(tokens=200_000))
        statistics = StatisticsSpec(dictionary=dictionary.ref, data=data, top=TOP)
        if k == T - 1:
            _write_probe(store, probe, rng)
            _write_dictionary(store, dictionary, lives.decoder[:, -1], rng)
            _write_statistics(store, statistics, lives, rng)
        else:
            for spec in (probe, dictionary, statistics):
                commit(store, spec)
        nodes |= {f"probe-{step}": probe.ref, f"dictionary-{step}": dictionary.ref, f"statistics-{step}": statistics.ref}
        points.append(Point(step=step, dictionary=dictionary.ref, statistics=statistics.ref, probe=probe.ref))
        before = dictionary.ref
    return tuple(points), points[-1].probe, source


def _write_tokenizer(store: Store, spec: TokenizerSpec, words: list[str]) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    with store.write(spec) as writer:
        writer.write_bytes("tokenizer.json", tokenizer.to_str().encode())
        writer.write_json("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False})
        writer.commit(figures={}, numerics={})


def _write_probe(store: Store, spec: HarvestSpec, rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.normal(size=(ROWS * (CONTEXT - 1), D)).astype(np.float32))
    with store.write(spec) as writer:
        n = len(x)
        array = writer.array("data", shape=(n, D), dtype="uint16", chunk_rows=n, shard_rows=n, attributes={"encoding": "bfloat16"})
        for i in array.pending():
            array.write_shard(i, from_bf16(x.to(torch.bfloat16)))
        writer.commit(figures={}, numerics={})


def _write_dictionary(store: Store, spec: Spec, decoder: np.ndarray, rng: np.random.Generator) -> None:
    F = len(decoder)
    W = torch.from_numpy(decoder.astype(np.float32))
    config = resolved(DictionaryConfig(features=F), D)
    sae = SAE(W.T.contiguous(), torch.full((F,), -1.5), W, torch.zeros(D), config)
    with store.write(spec) as writer:
        cfg, weights = to_bytes(sae)
        writer.write_bytes(CFG, cfg)
        writer.write_bytes(WEIGHTS, weights)
        writer.commit(figures={}, numerics={})


def _write_statistics(store: Store, spec: StatisticsSpec, lives: Lives, rng: np.random.Generator) -> None:
    alive = np.flatnonzero(lives.kind[:, -1] != DEAD)
    n = len(alive) * TOP
    examples = pd.DataFrame({"feature": np.repeat(alive, TOP), "rank": np.tile(np.arange(TOP), len(alive))})
    examples["activation"] = (4.0 - 0.1 * examples["rank"]).astype(np.float32)
    examples["row"], examples["position"] = rng.integers(0, ROWS, n), rng.integers(1, CONTEXT, n).astype(np.int16)
    examples["is_new"] = False
    with store.write(spec) as writer:
        writer.write_table("examples.parquet", examples)
        writer.commit(figures={"explained_variance": 0.85, "l0": 9.3, "dead_share": 0.05}, numerics={})
