"""The blob layer: named byte strings below one root, each put there whole or not at all.

Everything above it (claims, receipts, shards, manifests) needs only these few operations and holds on local disk and on S3 alike:
an atomic `put`, a `create` of which exactly one of several racers wins, reads of ranges, and listings that are never cached.
`open_objects` picks the implementation by the root: a path (`local.py`) or a URL that fsspec knows (`remote.py`).
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagediff.errors import UserError

__all__ = ["Entry", "Objects", "open_objects"]

_ONE_SLASH = re.compile(r"(s3a?|gs|gcs|az|abfs|https?|file):/?(?!/)")


@dataclass(frozen=True)
class Entry:
    """One stored object in a listing."""

    size: int
    modified: float
    """Seconds since the epoch."""
    version: str = ""
    """What tells two contents of one size and second apart, where the place says: S3 counts whole seconds, and gives an ETag."""


class Objects(ABC):
    """Blobs by key ("tokens/3f…/spec.json"). Reading a missing key raises FileNotFoundError."""

    root: str
    is_local: bool

    @abstractmethod
    def put(self, key: str, *parts: Any) -> None:
        """Stores the parts' bytes one after the other under the key, atomically; replaces what was there."""

    @abstractmethod
    def create(self, key: str, *parts: Any, durable: bool = True) -> bool:
        """Like `put`, but only if nothing is there. True when these bytes are now the object's (also after a lost reply to an earlier try).

        `durable=False` skips the wait for the disk: for claims, which mean nothing after a power loss.
        """

    @abstractmethod
    def create_file(self, key: str, path: Path) -> bool:
        """Like `create`, of a local file's bytes, in constant memory."""

    @abstractmethod
    def put_made(self, folder: str, make: Callable[[Path], str]) -> str:
        """Lets `make` write a local temporary file and stores it as `<folder>/<the name make returns>`; returns the key.

        The file is written where it can be renamed or uploaded from, so that nothing large passes through memory.
        """

    @abstractmethod
    def get(self, key: str) -> bytes: ...

    @abstractmethod
    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fills the buffers with consecutive bytes from `offset` on. Raises EOFError when the object ends before."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes, or None when there is no such object."""

    @abstractmethod
    def entries(self, prefix: str) -> dict[str, Entry]:
        """All objects below a folder, by key relative to it; files being written (`*.partial`) are left out."""

    @abstractmethod
    def folders(self, prefix: str) -> list[str]:
        """Names of the folders directly below a folder ("" is the root), sorted."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes an object; nothing happens when it is gone already."""

    @abstractmethod
    def delete_tree(self, prefix: str, first: Sequence[str] = ()) -> None:
        """Removes everything below a folder, the keys in `first` (relative to it) before all others."""

    @abstractmethod
    def move_tree(self, source: str, target: str, first: Sequence[str] = ()) -> None:
        """Moves everything below a folder; the keys in `first` leave the source before all others."""

    @abstractmethod
    def leftovers(self) -> dict[str, Entry]:
        """Unfinished writes by key: local `*.partial` files, multipart uploads."""

    @abstractmethod
    def delete_leftover(self, key: str) -> None: ...

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Space left, where that can be known."""

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """Where an object lies on this machine's disk; None for remote stores."""

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Copies an object into a local file, in constant memory."""

    @abstractmethod
    def describe(self, key: str = "") -> str:
        """The object's full path or URL, for messages."""

    def exists(self, key: str) -> bool:
        return self.size(key) is not None


def open_objects(root: str, **options: Any) -> Objects:
    """The blobs below a local path or a URL such as s3://bucket/prefix; touches nothing yet."""
    if not root.strip():
        raise UserError("The store's name is empty. Expected a folder, or something like s3://bucket/prefix.")
    if _ONE_SLASH.match(root):
        raise UserError(
            f"The store {root!r} looks like a URL with a slash missing. Expected a folder, or something like s3://bucket/prefix."
        )
    if "://" not in root or root.startswith(("file://", "local://")):
        from stagediff.store.local import LocalObjects

        return LocalObjects(root.split("://", 1)[-1])
    from stagediff.store.remote import RemoteObjects

    return RemoteObjects(root, **options)
