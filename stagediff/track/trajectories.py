"""The path of a feature's decoder direction over training, J_i = {W_dec_i[t]}: cosines along it, its length, and its PCA to two dimensions
(arXiv 2412.17626, section on feature drift).

A path has T points in d dimensions with T far below d, so its PCA comes from the T x T Gram matrix of the centred unit vectors: scores are
the eigenvectors times the roots of the eigenvalues. Everything is float64: late in training 1 - cos falls below what fp32 resolves.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Projection", "cosines", "path_length", "project"]

STILL = 1e-12
"""Mean squared distance of a path's unit vectors from their centre up to which it counts as not moving: what fp32 weights can resolve."""
TIE = 1e-9
"""Share of a coordinate's largest absolute value below which its start and end count as level."""


class Projection(NamedTuple):
    """PCA of n paths of T unit vectors each."""

    pc: Tensor
    """[n, T, 2] float64 coordinates; NaN where a row is zero, 0 where the path does not move."""
    explained: Tensor
    """[n] share of the path's variance that the two components hold; NaN where there is none, or a row is zero."""


def cosines(rows: Tensor, point: int) -> tuple[Tensor, Tensor]:
    """Cosines of every row of a path with that of `point`, and with the one before it; rows [n, T, d] float64 -> [n, T] and [n, T].

    Of equal rows exactly 1; NaN where a row is zero, and in the second where there is none before.
    """
    squares = _dot(rows, rows)
    to_point = _cosine(_dot(rows, rows[:, point, None]), squares, squares[:, point, None])
    to_previous = _cosine(_dot(rows[:, 1:], rows[:, :-1]), squares[:, 1:], squares[:, :-1])
    return to_point, torch.cat([torch.full_like(squares[:, :1], torch.nan), to_previous], dim=1)


def path_length(cos_previous: Tensor) -> Tensor:
    """Sum of the angles between successive points, degrees; cos_previous [n, T] as above -> [n], NaN where one of them is."""
    return torch.rad2deg(torch.arccos(cos_previous[:, 1:])).sum(1)


def project(rows: Tensor) -> Projection:
    """PCA to two components of each path's unit vectors, centred; rows [n, T, d] float64, T >= 2.

    Signs: both coordinates grow from the first point to the last; where these are level (TIE), the largest entry is positive.
    """
    squares = _dot(rows, rows)
    zero = (squares == 0).any(1)
    unit = rows / squares.sqrt().clamp_min(torch.finfo(rows.dtype).tiny)[..., None]
    unit -= unit.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(unit @ unit.mT)
    values = values.clamp_min(0)
    total = values.sum(1)
    still = total <= STILL * rows.shape[1]
    pc = vectors[:, :, -2:].flip(2) * values[:, None, -2:].flip(2).sqrt()
    pc = torch.where(still[:, None, None], 0.0, pc * _sign(pc))
    explained = torch.where(still, torch.nan, values[:, -2:].sum(1) / total)
    pc[zero], explained[zero] = torch.nan, torch.nan
    return Projection(pc, explained)


def _sign(pc: Tensor) -> Tensor:
    """[n, 1, 2] of +1 and -1."""
    at = pc.abs().argmax(1, keepdim=True)
    largest = pc.gather(1, at)
    forward = pc[:, -1:] - pc[:, :1]
    deciding = torch.where(forward.abs() > TIE * largest.abs(), forward, largest)
    return torch.where(deciding < 0, -1.0, 1.0).to(pc.dtype)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    # Not a matrix product: this sums every row's products in the same order, so that equal rows give what their squares give, to the last bit.
    return torch.from_numpy(np.einsum("...d,...d->...", a.numpy(), b.numpy()))


def _cosine(dot: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """From a product of rows and their squares. In binary floating point sqrt(s * s) is s: equal rows have cosine 1 to the last bit."""
    return (dot / (a * b).sqrt()).clamp(-1, 1)
