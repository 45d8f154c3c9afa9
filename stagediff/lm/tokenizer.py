"""Tokenizers: training a byte-level BPE (the step `tokenizer`), and tokenising whole documents. (Loading: `models.load_tokenizer`.)

The trained one has the layout of the Hugging Face hub (`tokenizer.json`, `tokenizer_config.json`), so that `AutoTokenizer` loads the
artifact's folder as it is. Its one special token, `<eos>`, ends every document. Byte-level: no text is unknown to it.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stagediff.errors import UserError
from stagediff.lm.corpora import open_corpus
from stagediff.lm.documents import in_split
from stagediff.lm.spec import TokenizerSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stagediff.steps import Job

__all__ = ["EOS", "check", "compute", "encode_documents"]

EOS = "<eos>"
SMALLEST_VOCAB = 257
"""256 bytes and <eos>."""


def compute(spec: TokenizerSpec, job: "Job") -> dict[str, Any]:
    """Trains the tokenizer on the first `documents` training documents of the seeded order."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    check(spec)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab, special_tokens=[EOS], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    characters = documents = 0

    def texts() -> Iterator[str]:
        nonlocal characters, documents
        with job.progress.task("tokenizer", spec.documents, "documents") as task:
            for document in open_corpus(spec.corpus).shuffled(spec.seed):
                if documents == spec.documents:
                    return
                if document.text and in_split(document.key, 0, spec.heldout) == "train":
                    documents += 1
                    characters += len(document.text)
                    task.advance()
                    yield document.text

    tokenizer.train_from_iterator(texts(), trainer)
    if not documents:
        raise UserError(
            f"The tokenizer's corpus has no training document (held-out share {spec.heldout}). Give a corpus with text, or a smaller "
            "held-out share."
        )
    if tokenizer.get_vocab_size() < spec.vocab:
        raise UserError(
            f"A vocabulary of {spec.vocab} was asked for, but {documents} documents ({characters} characters) give only "
            f"{tokenizer.get_vocab_size()} entries. Ask for that many, or train on more text."
        )
    job.writer.write_bytes("tokenizer.json", tokenizer.to_str(pretty=True).encode())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    job.writer.write_json("tokenizer_config.json", settings)
    return {"vocab": tokenizer.get_vocab_size(), "documents": documents, "characters": characters}


def check(spec: TokenizerSpec) -> None:
    """Raises UserError for a vocabulary that is too small."""
    if spec.vocab < SMALLEST_VOCAB:
        raise UserError(f"A byte-level vocabulary of {spec.vocab} was asked for; it needs at least {SMALLEST_VOCAB} (256 bytes and {EOS}).")


def encode_documents(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Token ids of whole documents.

    With what the tokenizer itself puts around a text (a BOS, where it has that habit), and always with its EOS at the end, if it has one.
    """
    ids = tokenizer(texts, add_special_tokens=True, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    if eos is None:
        return ids
    return [row if row and row[-1] == eos else [*row, eos] for row in ids]
