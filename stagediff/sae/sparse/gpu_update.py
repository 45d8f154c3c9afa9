"""Triton: one pass over the weights by feature row. Clip, Adam, the pull home, unit norm, the copies in compute type: each value is read and written once."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from stagediff.sae.sparse.kernels import Update
from stagediff.sae.sparse.weights import MATRICES, Weights

__all__ = ["update"]

VALUES_AT_ONCE = 1024


def update(weights: Weights, gradients: dict[str, Tensor], factor: Tensor | None, settings: Update) -> None:
    """`Kernels.update`."""
    step, (beta1, beta2) = settings.step, settings.betas
    device = weights.rows["b_dec"].device
    factor = torch.ones((), device=device) if factor is None else factor
    numbers = (
        settings.lr / (1 - beta1**step),
        1 / math.sqrt(1 - beta2**step),
        1 - beta1,
        beta2,
        1 - beta2,
        settings.eps,
        settings.pull,
    )
    for name, rows in weights.rows.items():
        home = settings.home.get(name)
        state = (rows, gradients[name], weights.first[name], weights.second[name], rows if home is None else home)
        if name in MATRICES:
            copy = weights.copy_of(name)
            F, d = rows.shape
            _rows[(F,)](
                *state,
                copy,
                factor,
                *numbers,
                d,
                HOME=home is not None,
                UNIT=settings.unit and name == "W_dec",
                COPY=copy.data_ptr() != rows.data_ptr(),
                BLOCK=triton.next_power_of_2(d),
                num_warps=min(8, max(1, triton.next_power_of_2(d) // 256)),
            )
        else:
            n = len(rows)
            _vector[(triton.cdiv(n, VALUES_AT_ONCE),)](
                *state, factor, *numbers, n, HOME=home is not None, BLOCK=VALUES_AT_ONCE, num_warps=4
            )


@triton.jit
def _adam(w, grad, first, second, home, at, inside, factor, rate, correction, part1, beta2, part2, eps, pull, HOME: tl.constexpr):
    """The values `at`, after the step; the moments are stored."""
    gradient = tl.load(grad + at, mask=inside, other=0.0) * factor
    m = tl.load(first + at, mask=inside, other=0.0)
    v = tl.load(second + at, mask=inside, other=0.0)
    m += part1 * (gradient - m)
    v = beta2 * v + part2 * gradient * gradient
    tl.store(first + at, m, mask=inside)
    tl.store(second + at, v, mask=inside)
    values = tl.load(w + at, mask=inside, other=0.0) - rate * m / (tl.sqrt(v) * correction + eps)
    if HOME:
        values += pull * (tl.load(home + at, mask=inside, other=0.0) - values)
    return values


@triton.jit
def _rows(
    w,
    grad,
    first,
    second,
    home,
    copy,
    factor,
    rate,
    correction,
    part1,
    beta2,
    part2,
    eps,
    pull,
    d,
    HOME: tl.constexpr,
    UNIT: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < d
    at = tl.program_id(0).to(tl.int64) * d + column
    values = _adam(w, grad, first, second, home, at, inside, tl.load(factor), rate, correction, part1, beta2, part2, eps, pull, HOME)
    if UNIT:
        values /= tl.maximum(tl.sqrt(tl.sum(tl.where(inside, values * values, 0.0))), 1e-12)
    tl.store(w + at, values, mask=inside)
    if COPY:
        tl.store(copy + at, values.to(copy.dtype.element_ty), mask=inside)


@triton.jit
def _vector(
    w,
    grad,
    first,
    second,
    home,
    factor,
    rate,
    correction,
    part1,
    beta2,
    part2,
    eps,
    pull,
    n,
    HOME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = _adam(w, grad, first, second, home, at, at < n, tl.load(factor), rate, correction, part1, beta2, part2, eps, pull, HOME)
    tl.store(w + at, values, mask=at < n)
