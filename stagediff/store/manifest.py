"""The manifest of an artifact: written last, and the only proof that the artifact is whole."""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from stagediff.errors import DamagedError
from stagediff.spec import Ref, canonical_json
from stagediff.store.checksum import crc32c, crc_hex

__all__ = ["FileRecord", "Manifest", "WriterRecord", "plain"]


class FileRecord(BaseModel):
    """One stored file."""

    model_config = ConfigDict(frozen=True)

    path: str
    bytes: int
    crc32c: str
    content: str | None = None
    """Array shards only: stands for their rows, which crc32c cannot (see `stagediff.store.shards`)."""
    evicted: bool = False
    """Dropped on purpose; can be computed again."""


class WriterRecord(BaseModel):
    """One process that worked on the artifact, killed ones included."""

    host: str
    pid: int
    started: float
    seconds: float
    """Until its end or last sign of life."""
    numerics: dict[str, Any] | None = None


class Manifest(BaseModel):
    """What `manifest.json` says."""

    format: int = 1
    key: str
    kind: str
    step: str
    spec: dict[str, Any]
    """All fields of the spec, those outside the key too."""
    files: list[FileRecord]
    upstream: list[str]
    figures: dict[str, Any] = Field(default_factory=dict)
    notes: dict[str, Any] = Field(default_factory=dict)
    """Timings and rates."""
    numerics: dict[str, Any] = Field(default_factory=dict)
    """See `stagediff.numerics`."""
    writers: list[WriterRecord] = Field(default_factory=list)
    """Several after a kill, or when shards were shared out; their numerics tell whether classes were mixed."""
    stagediff: str
    host: str
    created: str
    """UTC, ISO 8601."""
    seconds: float
    """Of all writers together."""
    same_bytes: bool | None = None
    """After a forced recomputation: whether the data files agree with those of the artifact it replaced."""
    forced: str | None = None
    """The mark under which it was computed anew (`steps.run`): who comes with the same one again need not."""
    inputs: str | None = None
    """Stands for the bytes that it was computed from (`Store.bytes_of`): whether they are still what its upstream holds."""
    evicted: bool = False

    @property
    def ref(self) -> Ref:
        return Ref(f"{self.kind}/{self.key}")

    @property
    def size(self) -> int:
        """Stored bytes, evicted files left out."""
        return sum(f.bytes for f in self.files if not f.evicted)

    def file(self, path: str) -> FileRecord | None:
        return next((f for f in self.files if f.path == path), None)

    def data(self) -> dict[str, tuple[int, str, str | None]]:
        """path -> (bytes, crc32c, content) of everything but the spec, whose fields outside the key may differ."""
        return {f.path: (f.bytes, f.crc32c, f.content) for f in self.files if f.path != "spec.json"}

    def to_bytes(self) -> bytes:
        """JSON with a checksum over itself, so that a flipped byte in the manifest is found too."""
        body = self.model_dump(mode="json")
        body["crc32c"] = _own_crc(body)
        return (json.dumps(body, indent=1, allow_nan=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, place: str) -> "Manifest":
        """Raises DamagedError when the bytes are not what `to_bytes` made."""
        try:
            body = json.loads(data)
            crc = body.pop("crc32c")
            if crc != _own_crc(body):
                raise ValueError("its checksum does not match")
            return cls.model_validate(body)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            what = str(error).splitlines()[0]
            raise DamagedError(
                f"The manifest {place} is damaged ({what}). Compute the step again with --force, or remove the folder it lies in."
            ) from error


def _own_crc(body: dict[str, Any]) -> str:
    return crc_hex(crc32c(canonical_json(body).encode()))


def plain(value: Any) -> Any:
    """The value as JSON can say it: numpy and torch scalars become numbers, tuples lists, paths text, and what is not a finite number null."""
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in (sorted(value) if isinstance(value, set) else value)]
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if value == value and abs(value) != float("inf") else None
    return str(value)
