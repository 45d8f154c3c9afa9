"""Writing an artifact: spec first, then data with receipts, the manifest last.

A writer may be killed at any moment; the next one finds what is whole and goes on. Several may work on one artifact at a time: shards are shared out
by claims, trainings go one at a time, files are put create-only, and exactly one writer commits. Whoever finds the artifact committed by another leaves
the `with store.write(spec)` block quietly: the result is there.
"""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from stagediff.errors import DamagedError, StagediffError
from stagediff.spec import Spec
from stagediff.store.artifact import object_crc32c, read_receipt
from stagediff.store.checksum import crc32c, crc_hex, file_crc32c
from stagediff.store.claims import Claims, Session
from stagediff.store.faults import explained, is_full
from stagediff.store.manifest import FileRecord, Manifest, WriterRecord, plain
from stagediff.store.names import FORCED, LOCKS, MANIFEST, PARTIAL, RECEIPTS, REPLACES, SCRATCH, SESSIONS, SPEC, WORK, check_name, claims
from stagediff.store.objects import Objects
from stagediff.store.training import TrainingCheckpoints

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from stagediff.store.arrays import ArrayWriter

__all__ = ["AlreadyComplete", "Writer"]

log = logging.getLogger("stagediff")

_LOCK = "files"
_READERS = 16
"""Receipts read at a time (on S3 each is a request)."""


class AlreadyComplete(StagediffError):  # noqa: N818  (not an error: a way out)
    """Another worker has committed this artifact meanwhile. Ends the `with store.write(spec)` block without an error."""


class Writer:
    """Fills one artifact. Use as `with store.write(spec) as w: …`."""

    def __init__(self, objects: Objects, spec: Spec, numerics: dict[str, Any] | None = None):
        self.objects, self.spec_value, self.ref = objects, spec, spec.ref
        self._numerics = numerics
        self._session: Session | None = None
        self._scratch: Path | None = None
        self._arrays: dict[str, ArrayWriter] = {}
        self._records: dict[str, FileRecord] = {}
        self._holds_lock = False
        self.leaves_bulk_out = False
        """Set by a step that stores no arrays where readers would expect some: the artifact is complete and EVICTED from the start."""
        self.training = TrainingCheckpoints(objects, self.ref, self._hold_lock)
        """Training checkpoints. The first use waits until no other live process trains the same artifact."""

    def __repr__(self) -> str:
        return f"Writer({self.objects.describe(self.ref)})"

    def __enter__(self) -> "Writer":
        spec = self.spec_value
        body = {"step": spec.step, "version": spec.version, "spec": spec.model_dump(mode="json")}
        self.objects.create(f"{self.ref}/{SPEC}", (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())
        self._session = Session(self.objects, self.ref, self._numerics)
        self._lock = Claims(self.objects, self.ref, LOCKS, self._session)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        scratch = self._scratch
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        complete = isinstance(error, AlreadyComplete)
        if self._session is not None:
            self._session.close(keep=not complete)
            self._session = None
            # Should another writer have committed meanwhile, it could not drop what this one wrote since.
            if complete or (error is None and self.objects.exists(f"{self.ref}/{MANIFEST}")):
                log.info("%s was completed by another process", self.ref)
                self.objects.delete_tree(f"{self.ref}/{WORK}")
        if error is not None and not isinstance(error, StagediffError) and is_full(error):  # outside the store's own writes: scratch files
            raise explained(error, scratch or Path(tempfile.gettempdir())) from error
        return complete

    # What is there

    def check_open(self) -> None:
        """Raises AlreadyComplete when the artifact has its manifest."""
        if self.objects.exists(f"{self.ref}/{MANIFEST}"):
            raise AlreadyComplete(f"{self.ref} is complete")

    def has(self, name: str) -> bool:
        """Whether that file is wholly there, from this or an earlier run."""
        size = self.objects.size(f"{self.ref}/{check_name(name)}")
        receipt = self.receipt(name)
        return size is not None and (receipt is None or receipt.bytes == size)

    def read_bytes(self, name: str) -> bytes:
        """A file that this or an earlier run wrote, checked against its receipt."""
        key = f"{self.ref}/{check_name(name)}"
        body = self.objects.get(key)
        receipt = self.receipt(name)
        if receipt is not None and receipt.crc32c != crc_hex(crc32c(body)):
            self.objects.delete(key)
            raise DamagedError(
                f"{self.objects.describe(key)} of an unfinished step is damaged and was removed. Run again: it is computed anew."
            )
        return body

    def receipt(self, name: str) -> FileRecord | None:
        if name not in self._records:
            found = read_receipt(self.objects, f"{self.ref}/{RECEIPTS}/{name}.json")
            if found is None:
                return None
            self._records[name] = found
        return self._records[name]

    def receipts(self, folder: str) -> set[str]:
        """Names below a folder (relative to it) that have a receipt."""
        return {name.removesuffix(".json") for name in self.objects.entries(f"{self.ref}/{RECEIPTS}/{folder}")}

    def add_receipt(self, record: FileRecord) -> None:
        self.objects.put(f"{self.ref}/{RECEIPTS}/{record.path}.json", record.model_dump_json().encode())
        self._records[record.path] = record

    # Files and tables

    def write_bytes(self, name: str, body: bytes) -> None:
        """Stores a file. Writing it again replaces it, as long as the artifact is not committed."""
        key = f"{self.ref}/{check_name(name)}"
        self.check_open()
        record = FileRecord(path=name, bytes=len(body), crc32c=crc_hex(crc32c(body)))
        if not self.objects.create(key, body):
            self._replace(record, lambda: self.objects.create(key, body))
        self.add_receipt(record)

    def _replace(self, record: FileRecord, create: Any) -> None:
        """Takes the place of a file that an earlier or racing writer left, unless that holds the same bytes."""
        key = f"{self.ref}/{record.path}"
        with self._locked():  # nobody can commit the old bytes meanwhile
            if self.objects.size(key) == record.bytes and crc_hex(object_crc32c(self.objects, key, record.bytes)) == record.crc32c:
                return
            self.objects.delete(f"{self.ref}/{RECEIPTS}/{record.path}.json")
            self.objects.delete(key)
            if not create():
                place = self.objects.describe(key)
                raise StagediffError(
                    f"Two processes write {place} with different content at the same time. Stop one of them and run again."
                )

    def write_json(self, name: str, value: Any) -> None:
        """Stores plain values as JSON (numpy scalars allowed; what is not a finite number becomes null)."""
        self.write_bytes(name, (json.dumps(plain(value), indent=1, allow_nan=False) + "\n").encode())

    def write_file(self, name: str, path: str | Path) -> None:
        """Stores a local file under that name, or all files of a local folder below it ("": at the top). Hidden files are left out."""
        path = Path(path)
        if path.is_dir():
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                relative = file.relative_to(path)
                if not any(part.startswith(".") for part in relative.parts):
                    self.write_file("/".join([*([name] if name else []), *relative.parts]), file)
            return
        key = f"{self.ref}/{check_name(name)}"
        self.check_open()
        record = FileRecord(path=name, bytes=path.stat().st_size, crc32c=crc_hex(file_crc32c(path)))
        if not self.objects.create_file(key, path):
            self._replace(record, lambda: self.objects.create_file(key, path))
        self.add_receipt(record)

    def write_table(self, name: str, frame: "pd.DataFrame | pa.Table", columns: Mapping[str, tuple[str, str]] | None = None) -> None:
        """Stores a table as parquet. `columns`: name -> (unit, meaning)."""
        from stagediff.store.tables import encode_table

        self.write_bytes(name, encode_table(frame, columns or {}))

    def array(
        self,
        name: str,
        *,
        shape: tuple[int, ...],
        dtype: str,
        chunk_rows: int,
        shard_rows: int,
        attributes: Mapping[str, Any] | None = None,
    ) -> "ArrayWriter":
        """An array of `shape[0]` rows, written shard by shard; begun by an earlier or another worker, it is continued.

        bfloat16 goes in as dtype "uint16" (`stagediff.store.shards.from_bf16`) with the attribute encoding="bfloat16".
        """
        from stagediff.store.arrays import ArrayWriter
        from stagediff.store.shards import Layout

        check_name(name)
        self.check_open()
        assert self._session is not None, "write inside `with store.write(spec) as w:`"
        layout = Layout(tuple(int(n) for n in shape), str(dtype), int(chunk_rows), int(shard_rows), plain(dict(attributes or {})))
        if name not in self._arrays:
            self._arrays[name] = ArrayWriter(self, name, layout, Claims(self.objects, self.ref, claims(name), self._session))
        elif self._arrays[name].layout != layout:
            raise ValueError(f"array {name!r} is open with another layout")
        return self._arrays[name]

    def drop(self, folder: str) -> None:
        """Removes what an earlier writer left below a folder, receipts and claims too."""
        with self._locked():
            for place in (f"{RECEIPTS}/{folder}", claims(folder), folder):
                self.objects.delete_tree(f"{self.ref}/{place}")
            self._records = {name: record for name, record in self._records.items() if not name.startswith(f"{folder}/")}

    def scratch(self) -> Path:
        """A local folder for temporary files, gone when the block ends. With a local store it lies on the store's disk."""
        if self._scratch is None:
            base = self.objects.local_path(SCRATCH)
            if base is not None:
                base.mkdir(parents=True, exist_ok=True)
            assert self._session is not None, "write inside `with store.write(spec) as w:`"
            # The name leads garbage collection to this writer's session (mkdtemp's own characters hold no "-").
            self._scratch = Path(tempfile.mkdtemp(prefix=f"{self.ref.kind}-{self.ref.key}-{self._session.id}-", dir=base))
        return self._scratch

    # Locks and commit

    def _hold_lock(self) -> None:
        """Makes this the only writer that trains and commits, until the block ends; waits for a live one to finish."""
        if self._holds_lock:
            return
        self.check_open()
        pause, told = 0.05, False
        while not self._lock.take(_LOCK):
            if not told and pause > 0.5:
                holder = self._lock.holder(_LOCK) or {}
                log.info(
                    "%s: waiting for process %s on %s, which works on the same artifact", self.ref, holder.get("pid"), holder.get("host")
                )
                told = True
            time.sleep(pause)
            pause = min(2.0, pause * 1.5)
            self.check_open()
            self._lock.refresh()
        self._holds_lock = True
        self.check_open()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The same for a short while, unless it is held already."""
        held = self._holds_lock
        self._hold_lock()
        try:
            yield
        finally:
            if not held:
                self._holds_lock = False
                self._lock.release(_LOCK)

    def commit(
        self,
        *,
        figures: Mapping[str, Any],
        numerics: Mapping[str, Any] | None = None,
        notes: Mapping[str, Any] | None = None,
        replaces: Manifest | None = None,
        inputs: str | None = None,
    ) -> Manifest:
        """Makes the artifact complete: checks that everything is there, writes the manifest, drops claims, receipts and training checkpoints.

        Parameters
        ----------
        replaces
            Manifest of the artifact that this one was computed anew for; `same_bytes` says whether they agree. After a kill the store remembers it.
        inputs
            `Store.bytes_of` its upstream, as they were read.

        Raises
        ------
        StagediffError
            When shards are missing.
        DamagedError
            When a stored file is no longer what was written; it is removed, so that running again heals it.
        """
        import stagediff

        assert self._session is not None, "commit inside `with store.write(spec) as w:`"
        with self._locked():
            for array in self._arrays.values():
                if missing := array.missing():
                    what = f"{len(missing)} of {array.n_shards} shards of {array.name!r} are missing (first: {missing[0]})"
                    raise StagediffError(f"{self.ref} cannot be committed: {what}.")
                array.describe()  # another writer may have dropped it before the first shard was there
            records = self._collect()
            replaces = replaces or self._replaced()
            writers = self._writers()
            manifest = Manifest(
                key=self.ref.key,
                kind=self.ref.kind,
                step=self.spec_value.step,
                spec=self.spec_value.model_dump(mode="json"),
                files=records,
                upstream=[str(ref) for ref in self.spec_value.refs()],
                figures=plain(dict(figures)),
                notes=plain(dict(notes or {})),
                numerics=plain(dict(numerics or self._numerics or {})),
                writers=writers,
                stagediff=stagediff.__version__,
                host=self._session.host,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                seconds=round(sum(w.seconds for w in writers), 3),
                forced=self._mark(),
                inputs=inputs,
                evicted=self.leaves_bulk_out,
            )
            if replaces is not None:
                manifest.same_bytes = manifest.data() == replaces.data()
            if not self.objects.create(f"{self.ref}/{MANIFEST}", manifest.to_bytes()):
                raise AlreadyComplete(f"{self.ref} is complete")
            self._session.close(keep=False)
            self._session = None
        self.objects.delete_tree(f"{self.ref}/{WORK}")
        return manifest

    def _collect(self) -> list[FileRecord]:
        """A record of every stored file; sizes are compared, files without a receipt are read."""
        stored = {
            n: e
            for n, e in self.objects.entries(self.ref).items()
            if n != MANIFEST and not n.startswith(f"{WORK}/") and not n.endswith(PARTIAL)
        }

        def record(name: str) -> FileRecord:
            size = stored[name].size
            if name in self._records and self._records[name].content is None:
                del self._records[name]  # a racing writer may have put another file there; shards never change
            receipt = self.receipt(name)
            if receipt is None:
                return FileRecord(path=name, bytes=size, crc32c=crc_hex(object_crc32c(self.objects, f"{self.ref}/{name}", size)))
            if receipt.bytes != size:
                self.objects.delete(f"{self.ref}/{RECEIPTS}/{name}.json")
                self.objects.delete(f"{self.ref}/{name}")
                place = self.objects.describe(f"{self.ref}/{name}")
                raise DamagedError(
                    f"{place} has {size:,} bytes instead of {receipt.bytes:,} and was removed. Run again: it is computed anew."
                )
            return receipt

        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(record, sorted(stored)))

    def _mark(self) -> str | None:
        try:
            return self.objects.get(f"{self.ref}/{FORCED}").decode()
        except FileNotFoundError:
            return None

    def _replaced(self) -> Manifest | None:
        key = f"{self.ref}/{REPLACES}"
        try:
            return Manifest.from_bytes(self.objects.get(key), self.objects.describe(key))
        except FileNotFoundError:
            return None
        except DamagedError as error:  # only the comparison is lost
            log.warning("%s", error)
            return None

    def _writers(self) -> list[WriterRecord]:
        """All sessions so far, in the order in which they began."""
        assert self._session is not None
        found = {}
        for name in self.objects.entries(f"{self.ref}/{SESSIONS}"):
            try:
                body = json.loads(self.objects.get(f"{self.ref}/{SESSIONS}/{name}"))
            except (FileNotFoundError, ValueError):
                continue
            found[body["id"]] = WriterRecord.model_validate({f: body[f] for f in WriterRecord.model_fields})
        if self._session.id in found:
            found[self._session.id].seconds = round(self._session.seconds, 3)
        return sorted(found.values(), key=lambda w: w.started)
