"""The null for likeness: random sets of probe positions, and how large a random set a feature's examples are to be compared with.

A feature's examples are rarely as many independent pieces of evidence as their number. Take one that fires on two unrelated tokens: 25 examples give up to
156 pairs with different tokens, but all of them compare the same two tokens, and the cosine of two single directions is often above 0.1 where few directions
have most of the variance. Against random sets of 25 positions it would pass for a concept. So pairs of examples with the same two tokens count as one pair:
with n_a examples of token a, the pairs' weights are w_ab = n_a n_b, their effective number is (sum w)^2 / sum w^2 (Kish), and the examples are compared with
random sets of the size s that has as many pairs, s (s - 1) / 2. Examples whose tokens are all different are compared with sets of as many positions; k tokens
of equally many examples with sets of k. This is on the safe side: the mean over several pairs of two tokens varies less than one of them.
"""

import numpy as np
import torch

from stagediff.errors import UserError
from stagediff.track.likeness import ReferenceSpace

__all__ = ["RandomSets", "set_sizes"]

SETS_AT_ONCE = 64
ROUNDS = 1000
"""Draws of a second position before it is given up that one with another token exists."""


def set_sizes(set_: np.ndarray, count: np.ndarray, n_sets: int) -> np.ndarray:
    """[n_sets] int: the size of the random sets to compare with; 0 where there are no two tokens.

    `set_`, `count`: one entry per (set, token): the set and how many of its examples have the token.
    """
    count = count.astype(float)
    first, second, fourth = (np.bincount(set_, count**power, n_sets) for power in (1, 2, 4))
    pairs, squares = (first**2 - second) / 2, (second**2 - fourth) / 2
    effective = np.divide(pairs**2, squares, out=np.zeros(n_sets), where=squares > 0)
    return np.where(squares > 0, np.floor((1 + np.sqrt(1 + 8 * effective)) / 2 + 1e-9), 0).astype(np.int64)


class RandomSets:
    """Likeness of `sets` random sets of every size from 2 to `largest`: a set of size s is the first s positions of a drawn sequence.

    Like a feature's examples, a sequence has one position per row. Its first two have different tokens, so that every size has a pair.
    """

    def __init__(self, space: ReferenceSpace, codes: np.ndarray, sets: int, largest: int, seed: int):
        """`codes` [rows, kept positions]: the token of every position of the space. `largest` is at most the number of rows.

        Raises UserError where all positions hold the same token.
        """
        self.at = _draw(codes, sets, largest, np.random.default_rng(seed))
        wanted, inverse = np.unique(self.at, return_inverse=True)
        units = torch.empty(len(wanted), space.d)
        for start, stop, vectors in space.unit_vectors(wanted):
            units[start:stop] = vectors
        token = codes.ravel()[self.at]
        of = torch.from_numpy(inverse.reshape(self.at.shape))
        self.likeness = np.full((largest + 1, sets), np.nan)
        """[size, set] of all sizes, ascending over the sets."""
        for start in range(0, sets, SETS_AT_ONCE):
            some = slice(start, start + SETS_AT_ONCE)
            u = units[of[some]].double()
            differ = token[some, :, None] != token[some, None, :]
            dots = (u @ u.transpose(1, 2)).numpy() * differ
            sums, pairs = (np.einsum("sii->is", a.cumsum(1).cumsum(2)) for a in (dots, differ.astype(float)))
            self.likeness[2:, some] = sums[1:] / pairs[1:]
        self.likeness.sort(axis=1)

    def compare(self, likeness: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For examples of this likeness [n], beside random sets of this size [n]: the sets' mean, and p = (1 + sets at least as alike) / (1 + sets)."""
        mean, p = np.full(len(size), np.nan), np.full(len(size), np.nan)
        sets = self.likeness.shape[1]
        for s in np.unique(size[size > 1]):
            here = size == s
            mean[here] = self.likeness[s].mean()
            p[here] = (1 + sets - np.searchsorted(self.likeness[s], likeness[here], side="left")) / (1 + sets)
        return mean, p


def _draw(codes: np.ndarray, sets: int, largest: int, rng: np.random.Generator) -> np.ndarray:
    """Flat positions [sets, largest]."""
    rows, width = codes.shape
    row = np.stack([rng.choice(rows, largest, replace=False) for _ in range(sets)])
    at = row * width + rng.integers(0, width, row.shape)
    flat = codes.ravel()
    for _ in range(ROUNDS):
        again = np.flatnonzero(flat[at[:, 0]] == flat[at[:, 1]])
        if not len(again):
            return at
        # both are drawn again, as if the set had not been drawn: only so do the first two stay random
        row = np.stack([rng.choice(rows, largest, replace=False) for _ in again])
        at[again] = row * width + rng.integers(0, width, row.shape)
    raise UserError(
        f"Among {ROUNDS} draws from the probe rows ({rows} rows of {width} positions) there were no two positions with different tokens, so there is "
        "nothing to compare likeness with. Take probe rows of real text."
    )
