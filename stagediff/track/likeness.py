"""How alike the examples of a feature are, in a space that does not move: the mean cosine over pairs of examples with different tokens.

Residual streams are anisotropic: their vectors share a large mean, which alone makes any two of them alike (Ethayarajh 2019, arXiv 1909.00512). So the
mean over the probe positions is subtracted before cosines are taken; random positions then have a likeness near 0. What is left of the anisotropy (few
directions with most of the variance) widens the random sets' likeness, with which every feature is compared.

Of unit vectors u_e with tokens g(e), all pairs less those of one token are

    sum_{g(e) != g(f)} u_e . u_f = |sum_e u_e|^2 - sum_g |sum_{g(e) = g} u_e|^2,

over n^2 - sum_g n_g^2 ordered pairs. So only sums of vectors are kept: one per set and token with several examples, and one per set for the examples
that are alone with their token. Reference vectors stream by shard by shard and are added where they belong, for as many sets at once as fit into
BUDGET_BYTES. All of it runs on the CPU, where the order of additions is fixed.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stagediff.errors import UserError

if TYPE_CHECKING:
    from stagediff.lm.activations import ActivationReader
    from stagediff.progress import Progress

__all__ = ["PairLikeness", "ReferenceSpace"]

BUDGET_BYTES = 512 << 20
ENTRY_BYTES = 64
"""What one waiting example takes, sorted copies included."""
BLOCK = 8192
"""Vectors worked on at once."""


class ReferenceSpace:
    """Centred unit vectors of probe positions, read shard by shard. Positions are flat: (row, kept position) in order, 0 … n - 1."""

    def __init__(self, reader: "ActivationReader", progress: "Progress"):
        """Takes the mean over all positions in one pass. Raises UserError where vectors are not finite."""
        self.reader, self.progress = reader, progress
        self.d, self.n = reader.d, reader.n_tokens
        total = torch.zeros(self.d, dtype=torch.float64)
        with progress.task("reference mean", self.n, "tokens") as task:
            for i in range(reader.n_shards):
                for block in reader.read_shard(i).split(BLOCK):
                    total += block.double().sum(0)
                    task.advance(len(block))
        if not torch.isfinite(total).all():
            raise UserError(f"The reference activations {reader.data.base} hold NaN or infinity. Harvest them in fp32.")
        self.mean = total / self.n

    def unit_vectors(self, at: np.ndarray) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, vectors [stop - start, d] fp32) for successive parts of the flat positions `at` (ascending, distinct).

        Reads the shards that hold some of them, once. A vector that equals the mean has no direction and stays zero.
        """
        mean, end = self.mean.float(), 0
        with self.progress.task("likeness", len(at), "positions") as task:
            for i in range(self.reader.n_shards):
                begin = end
                end += self.reader.shard_tokens(i)
                first, last = np.searchsorted(at, [begin, end]).tolist()
                if first == last:
                    continue
                x = self.reader.read_shard(i)
                for start in range(first, last, BLOCK):
                    stop = min(start + BLOCK, last)
                    yield start, stop, functional.normalize(x[torch.from_numpy(at[start:stop] - begin)].float() - mean)
                    task.advance(stop - start)


class PairLikeness:
    """Likeness of sets of probe positions, given in any number of `add` calls. `finish` returns one number per set, in their order."""

    def __init__(self, space: ReferenceSpace, budget_bytes: int = BUDGET_BYTES):
        self.space, self.budget = space, budget_bytes
        self._done: list[np.ndarray] = []
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        self._sets, self._bytes = 0, 0

    def add(self, set_: np.ndarray, at: np.ndarray, token: np.ndarray, n_sets: int) -> None:
        """One entry per example: its set (0 … n_sets - 1 of this call; a set may have none), its flat position, its token's code."""
        order = np.lexsort((token, set_))
        set_, at, token = set_[order], at[order], token[order]
        cell = np.cumsum(_changes(set_, token)) - 1
        alone = np.bincount(cell)[cell] == 1 if len(cell) else np.empty(0, bool)
        order = np.lexsort((cell, alone, set_))  # what is alone comes last in its set, and shares a slot
        set_, at, alone, cell = set_[order], at[order], alone[order], np.where(alone, -1, cell)[order]
        opens = _changes(set_, cell)
        examples = np.bincount(set_, minlength=n_sets)
        cost = np.cumsum(np.bincount(set_[opens], minlength=n_sets) * (self.space.d * 4) + examples * ENTRY_BYTES)
        ends = np.cumsum(examples)
        first = 0
        while first < n_sets:
            spent, begin = (int(cost[first - 1]), int(ends[first - 1])) if first else (0, 0)
            last = int(np.searchsorted(cost, spent + self.budget - self._bytes, side="right"))
            if last <= first and self._sets:
                self._flush()
                continue
            last = max(last, first + 1)
            part = slice(begin, int(ends[last - 1]))
            self._waiting.append((set_[part] + (self._sets - first), at[part], opens[part], alone[part]))
            self._bytes += int(cost[last - 1]) - spent
            self._sets += last - first
            first = last

    def finish(self) -> np.ndarray:
        """[sets] float64; NaN for a set without two different tokens."""
        self._flush()
        return np.concatenate(self._done) if self._done else np.empty(0)

    def _flush(self) -> None:
        if self._waiting:
            set_, at, opens, alone = (np.concatenate(column) for column in zip(*self._waiting, strict=True))
            self._waiting, n_sets = [], self._sets
            self._sets, self._bytes = 0, 0
            self._done.append(self._likeness(set_, at, opens, alone, n_sets))

    def _likeness(self, set_: np.ndarray, at: np.ndarray, opens: np.ndarray, alone: np.ndarray, n_sets: int) -> np.ndarray:
        """Entries are ordered by set and slot. `opens` marks the first of a slot, `alone` the examples of a slot whose tokens all differ."""
        slot, starts = np.cumsum(opens) - 1, np.flatnonzero(opens)
        sums, squares = self._sums(at, slot, len(starts))
        owner, is_single, size = set_[starts], alone[starts], np.bincount(slot, minlength=len(starts))
        whole, same = np.zeros(n_sets), np.zeros(n_sets)
        for first in range(0, n_sets, BLOCK):
            low, high = np.searchsorted(owner, [first, first + BLOCK])
            if low == high:
                continue
            rows, of = sums[low:high].double().numpy(), owner[low:high]
            begins = np.flatnonzero(_changes(of))
            whole[of[begins]] = np.square(np.add.reduceat(rows, begins)).sum(1)
            one_token = np.where(is_single[low:high], squares[low:high], np.square(rows).sum(1))
            same[of[begins]] = np.add.reduceat(one_token, begins)
        pairs = np.bincount(set_, minlength=n_sets) ** 2 - np.bincount(owner, np.where(is_single, size, size**2), n_sets)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(pairs > 0, (whole - same) / pairs, np.nan)

    def _sums(self, at: np.ndarray, slot: np.ndarray, n_slots: int) -> tuple[Tensor, np.ndarray]:
        """Sum of each slot's unit vectors [n_slots, d] fp32, and of their squared lengths [n_slots] (1 each, 0 for a vector at the mean)."""
        sums, squares = torch.zeros(n_slots, self.space.d), np.zeros(n_slots)
        order = np.lexsort((slot, at))
        wanted, entry = np.unique(at[order], return_inverse=True)
        slot = slot[order]
        for start, stop, unit in self.space.unit_vectors(wanted):
            has_direction = unit.any(1).numpy()
            low, high = np.searchsorted(entry, [start, stop])
            for piece in range(low, high, 2 * BLOCK):
                part = slice(piece, min(piece + 2 * BLOCK, high))
                by_slot = np.argsort(slot[part], kind="stable")
                into, local = slot[part][by_slot], entry[part][by_slot] - start
                bags = np.flatnonzero(_changes(into))
                added = functional.embedding_bag(torch.from_numpy(local), unit, torch.from_numpy(bags), mode="sum")
                sums.index_add_(0, torch.from_numpy(into[bags]), added)
                squares += np.bincount(into, has_direction[local], n_slots)
        return sums, squares


def _changes(*columns: np.ndarray) -> np.ndarray:
    """[n] bool: where an entry differs from the one before in any column; the first one does."""
    differs = np.ones(len(columns[0]), bool)
    if len(differs):
        differs[1:] = np.logical_or.reduce([c[1:] != c[:-1] for c in columns])
    return differs
