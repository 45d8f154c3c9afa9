"""Where checkpoints appear: a folder, an S3 prefix, a hub repository's revisions. Each step found there with the files that it consists of.

Nothing is judged here (see `complete`), and nothing but names, sizes and the heads of weight files is read.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stagediff.errors import UserError
from stagediff.lm import hub, remote
from stagediff.store.objects import Entry, Objects, open_objects
from stagediff.watch.config import STEP, WatchConfig

__all__ = ["Files", "Place", "open_place"]

RETRY_SECONDS = 20.0
"""How long a fault of the network is tried again within one look; the next look comes anyway."""


class Files(ABC):
    """The files directly in one checkpoint's folder."""

    name: str
    """What `models` in a config would call it: a path, a URL, a hub name."""
    revision: str | None = None
    is_fixed = False
    """Whether what is there can't change any more (a commit)."""
    is_local = False
    is_checked = False
    """Whether whoever keeps them takes a file only whole, so that no size needs a second look (the hub)."""

    @abstractmethod
    def entries(self) -> dict[str, Entry]: ...

    @abstractmethod
    def read(self, file: str, start: int, stop: int) -> bytes:
        """Bytes start to stop of a file; fewer where it ends before."""

    def whole(self, file: str) -> bytes:
        entry = self.entries().get(file)
        return self.read(file, 0, entry.size) if entry else b""

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


class Place(ABC):
    """Where checkpoints of one training run appear."""

    @abstractmethod
    def find(self) -> dict[int, Files]:
        """Everything there that is named like a checkpoint, by step, ascending. Raises UserError where the place can't be looked at."""


def open_place(settings: WatchConfig) -> Place:
    """The place that the settings name; touches nothing yet."""
    assert settings.source is not None
    if settings.revision is not None:
        return _Hub(settings.source, settings.revision)
    if "://" in settings.source:
        return _Bucket(settings.source)
    return _Folder(settings.source)


class _Template:
    """A path with {step} in one of its parts: what stands before that part, the part as a pattern, and what stands after."""

    def __init__(self, template: str):
        before, _, after = template.partition(STEP)
        self.root, _, prefix = before.rpartition("/")
        suffix, slash, self.rest = after.partition("/")
        self.template, self.below = template, slash + self.rest
        if template.startswith("/") and not self.root:
            self.root = "/"
        self._pattern = re.compile(f"{re.escape(prefix)}(0|[1-9][0-9]*){re.escape(suffix)}")

    def step(self, name: str) -> int | None:
        """The step that a folder's name tells (without leading zeros)."""
        match = self._pattern.fullmatch(name)
        return int(match[1]) if match else None

    def at(self, step: int) -> str:
        return self.template.replace(STEP, str(step))


class _Folder(Place):
    def __init__(self, template: str):
        self._template = _Template(str(Path(template).expanduser()))

    def find(self) -> dict[int, Files]:
        root = self._template.root or "."
        try:
            names = os.listdir(root)
        except FileNotFoundError:
            return {}  # the training has not begun
        except OSError as error:
            raise UserError(
                f"watch.source {self._template.template!r}: {root} cannot be listed ({error.strerror}). A folder in which checkpoints appear was "
                "expected."
            ) from error
        steps = sorted(step for name in names if (step := self._template.step(name)) is not None)
        return {step: FolderFiles(Path(self._template.at(step))) for step in steps if Path(self._template.at(step)).is_dir()}


class FolderFiles(Files):
    is_local = True

    def __init__(self, path: Path, name: str | None = None, revision: str | None = None):
        self._path, self.name, self.revision = path, str(path) if name is None else name, revision
        self.is_fixed = revision is not None

    def entries(self) -> dict[str, Entry]:
        found = {}
        try:
            with os.scandir(self._path) as items:
                for item in items:
                    status = item.stat()  # of what a link leads to: the hub's cache is made of links
                    if not item.is_dir():
                        found[item.name] = Entry(status.st_size, status.st_mtime)
        except FileNotFoundError:  # deleted, or renamed to its final name, just now
            return {}
        return found

    def read(self, file: str, start: int, stop: int) -> bytes:
        try:
            with open(self._path / file, "rb") as f:
                f.seek(start)
                return f.read(max(0, stop - start))
        except FileNotFoundError:
            return b""


class _Bucket(Place):
    def __init__(self, template: str):
        self._template = _Template(template)
        if self._template.root.endswith(":/") or "://" not in self._template.root:
            raise UserError(f"watch.source {template!r} names no bucket; expected something like s3://bucket/run/{STEP}.")
        self._objects = open_objects(self._template.root, retry_seconds=RETRY_SECONDS)

    def find(self) -> dict[int, Files]:
        try:
            names = self._objects.folders("")
        except UserError as error:
            raise UserError(f"watch.source {self._template.template!r} cannot be looked at. {remote.in_place(error)}") from error
        steps = {name: step for name in names if (step := self._template.step(name)) is not None}
        return {
            step: _BucketFiles(self._objects, name + self._template.below, self._template.at(step))
            for name, step in sorted(steps.items(), key=lambda pair: pair[1])
        }


class _BucketFiles(Files):
    def __init__(self, objects: Objects, folder: str, name: str):
        self._objects, self._folder, self.name = objects, folder, name
        self._entries: dict[str, Entry] | None = None

    def entries(self) -> dict[str, Entry]:
        if self._entries is None:
            self._entries = {key: entry for key, entry in self._objects.entries(self._folder).items() if "/" not in key}
        return self._entries

    def read(self, file: str, start: int, stop: int) -> bytes:
        entry = self.entries().get(file)
        buffer = bytearray(max(0, min(stop, entry.size if entry else 0) - start))
        try:
            self._objects.read_into(f"{self._folder}/{file}", start, [memoryview(buffer)])
        except (EOFError, FileNotFoundError):  # replaced or deleted since the listing
            return b""
        return bytes(buffer)


class _Hub(Place):
    """A repository's branches and tags; the local cache's where the hub does not answer."""

    def __init__(self, name: str, revision: str):
        self._name, self._template = name, _Template(f"revision/{revision}")

    def find(self) -> dict[int, Files]:
        refs = hub.ask(self._name, lambda offline: _cached_refs(self._name) if offline else _online_refs(self._name))
        steps = {step: make for ref, make in refs.items() if (step := self._template.step(ref)) is not None}
        return {step: steps[step]() for step in sorted(steps)}


def _online_refs(name: str) -> dict[str, Callable[[], Files]]:
    import huggingface_hub

    api = huggingface_hub.HfApi()
    refs = api.list_repo_refs(name)
    return {ref.name: lambda ref=ref: _HubFiles(api, name, ref.target_commit) for ref in [*refs.tags, *refs.branches]}  # type: ignore[misc]


def _cached_refs(name: str) -> dict[str, Callable[[], Files]]:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    commits = {ref.name: ref.read_text().strip() for ref in (folder / "refs").iterdir()}
    return {ref: lambda c=commit: FolderFiles(folder / "snapshots" / c, name, c) for ref, commit in commits.items()}  # type: ignore[misc]


class _HubFiles(Files):
    """The files of one commit. The hub takes a file only whole, by its sha256: a listing and the small JSON files are all that is read."""

    is_fixed = is_checked = True

    def __init__(self, api: Any, name: str, commit: str):
        self._api, self.name, self.revision = api, name, commit

    def entries(self) -> dict[str, Entry]:
        listed = self._api.list_repo_tree(self.name, revision=self.revision, recursive=False)
        return {item.path: Entry(item.size, 0.0) for item in listed if hasattr(item, "size")}

    def read(self, file: str, start: int, stop: int) -> bytes:
        return hub.file(self.name, file, self.revision).read_bytes()[start:stop]
