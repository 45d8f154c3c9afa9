"""Checkpoints of a tiny model, saved as training loops save them."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "store"))
from conftest import s3_endpoint, s3_root, strict_s3_endpoint  # noqa: F401  (their fixtures, for these tests too)

LONG_AGO = 1_700_000_000


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Digests and copies lie in a folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("STAGEDIFF_CACHE", str(folder))
    return folder


def save_checkpoint(folder: Path, seed: int, *, trainer: bool = False, shard: str | None = None, width: int = 32) -> Path:
    """A GPT-NeoX of two layers with its tokenizer; `trainer`: with the Trainer's state beside it."""
    torch.manual_seed(seed)
    shape = GPTNeoXConfig(
        vocab_size=97, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, **{f"w{i}": i for i in range(1, 97)}}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<eos>").save_pretrained(folder)
    if trainer:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": seed}))
    return folder


def age(folder: Path) -> Path:
    """Nobody has written there for long."""
    for file in folder.iterdir():
        os.utime(file, (LONG_AGO, LONG_AGO))
    return folder


@pytest.fixture(scope="session")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str | None], Path]:
    made: dict[tuple[int, str | None], Path] = {}

    def saved(seed: int, shard: str | None) -> Path:
        if (seed, shard) not in made:
            made[seed, shard] = save_checkpoint(tmp_path_factory.mktemp("saved") / "model", seed, shard=shard)
        return made[seed, shard]

    return saved


@pytest.fixture
def save(tmp_path: Path, _saved: Callable[[int, str | None], Path]) -> Callable[..., Path]:
    """save(step, done=True, folder="lm/checkpoint-{step}"): a checkpoint; done: the Trainer's state is there too, which it writes last."""

    def save(
        step: int, *, done: bool = True, folder: str = "lm/checkpoint-{step}", seed: int | None = None, shard: str | None = None
    ) -> Path:
        place = tmp_path / folder.replace("{step}", str(step))
        shutil.copytree(_saved(step if seed is None else seed, shard), place)
        for file in place.iterdir():  # written now, and not when the model was first saved
            file.touch()
        if done:
            (place / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        return place

    return save
