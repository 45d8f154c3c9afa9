"""The decoders of a chain of dictionaries, a block of features at a time: every point's rows of the same features side by side.

Rows are read straight from the weights files in slices, so that 30 dictionaries cost the memory of one block, and each byte is read once.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from stagediff.errors import UserError
from stagediff.sae.layout import WEIGHTS

if TYPE_CHECKING:
    from stagediff.spec import Ref
    from stagediff.steps import Job

__all__ = ["ChainDecoders"]

BLOCK_BYTES = 64 << 20
"""Decoder rows held at once, in float64; a computation on them holds a few times as much."""


class ChainDecoders:
    """W_dec of several dictionaries of one shape; `features` and `d` are theirs, `len()` is their number."""

    def __init__(self, job: "Job", dictionaries: Sequence["Ref"]):
        """Raises UserError where the dictionaries differ in shape: their indices would not mean the same feature."""
        self._paths = [job.artifact(ref).local(WEIGHTS) for ref in dictionaries]
        shapes = [_shape(path) for path in self._paths]
        for ref, shape in zip(dictionaries, shapes, strict=True):
            if shape != shapes[0]:
                raise UserError(
                    f"The dictionaries of a chain must have one shape (features x width), but {dictionaries[0]} is {shapes[0][0]} x {shapes[0][1]} and "
                    f"{ref} is {shape[0]} x {shape[1]}. Each has to be finetuned from the one before."
                )
        self.features, self.d = shapes[0]

    def __len__(self) -> int:
        return len(self._paths)

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, rows [stop - start, dictionaries, d] float64) over all features, in order; at least one feature at a time."""
        size = max(1, block_bytes // (len(self) * self.d * 8))
        for start in range(0, self.features, size):
            stop = min(start + size, self.features)
            rows = torch.empty(stop - start, len(self), self.d, dtype=torch.float64)
            for i, path in enumerate(self._paths):
                with safe_open(path, "pt") as file:
                    rows[:, i] = file.get_slice("W_dec")[start:stop]
            yield start, stop, rows


def _shape(path: Path) -> tuple[int, int]:
    with safe_open(path, "pt") as file:
        features, d = file.get_slice("W_dec").get_shape()
    return features, d
