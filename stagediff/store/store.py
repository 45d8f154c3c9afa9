"""The store: artifacts by reference below one root, a local path or a URL (s3://bucket/prefix).

    <root>/<kind>/<key>/spec.json        written first: the artifact is PARTIAL from then on
                        …                files, tables, arrays
                        _work/           writers' sessions, claims, receipts, training checkpoints; gone after the commit
                        manifest.json    written last: the artifact is COMPLETE
    <root>/_quarantine/<kind>/<key>/<time>/ what a forced recomputation or `remove` took out of the way
    <root>/_scratch/                     temporary files of running steps (local stores)

It is the only truth about what is done.
"""

import hashlib
import json
import logging
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from stagediff.errors import DamagedError, UserError
from stagediff.spec import Ref, Spec
from stagediff.store.artifact import Artifact, Problem, State
from stagediff.store.claims import is_alive
from stagediff.store.manifest import Manifest
from stagediff.store.names import FORCED, MANIFEST, QUARANTINE, REPLACES, SCRATCH, SESSIONS, SPEC, WORK
from stagediff.store.objects import open_objects
from stagediff.store.writer import Writer

__all__ = ["Garbage", "Listing", "Store"]

log = logging.getLogger("stagediff")

_KIND = re.compile(r"^[a-z]+$")
_HOUR = 3600.0


@dataclass(frozen=True)
class Listing:
    """One artifact in `Store.ls`."""

    ref: Ref
    state: State
    step: str
    bytes: int
    """Stored bytes; of a partial artifact, what is there so far."""
    created: str
    """UTC; empty unless complete."""
    figures: dict[str, Any]


@dataclass(frozen=True)
class Garbage:
    """Something `Store.collect_garbage` removed (or would remove)."""

    path: str
    why: str
    bytes: int


class Store:
    """All artifacts below one root. Opening it touches nothing.

    Parameters
    ----------
    root
        A local path (made on the first write) or a URL that fsspec knows.
    options
        For remote stores: `retry_seconds`, how long a fault that lasts is retried (300); anything else goes to fsspec's file system
        (`endpoint_url`, `key`, `secret`; by default they come from the environment).
    """

    def __init__(self, root: str | Path, **options: Any):
        self.root = str(root)
        self._options = options
        self.objects = open_objects(self.root, **options)

    def __repr__(self) -> str:
        return f"Store({self.root!r})"

    def artifact(self, ref: Ref | str) -> Artifact:
        return Artifact(self.objects, Ref(ref))

    def check_writable(self) -> None:
        """Writes a small file and removes it. Raises UserError where that cannot be done: better now than after the first long step."""
        folder = f"{SCRATCH}/check-{uuid.uuid4().hex}"
        self.objects.put(f"{folder}/empty", b"")
        self.objects.delete_tree(folder)

    def write(self, spec: Spec, numerics: dict[str, Any] | None = None) -> Writer:
        """A writer that makes or continues the spec's artifact; use it in a `with` statement.

        `numerics` is recorded for this worker at once, so that a manifest shows when a killed run was resumed on another numerics class.
        """
        return Writer(self.objects, spec, numerics)

    def refs(self, kind: str | None = None) -> list[Ref]:
        """All artifacts, complete or not, sorted."""
        out = []
        for folder in [kind] if kind else self.objects.folders(""):
            if not _KIND.match(folder):
                continue
            for key in self.objects.folders(folder):
                try:
                    out.append(Ref(f"{folder}/{key}"))
                except ValueError:
                    continue
        return out

    def ls(self, kind: str | None = None) -> Iterator[Listing]:
        """State and key figures of every artifact."""
        for ref in self.refs(kind):
            artifact = self.artifact(ref)
            try:
                manifest = artifact.read_manifest() if artifact.is_complete else None
            except DamagedError:
                yield Listing(ref, State.DAMAGED, "", 0, "", {})
                continue
            if manifest is not None:
                state = State.EVICTED if manifest.evicted else State.COMPLETE
                yield Listing(ref, state, manifest.step, manifest.size, manifest.created, manifest.figures)
            else:
                size = sum(e.size for e in self.objects.entries(ref).values())
                yield Listing(ref, State.PARTIAL, self._step_of(ref), size, "", {})

    def _step_of(self, ref: Ref) -> str:
        try:
            return json.loads(self.objects.get(f"{ref}/{SPEC}"))["step"]
        except (FileNotFoundError, ValueError, KeyError):
            return ""

    def find(self, prefix: str) -> Ref:
        """The artifact that a shortened name means: "tokens/3f2a", "3f2a" or a whole reference."""
        kind, _, key = prefix.rpartition("/")
        found = [ref for ref in self.refs(kind or None) if ref.key.startswith(key)]
        if len(found) != 1:
            place = self.objects.describe()
            if not found:
                raise UserError(f"The store {place} has no artifact {prefix!r}. `stagediff ls {self.root}` shows what it holds.")
            raise UserError(
                f"{prefix!r} means {len(found)} artifacts of the store {place} ({', '.join(found[:4])}{' …' if len(found) > 4 else ''}). "
                "Give more digits of the key."
            )
        return found[0]

    def verify(self, refs: Iterable[Ref] | None = None) -> Iterator[tuple[Ref, State, list[Problem]]]:
        """Reads every byte of the artifacts (all by default); state DAMAGED where something is wrong."""
        for ref in self.refs() if refs is None else refs:
            artifact = self.artifact(ref)
            problems = artifact.verify()
            yield ref, State.DAMAGED if problems else artifact.state, problems

    def bytes_of(self, refs: Iterable[Ref]) -> str:
        """A digest of what complete artifacts hold now; raises UserError where one is not complete."""
        held = [sorted(self.artifact(ref).read_manifest().data().items()) for ref in refs]
        return hashlib.sha256(repr(held).encode()).hexdigest()[:16]

    def quarantine(self, ref: Ref, mark: str | None = None) -> Manifest | None:
        """Moves a complete artifact out of the way, so that it is computed again; returns its manifest.

        The new artifact remembers the manifest until it is committed: a forced run that was killed goes on when it is forced again, and still says whether the
        bytes agree. None when there was nothing complete (and readable) to compare with. Unfinished work stays, to be gone on with: there is no result to
        doubt, and it may be that of another worker which shares the step. `mark` will stand in the new manifest as `forced`.
        """
        artifact = self.artifact(ref)
        manifest = None
        complete = artifact.is_complete
        try:
            manifest = artifact.read_manifest() if complete else self._remembered(ref)
        except DamagedError as error:
            log.warning("%s", error)
        except UserError:  # another worker has moved it since
            manifest = self._remembered(ref)
        # Looked up again: a worker that was faster may have moved it, and begun anew, since.
        if artifact.is_complete:
            self._set_aside(ref)
        if manifest is not None:
            self.objects.put(f"{ref}/{REPLACES}", manifest.to_bytes())
        if mark is not None:
            self.objects.put(f"{ref}/{FORCED}", mark.encode())
        return manifest

    def _remembered(self, ref: Ref) -> Manifest | None:
        """Of an artifact that is not complete: the manifest that an earlier forced run, killed meanwhile, took out of the way."""
        places = [f"{ref}/{REPLACES}"]
        if not self.objects.entries(ref):  # killed between moving the old artifact and leaving word of it
            places += [f"{QUARANTINE}/{ref}/{name}/{MANIFEST}" for name in self.objects.folders(f"{QUARANTINE}/{ref}")[-1:]]
        for place in places:
            try:
                return Manifest.from_bytes(self.objects.get(place), self.objects.describe(place))
            except FileNotFoundError:
                continue
        return None

    def _set_aside(self, ref: Ref) -> None:
        """Moves what there is of an artifact into quarantine; the manifest leaves first."""
        if not self.objects.entries(ref):
            return
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{uuid.uuid4().hex[:6]}"  # in order, and never two writers' same one
        with suppress(FileNotFoundError):  # another worker was faster
            self.objects.move_tree(ref, f"{QUARANTINE}/{ref}/{name}", first=[MANIFEST])

    def remove(self, ref: Ref) -> None:
        """Deletes an artifact for good."""
        self.objects.delete_tree(ref, first=[MANIFEST, SPEC])

    def evict(self, ref: Ref) -> int:
        """Drops an artifact's arrays; tables, files and the manifest stay. Returns the bytes freed.

        The manifest says so first: should this be interrupted, calling it again (or `collect_garbage`) removes the rest.
        """
        artifact = self.artifact(ref).require()
        manifest = artifact.manifest
        arrays = tuple(f.path.removesuffix("zarr.json") for f in manifest.files if f.path.endswith("/zarr.json"))
        bulk = {f.path for f in manifest.files if f.path.startswith(arrays) and not f.path.endswith("/zarr.json")} if arrays else set()
        if not bulk:
            return 0
        freed = sum(f.bytes for f in manifest.files if f.path in bulk and not f.evicted)
        manifest.files = [f.model_copy(update={"evicted": True}) if f.path in bulk else f for f in manifest.files]
        manifest.evicted = True
        self.objects.put(f"{ref}/{MANIFEST}", manifest.to_bytes())
        for path in sorted(bulk):
            self.objects.delete(f"{ref}/{path}")
        return freed

    def has_live_writers(self, ref: Ref) -> bool:
        """Whether a process works on this artifact now."""
        for name in self.objects.entries(f"{ref}/{SESSIONS}"):
            try:
                if is_alive(json.loads(self.objects.get(f"{ref}/{SESSIONS}/{name}"))):
                    return True
            except (FileNotFoundError, ValueError):
                continue
        return False

    def collect_garbage(self, older_than: timedelta | float = _HOUR, dry_run: bool = False) -> list[Garbage]:
        """Removes what no run needs: unfinished artifacts nobody works on, quarantine, leftovers of killed writes, scratch folders.

        Parameters
        ----------
        older_than
            A timedelta or seconds: only what has not changed for so long. An unfinished artifact holds work that a rerun would continue from.
        """
        age = older_than.total_seconds() if isinstance(older_than, timedelta) else float(older_than)
        before = time.time() - age
        garbage: list[Garbage] = []

        def tree(prefix: str, why: str) -> None:
            entries = self.objects.entries(prefix).values()
            if entries and max(e.modified for e in entries) <= before:
                garbage.append(Garbage(prefix, why, sum(e.size for e in entries)))
                if not dry_run:
                    self.objects.delete_tree(prefix, first=[MANIFEST, SPEC])

        for ref in self.refs():
            if not self.artifact(ref).is_complete:
                if not self.has_live_writers(ref):
                    tree(ref, "unfinished, nobody works on it")
            else:
                tree(f"{ref}/{WORK}", "left by a writer that came late")
                garbage += self._evicted_leftovers(ref, dry_run)
        for kind in self.objects.folders(QUARANTINE):
            for key in self.objects.folders(f"{QUARANTINE}/{kind}"):
                tree(f"{QUARANTINE}/{kind}/{key}", "replaced by a forced recomputation")
        for folder in self.objects.folders(SCRATCH):
            if self._is_scratch_in_use(folder):
                continue
            tree(f"{SCRATCH}/{folder}", "scratch files of a killed process")
        for key, entry in self.objects.leftovers().items():
            if entry.modified <= before and _is_ours(key):
                garbage.append(Garbage(key, "a write that was never finished", entry.size))
                if not dry_run:
                    self.objects.delete_leftover(key)
        return garbage

    def _is_scratch_in_use(self, folder: str) -> bool:
        """Scratch folders are named <kind>-<key>-<session>-<random>."""
        parts = folder.split("-")
        if len(parts) != 4:
            return False
        try:
            return is_alive(json.loads(self.objects.get(f"{parts[0]}/{parts[1]}/{SESSIONS}/{parts[2]}.json")))
        except (FileNotFoundError, ValueError):
            return False

    def _evicted_leftovers(self, ref: Ref, dry_run: bool) -> list[Garbage]:
        try:
            manifest = self.artifact(ref).read_manifest()
        except DamagedError:
            return []
        if not manifest.evicted:
            return []
        stored = self.objects.entries(ref)
        left = [f.path for f in manifest.files if f.evicted and f.path in stored]
        if not dry_run:
            for path in left:
                self.objects.delete(f"{ref}/{path}")
        return [Garbage(f"{ref}/{path}", "evicted", stored[path].size) for path in left]


def _is_ours(key: str) -> bool:
    """Whether a store can have put this there: a folder given by mistake may hold others' unfinished downloads."""
    first, _, rest = key.partition("/")
    try:
        return first in (QUARANTINE, SCRATCH) or bool(Ref(f"{first}/{rest.partition('/')[0]}"))
    except ValueError:
        return False
