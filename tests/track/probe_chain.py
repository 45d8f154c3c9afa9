"""A small chain in a store, for the steps that read statistics' examples: token rows, a reference space, and at every checkpoint a probe, a dictionary and
statistics whose tables are written as the test gives them."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save

from stagediff.lm.spec import ActivationData, CorpusSource, HarvestSpec, HookPoint, ModelSource, TokenizerSource, TokensSpec
from stagediff.sae.layout import WEIGHTS
from stagediff.sae.spec import Budget, DictionaryConfig, StatisticsSpec, TrainSpec
from stagediff.spec import Ref
from stagediff.store import Store
from stagediff.store.shards import from_bf16
from stagediff.track.spec import Point

__all__ = ["ProbeChain", "word_tokenizer"]


class ProbeChain:
    """`ids` [rows, context] token ids; `vectors` [rows * (context - 1), d] the reference's, position 0 skipped."""

    def __init__(self, store: Store, ids: np.ndarray, vectors: torch.Tensor, tokenizer: TokenizerSource, shard_rows: int = 32):
        self.store, self.ids, self.tokenizer, self.shard_rows = store, np.asarray(ids, np.int32), tokenizer, shard_rows
        self.rows, self.context = self.ids.shape
        spec = TokensSpec(corpus=CorpusSource(builtin="stdlib", digest="p"), tokenizer=tokenizer, context=self.context, rows=self.rows)
        with store.write(spec) as w:
            array = w.array("rows", shape=self.ids.shape, dtype="int32", chunk_rows=self.rows, shard_rows=self.rows)
            array.write_shard(next(iter(array.pending())), self.ids)
            w.commit(figures={})
        self.tokens = spec.ref
        self.vectors = vectors.to(torch.bfloat16)
        self.reference = self.harvest(self.vectors, HookPoint(layer=9, site="resid_post"))

    def harvest(self, x: torch.Tensor, hook: HookPoint, rows: int | None = None, model: str = "m", skip: tuple[int, ...] = (0,)) -> Ref:
        spec = HarvestSpec(
            model=ModelSource(digest=model),
            tokens=self.tokens,
            rows=rows or self.rows,
            hook=hook,
            shard_rows=self.shard_rows,
            batch_rows=1,
            skip_positions=skip,
        )
        per_shard = self.shard_rows * (self.context - len(skip))
        with self.store.write(spec) as w:
            n = spec.rows * (self.context - len(skip))
            attributes = {"encoding": "bfloat16"}
            array = w.array(
                "data", shape=(n, x.shape[1]), dtype="uint16", chunk_rows=per_shard, shard_rows=per_shard, attributes=attributes
            )
            for i in array.pending():
                array.write_shard(i, from_bf16(x[:n][i * per_shard : (i + 1) * per_shard].to(torch.bfloat16)))
            w.commit(figures={})
        return spec.ref

    def point(self, step: int, examples: pd.DataFrame, firings: np.ndarray, decoder: torch.Tensor | None = None, **changes) -> Point:
        """`examples`: feature, activation, row, position, in any order; ranks follow from the activations. `changes` go into the statistics' spec."""
        features = len(firings)
        probe = self.harvest(torch.zeros(self.rows * (self.context - 1), 2), HookPoint(layer=3), model=f"step{step}")
        decoder = torch.randn(features, 8, generator=torch.Generator().manual_seed(step)) if decoder is None else decoder
        data = ActivationData(base=probe, rows=self.rows)
        dictionary = TrainSpec(data=data, budget=Budget(tokens=1), dictionary=DictionaryConfig(features=features), seed=step)
        with self.store.write(dictionary) as w:
            w.write_bytes(WEIGHTS, save({"W_dec": decoder.float().contiguous()}))
            w.commit(figures={})
        statistics = StatisticsSpec(**{"dictionary": dictionary.ref, "data": data, "top": 25, **changes})
        table = examples.sort_values(["feature", "activation"], ascending=[True, False], ignore_index=True)
        table["rank"] = table.groupby("feature").cumcount().astype("int32")
        with self.store.write(statistics) as w:
            norms = decoder.norm(dim=1).numpy()
            w.write_table("features.parquet", pd.DataFrame({"feature": np.arange(features), "firings": firings, "decoder_norm": norms}))
            w.write_table("examples.parquet", table)
            w.commit(figures={})
        return Point(step=step, dictionary=dictionary.ref, statistics=statistics.ref, probe=probe)


def word_tokenizer(folder: Path, words: list[str]) -> TokenizerSource:
    """Id i is words[i]."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words[0]).save_pretrained(folder)
    return TokenizerSource(name=str(folder))
