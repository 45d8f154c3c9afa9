"""Triton: from pairs to the error, the activations' gradients and the weights' gradients.

One program per token reads the decoder rows of its pairs, twice: for the reconstruction, and for the activations' gradients. One program per
feature adds up its pairs' share of both weight gradients. A feature that fires on many tokens would keep its program busy long after all others
are done, so its pairs are cut into parts of MOST: the first is the feature's own program's, the others are summed before, each by a program of its
own, into at most P / MOST rows of scratch. All sums have a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stagediff.sae.sparse.kernels import Decoded, Extra, Rows
from stagediff.sae.sparse.pairs import ByFeature, Pairs
from stagediff.sae.sparse.weights import Weights

__all__ = ["decode", "gradients"]

MOST = 64
"""Pairs that one program adds up."""
VALUES_AT_ONCE = 4096


def decode(weights: Weights, pairs: Pairs, x: Tensor) -> Decoded:
    """`Kernels.decode`."""
    n, d = x.shape
    error, squares = torch.empty_like(x), x.new_empty(n)
    scaled = torch.empty_like(x, dtype=weights.compute)
    g = torch.zeros_like(pairs.value)  # batchtopk: slots after the last token's are nobody's
    d_block, at_once = _blocks(d)
    _decode[(n,)](
        pairs.feature,
        pairs.value,
        pairs.start,
        weights.copy_of("W_dec"),
        weights.rows["b_dec"],
        x,
        error,
        scaled,
        squares,
        g,
        2 / n,
        weights.features,
        d,
        D_BLOCK=d_block,
        AT_ONCE=at_once,
        num_warps=_warps(d_block),
    )
    return Decoded(error, scaled, squares, error.sum(0), g)


def gradients(
    weights: Weights, pairs: Pairs, sorted_pairs: ByFeature, decoded: Decoded, inner: Tensor, extra: Extra | None, unit: bool
) -> Rows:
    """`Kernels.gradients`."""
    W_dec = weights.rows["W_dec"]
    F, d = W_dec.shape
    counts = sorted_pairs.start.diff()
    parts = (counts - 1).clamp_min_(0) // MOST  # besides the first
    part_start = torch.zeros(F + 1, dtype=torch.int32, device=W_dec.device)
    torch.cumsum(parts, 0, out=part_start[1:])
    most_parts = max(1, len(pairs.token) // MOST)
    owner = torch.searchsorted(part_start[1:], torch.arange(most_parts, dtype=torch.int32, device=W_dec.device), right=True, out_int32=True)
    d_block, at_once = _blocks(d)
    scratch = W_dec.new_empty(2, most_parts, d)
    scratch_b = W_dec.new_empty(most_parts)
    slot = torch.full((F,), -1, dtype=torch.int32, device=W_dec.device) if extra is not None else owner
    if extra is not None:
        slot[extra.features] = torch.arange(len(extra.features), dtype=torch.int32, device=W_dec.device)
    more = (extra.W_enc, extra.W_dec, extra.b_enc) if extra is not None else (W_dec, W_dec, W_dec)
    out = (torch.empty_like(W_dec), torch.empty_like(W_dec), W_dec.new_empty(F), W_dec.new_empty(F))
    read = (sorted_pairs.order, pairs.token, pairs.value, decoded.g, decoded.scaled, inner, sorted_pairs.start, part_start)
    sizes = {"D_BLOCK": d_block, "AT_ONCE": at_once, "MOST": MOST, "num_warps": _warps(d_block)}
    _part[(most_parts,)](*read, owner, scratch[0], scratch[1], scratch_b, F, d, **sizes)
    _row[(F,)](*read, scratch[0], scratch[1], scratch_b, slot, *more, W_dec, *out, d, UNIT=unit, HAS_MORE=extra is not None, **sizes)
    return Rows(*out, out[2] @ weights.rows["W_enc"])


def _blocks(d: int) -> tuple[int, int]:
    """Values of a row that a program holds, and rows that it reads at once."""
    d_block = triton.next_power_of_2(d)
    return d_block, max(1, min(8, VALUES_AT_ONCE // d_block))


def _warps(d_block: int) -> int:
    return min(8, max(1, d_block // 256))


@triton.jit
def _decode(
    feature,
    value,
    start,
    W_dec,
    b_dec,
    x,
    error,
    scaled,
    squares,
    g,
    factor,
    F,
    d,
    D_BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, D_BLOCK)
    inside = column < d
    first, last = tl.load(start + token), tl.load(start + token + 1)
    x_hat = tl.load(b_dec + column, mask=inside, other=0.0).to(tl.float32)
    for at in range(first, last, AT_ONCE):
        slot = at + tl.arange(0, AT_ONCE)
        f = tl.load(feature + slot, mask=slot < last, other=F)
        v = tl.load(value + slot, mask=slot < last, other=0.0)
        rows = tl.load(W_dec + f.to(tl.int64)[:, None] * d + column[None, :], mask=(f < F)[:, None] & inside[None, :], other=0.0)
        x_hat += tl.sum(rows.to(tl.float32) * v[:, None], axis=0)
    e = tl.where(inside, x_hat - tl.load(x + token * d + column, mask=inside, other=0.0), 0.0)
    tl.store(error + token * d + column, e, mask=inside)
    tl.store(squares + token, tl.sum(e * e))
    e *= factor
    tl.store(scaled + token * d + column, e.to(scaled.dtype.element_ty), mask=inside)
    for at in range(first, last, AT_ONCE):
        slot = at + tl.arange(0, AT_ONCE)
        f = tl.load(feature + slot, mask=slot < last, other=F)
        rows = tl.load(W_dec + f.to(tl.int64)[:, None] * d + column[None, :], mask=(f < F)[:, None] & inside[None, :], other=0.0)
        tl.store(g + slot, tl.sum(rows.to(tl.float32) * e[None, :], axis=1), mask=slot < last)


@triton.jit
def _sum_pairs(order, token, value, g, scaled, inner, first, last, d, D_BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """Sums over a feature's pairs from `first` to `last`: gradients of its decoder row, its encoder row and its bias."""
    column = tl.arange(0, D_BLOCK)
    inside = column < d
    dec = tl.zeros([D_BLOCK], tl.float32)
    enc = tl.zeros([D_BLOCK], tl.float32)
    bias = tl.zeros([AT_ONCE], tl.float32)
    for at in range(first, last, AT_ONCE):
        place = at + tl.arange(0, AT_ONCE)
        here = place < last
        slot = tl.load(order + place, mask=here, other=0)
        t = tl.load(token + slot, mask=here, other=0).to(tl.int64)
        v = tl.load(value + slot, mask=here, other=0.0)
        grad = tl.load(g + slot, mask=here, other=0.0)
        at_row = t[:, None] * d + column[None, :]
        read = here[:, None] & inside[None, :]
        dec += tl.sum(tl.load(scaled + at_row, mask=read, other=0.0).to(tl.float32) * v[:, None], axis=0)
        enc += tl.sum(tl.load(inner + at_row, mask=read, other=0.0).to(tl.float32) * grad[:, None], axis=0)
        bias += grad
    return dec, enc, tl.sum(bias)


@triton.jit
def _part(
    order,
    token,
    value,
    g,
    scaled,
    inner,
    start,
    part_start,
    owner,
    scratch_dec,
    scratch_enc,
    scratch_b,
    F,
    d,
    D_BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    MOST: tl.constexpr,
):
    part = tl.program_id(0)
    if part < tl.load(part_start + F):
        f = tl.load(owner + part)
        first = tl.load(start + f) + (part - tl.load(part_start + f) + 1) * MOST
        last = tl.minimum(first + MOST, tl.load(start + f + 1))
        dec, enc, bias = _sum_pairs(order, token, value, g, scaled, inner, first, last, d, D_BLOCK, AT_ONCE)
        column = tl.arange(0, D_BLOCK)
        at = part.to(tl.int64) * d + column
        tl.store(scratch_dec + at, dec, mask=column < d)
        tl.store(scratch_enc + at, enc, mask=column < d)
        tl.store(scratch_b + part, bias)


@triton.jit
def _row(
    order,
    token,
    value,
    g,
    scaled,
    inner,
    start,
    part_start,
    scratch_dec,
    scratch_enc,
    scratch_b,
    slot,
    more_enc,
    more_dec,
    more_b,
    W_dec,
    out_enc,
    out_dec,
    out_b,
    squares,
    d,
    UNIT: tl.constexpr,
    HAS_MORE: tl.constexpr,
    D_BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    MOST: tl.constexpr,
):
    f = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, D_BLOCK)
    inside = column < d
    first = tl.load(start + f)
    last = tl.minimum(first + MOST, tl.load(start + f + 1))
    dec, enc, bias = _sum_pairs(order, token, value, g, scaled, inner, first, last, d, D_BLOCK, AT_ONCE)
    part, parts_end = tl.load(part_start + f), tl.load(part_start + f + 1)
    at = part.to(tl.int64) * d + column
    for _ in range(part, parts_end):
        dec += tl.load(scratch_dec + at, mask=inside, other=0.0)
        enc += tl.load(scratch_enc + at, mask=inside, other=0.0)
        bias += tl.load(scratch_b + part)
        part += 1
        at += d
    if HAS_MORE:
        s = tl.load(slot + f).to(tl.int64)
        at = s * d + column
        read = column < tl.where(s >= 0, d, 0)  # (Triton 3.9's interpreter refuses a mask from a scalar condition)
        dec += tl.load(more_dec + at, mask=read, other=0.0)
        enc += tl.load(more_enc + at, mask=read, other=0.0)
        bias += tl.load(more_b + s, mask=s >= 0, other=0.0)
    if UNIT:
        w = tl.load(W_dec + f * d + column, mask=inside, other=0.0)
        dec -= tl.sum(dec * w) * w
    tl.store(out_dec + f * d + column, dec, mask=inside)
    tl.store(out_enc + f * d + column, enc, mask=inside)
    tl.store(out_b + f, bias)
    tl.store(squares + f, tl.sum(dec * dec) + tl.sum(enc * enc) + bias * bias)
