"""Arrays of rows in zarr v3 shards, encoded and decoded here for speed and checks, readable by any zarr v3 library.

An array [n, …] is cut along its rows into shards of `shard_rows`, one object each, and a shard into chunks of `chunk_rows` at full
width. A shard's bytes: the chunks' payloads in order, little-endian, each followed by its crc32c; then the index (offset and length of
every chunk as uint64, all ones for a chunk that is not there), and the index's crc32c. This is zarr's `sharding_indexed` codec with
`[bytes, crc32c]` inside; no compression, since bf16 activations shrink by 1.25x only at a tenth of the speed.

A crc over bytes that end in their own crc is a constant: the crc32c of a whole shard detects damage, but is the same for any content. What tells two
shards apart is their `content`: a hash of the chunks' checksums, kept in receipts and manifests and compared when a whole shard is read.

zarr-python itself is not used: it reads missing shards silently as fill values, reads at a quarter of the speed, and reads before it overwrites.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stagediff.errors import DamagedError
from stagediff.store.checksum import crc32c, crc_hex
from stagediff.store.manifest import FileRecord
from stagediff.store.objects import Objects

if TYPE_CHECKING:
    import torch

__all__ = ["METADATA", "ArrayReader", "EncodedShard", "Layout", "as_bf16", "check_shard", "encode_shard", "from_bf16"]

METADATA = "zarr.json"
_ABSENT = np.uint64(0xFFFFFFFFFFFFFFFF)
_CRC = 4
_INDEXES_KEPT = 8
"""Of the shards read last. Small as they are, one for every shard splits the heap between the shards' freed buffers, which then fit no new one."""

_FILL: dict[str, Any] = {
    "uint16": 0xFFFF,  # a NaN as bf16
    "int32": -1,
    "int64": -1,
    "float32": "NaN",
    "float64": "NaN",
    "uint8": 255,
    "bool": False,
}
"""What stands in the rows that pad the last chunk. Chosen so that it cannot pass for data."""


def as_bf16(array: np.ndarray) -> "torch.Tensor":
    """A bfloat16 view of stored uint16 values; shares their memory."""
    import torch

    return torch.from_numpy(array).view(torch.bfloat16)


def from_bf16(tensor: "torch.Tensor") -> np.ndarray:
    """A uint16 view of a bfloat16 tensor's values (copied only if not contiguous or not on the CPU)."""
    import torch

    if tensor.dtype != torch.bfloat16:
        raise TypeError(f"expected a bfloat16 tensor, not {tensor.dtype}")
    return tensor.detach().cpu().contiguous().view(torch.uint16).numpy()


@dataclass(frozen=True)
class Layout:
    """An array's shape and how it is cut; the content of its zarr.json."""

    shape: tuple[int, ...]
    dtype: str
    chunk_rows: int
    shard_rows: int
    attributes: dict[str, Any]

    def __post_init__(self) -> None:
        if self.dtype not in _FILL:
            raise ValueError(f"dtype {self.dtype!r} is not stored here; known: {', '.join(_FILL)} (bfloat16: as uint16, see as_bf16)")
        if not self.shape or min(self.shape) < 0 or min(self.shape[1:], default=1) < 1:
            raise ValueError(f"an array of shape {self.shape} cannot be stored")
        if self.chunk_rows < 1 or self.shard_rows < 1 or self.shard_rows % self.chunk_rows:
            raise ValueError(f"shard_rows ({self.shard_rows}) must be a multiple of chunk_rows ({self.chunk_rows})")

    @property
    def n_shards(self) -> int:
        return -(-self.shape[0] // self.shard_rows)

    @property
    def chunks_per_shard(self) -> int:
        return self.shard_rows // self.chunk_rows

    @property
    def index_bytes(self) -> int:
        return 16 * self.chunks_per_shard + _CRC

    @property
    def chunk_bytes(self) -> int:
        """Of one payload, without its checksum."""
        return self.chunk_rows * int(np.prod(self.shape[1:], dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def rows_of(self, shard: int) -> int:
        """Rows of a shard; the last may be shorter."""
        if not 0 <= shard < self.n_shards:
            raise IndexError(f"shard {shard} of {self.n_shards}")
        return min(self.shard_rows, self.shape[0] - shard * self.shard_rows)

    def shard_bytes(self, shard: int) -> int:
        """Length of a shard's object."""
        return -(-self.rows_of(shard) // self.chunk_rows) * (self.chunk_bytes + _CRC) + self.index_bytes

    def shard_name(self, shard: int) -> str:
        """Relative to the array: "c/3/0" for a matrix."""
        return "/".join(["c", str(shard), *["0"] * (len(self.shape) - 1)])

    def to_json(self) -> bytes:
        """zarr.json, as zarr-python 3 writes it."""
        plain = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        inner = plain if np.dtype(self.dtype).itemsize > 1 else [{"name": "bytes"}, {"name": "crc32c"}]
        sharding = {"chunk_shape": [self.chunk_rows, *self.shape[1:]], "codecs": inner, "index_codecs": plain, "index_location": "end"}
        body = {
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.shard_rows, *self.shape[1:]]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": _FILL[self.dtype],
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": self.attributes,
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }
        return json.dumps(body, indent=2, allow_nan=False).encode()

    @classmethod
    def from_json(cls, body: bytes) -> "Layout":
        parsed = json.loads(body)
        inner = parsed["codecs"][0]["configuration"]
        return cls(
            shape=tuple(parsed["shape"]),
            dtype=parsed["data_type"],
            chunk_rows=inner["chunk_shape"][0],
            shard_rows=parsed["chunk_grid"]["configuration"]["chunk_shape"][0],
            attributes=parsed["attributes"],
        )


@dataclass(frozen=True)
class EncodedShard:
    """A shard's bytes, as a list of buffers in order, and what its receipt says."""

    parts: list[Any]
    crc: int
    content: str


def encode_shard(layout: Layout, shard: int, block: np.ndarray) -> EncodedShard:
    """Encodes a shard; the block's memory is referred to, not copied.

    Parameters
    ----------
    block
        The shard's rows, [rows_of(shard), …] of the layout's dtype.
    """
    expected = (layout.rows_of(shard), *layout.shape[1:])
    if block.shape != expected or block.dtype != np.dtype(layout.dtype):
        raise ValueError(f"shard {shard} takes a {layout.dtype} block of shape {expected}, not {block.dtype} of shape {block.shape}")
    block = np.ascontiguousarray(block).astype(np.dtype(layout.dtype).newbyteorder("<"), copy=False)
    parts: list[Any] = []
    index = np.full((layout.chunks_per_shard, 2), _ABSENT, dtype="<u8")
    offset = 0
    for i, start in enumerate(range(0, len(block), layout.chunk_rows)):
        chunk = block[start : start + layout.chunk_rows]
        if len(chunk) < layout.chunk_rows:
            fill = np.nan if _FILL[layout.dtype] == "NaN" else _FILL[layout.dtype]
            padded = np.full((layout.chunk_rows, *layout.shape[1:]), fill, dtype=block.dtype)
            padded[: len(chunk)] = chunk
            chunk = padded
        payload = chunk.reshape(-1).view(np.uint8)
        parts += [payload, crc32c(payload).to_bytes(_CRC, "little")]
        index[i] = offset, layout.chunk_bytes + _CRC
        offset += layout.chunk_bytes + _CRC
    content = _content(b"".join(parts[1::2]))
    body = index.tobytes()
    parts += [body, crc32c(body).to_bytes(_CRC, "little")]
    crc = 0
    for part in parts:
        crc = crc32c(part, crc)
    return EncodedShard(parts, crc, content)


def _content(crcs: bytes) -> str:
    """Stands for a shard's content: 16 hex digits over its chunks' checksums."""
    return hashlib.sha256(crcs).hexdigest()[:16]


class ArrayReader:
    """Rows of a stored array, checked as they are read.

    `record_of(name)` gives what is recorded of one of its objects, None when nothing is.
    """

    def __init__(self, objects: Objects, folder: str, layout: Layout, record_of: Callable[[str], FileRecord | None] | None = None):
        self._objects, self._folder, self.layout = objects, folder, layout
        self._record_of = record_of or (lambda name: None)
        self._indexes: dict[int, np.ndarray] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.layout.dtype)

    @property
    def attributes(self) -> dict[str, Any]:
        return self.layout.attributes

    @property
    def chunk_rows(self) -> int:
        return self.layout.chunk_rows

    @property
    def shard_rows(self) -> int:
        return self.layout.shard_rows

    @property
    def n_shards(self) -> int:
        return self.layout.n_shards

    def __len__(self) -> int:
        return self.shape[0]

    def rows_of(self, shard: int) -> int:
        return self.layout.rows_of(shard)

    def read_shard(self, shard: int) -> np.ndarray:
        """All rows of a shard, [rows_of(shard), …]. Raises DamagedError when the shard is missing, cut or changed."""
        start = shard * self.shard_rows
        return self.read_rows(start, start + self.layout.rows_of(shard))

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start … stop - 1, [stop - start, …]; reads the chunks they lie in, and checks each of them."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows {start}:{stop} of an array of {len(self)} rows")
        if start < stop and start // self.shard_rows == (stop - 1) // self.shard_rows:
            return self._read(start // self.shard_rows, start % self.shard_rows, (stop - 1) % self.shard_rows + 1)
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        row = start
        while row < stop:
            shard, begin = divmod(row, self.shard_rows)
            end = min(self.shard_rows, begin + stop - row)
            out[row - start : row - start + end - begin] = self._read(shard, begin, end)
            row += end - begin
        return out

    def _read(self, shard: int, start: int, stop: int) -> np.ndarray:
        rows, size = self.chunk_rows, self.layout.chunk_bytes
        first, last = start // rows, -(-stop // rows)
        index = self._index(shard)[first:last]
        if (index == _ABSENT).any():
            raise self._damaged(shard, "its index says that a chunk was never written")
        offsets, sizes = index[:, 0].astype(np.int64), index[:, 1].astype(np.int64)
        if (sizes != size + _CRC).any() or (np.diff(offsets) != size + _CRC).any():
            raise self._damaged(shard, "its chunks do not lie one after the other, as stagediff writes them")
        data = np.empty(((last - first) * rows, *self.shape[1:]), np.dtype(self.layout.dtype).newbyteorder("<"))
        payloads = data.reshape(last - first, -1).view(np.uint8)  # [chunks, bytes]
        crcs = np.empty((last - first, _CRC), np.uint8)
        buffers = [b.data for pair in zip(payloads, crcs, strict=True) for b in pair]
        self._read_into(shard, int(offsets[0]), buffers)
        for i, (payload, crc) in enumerate(zip(payloads, crcs, strict=True)):
            if crc32c(payload) != int.from_bytes(crc.tobytes(), "little"):
                raise self._damaged(shard, f"chunk {first + i} does not match its checksum")
        if stop - start == self.layout.rows_of(shard):
            recorded = self._record_of(self.layout.shard_name(shard))
            if recorded is not None and recorded.content not in (None, _content(crcs.tobytes())):
                raise self._damaged(shard, "it holds other rows than were written here (another shard's, or another run's)")
        return data[start - first * rows : stop - first * rows].astype(self.dtype, copy=False)

    def _index(self, shard: int) -> np.ndarray:
        """Offset and length of every chunk, uint64 [chunks, 2]."""
        index = self._indexes.get(shard)
        if index is None:
            expected = self.layout.shard_bytes(shard)
            recorded = self._record_of(self.layout.shard_name(shard))
            if recorded is not None and recorded.bytes != expected:
                raise self._damaged(shard, f"the manifest records {recorded.bytes:,} bytes where the array's shape needs {expected:,}")
            body = np.empty(self.layout.index_bytes, np.uint8)
            self._read_into(shard, expected - len(body), [body.data])
            if crc32c(body[:-_CRC]) != int.from_bytes(body[-_CRC:].tobytes(), "little"):
                raise self._damaged(shard, "its index does not match its checksum")
            index = body[:-_CRC].view("<u8").reshape(-1, 2)
            kept = list(self._indexes.items())[1 - _INDEXES_KEPT :]
            self._indexes = dict([*kept, (shard, index)])  # replaced, not changed: several threads may read
        return index

    def _read_into(self, shard: int, offset: int, buffers: list[memoryview]) -> None:
        try:
            self._objects.read_into(f"{self._folder}/{self.layout.shard_name(shard)}", offset, buffers)
        except FileNotFoundError:
            raise self._damaged(shard, "it is missing") from None
        except EOFError as error:
            raise self._damaged(shard, f"it is shorter than the {self.layout.shard_bytes(shard):,} bytes it must have") from error

    def _damaged(self, shard: int, what: str) -> DamagedError:
        place = self._objects.describe(f"{self._folder}/{self.layout.shard_name(shard)}")
        return DamagedError(
            f"Shard {shard} of {self.n_shards} ({place}) is damaged: {what}. "
            "`stagediff verify` lists all damage; computing this step again (--force) heals it."
        )


def check_shard(objects: Objects, folder: str, layout: Layout, shard: int) -> FileRecord | None:
    """Reads a shard that has no receipt. What its receipt should say (path relative to the array) when it is whole; None when it is missing or torn."""
    name = layout.shard_name(shard)
    size = layout.shard_bytes(shard)
    if objects.size(f"{folder}/{name}") != size:
        return None
    try:
        encoded = encode_shard(layout, shard, ArrayReader(objects, folder, layout).read_shard(shard))
    except DamagedError:
        return None
    stored = np.empty(size, np.uint8)
    objects.read_into(f"{folder}/{name}", 0, [stored.data])
    if encoded.crc != crc32c(stored):  # its index places the chunks elsewhere
        return None
    return FileRecord(path=name, bytes=size, crc32c=crc_hex(encoded.crc), content=encoded.content)
