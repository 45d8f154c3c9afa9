"""What a watched run has taken: one small file per checkpoint in the store, made once, with the digest of what was taken.

    <store>/_watch/<run>/<step>.json

It is what makes "each once, in order" hold over restarts and between machines: a checkpoint that turns up below one that was taken comes
too late for a chain, one that was deleted since stays part of it, and a model in a local folder that holds other weights than those taken is told
(to look at others again would cost a download, or a question to the hub, at every look).
"""

import hashlib
import json
import re

from stagediff.errors import DamagedError
from stagediff.store import Store
from stagediff.track.config import FoundCheckpoint

__all__ = ["Taken"]

FOLDER = "_watch"


class Taken:
    """The record of one run (a config's name) in one store."""

    def __init__(self, store: Store, run: str):
        self._objects = store.objects
        self.folder = f"{FOLDER}/{re.sub(r'[^A-Za-z0-9-]+', '-', run)[:40]}-{hashlib.sha256(run.encode()).hexdigest()[:8]}"

    def all(self) -> dict[int, FoundCheckpoint]:
        """Everything taken so far, by step, ascending."""
        names = self._objects.entries(self.folder)
        steps = sorted(int(name.removesuffix(".json")) for name in names if re.fullmatch(r"\d+\.json", name))
        return {step: self._read(step) for step in steps}

    def add(self, step: int, checkpoint: FoundCheckpoint) -> FoundCheckpoint:
        """Records it, unless another process was faster. Returns what is recorded."""
        self._objects.create(self._key(step), json.dumps(checkpoint.model_dump(), indent=1).encode())
        return self._read(step)

    def _key(self, step: int) -> str:
        return f"{self.folder}/{step}.json"

    def _read(self, step: int) -> FoundCheckpoint:
        body = self._objects.get(self._key(step))
        try:
            return FoundCheckpoint.model_validate_json(body)
        except ValueError as error:
            place = self._objects.describe(self._key(step))
            raise DamagedError(
                f"The record {place} of a checkpoint that was taken cannot be read. Delete it: the checkpoint is taken anew."
            ) from error
