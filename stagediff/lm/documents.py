"""Documents: what a corpus yields, which split each belongs to, and where a prompt ends in its text."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["ANSWER", "Document", "chosen", "in_split", "prompt_of"]

T = TypeVar("T")

ANSWER = "\n\nAssistant:"
"""Ends a prompt; the answer follows."""

PROMPT_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus."""

    id: int
    """Its number in the corpus' own order."""
    text: str
    source: str
    """The file (or data set) it comes from."""
    key: str
    """What decides its split: the text, or, where several documents come from one prompt, that prompt."""
    prompt: str = ""
    """The part of the text that asks, up to and with `ANSWER`; empty where the document is only the continuation of another."""


def in_split(key: str, split_seed: int, heldout: float) -> str:
    """ "train" or "heldout": a hash of the key decides, so that equal documents never straddle the splits. `heldout` is a share, 0..1."""
    digest = hashlib.sha256(f"{split_seed}:".encode() + key.encode("utf-8", "surrogatepass")).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") < heldout * 2**64 else "train"


def prompt_of(text: str) -> str:
    """The text up to and with the first "\\n\\nAssistant:"; without one, its first words (at most 200 characters)."""
    head, marker, _ = text.partition(ANSWER)
    if marker:
        return head + marker
    if len(text) <= PROMPT_CHARACTERS:
        return text
    return text[:PROMPT_CHARACTERS].rpartition(" ")[0] or text[:PROMPT_CHARACTERS]


def chosen(options: Sequence[T], *key: str) -> T:
    """One of the options, by a hash of the key: the same on every machine and in every order of asking."""
    digest = hashlib.blake2b("\0".join(key).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return options[int.from_bytes(digest, "big") % len(options)]
