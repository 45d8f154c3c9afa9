"""The store: artifacts, their commit protocol, activation shards, tables, training checkpoints. Light to import."""

from typing import TYPE_CHECKING, Any

from stagediff.store.artifact import Artifact, Problem, State
from stagediff.store.manifest import Manifest
from stagediff.store.store import Garbage, Listing, Store
from stagediff.store.writer import Writer

if TYPE_CHECKING:
    from stagediff.store.arrays import ArrayWriter
    from stagediff.store.shards import ArrayReader

__all__ = ["ArrayReader", "ArrayWriter", "Artifact", "Garbage", "Listing", "Manifest", "Problem", "State", "Store", "Writer"]

_LAZY = {"ArrayReader": "stagediff.store.shards", "ArrayWriter": "stagediff.store.arrays"}


def __getattr__(name: str) -> Any:  # these two bring numpy
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(name)
