"""numba: the k largest of each row, or k B of a batch, from one pass over the pre-activations.

Features lie in groups: of F = size x groups, group g holds g, g + groups, g + 2 groups, …, so that the maxima of all groups come out of plain vector
maxima. At least k groups have a maximum as large as the k-th largest maximum, so this is a lower bound of the k-th largest value, and only the few
groups that reach it are looked at again. Values are compared as bit patterns (`cpu_bits`). Equal values are taken by index.
"""

import numpy as np

from stagediff.sae.sparse.cpu_bits import jitted, widened

__all__ = ["chosen_of_all", "counted", "gathered", "group_size", "largest", "maxima"]

GROUP = 32


def group_size(features: int, k: int) -> int:
    """Features per group, such that there are at least 4 k groups where that is possible."""
    return max(1, min(GROUP, features // (4 * k)))


@jitted
def _at_least(keys, n, least):
    """How many of keys[:n] are >= least (of the same type)."""
    count = np.int32(0)
    for i in range(n):
        count += np.int32(keys[i] >= least)
    return count


@jitted
def _kth_largest(keys, n, k):
    """The k-th largest of keys[:n], in an array of one; 1 where fewer than k are positive."""
    out = np.ones(1, keys.dtype)
    low, high = np.int64(1), np.int64(1)
    for i in range(n):
        high = max(high, np.int64(keys[i]))
    high += 1
    middle = np.empty(1, keys.dtype)
    middle[0] = 1
    if _at_least(keys, n, middle[0]) < k:
        return out
    while high - low > 1:
        m = low + (high - low) // 2
        middle[0] = m
        if _at_least(keys, n, middle[0]) >= k:
            low = m
        else:
            high = m
    out[0] = low
    return out


@jitted
def _row_maxima(row, size, groups, best):
    """The largest of every group, 0 where none is positive."""
    F = len(row)
    for g in range(groups):
        best[g] = 0
    for i in range(size):
        at = i * groups
        part = row[at : min(at + groups, F)]
        for g in range(len(part)):
            best[g] = part[g] if part[g] > best[g] else best[g]


@jitted
def _candidates(row, groups, best, least, keys, where):
    """Values >= least and where they are; their number."""
    n = 0
    for g in range(groups):
        if best[g] >= least:
            for at in range(g, len(row), groups):
                if row[at] >= least:
                    keys[n] = row[at]
                    where[n] = at
                    n += 1
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
    keys = np.empty(F, pre.dtype)
    where = np.empty(F, np.int32)
    for r in range(first, last):
        row = pre[r]
        _row_maxima(row, size, groups, best)
        n = _candidates(row, groups, best, _kth_largest(best, groups, k)[0], keys, where)
        m = 0
        if n <= k:
            for i in range(n):
                feature[r, i] = where[i]
                value[r, i] = widened(keys[i])
            m = n
        else:
            least = _kth_largest(keys, n, k)[0]
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
def maxima(first, last, pre, size, groups, out):
    """Rows `first` to `last` of the groups' maxima out [n, groups]."""
    for r in range(first, last):
        _row_maxima(pre[r], size, groups, out[r])


@jitted
def counted(first, last, pre, groups, best, least, out):
    """How many values of rows `first` to `last` are >= least[0]: out [n]."""
    for r in range(first, last):
        n = 0
        for g in range(groups):
            if best[r, g] >= least[0]:
                for at in range(g, pre.shape[1], groups):
                    n += pre[r, at] >= least[0]
        out[r] = n


@jitted
def gathered(first, last, pre, groups, best, least, start, keys, where):
    """These values and their features, row r's from start[r] on."""
    for r in range(first, last):
        _candidates(pre[r], groups, best[r], least[0], keys[start[r] : start[r + 1]], where[start[r] : start[r + 1]])


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
