"""Training checkpoints: everything a killed training needs to go on bit by bit where it stopped.

One safetensors object each, its step and crc32c in its name (`_work/training/000001000-89abcdef.safetensors`), the meta as JSON in its header.
A checkpoint is thus one atomic object; the older one goes after the newer is in, and all of them go when the artifact is committed. A newest
checkpoint that is damaged is reported and the one before it, if it is still there, is used.
"""

import json
import logging
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagediff.errors import UserError
from stagediff.store.checksum import crc_hex, file_crc32c
from stagediff.store.names import TRAINING
from stagediff.store.objects import Objects

if TYPE_CHECKING:
    import torch

__all__ = ["TrainingCheckpoints"]

log = logging.getLogger("stagediff")

_NAME = re.compile(r"^(\d{9,})-([0-9a-f]{8})\.safetensors$")
_META = "meta"


class TrainingCheckpoints:
    """The training checkpoints of one artifact. `lock()` is called before anything is read or written: one trainer at a time."""

    def __init__(self, objects: Objects, artifact: str, lock: Callable[[], None]):
        self._objects, self._lock = objects, lock
        self._folder = f"{artifact}/{TRAINING}"

    def save(self, step: int, tensors: Mapping[str, "torch.Tensor"], meta: Mapping[str, Any]) -> None:
        """Keeps this state as the newest.

        Parameters
        ----------
        step
            Where the training stands; counts up.
        tensors
            By name; any shapes and dtypes, on any device.
        meta
            Anything JSON can say (data position, schedule, generator states as lists).
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        self._lock()
        header = {_META: json.dumps(dict(meta))}  # one entry only: safetensors writes several in random order
        plain = _separate(tensors)

        def make(path: Path) -> str:
            try:
                save_file(plain, path, metadata=header)
            except SafetensorError as error:
                raise UserError(
                    f"A training checkpoint could not be written below {path.parent}: {error}. "
                    "Free some space and run again: it continues from the checkpoint before."
                ) from error
            return f"{step:09d}-{crc_hex(file_crc32c(path))}.safetensors"

        key = self._objects.put_made(self._folder, make)
        for name in self._objects.entries(self._folder):
            if f"{self._folder}/{name}" != key:
                self._objects.delete(f"{self._folder}/{name}")

    def latest(self) -> "tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None":
        """Step, tensors (CPU) and meta of the newest undamaged checkpoint; None when there is none."""
        self._lock()
        found = [m for m in map(_NAME.match, self._objects.entries(self._folder)) if m]
        for match in sorted(found, key=lambda m: int(m[1]), reverse=True):
            state = self._read(match[0], match[2])
            if state is not None:
                return int(match[1]), *state
        return None

    def _read(self, name: str, crc: str) -> "tuple[dict[str, torch.Tensor], dict[str, Any]] | None":
        from safetensors import safe_open

        key = f"{self._folder}/{name}"
        with tempfile.TemporaryDirectory(prefix="stagediff-") as folder:
            path = self._objects.local_path(key)
            if path is None:
                path = Path(folder) / name
                self._objects.download(key, path)
            if crc_hex(file_crc32c(path)) != crc:
                log.warning(
                    "The training checkpoint %s is damaged and was removed; the training continues from an earlier state.",
                    self._objects.describe(key),
                )
                self._objects.delete(key)
                return None
            with safe_open(path, "pt") as file:
                # Copies: safetensors maps the file, which is gone once a newer checkpoint is in.
                return {n: file.get_tensor(n).clone() for n in file.keys()}, json.loads(file.metadata()[_META])  # noqa: SIM118


def _separate(tensors: Mapping[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """Contiguous tensors that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous()
        storage = plain.untyped_storage().data_ptr()
        if storage and storage in seen:
            plain = plain.clone()
        seen.add(storage)
        out[name] = plain
    return out
