"""The sparse step's parts on a CPU, compiled by numba for the processor at hand (AVX-512, AVX2, or whatever it has).

Threads are plain ones that take blocks of rows from a common list, as many as torch uses: compiled code runs without Python's lock. What a block holds does
not depend on how many threads there are, and neither does any sum.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagediff.sae.sparse import cpu_gradients, cpu_select, cpu_update
from stagediff.sae.sparse.kernels import Decoded, Extra, Rows, Update
from stagediff.sae.sparse.pairs import ByFeature, Pairs
from stagediff.sae.sparse.weights import MATRICES, Weights

__all__ = ["NumbaKernels"]


class NumbaKernels:
    """Kernels of one training. Raises whatever numba raises where it cannot compile. Weight gradients are valid until the next ones are taken."""

    name = "numba"

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._kept: dict[str, Tensor] = {}
        self.largest(torch.ones(1, 8), 2)  # where something is missing, this says so

    def largest(self, pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
        n, F = pre.shape
        feature, value = torch.empty(n, k, dtype=torch.int32), torch.empty(n, k)
        size, groups = cpu_select.grouped(F, k)
        self._spread(cpu_select.largest, n, 16, _patterns(pre), k, size, groups, feature.numpy(), value.numpy())
        return feature, value

    def largest_of_all(self, pre: Tensor, count: int) -> tuple[Pairs, Tensor]:
        n, F = pre.shape
        patterns = _patterns(pre)
        size, groups = cpu_select.grouped(F, -(-count // n))
        best = np.empty((n, groups), patterns.dtype)
        self._spread(cpu_select.maxima, n, 16, patterns, size, best)
        least = np.maximum(_kth_largest(best.ravel(), count), 1)
        start = np.zeros(n + 1, np.int64)
        self._spread(cpu_select.counted, n, 16, patterns, size, best, least, start[1:])
        start = np.cumsum(start)
        keys, where = np.empty(start[-1], patterns.dtype), np.empty(start[-1], np.int32)
        self._spread(cpu_select.gathered, n, 16, patterns, size, best, least, start, keys, where)
        if len(keys) > count:
            least = _kth_largest(keys, count)
        left = count - int((keys > least).sum())
        feature, token = (torch.empty(count, dtype=torch.int32) for _ in range(2))
        value, out_start = torch.empty(count), torch.empty(n + 1, dtype=torch.int32)
        cpu_select.chosen_of_all(keys, where, start, least, left, F, *(t.numpy() for t in (feature, value, token, out_start)))
        return Pairs(feature, value, token, out_start), value.min()

    def above(self, pre: Tensor, floor: Tensor, most: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        n = len(pre)
        patterns, counts = _patterns(pre), torch.empty(n, dtype=torch.int32)
        self._spread(cpu_select.counted_above, n, 64, patterns, floor.numpy(), counts.numpy())
        start = np.zeros(n + 1, np.int64)
        np.cumsum(counts.numpy(), out=start[1:])
        if start[-1] > most:
            return counts, None, None
        feature, value = torch.empty(int(start[-1]), dtype=torch.int32), torch.empty(int(start[-1]))
        self._spread(cpu_select.gathered_above, n, 64, patterns, floor.numpy(), start, feature.numpy(), value.numpy())
        return counts, feature, value

    def decode(self, weights: Weights, pairs: Pairs, x: Tensor) -> Decoded:
        n, d = x.shape
        error, scaled, squares = torch.empty_like(x), torch.empty_like(x, dtype=weights.compute), torch.empty(n)
        g = torch.zeros_like(pairs.value)
        parts = -(-n // cpu_gradients.TOKENS_PER_SUM)
        sums = torch.empty(parts, d)
        self._spread(
            cpu_gradients.decoded,
            parts,
            1,
            *_arrays(pairs.feature, pairs.value, pairs.start, weights.copy_of("W_dec"), weights.rows["b_dec"], x),
            np.float32(2 / n),
            *_arrays(error, scaled, squares, sums, g),
        )
        return Decoded(error, scaled, squares, _summed(sums), g)

    def by_feature(self, pairs: Pairs, features: int) -> ByFeature:
        order, start = torch.empty_like(pairs.feature), torch.empty(features + 1, dtype=torch.int32)
        cpu_gradients.sorted_pairs(pairs.feature.numpy(), features, order.numpy(), start.numpy())
        return ByFeature(order, start)

    def gradients(
        self, weights: Weights, pairs: Pairs, sorted_pairs: ByFeature, decoded: Decoded, inner: Tensor, extra: Extra | None, unit: bool
    ) -> Rows:
        W_enc, W_dec = weights.rows["W_enc"], weights.rows["W_dec"]
        F, d = W_dec.shape
        by_feature = torch.empty_like(pairs.token), torch.empty_like(pairs.value), torch.empty_like(decoded.g)
        self._spread(
            cpu_gradients.gathered,
            len(pairs.token),
            1 << 14,
            *_arrays(sorted_pairs.order, pairs.token, pairs.value, decoded.g, *by_feature),
        )
        slot = torch.full((F,), -1, dtype=torch.int32)
        if extra is None:
            extra = Extra(slot, W_enc[:0], W_dec[:0], W_enc[:0, 0])
        else:
            slot[extra.features] = torch.arange(len(extra.features), dtype=torch.int32)
        parts = -(-F // cpu_gradients.FEATURES_PER_SUM)
        # Mapped anew for every step, these would cost as much as their sums: every page is zeroed first.
        enc, dec = (self._buffer(name, F, d) for name in MATRICES)
        b_enc, squares, sums = torch.empty(F), torch.empty(F, dtype=torch.float64), torch.empty(parts, d)
        read = (sorted_pairs.start, *by_feature, decoded.scaled, inner, W_enc, W_dec)
        self._spread(
            cpu_gradients.gradients,
            parts,
            1,
            *_arrays(*read),
            unit,
            *_arrays(slot, extra.W_enc, extra.W_dec, extra.b_enc, enc, dec, b_enc, squares, sums),
        )
        return Rows(enc, dec, b_enc, _summed(squares), _summed(sums))

    def update(self, weights: Weights, gradients: dict[str, Tensor], factor: Tensor | None, update: Update) -> None:
        step, (beta1, beta2) = update.step, update.betas
        scale = 1.0 if factor is None else float(factor)
        numbers = tuple(
            map(
                np.float32,
                (
                    scale,
                    update.lr / (1 - beta1**step),
                    1 / math.sqrt(1 - beta2**step),
                    1 - beta1,
                    beta2,
                    1 - beta2,
                    update.eps,
                    update.pull,
                ),
            )
        )
        for name, rows in weights.rows.items():
            home = update.home.get(name, rows[:0])
            state = _arrays(rows, gradients[name], weights.first[name], weights.second[name], home)
            if name in MATRICES:
                copy = weights.copy_of(name)
                (copies,) = _arrays(copy if copy.data_ptr() != rows.data_ptr() else rows[:0])
                self._spread(cpu_update.rows, len(rows), 64, *state, copies, numbers, update.unit and name == "W_dec")
            else:
                cpu_update.vector(0, len(rows), *state, numbers)

    def _buffer(self, name: str, *shape: int) -> Tensor:
        """Memory that is kept from step to step."""
        if name not in self._kept or self._kept[name].shape != shape:
            self._kept[name] = torch.empty(*shape)
        return self._kept[name]

    def _spread(self, kernel: Callable[..., Any], n: int, block: int, *args: Any) -> None:
        """kernel(first, last, *args) over the blocks of range(n), by as many threads as torch uses."""
        starts = iter(range(0, n, block))

        def work() -> None:
            for first in starts:  # a range's iterator gives every start to one thread
                kernel(first, min(first + block, n), *args)

        others = min(torch.get_num_threads(), -(-n // block)) - 1
        if others > 0 and self._pool is None:
            self._pool = ThreadPoolExecutor(thread_name_prefix="sparse")
        waiting = [self._pool.submit(work) for _ in range(others)] if self._pool is not None else []
        work()
        for future in waiting:
            if not future.cancel():  # on a busy machine it may not have begun, and there is nothing left to do
                future.result()


def _kth_largest(keys: np.ndarray, k: int) -> np.ndarray:
    """In an array of one."""
    return np.partition(keys, len(keys) - k)[len(keys) - k :][:1]


def _summed(values: Tensor) -> Tensor:
    """The sum over the first dimension, in an order that threads do not change."""
    return torch.from_numpy(np.asarray(values.numpy().sum(0, dtype=np.float64), np.float32))


def _patterns(values: Tensor) -> np.ndarray:
    return values.view(torch.int16 if values.dtype == torch.bfloat16 else torch.int32).numpy()


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    """bf16 as its patterns."""
    return [(t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy() for t in tensors]
