"""Artifacts as their readers see them: state, manifest, files, tables, arrays, and a check of every byte."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagediff.digest import cache_folder
from stagediff.errors import DamagedError, UserError
from stagediff.spec import Ref, Spec
from stagediff.store.checksum import crc32c, crc_hex, file_crc32c
from stagediff.store.manifest import FileRecord, Manifest
from stagediff.store.names import MANIFEST, RECEIPTS, SPEC, WORK
from stagediff.store.objects import Objects

if TYPE_CHECKING:
    import pandas as pd

    from stagediff.store.shards import ArrayReader

__all__ = ["Artifact", "Problem", "State"]

_VERIFY_BLOCK = 16 << 20
_ZARR = "zarr.json"


class State(StrEnum):
    ABSENT = "absent"
    PARTIAL = "partial"
    COMPLETE = "complete"
    EVICTED = "evicted"
    DAMAGED = "damaged"
    """What `verify` and a plan say of one whose manifest or bytes cannot be trusted; a handle's own `state` raises DamagedError then."""


@dataclass(frozen=True)
class Problem:
    """One file that is not what it should be."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


class Artifact:
    """A handle on `<kind>/<key>/`; nothing is read before it is asked for."""

    def __init__(self, objects: Objects, ref: Ref):
        self.ref = ref
        self._objects = objects
        self._manifest: Manifest | None = None
        self._records: dict[str, FileRecord] = {}

    def __repr__(self) -> str:
        return f"Artifact({self._objects.describe(self.ref)})"

    @property
    def state(self) -> State:
        if not self._objects.exists(f"{self.ref}/{MANIFEST}"):
            return State.PARTIAL if self._objects.exists(f"{self.ref}/{SPEC}") else State.ABSENT
        return State.EVICTED if self.read_manifest().evicted else State.COMPLETE

    @property
    def is_complete(self) -> bool:
        """Whether its step is done (its bulk data may have been evicted since)."""
        return self._objects.exists(f"{self.ref}/{MANIFEST}")

    def require(self) -> "Artifact":
        """Itself. Raises UserError when there is nothing complete to read."""
        state = self.state
        if state not in (State.COMPLETE, State.EVICTED):
            have = "only a part of it is there" if state is State.PARTIAL else "it is not there"
            raise UserError(
                f"Artifact {self.ref} is needed from the store {self._objects.describe()}, but {have}. "
                "Run the step that makes it first (`stagediff run` does all of a run's steps in order)."
            )
        return self

    @property
    def manifest(self) -> Manifest:
        """Read once per handle."""
        if self._manifest is None:
            self.read_manifest()
        assert self._manifest is not None
        return self._manifest

    def read_manifest(self) -> Manifest:
        """The manifest as it is now. Raises DamagedError when it cannot be trusted, UserError when there is none."""
        key = f"{self.ref}/{MANIFEST}"
        try:
            body = self._objects.get(key)
        except FileNotFoundError:
            place = self._objects.describe(self.ref)
            raise UserError(f"Artifact {self.ref} ({place}) has no manifest: it is not complete. Run the step that makes it.") from None
        manifest = Manifest.from_bytes(body, self._objects.describe(key))
        if f"{manifest.kind}/{manifest.key}" != self.ref:
            raise DamagedError(
                f"The manifest {self._objects.describe(key)} belongs to {manifest.kind}/{manifest.key}: folders were mixed up."
            )
        self._manifest, self._records = manifest, {f.path: f for f in manifest.files}
        return manifest

    def spec(self) -> Spec:
        """The spec it was made from, as the registered class."""
        from stagediff.steps import spec_from_json

        return spec_from_json(self.manifest.step, self.manifest.spec)

    # Reading

    def names(self, below: str = "") -> list[str]:
        """Files as the manifest lists them (evicted ones left out), optionally those below a folder."""
        prefix = f"{below}/" if below else ""
        return [f.path for f in self.manifest.files if f.path.startswith(prefix) and not f.evicted]

    def _record(self, name: str) -> FileRecord:
        self.manifest  # noqa: B018  (fills the records)
        files = self._records
        if name not in files:
            raise UserError(
                f"Artifact {self.ref} has no file {name!r}; it has {', '.join(list(files)[:8])}{' …' if len(files) > 8 else ''}."
            )
        if files[name].evicted:
            raise self._evicted(name)
        return files[name]

    def _evicted(self, name: str) -> UserError:
        return UserError(f"{name!r} of artifact {self.ref} was evicted to save space. Compute the step again with --force if it is needed.")

    def _damaged(self, name: str, what: str) -> DamagedError:
        place = self._objects.describe(f"{self.ref}/{name}")
        return DamagedError(
            f"{place} is damaged: {what}. `stagediff verify` lists all damage; computing this step again (--force) heals it."
        )

    def read_bytes(self, name: str) -> bytes:
        """A whole file, checked."""
        record = self._record(name)
        try:
            body = self._objects.get(f"{self.ref}/{name}")
        except FileNotFoundError:
            raise self._damaged(name, "it is missing") from None
        if len(body) != record.bytes:
            raise self._damaged(name, f"it has {len(body):,} bytes instead of {record.bytes:,}")
        if crc_hex(crc32c(body)) != record.crc32c:
            raise self._damaged(name, "its checksum does not match")
        return body

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_bytes(name))

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> "pd.DataFrame":
        """A parquet table, checked; its columns' units and meanings stand in `.attrs["columns"]`."""
        from stagediff.store.tables import decode_table

        path = self._objects.local_path(f"{self.ref}/{name}")
        if path is None:
            return decode_table(self.read_bytes(name), columns)
        self._check_file(name, path)
        return decode_table(path, columns)

    def _check_file(self, name: str, path: Path) -> None:
        """That a local file is what the manifest records."""
        record = self._record(name)
        if not path.is_file():
            raise self._damaged(name, "it is missing")
        if (size := path.stat().st_size) != record.bytes:
            raise self._damaged(name, f"it has {size:,} bytes instead of {record.bytes:,}")
        if crc_hex(file_crc32c(path)) != record.crc32c:
            raise self._damaged(name, "its checksum does not match")

    def local(self, name: str = "") -> Path:
        """A local path of a file or of a folder of files ("" is the whole artifact), all of them checked.

        Local stores give the path itself: change nothing there. Remote stores give a copy in the user's cache (`STAGEDIFF_CACHE`).
        """
        names = self.names(name)
        if name in self._records:
            names = [name]
        if not names:
            self._record(name)  # says what there is
        base = self._objects.local_path(self.ref)
        if base is None:
            base = cache_folder() / hashlib.sha256(self._objects.describe().encode()).hexdigest()[:12] / self.ref
        for each in names:
            path = base / each
            if self._objects.local_path(f"{self.ref}/{each}") is None and not self._is_cached(each, path):
                path.parent.mkdir(parents=True, exist_ok=True)
                copy = path.with_name(f".{path.name}.{os.getpid()}.partial")
                try:
                    self._objects.download(f"{self.ref}/{each}", copy)
                    self._check_file(each, copy)
                    os.replace(copy, path)
                finally:
                    copy.unlink(missing_ok=True)
            else:
                self._check_file(each, path)
        return base / name if name else base

    def _is_cached(self, name: str, path: Path) -> bool:
        record = self._record(name)
        return path.is_file() and path.stat().st_size == record.bytes and crc_hex(file_crc32c(path)) == record.crc32c

    def array(self, name: str = "data") -> "ArrayReader":
        """A reader of a stored array; every chunk is checked as it is read."""
        from stagediff.store.shards import ArrayReader, Layout

        layout = Layout.from_json(self.read_bytes(f"{name}/{_ZARR}"))
        records = self._records
        if any(f.evicted for path, f in records.items() if path.startswith(f"{name}/")):
            raise self._evicted(name)
        return ArrayReader(self._objects, f"{self.ref}/{name}", layout, lambda shard: records.get(f"{name}/{shard}"))

    # Checking

    def verify(self) -> list[Problem]:
        """Reads every byte and compares it with what was recorded; [] when all is well.

        A partial artifact is checked as far as its receipts go.
        """
        if not self.is_complete:
            return self._verify_partial()
        try:
            manifest = self.read_manifest()
        except DamagedError as error:
            return [Problem(MANIFEST, str(error))]
        stored = self._objects.entries(self.ref)
        problems = []
        for record in manifest.files:
            if not record.evicted:
                problems += self._verify_file(record, stored[record.path].size if record.path in stored else None)
        known = {f.path for f in manifest.files} | {MANIFEST}
        problems += [Problem(name, "is not in the manifest") for name in stored if name not in known and not name.startswith(f"{WORK}/")]
        return problems

    def _verify_partial(self) -> list[Problem]:
        stored = self._objects.entries(self.ref)
        problems = []
        for name in stored:
            if name.startswith(f"{RECEIPTS}/"):
                record = read_receipt(self._objects, f"{self.ref}/{name}")
                if record is None:
                    problems.append(Problem(name, "is not readable"))
                else:
                    problems += self._verify_file(record, stored[record.path].size if record.path in stored else None)
        return problems

    def _verify_file(self, record: FileRecord, size: int | None) -> list[Problem]:
        if size is None:
            return [Problem(record.path, "is missing")]
        if size != record.bytes:
            return [Problem(record.path, f"has {size:,} bytes instead of {record.bytes:,}")]
        crc = crc_hex(object_crc32c(self._objects, f"{self.ref}/{record.path}", size))
        if crc != record.crc32c:
            return [Problem(record.path, f"has crc32c {crc} instead of {record.crc32c}")]
        return self._verify_content(record) if record.content is not None else []

    def _verify_content(self, record: FileRecord) -> list[Problem]:
        from stagediff.store.shards import Layout, check_shard

        array, _, name = record.path.rpartition("/c/")
        try:
            layout = Layout.from_json(self._objects.get(f"{self.ref}/{array}/{_ZARR}"))
            fits = layout.shard_bytes(int(name.split("/")[0])) == record.bytes
        except (FileNotFoundError, ValueError, KeyError, TypeError, IndexError):
            fits = False
        if not fits:  # zarr.json is missing or damaged, which is reported by itself
            return []
        found = check_shard(self._objects, f"{self.ref}/{array}", layout, int(name.split("/")[0]))
        return (
            []
            if found is not None and found.content == record.content
            else [Problem(record.path, "holds other rows than were written here")]
        )


def object_crc32c(objects: Objects, key: str, size: int) -> int:
    """Of a stored object, in constant memory."""
    crc = 0
    for offset in range(0, size, _VERIFY_BLOCK):
        block = bytearray(min(_VERIFY_BLOCK, size - offset))
        objects.read_into(key, offset, [memoryview(block)])
        crc = crc32c(block, crc)
    return crc


def read_receipt(objects: Objects, key: str) -> FileRecord | None:
    """A receipt, or None when it is gone or not readable (a power loss): the file it was for is then checked afresh."""
    try:
        return FileRecord.model_validate_json(objects.get(key))
    except (FileNotFoundError, ValueError):
        return None
