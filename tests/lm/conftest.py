"""Tiny random models of the supported families, made in the test process; nothing is downloaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

VOCAB, WIDTH, LAYERS = 97, 32, 4


def _config(family: str) -> Any:
    import transformers as tf

    neox = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    grouped = {**neox, "num_key_value_heads": 2}
    common = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
    make: dict[str, Callable[[], Any]] = {
        "gpt_neox": lambda: tf.GPTNeoXConfig(**common, **neox),
        "gpt_neox_sequential": lambda: tf.GPTNeoXConfig(**common, **neox, use_parallel_residual=False),
        "gpt2": lambda: tf.GPT2Config(**common, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=64),
        "llama": lambda: tf.LlamaConfig(**common, **grouped),
        "mistral": lambda: tf.MistralConfig(**common, **grouped, sliding_window=8),
        "qwen2": lambda: tf.Qwen2Config(**common, **grouped),
        "qwen3": lambda: tf.Qwen3Config(**common, **grouped, head_dim=8),
        "gemma2": lambda: tf.Gemma2Config(**common, **grouped, head_dim=8, sliding_window=8),
        "gemma3": lambda: tf.Gemma3TextConfig(**common, **grouped, head_dim=8, sliding_window=8),
        "olmo2": lambda: tf.Olmo2Config(**common, **grouped, pad_token_id=0),
        "phi": lambda: tf.PhiConfig(**common, **neox),
        "granite": lambda: tf.GraniteConfig(**common, **grouped, residual_multiplier=0.5),
    }
    return make[family]()


def make_tiny(family: str, seed: int = 0, **changes: Any) -> Any:
    """A causal LM with 4 layers of width 32; gains and biases are random too, so that a norm left out is noticed."""
    from transformers import AutoModelForCausalLM

    config = _config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """tiny(family, seed=0, **config changes) -> model."""
    return make_tiny


@pytest.fixture
def save_tiny(tmp_path: Path) -> Callable[..., Path]:
    """save_tiny(family, name="model", tokenizer=False, …) -> folder with a saved model (and a word-level tokenizer)."""

    def save(family: str = "gpt_neox", name: str = "model", *, tokenizer: bool = False, **options: Any) -> Path:
        folder = tmp_path / name
        make_tiny(family, **options).save_pretrained(folder)
        if tokenizer:
            save_tokenizer(folder)
        return folder

    return save


def save_tokenizer(folder: Path, words: int = VOCAB) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<eos>": 0, **{f"w{i}": i for i in range(1, words)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<eos>").save_pretrained(folder)


@pytest.fixture
def tokenizer_into() -> Callable[..., None]:
    """tokenizer_into(folder, words=97): saves a word-level tokenizer there."""
    return save_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Digests are remembered in a folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("STAGEDIFF_CACHE", str(folder))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Any:
    from stagediff.store import Store

    return Store(str(tmp_path / "store"))


@pytest.fixture
def put_rows(store: Any) -> Callable[..., Any]:
    """put_rows(ids [rows, context], is_new=False) -> Ref of a tokens artifact with these token ids."""
    import hashlib

    import numpy as np
    import pandas as pd

    from stagediff.lm.spec import CorpusSource, TokenizerSource, TokensSpec

    def put(ids: Any, is_new: bool = False) -> Any:
        ids = np.asarray(ids, np.int32)
        digest = hashlib.sha256(ids.tobytes()).hexdigest()
        spec = TokensSpec(
            corpus=CorpusSource(digest=digest), tokenizer=TokenizerSource(digest="x"), context=ids.shape[1], rows=len(ids), is_new=is_new
        )
        with store.write(spec) as w:
            shard = min(16, len(ids))
            array = w.array("rows", shape=ids.shape, dtype="int32", chunk_rows=shard, shard_rows=shard)
            for i in array.pending():
                array.write_shard(i, ids[i * shard : (i + 1) * shard])
            n = len(ids)
            w.write_table(
                "rows.parquet", pd.DataFrame({"row": range(n), "document": range(n), "source": ["test"] * n, "is_new": [is_new] * n})
            )
            w.commit(figures={})
        return spec.ref

    return put


@pytest.fixture
def put_mix(store: Any) -> Callable[..., Any]:
    """put_mix(base, new, rows, replaced) -> Ref of a mix that replaces the given base rows by new rows 0, 1, …"""
    import pandas as pd

    from stagediff.lm.spec import MixSpec

    def put(base: Any, new: Any, rows: int, replaced: list[int]) -> Any:
        spec = MixSpec(base=base, new=new, rows=rows, share=len(replaced) / rows)
        with store.write(spec) as w:
            w.write_table(
                "overlay.parquet",
                pd.DataFrame({"row": pd.Series(replaced, dtype="int64"), "new_row": pd.Series(range(len(replaced)), dtype="int64")}),
            )
            w.commit(figures={})
        return spec.ref

    return put
