"""Activations that are not stored: the array of a harvest, made from the model as it is read.

For runs whose activations no disk holds (`harvest: stored: false`), and for those that were evicted. A training reads shard after shard ahead of itself, so
the model runs while the dictionary trains; nothing is written, so there is nothing to lose, and a training that is continued makes only what it has not
seen. Every value has the bits that the stored one would have (on the same numerics class): the same rows go through the model together. The price is the
model's pass each time that something is read. Memory: the model up to the hook point, one shard.
"""

import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stagediff.lm import sources
from stagediff.lm.harvest import vectors
from stagediff.lm.models import LoadedModel, load_model
from stagediff.lm.spec import HarvestSpec

if TYPE_CHECKING:
    from stagediff.store import Store

__all__ = ["StreamedArray"]

log = logging.getLogger("stagediff")


class StreamedArray:
    """The interface of `store.shards.ArrayReader` over what `spec` would harvest; `kept` are the positions of a row that count."""

    def __init__(self, store: "Store", spec: HarvestSpec, kept: np.ndarray, device: str):
        self._store, self.spec, self._kept, self._device = store, spec, kept, device
        self._rows = store.artifact(spec.tokens).require().array("rows")
        config = sources.model_config(spec.model, store)
        assert config is not None
        self.shape = (spec.rows * len(kept), sources.width(config))
        self._loaded: LoadedModel | None = None

    def read_shard(self, shard: int) -> np.ndarray:
        """A shard's activations, bf16 patterns (uint16) [tokens, d]."""
        t, rows = len(self._kept), self.spec.shard_rows
        return self.read_rows(shard * rows * t, min((shard + 1) * rows, self.spec.rows) * t)

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Activations `start` to `stop`: of the batches of token rows that hold them."""
        t, size = len(self._kept), self.spec.batch_rows
        first = start // t // size * size
        last = min(math.ceil(stop / t / size) * size, self.spec.rows)
        ids = self._rows.read_rows(first, last)
        out = torch.empty(len(ids) * t, self.shape[1], dtype=torch.bfloat16)
        vectors(self._model(), self.spec, ids, first, self._kept, out)
        patterns: Any = out.view(torch.uint16).numpy()
        return patterns[start - first * t : stop - first * t]

    def _model(self) -> LoadedModel:
        if self._loaded is None:
            log.info("%s is not stored: the model runs as it is read", self.spec.ref)
            self._loaded = load_model(self.spec.model, self._store, precision=self.spec.precision, device=self._device, upto=self.spec.hook)
        return self._loaded
