"""Decoder directions of finished dictionaries, read block by block: no decoder is ever held whole.

Reads `sae_weights.safetensors` (SAELens' layout, W_dec [F, d]) directly, so that comparing six dictionaries of 262,144 features costs the memory of a
few thousand rows.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from stagediff.errors import UserError

if TYPE_CHECKING:
    from stagediff.store import Artifact

__all__ = ["Decoder", "aligned_blocks", "cosines", "nearest", "unit_rows"]

BLOCK = 8192


class Decoder:
    """The decoder of one dictionary artifact; `shape` is (F, d)."""

    def __init__(self, artifact: "Artifact"):
        self._path = artifact.local("sae_weights.safetensors")
        with safe_open(self._path, "pt") as file:
            self.shape: tuple[int, int] = tuple(file.get_slice("W_dec").get_shape())

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, [stop - start, d] float64."""
        with safe_open(self._path, "pt") as file:
            return file.get_slice("W_dec")[start:stop].double()

    def take(self, features: np.ndarray) -> Tensor:
        """Chosen rows, [n, d] float64; read in the file's blocks, so that memory is that of the result and one block."""
        out = torch.empty(len(features), self.shape[1], dtype=torch.float64)
        features = np.asarray(features, np.int64)
        for start in range(0, self.shape[0], BLOCK):
            here = np.flatnonzero((features >= start) & (features < start + BLOCK))
            if len(here):
                out[torch.from_numpy(here)] = self.rows(start, min(start + BLOCK, self.shape[0]))[torch.from_numpy(features[here] - start)]
        return out


def aligned_blocks(decoders: Mapping[str, Decoder], block: int = BLOCK) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """The same rows of all decoders, block by block: (start, stop, name -> [stop - start, d] float64).

    Raises UserError where the dictionaries have different shapes: their indices would not mean the same feature.
    """
    shapes = {name: d.shape for name, d in decoders.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {s[0]} x {s[1]}" for name, s in shapes.items())
        raise UserError(
            f"The dictionaries of a diff must have one shape (features x width), but they are: {listed}. Each has to be finetuned from the one before."
        )
    features = next(iter(shapes.values()))[0]
    for start in range(0, features, block):
        stop = min(start + block, features)
        yield start, stop, {name: d.rows(start, stop) for name, d in decoders.items()}


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each row of `a` with the same row of `b`, both [n, d] float64 -> [n]; NaN where a row is zero. In [-1, 1]."""
    return (unit_rows(a) * unit_rows(b)).sum(1).clamp(-1, 1)


def unit_rows(a: Tensor) -> Tensor:
    """Rows scaled to norm 1; NaN where a row is zero."""
    return a / a.norm(dim=1, keepdim=True)


def nearest(a: Tensor, b: Tensor, block: int = 2048) -> tuple[Tensor, Tensor]:
    """For each row of `a` [n, d] the row of `b` [m, d] with the largest cosine: (cosine [n], index [n]).

    Computed in n x m blocks; of equal cosines the smaller index wins.
    """
    a, b = unit_rows(a), unit_rows(b)
    best, index = torch.full((len(a),), -2.0, dtype=a.dtype), torch.zeros(len(a), dtype=torch.int64)
    for i in range(0, len(a), block):
        for j in range(0, len(b), block):
            value, at = (a[i : i + block] @ b[j : j + block].T).nan_to_num(-1.0).max(1)
            better = value > best[i : i + block]
            best[i : i + block] = torch.where(better, value, best[i : i + block])
            index[i : i + block] = torch.where(better, at + j, index[i : i + block])
    return best.clamp(-1, 1), index
