"""Repositories as they lie in the Hugging Face hub's local cache, with revisions, holding tiny random models: what a config that names a hub model reads
where no hub is.

    <cache>/models--OWNER--NAME/refs/REVISION           the commit that the revision stands at
                               /snapshots/COMMIT/…      that commit's files
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, PretrainedConfig, PreTrainedTokenizerFast

__all__ = ["LAYERS", "WIDTH", "FakeHub", "corpus"]

LAYERS, WIDTH = 8, 32
WORDS = ["while", "return", "movement", "up", "license", "sport", "mood", "tree", "river", "seven", "blue", "of", "and", "then"]


class FakeHub:
    """A cache folder; `add` puts a repository of one family into it."""

    def __init__(self, cache: Path):
        self.cache = cache

    def add(self, name: str, family: str, revisions: Iterable[str], *, weights: bool = False) -> None:
        """`family`: gpt_neox (safetensors, tokenizer.json, as Pythia) or gpt2 (pytorch_model.bin, vocab.json, merges.txt, as Stanford CRFM's).

        Without `weights` a revision holds its config and tokenizer only, which is what planning reads.
        """
        for revision in revisions:
            commit = hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()
            repository = self.cache / f"models--{name.replace('/', '--')}"
            (repository / "refs").mkdir(parents=True, exist_ok=True)
            (repository / "refs" / revision).write_text(commit)
            snapshot = repository / "snapshots" / commit
            snapshot.mkdir(parents=True)
            {"gpt_neox": _neox, "gpt2": _gpt2}[family](snapshot, int(commit[:8], 16) if weights else None)

    def forget(self, name: str, revision: str) -> None:
        """Takes a revision away, as if it had never been there."""
        (self.cache / f"models--{name.replace('/', '--')}" / "refs" / revision).unlink()


def corpus(path: Path, documents: int = 1500) -> Path:
    """A jsonl file of made-up sentences."""
    rng = torch.Generator().manual_seed(0)
    with path.open("w") as file:
        for _ in range(documents):
            chosen = torch.randint(len(WORDS), (60,), generator=rng).tolist()
            file.write(json.dumps({"text": " ".join(WORDS[i] for i in chosen)}) + "\n")
    return path


def _neox(folder: Path, seed: int | None) -> None:
    tokenizer = _byte_level()
    shape = GPTNeoXConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    _model(shape, seed, folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<|endoftext|>").save_pretrained(folder)


def _gpt2(folder: Path, seed: int | None) -> None:
    tokenizer = _byte_level()
    shape = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=2,
        n_positions=128,
        scale_attn_by_inverse_layer_idx=True,
        reorder_and_upcast_attn=True,
        bos_token_id=tokenizer.token_to_id("<|endoftext|>"),
        eos_token_id=tokenizer.token_to_id("<|endoftext|>"),
    )
    _model(shape, seed, folder)
    if (folder / "model.safetensors").exists():  # these repositories are older than safetensors
        from safetensors.torch import load_file

        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    tokenizer.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024}))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def _model(shape: PretrainedConfig, seed: int | None, folder: Path) -> None:
    if seed is None:
        shape.architectures = ["GPTNeoXForCausalLM" if isinstance(shape, GPTNeoXConfig) else "GPT2LMHeadModel"]
        shape.save_pretrained(folder)
        return
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)


def _byte_level() -> Tokenizer:
    """Bytes and a few whole words, in the form that both families use."""
    vocab = {"<|endoftext|>": 0, **{c: i + 1 for i, c in enumerate(sorted(ByteLevel.alphabet()))}}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        piece = "Ġ"
        for c in word:
            if piece + c not in vocab:
                vocab[piece + c] = len(vocab)
                merges.append((piece, c))
            piece += c
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
