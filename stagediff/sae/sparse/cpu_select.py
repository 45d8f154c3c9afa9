"""numba: the k largest of each row, or k B of a batch, from one pass over the pre-activations; and what passes a threshold, from two.

Features lie in groups: a block of size x 32 of them in 32 groups, group i with i, i + 32, i + 64, … of the block, so that the maxima of 32
groups at a time come out of plain vector maxima. At least k groups have a maximum as large as the k-th largest maximum, so this is a lower bound
of the k-th largest value, and only the few groups that reach it are looked at again. Values are compared as bit patterns (`cpu_bits`). Equal
values are taken by index.
"""

import numpy as np

from stagediff.sae.sparse.cpu_bits import jitted, widened

__all__ = ["chosen_of_all", "counted", "counted_above", "gathered", "gathered_above", "grouped", "largest", "maxima"]

GROUP = 32
LANES = 32
"""bf16 patterns in the widest vector there is."""


def grouped(features: int, k: int) -> tuple[int, int]:
    """Features per group, such that there are at least 4 k groups where that is possible, and the number of groups."""
    size = max(1, min(GROUP, features // (4 * k)))
    return size, -(-features // (size * LANES)) * LANES


@jitted
def _at_least(keys, n, least):
    """How many of keys[:n] are >= least (of the same type)."""
    count = np.int32(0)
    for i in range(n):
        count += np.int32(keys[i] >= least)
    return count


@jitted
def _least_of(keys, n, k, slack):
    """A pattern that k of keys[:n], or up to `slack` more, are not below; the k-th largest where equal ones leave no other. 1: fewer than k are positive."""
    most = keys[0]
    for i in range(n):
        most = keys[i] if keys[i] > most else most
    low, high = np.int64(1), np.int64(most) + 1
    near = np.int64(most) - (2 << (7 if keys.itemsize == 2 else 23))  # a quarter of the largest value
    if near > 1 and _at_least(keys, n, keys.dtype.type(near)) >= k:
        low = near
    elif _at_least(keys, n, keys.dtype.type(1)) < k:
        return keys.dtype.type(1)
    while high - low > 1:
        middle = low + (high - low) // 2
        count = _at_least(keys, n, keys.dtype.type(middle))
        if count < k:
            high = middle
        else:
            low = middle
            if count <= k + slack:
                break
    return keys.dtype.type(low)


@jitted
def _row_maxima(row, size, best):
    """The largest of every group, 0 where none is positive."""
    F = len(row)
    for block in range(len(best) // LANES):
        out = best[block * LANES : (block + 1) * LANES]
        out[:] = 0
        at, end = block * size * LANES, min(F, (block + 1) * size * LANES)
        while at + 4 * LANES <= end:
            a, b = row[at : at + LANES], row[at + LANES : at + 2 * LANES]
            c, e = row[at + 2 * LANES : at + 3 * LANES], row[at + 3 * LANES : at + 4 * LANES]
            for i in range(LANES):
                x = a[i] if a[i] > b[i] else b[i]
                y = c[i] if c[i] > e[i] else e[i]
                x = x if x > y else y
                out[i] = x if x > out[i] else out[i]
            at += 4 * LANES
        while at < end:
            a = row[at : min(at + LANES, end)]
            for i in range(len(a)):
                out[i] = a[i] if a[i] > out[i] else out[i]
            at += LANES


@jitted
def _candidates(row, size, best, least, keys, where):
    """Values >= least and where they are; their number. keys and where have room for one more than there are features, and than
    there are groups.

    Everything is written and what counts is kept: branches that are taken at random would cost more than the rest.
    """
    hits = np.uint32(0)
    for j in range(len(best)):
        where[hits] = j
        hits = np.uint32(hits + np.uint32(best[j] >= least))
    groups = where[:hits].copy()
    n = np.uint32(0)
    for i in range(hits):
        g = np.uint32(groups[i])
        at = g // np.uint32(LANES) * np.uint32(size * LANES) + g % np.uint32(LANES)
        end = min(np.uint32(len(row)), at + np.uint32(size * LANES))
        while at < end:
            keys[n] = row[at]
            where[n] = at
            n = np.uint32(n + np.uint32(row[at] >= least))
            at = np.uint32(at + np.uint32(LANES))
    return n


@jitted
def _last_tie(keys, where, n, tie, left, F):
    """The `left`-th lowest index among the values that equal `tie`."""
    low, high = -1, F - 1
    while high - low > 1:
        middle = low + (high - low) // 2
        count = 0
        for i in range(n):
            count += (keys[i] == tie) & (where[i] <= middle)
        if count >= left:
            high = middle
        else:
            low = middle
    return high


@jitted
def largest(first, last, pre, k, size, groups, feature, value):
    """Rows `first` to `last` of pre [n, F] (patterns): feature [n, k] int32 and value [n, k] fp32."""
    F = pre.shape[1]
    best = np.empty(groups, pre.dtype)
    keys = np.empty(max(F, groups) + 1, pre.dtype)
    where = np.empty(max(F, groups) + 1, np.int32)
    for r in range(first, last):
        row = pre[r]
        _row_maxima(row, size, best)
        n = _candidates(row, size, best, _least_of(best, groups, k, k // 4), keys, where)
        m = 0
        if n <= k:
            for i in range(n):
                feature[r, i] = where[i]
                value[r, i] = widened(keys[i])
            m = n
        else:
            least = _least_of(keys, n, k, 0)
            above = 0
            ties = 0
            for i in range(n):
                above += keys[i] > least
                ties += keys[i] == least
            end = F if above + ties == k else _last_tie(keys, where, n, least, k - above, F)
            for i in range(n):
                if keys[i] > least or (keys[i] == least and where[i] <= end):
                    feature[r, m] = where[i]
                    value[r, m] = widened(keys[i])
                    m += 1
        for i in range(m, k):
            feature[r, i] = F
            value[r, i] = np.float32(0)


@jitted
def maxima(first, last, pre, size, out):
    """Rows `first` to `last` of the groups' maxima out [n, groups]."""
    for r in range(first, last):
        _row_maxima(pre[r], size, out[r])


@jitted
def counted(first, last, pre, size, best, least, out):
    """How many values of rows `first` to `last` are >= least[0]: out [n]."""
    room = max(pre.shape[1], best.shape[1]) + 1
    keys = np.empty(room, pre.dtype)
    where = np.empty(room, np.int32)
    for r in range(first, last):
        out[r] = _candidates(pre[r], size, best[r], least[0], keys, where)


@jitted
def gathered(first, last, pre, size, best, least, start, keys, where):
    """These values and their features, row r's from start[r] on."""
    room = max(pre.shape[1], best.shape[1]) + 1
    some_keys = np.empty(room, pre.dtype)
    some_where = np.empty(room, np.int32)
    for r in range(first, last):
        n = _candidates(pre[r], size, best[r], least[0], some_keys, some_where)
        keys[start[r] : start[r] + n] = some_keys[:n]
        where[start[r] : start[r] + n] = some_where[:n]


@jitted
def chosen_of_all(keys, where, start, least, left, F, feature, value, token, out_start):
    """Of candidates by row those > least[0], and the first `left` that equal it; feature, value, token [count], out_start [n + 1]."""
    m = 0
    n = len(start) - 1
    for r in range(n):
        a, b = start[r], start[r + 1]
        out_start[r] = m
        ties = 0
        for i in range(a, b):
            ties += keys[i] == least[0]
        end = F if ties <= left else -1
        if 0 < left < ties:
            end = _last_tie(keys[a:b], where[a:b], b - a, least[0], left, F)
        left = max(0, left - ties)
        for i in range(a, b):
            if keys[i] > least[0] or (keys[i] == least[0] and where[i] <= end):
                feature[m] = where[i]
                value[m] = widened(keys[i])
                token[m] = r
                m += 1
    out_start[n] = m
    for i in range(m, len(feature)):
        feature[i] = F
        value[i] = np.float32(0)
        token[i] = n - 1


@jitted
def counted_above(first, last, pre, floor, out):
    """How many values of rows `first` to `last` are above floor [F] (fp32): out [n] int32."""
    F = pre.shape[1]
    for r in range(first, last):
        count = np.int32(0)
        for j in range(F):
            count += np.int32(widened(pre[r, j]) > floor[j])
        out[r] = count


@jitted
def gathered_above(first, last, pre, floor, start, feature, value):
    """These values and their features, row r's from start[r] on. Groups of neighbours without any are passed over."""
    F = np.uint32(pre.shape[1])
    for r in range(first, last):
        m, end = start[r], start[r + 1]
        at = np.uint32(0)
        while m < end:
            hits = np.int32(0)
            if at + np.uint32(GROUP) <= F:
                for j in range(GROUP):  # of fixed length: vector compares
                    hits += np.int32(widened(pre[r, at + np.uint32(j)]) > floor[at + np.uint32(j)])
            else:
                hits = np.int32(1)
            stop = min(F, np.uint32(at + np.uint32(GROUP)))
            if hits > 0:
                for j in range(at, stop):
                    if widened(pre[r, j]) > floor[j]:
                        feature[m] = j
                        value[m] = widened(pre[r, j])
                        m += 1
            at = stop
