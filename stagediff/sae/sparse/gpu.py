"""The sparse step's parts on CUDA, by Triton. Nothing waits for the device."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from stagediff.sae.sparse import gpu_gradients, gpu_select, gpu_update
from stagediff.sae.sparse.kernels import Decoded, Extra, Rows, Update
from stagediff.sae.sparse.pairs import ByFeature, Pairs
from stagediff.sae.sparse.reference import largest_of_all
from stagediff.sae.sparse.weights import Weights

__all__ = ["TritonKernels"]

SHORT = 1 << 16
"""So many values has the type in which features are sorted where they fit: half the radix passes."""


class TritonKernels:
    """Kernels for one device. Raises whatever Triton raises where it cannot compile for it."""

    name = "triton"

    def __init__(self, device: torch.device):
        self._device = device
        self.largest(torch.ones(1, 64, device=device), 2)  # where a compiler is missing, this says so

    def largest(self, pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
        with self._here():
            return gpu_select.largest(pre, k)

    def largest_of_all(self, pre: Tensor, count: int) -> tuple[Pairs, Tensor]:
        with self._here():
            return largest_of_all(pre, count, gpu_select.group_maxima)

    def decode(self, weights: Weights, pairs: Pairs, x: Tensor) -> Decoded:
        with self._here():
            return gpu_gradients.decode(weights, pairs, x)

    def by_feature(self, pairs: Pairs, features: int) -> ByFeature:
        low = SHORT // 2 if features < SHORT else 0
        keys = (pairs.feature - low).short() if low else pairs.feature
        keys, order = torch.sort(keys, stable=True)
        bounds = torch.arange(-low, features + 1 - low, device=keys.device, dtype=keys.dtype)
        return ByFeature(order.int(), torch.searchsorted(keys, bounds, out_int32=True))

    def gradients(
        self, weights: Weights, pairs: Pairs, sorted_pairs: ByFeature, decoded: Decoded, inner: Tensor, extra: Extra | None, unit: bool
    ) -> Rows:
        with self._here():
            return gpu_gradients.gradients(weights, pairs, sorted_pairs, decoded, inner, extra, unit)

    def update(self, weights: Weights, gradients: dict[str, Tensor], factor: Tensor | None, update: Update) -> None:
        with self._here():
            gpu_update.update(weights, gradients, factor, update)

    def _here(self) -> AbstractContextManager[object]:
        """Triton launches on the current device."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" and self._device.index is not None else nullcontext()
