"""Triton: the k largest of each row, in three kernels that read the row once.

Features lie in groups of up to 32. Every group's largest is taken (one pass over the pre-activations, at the speed of memory); of the groups the k
with the largest maxima are kept, which hold all of the row's k largest; of their few hundred values these are found. Values are compared as their
bit patterns, which sort like non-negative floats; the k-th largest is found by bisection over the patterns. Equal values are taken by index: among
groups, and among the values of the groups kept, so the result is exact.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["group_maxima", "group_size", "largest"]

GROUP = 32
VALUES_AT_ONCE = 8192


def group_size(features: int, k: int) -> int:
    """Features per group: a power of two, such that there are at least 4 k groups."""
    size = GROUP
    while size > 1 and size * 4 * k > features:
        size //= 2
    return size


def group_maxima(pre: Tensor, size: int) -> Tensor:
    """The largest bit pattern of every group of pre [n, F] (bf16, fp32): [n, groups] int16 or int32, 0 where none is positive."""
    n, F = pre.shape
    groups = -(-F // size)
    out = torch.empty(n, groups, dtype=torch.int16 if pre.dtype == torch.bfloat16 else torch.int32, device=pre.device)
    at_once = min(triton.next_power_of_2(groups), VALUES_AT_ONCE // size)
    _maxima[(n, triton.cdiv(groups, at_once))](pre, out, F, groups, SIZE=size, AT_ONCE=at_once, num_warps=4)
    return out


def largest(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest positive of each row of pre [n, F]: features [n, k] int32 (ascending; F: there were too few) and values [n, k] fp32."""
    n, F = pre.shape
    feature = torch.empty(n, k, dtype=torch.int32, device=pre.device)
    value = torch.empty(n, k, dtype=torch.float32, device=pre.device)
    size = group_size(F, k)
    maxima = group_maxima(pre, size)
    groups = maxima.shape[1]
    chosen = torch.empty(n, k, dtype=torch.int32, device=pre.device)
    k_block, g_block = triton.next_power_of_2(k), triton.next_power_of_2(groups)
    _chosen_groups[(n,)](maxima, chosen, groups, k, BLOCK=g_block, K_BLOCK=k_block, num_warps=_warps(g_block))
    _chosen_values[(n,)](pre, chosen, feature, value, F, groups, k, SIZE=size, K_BLOCK=k_block, num_warps=_warps(k_block * size))
    return feature, value


def _warps(values: int) -> int:
    return min(16, max(1, values // 256))


@triton.jit
def _patterns(values):
    """Non-negative integers that sort like the values: 0 for those that are not positive; NaN is the largest."""
    if values.dtype == tl.bfloat16:
        bits = values.to(tl.int16, bitcast=True).to(tl.int32)
        size = bits & 0x7FFF
        return tl.where(size > 0x7F80, size, tl.maximum(bits, 0))
    else:
        bits = values.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        return tl.where(size > 0x7F800000, size, tl.maximum(bits, 0))


@triton.jit
def _kth_largest(keys, k):
    """The k-th largest of positive keys; 1 where there are fewer."""
    low = 1
    high = tl.where(tl.sum((keys >= 1).to(tl.int32)) >= k, tl.max(keys) + 1, 2)
    while high - low > 1:
        middle = low + (high - low) // 2
        enough = tl.sum((keys >= middle).to(tl.int32)) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _maxima(pre, out, F, groups, SIZE: tl.constexpr, AT_ONCE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    at = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    keys = _patterns(tl.load(pre + row * F + at, mask=at < F, other=0.0))
    tl.store(out + row * groups + group, tl.max(keys, axis=1).to(out.dtype.element_ty), mask=group < groups)


@triton.jit
def _chosen_groups(maxima, chosen, groups, k, BLOCK: tl.constexpr, K_BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK)
    keys = tl.load(maxima + row * groups + group, mask=group < groups, other=0).to(tl.int32)
    least = _kth_largest(keys, k)
    above = keys > least
    left = k - tl.sum(above.to(tl.int32))
    # Two counts in one scan: larger ones in the high half, ties in the low half.
    counted = above.to(tl.int32) * 65536 + (keys == least).to(tl.int32)
    before = tl.cumsum(counted, axis=0) - counted
    ties = before & 65535
    keep = above | ((keys == least) & (ties < left))
    tl.store(chosen + row * k + (before >> 16) + tl.minimum(ties, left), group, mask=keep)
    slot = tl.arange(0, K_BLOCK)
    tl.store(chosen + row * k + slot, groups, mask=(slot >= tl.sum(keep.to(tl.int32))) & (slot < k))


@triton.jit
def _chosen_values(pre, chosen, feature, value, F, groups, k, SIZE: tl.constexpr, K_BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, K_BLOCK)
    group = tl.load(chosen + row * k + slot, mask=slot < k, other=groups)
    at = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    values = tl.load(pre + row * F + at, mask=(group < groups)[:, None] & (at < F), other=0.0)
    keys = _patterns(values)
    least = _kth_largest(keys, k)
    above = keys > least
    left = k - tl.sum(above.to(tl.int32))
    counted = above.to(tl.int32) * 65536 + (keys == least).to(tl.int32)
    totals = tl.sum(counted, axis=1)
    before = tl.cumsum(counted, axis=1) - counted + (tl.cumsum(totals, axis=0) - totals)[:, None]
    ties = before & 65535
    keep = above | ((keys == least) & (ties < left))
    place = row * k + (before >> 16) + tl.minimum(ties, left)
    tl.store(feature + place, at, mask=keep)
    tl.store(value + place, values.to(tl.float32), mask=keep)
    empty = (slot >= tl.sum(keep.to(tl.int32))) & (slot < k)
    tl.store(feature + row * k + slot, F, mask=empty)
    tl.store(value + row * k + slot, 0.0, mask=empty)
