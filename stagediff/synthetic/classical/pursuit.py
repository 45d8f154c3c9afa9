"""Batch orthogonal matching pursuit: the sparse codes of many vectors over a fixed set of unit atoms.

Greedy: the atom that correlates most with what is left joins, then all coefficients are fitted anew (Pati et al. 1993). As in Batch-OMP (Rubinstein,
Zibulevsky, Elad 2008, section 2) only products with the atoms are touched (D x and the Gram matrix G = D D^T), and the Cholesky factor of the chosen
atoms' Gram grows by one row per step. That row is what the new atom has in common with the orthonormalised earlier ones; with their products with all
atoms kept (`basis`), correlations with the residual are updated without solving a system at each step, and coefficients are solved for once, at the end.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stagediff.errors import UserError

__all__ = ["Codes", "batch_omp", "check_k"]

HELD_VALUES = 1 << 20
"""Of `basis` [rows, k, F] at once: what bounds the memory, whatever the number of vectors."""
DEPENDENT = 1e-6
"""Squared distance of a unit atom from the span of the chosen ones under which it adds nothing."""


class Codes(NamedTuple):
    """Sparse codes of n vectors."""

    atom: Tensor
    """[n, k] int64, distinct within a row where the value is not 0."""
    value: Tensor
    """[n, k] coefficients of either sign; 0 where fewer than k atoms were needed."""

    def dense(self, features: int) -> Tensor:
        """The codes as [n, features]."""
        return self.value.new_zeros(len(self.value), features).scatter_add_(1, self.atom, self.value)


@torch.no_grad()
def batch_omp(x: Tensor, atoms: Tensor, k: int, error: float = 0.0) -> Codes:
    """Codes of x [n, d] over unit atoms [F, d]: k atoms each, or fewer where ||x - x_hat||^2 <= `error` before.

    Raises UserError when k is not between 1 and the smaller of d and F, or the widths differ.
    """
    F, d = atoms.shape
    check_k(k, d, F)
    if x.ndim != 2 or x.shape[1] != d:
        raise UserError(f"Vectors of shape {tuple(x.shape)} cannot be coded with atoms of width {d}; give [n, {d}].")
    gram = atoms @ atoms.t()
    rows = max(1, HELD_VALUES // (k * F))
    parts = [_pursue(part @ atoms.t(), gram, k, part.square().sum(1), error) for part in x.split(rows)]
    return Codes(torch.cat([p.atom for p in parts]), torch.cat([p.value for p in parts]))


def check_k(k: int, d: int, features: int) -> None:
    """Raises UserError when no vector of width d can have k of so many atoms in its code."""
    if not 1 <= k <= min(d, features):
        raise UserError(
            f"k is {k}, but a vector of width {d} is coded with 1 to {min(d, features)} of {features} atoms (with {d} independent ones nothing is left). "
            "Give a k in that range."
        )


def _pursue(alpha: Tensor, gram: Tensor, k: int, left: Tensor, error: float) -> Codes:
    """Codes from correlations alpha [n, F] (overwritten) and squared norms left [n]."""
    n, F = alpha.shape
    index = torch.zeros(n, k, dtype=torch.int64, device=alpha.device)
    z = alpha.new_zeros(n, k)
    factor = torch.eye(k, dtype=alpha.dtype, device=alpha.device).repeat(n, 1, 1)
    basis, taken = alpha.new_zeros(n, k, F), torch.zeros(n, F, dtype=torch.bool, device=alpha.device)
    smallest = left * torch.finfo(alpha.dtype).eps ** 2  # squared correlations under it are rounding
    rows, active = torch.arange(n, device=alpha.device), left > error
    for j in range(k):
        if not active.any():
            break
        if 2 * int(active.sum()) < len(rows):  # most are done: go on with the others alone
            alpha, basis, taken, left, smallest, rows = (t[active] for t in (alpha, basis, taken, left, smallest, rows))
            active = torch.ones(len(rows), dtype=torch.bool, device=alpha.device)
        correlation, new = alpha.abs().masked_fill_(taken, -1.0).max(1)
        at = new[:, None]
        common = basis[:, :j].gather(2, at[:, None].expand(-1, j, 1))[..., 0]  # [n, j]
        pivot = gram[new, new] - common.square().sum(1)
        active &= (pivot > DEPENDENT) & (correlation.square() > smallest)
        pivot = pivot.clamp_min(DEPENDENT).sqrt()
        product = gram[new]
        for i in range(j):  # a batched product of such thin matrices takes longer
            product.addcmul_(common[:, i, None], basis[:, i], value=-1)
        product /= pivot[:, None]
        step = torch.where(active, alpha.gather(1, at)[:, 0] / pivot, 0.0)
        alpha -= step[:, None] * product
        basis[:, j] = product
        taken.scatter_(1, at, True)
        left = left - step.square()
        index[rows, j], z[rows, j] = new, step
        factor[rows, j, :j] = torch.where(active[:, None], common, 0.0)
        factor[rows, j, j] = torch.where(active, pivot, 1.0)
        active &= left > error
    value = torch.linalg.solve_triangular(factor.transpose(1, 2), z[..., None], upper=True)[..., 0]
    return Codes(index, value)
