"""Writing arrays shard by shard: several workers share one array, each shard is computed once, kills cost at most the shard at hand.

A shard is claimed, computed, put create-only, and then given its receipt (path, bytes, crc32c). It counts as written when its receipt is there and
its object has the recorded length. An object without a receipt (its writer died in between) is read, checked and adopted, or deleted and computed again.
"""

import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from stagediff.errors import StagediffError, UserError
from stagediff.store.checksum import crc_hex
from stagediff.store.claims import Claims
from stagediff.store.manifest import FileRecord
from stagediff.store.shards import METADATA, ArrayReader, Layout, check_shard, encode_shard

if TYPE_CHECKING:
    from stagediff.store.writer import Writer

__all__ = ["ArrayWriter"]

log = logging.getLogger("stagediff")


class ArrayWriter:
    """One array of an artifact that is being written; made by `Writer.array`."""

    def __init__(self, writer: "Writer", name: str, layout: Layout, claims: Claims):
        self.name, self.layout = name, layout
        self._writer, self._objects, self._claims = writer, writer.objects, claims
        self._folder = f"{writer.ref}/{name}"
        if not self.describe() and (old := self._objects.get(f"{self._folder}/{METADATA}")) != layout.to_json():
            raise StagediffError(
                f"Array {name!r} of the unfinished artifact {writer.ref} was begun with another shape or layout "
                f"({Layout.from_json(old).shape} instead of {layout.shape}). "
                "Remove what is there (`stagediff gc`) and run again."
            )
        self._check_space()

    def describe(self) -> bool:
        """Stores the array's description where there is none; whether there was none."""
        return self._objects.create(f"{self._folder}/{METADATA}", self.layout.to_json())

    def _check_space(self) -> None:
        free = self._objects.free_bytes()
        if free is None:
            return
        needed = sum(self.layout.shard_bytes(i) for i in range(self.n_shards)) if self.n_shards else 0
        missing = needed - sum(e.size for e in self._objects.entries(self._folder).values())
        if missing > free:
            raise UserError(
                f"Array {self.name!r} of {self._writer.ref} needs {missing / 2**30:.2f} GiB more, "
                f"but only {free / 2**30:.2f} GiB are free at {self._objects.describe()}. "
                "Free some space (`stagediff gc`, or `keep: tables` in the config), use another store, or ask for fewer tokens."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def shard_rows(self) -> int:
        return self.layout.shard_rows

    @property
    def n_shards(self) -> int:
        return self.layout.n_shards

    def rows_of(self, shard: int) -> int:
        """Rows of a shard; the last may be shorter."""
        return self.layout.rows_of(shard)

    def _path(self, shard: int) -> str:
        return f"{self.name}/{self.layout.shard_name(shard)}"

    def done(self) -> set[int]:
        """Shards that are written, by whomever. Raises AlreadyComplete (inside `store.write`) when another worker has committed the artifact."""
        self._writer.check_open()
        receipts = self._writer.receipts(self.name)
        stored = self._objects.entries(self._folder)
        names = {self.layout.shard_name(i): i for i in range(self.n_shards)}
        return {i for name, i in names.items() if name in receipts and name in stored and stored[name].size == self.layout.shard_bytes(i)}

    @property
    def is_complete(self) -> bool:
        return len(self.done()) == self.n_shards

    def pending(self, part: tuple[int, int] = (0, 1), wait: bool = True) -> Iterator[int]:
        """Shards to write now, each claimed for this worker before it is given out.

        Parameters
        ----------
        part
            (i, n): only the i-th of n equal ranges of shards.
        wait
            Whether to wait, in the end, for shards of this range that another live worker has claimed, and to take them over should it die.
        """
        i, n = part
        if not 0 <= i < n:
            raise ValueError(f"part must be (i, n) with 0 <= i < n, not {part}")
        left = list(range(self.n_shards * i // n, self.n_shards * (i + 1) // n))
        pause, told = 0.1, False
        self._claims.refresh()
        done = self.done()
        while left := [shard for shard in left if shard not in done]:
            moved = False
            for shard in list(left):
                if not self._claims.take(str(shard)):
                    continue
                moved = True
                left.remove(shard)
                self._writer.check_open()
                if not self._adopt(shard):
                    yield shard
            if not left or not (wait or moved):
                return
            if not moved:
                if not told:
                    log.info("%s: waiting for %d shards that other workers have claimed", self._writer.ref, len(left))
                    told = True
                time.sleep(pause)
                pause = min(2.0, pause * 1.5)
            self._claims.refresh()
            done = self.done()

    def _adopt(self, shard: int) -> bool:
        """Whether the claimed shard is there already. An object without a receipt gets one, or goes."""
        path = self._path(shard)
        size = self._objects.size(f"{self._writer.ref}/{path}")
        if size is None:
            return False
        if size == self.layout.shard_bytes(shard) and self._writer.receipt(path) is not None:
            return True
        record = check_shard(self._objects, self._folder, self.layout, shard)
        if record is None:
            log.warning("%s: %s was left torn or damaged by an earlier run and is computed again", self._writer.ref, path)
            self._objects.delete(f"{self._writer.ref}/{path}")
            return False
        self._writer.add_receipt(record.model_copy(update={"path": path}))
        return True

    def write_shard(self, shard: int, block: np.ndarray) -> None:
        """Stores a shard for good.

        Parameters
        ----------
        block
            Its rows, [rows_of(shard), …], of the array's dtype.
        """
        encoded = encode_shard(self.layout, shard, block)
        path = self._path(shard)
        key = f"{self._writer.ref}/{path}"
        # Something may be there if this worker lost its claim (paused for longer than the lease): whatever is whole stays.
        while not self._objects.create(key, *encoded.parts):
            self._writer.check_open()
            if self._adopt(shard):
                return
        self._writer.add_receipt(
            FileRecord(path=path, bytes=self.layout.shard_bytes(shard), crc32c=crc_hex(encoded.crc), content=encoded.content)
        )

    def reader(self) -> ArrayReader:
        """Reads what is written so far."""
        return ArrayReader(self._objects, self._folder, self.layout)

    def read_shard(self, shard: int) -> np.ndarray:
        """A written shard's rows."""
        return self.reader().read_shard(shard)

    def missing(self) -> list[int]:
        done = self.done()
        return [i for i in range(self.n_shards) if i not in done]
