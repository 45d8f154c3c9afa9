"""The order in which activations are read: shards in a seeded permutation, shuffled in memory over a window of a few shards.

Whole shards are read, never single rows (a random 4,096-row batch from storage is 20 to 100 times slower). Every epoch permutes the
shards anew; consecutive shards form windows of at most WINDOW_TOKENS tokens, and every window is permuted token by token. The order is a
function of (order seed, shard sizes, batch) alone: two data sets with the same layout yield the same positions in the same order, which is
what pairs the stages D, M and F; and the batch of any step can be found without reading what came before, so that a resumed training goes
on exactly where it was. Memory: the window in use and the next one, which a thread reads ahead.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stagediff.errors import UserError

__all__ = ["WINDOW_TOKENS", "Activations", "Order", "Window", "batches", "shard_sizes"]

WINDOW_TOKENS = 1 << 18
"""Tokens shuffled together. In bf16 at d = 1,024: 0.5 GiB a window. One larger shard is a window of its own."""


class Activations(Protocol):
    """What is read: `stagediff.lm.activations.ActivationReader`."""

    @property
    def d(self) -> int: ...

    @property
    def n_tokens(self) -> int: ...

    @property
    def n_shards(self) -> int: ...

    def shard_tokens(self, i: int) -> int: ...

    def read_shard(self, i: int) -> Tensor: ...


@dataclass(frozen=True)
class Window:
    """Consecutive shards of one epoch's permutation."""

    epoch: int
    index: int
    shards: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class Order:
    """The stream of all tokens, epoch after epoch."""

    seed: int
    sizes: tuple[int, ...]
    """Tokens of each shard."""
    window_tokens: int = WINDOW_TOKENS

    def windows(self, epoch: int) -> list[Window]:
        """The windows of an epoch, in order."""
        groups: list[list[int]] = []
        tokens: list[int] = []
        for shard in _permutation(len(self.sizes), self.seed, epoch).tolist():
            if not groups or tokens[-1] + self.sizes[shard] > self.window_tokens:
                groups.append([])
                tokens.append(0)
            groups[-1].append(shard)
            tokens[-1] += self.sizes[shard]
        return [Window(epoch, i, tuple(g), n) for i, (g, n) in enumerate(zip(groups, tokens, strict=True))]

    def permutation(self, window: Window) -> Tensor:
        """The order [tokens] in which a window's tokens (its shards laid end to end) are read."""
        return _permutation(window.tokens, self.seed, window.epoch, window.index)

    def from_position(self, position: int) -> Iterator[tuple[Window, int]]:
        """Windows from a token position of the endless stream on, each with the offset at which its reading starts."""
        epoch, offset = divmod(position, sum(self.sizes))
        while True:
            for window in self.windows(epoch):
                if offset < window.tokens:
                    yield window, offset
                offset = max(0, offset - window.tokens)
            epoch += 1


def batches(data: Activations, order: Order, batch: int, first: int = 0, stop: int | None = None, device: str = "cpu") -> Iterator[Tensor]:
    """The batches [batch, d] (bf16, raw units, on `device`) of steps `first` to `stop` (None: without end).

    Raises UserError when the data holds NaN or infinite values.
    """
    count = None if stop is None else stop - first
    needed = _needed(order, first * batch, None if count is None else count * batch)
    parts: list[Tensor] = []
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:

        def read_ahead() -> tuple[Future[tuple[Tensor, Tensor]], int] | None:
            following = next(needed, None)
            return following and (pool.submit(_load, data, order, following[0], device), following[1])

        coming = read_ahead()
        while coming:
            values, permutation = coming[0].result()
            offset = coming[1]
            coming = read_ahead()
            while offset < len(permutation):
                take = permutation[offset : offset + batch - sum(map(len, parts))]
                parts.append(values.index_select(0, take))
                offset += len(take)
                if sum(map(len, parts)) == batch:
                    if count == 0:
                        return
                    count = None if count is None else count - 1
                    yield parts[0] if len(parts) == 1 else torch.cat(parts)
                    parts = []


def shard_sizes(data: Activations) -> tuple[int, ...]:
    """Tokens of each shard."""
    return tuple(data.shard_tokens(i) for i in range(data.n_shards))


def _needed(order: Order, position: int, tokens: int | None) -> Iterator[tuple[Window, int]]:
    """The windows that hold the stream's next `tokens` tokens, each with the offset at which its reading starts."""
    for window, offset in order.from_position(position):
        if tokens is not None and tokens <= 0:
            return
        yield window, offset
        if tokens is not None:
            tokens -= window.tokens - offset


def _load(data: Activations, order: Order, window: Window, device: str) -> tuple[Tensor, Tensor]:
    """A window's tokens [tokens, d] and their order, on `device`."""
    values = torch.empty(window.tokens, data.d, dtype=torch.bfloat16)
    at = 0
    for i in window.shards:
        shard = data.read_shard(i)
        if len(shard) != order.sizes[i]:
            raise RuntimeError(f"shard {i} holds {len(shard)} tokens, its layout says {order.sizes[i]}")
        if not torch.isfinite(shard).all():
            bad = int((~torch.isfinite(shard)).any(1).nonzero()[0])
            raise UserError(
                f"The activations hold NaN or infinite values (shard {i}, token {bad} of it). Finite ones were expected: the model yields "
                "NaN or overflows there. Harvest in fp32, leave out the positions with massive norms (skip_positions), or check the model."
            )
        values[at : at + len(shard)] = shard
        at += len(shard)
    return values.to(device), order.permutation(window).to(device)


def _permutation(n: int, *seeds: int) -> Tensor:
    """A permutation of range(n) that depends on the seeds alone."""
    digest = hashlib.sha256("/".join(map(str, seeds)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(n, generator=generator)
