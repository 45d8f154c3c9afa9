"""numba: from pairs to the error, the activations' gradients and the weights' gradients.

A token's decoder rows are added up while its error lies in the first cache, and read again for the activations' gradients; a feature's two gradient rows
are added up from the rows of the tokens on which it fires. Rows are taken four at a time, which saves three of four passes over the sum. The
order of every sum is that of the pairs.
"""

import numpy as np

from stagediff.sae.sparse.cpu_bits import jitted, narrowed, widened

__all__ = ["FEATURES_PER_SUM", "TOKENS_PER_SUM", "decoded", "gathered", "gradients", "sorted_pairs"]

TOKENS_PER_SUM = 64
FEATURES_PER_SUM = 64
"""Tokens or features whose share of a sum over all of them is added up first: fixed, so that threads do not change any sum."""


@jitted
def _add_rows(out, rows, index, weight, first, last):
    """out [d] += sum of weight[j] * rows[index[j]] over j from `first` to `last`."""
    d = len(out)
    j = first
    while j + 4 <= last:  # unsigned: no index counts from the end; and no views of rows, which would be counted references
        a, b, c, e = np.uint32(index[j]), np.uint32(index[j + 1]), np.uint32(index[j + 2]), np.uint32(index[j + 3])
        va, vb, vc, ve = weight[j], weight[j + 1], weight[j + 2], weight[j + 3]
        for t in range(d):
            out[t] += va * widened(rows[a, t]) + vb * widened(rows[b, t]) + vc * widened(rows[c, t]) + ve * widened(rows[e, t])
        j += 4
    while j < last:
        a, va = np.uint32(index[j]), weight[j]
        for t in range(d):
            out[t] += va * widened(rows[a, t])
        j += 1


@jitted
def decoded(first, last, feature, value, start, W_dec, b_dec, x, factor, error, scaled, squares, sums, g):
    """Tokens first * TOKENS_PER_SUM to last * TOKENS_PER_SUM. sums [parts, d]: the errors' sums over TOKENS_PER_SUM tokens each."""
    F, d = W_dec.shape
    n = len(x)
    whole = np.empty(d, np.float32)
    for part in range(first, last):
        total = sums[part]
        for t in range(d):
            total[t] = 0
        for b in range(part * TOKENS_PER_SUM, min(n, (part + 1) * TOKENS_PER_SUM)):
            e, s = error[b], scaled[b]
            begin, end = start[b], start[b + 1]
            while end > begin and feature[end - 1] == F:
                end -= 1
            for t in range(d):
                e[t] = b_dec[t] - x[b, t]
            _add_rows(e, W_dec, feature, value, begin, end)
            square = np.float32(0)
            for t in range(d):
                square += e[t] * e[t]
                total[t] += e[t]
                whole[t] = e[t] * factor
                s[t] = narrowed(s, whole[t])
            squares[b] = square
            for j in range(begin, end):
                f = np.uint32(feature[j])
                dot = np.float32(0)
                for t in range(d):
                    dot += widened(W_dec[f, t]) * whole[t]
                g[j] = dot
            for j in range(end, start[b + 1]):
                g[j] = 0


@jitted
def sorted_pairs(feature, F, order, start):
    """A stable counting sort by feature: order [P], in which empty slots come last, and start [F + 1]."""
    count = np.zeros(F + 2, np.int32)
    for i in range(len(feature)):
        count[feature[i] + 1] += 1
    for f in range(F + 1):
        count[f + 1] += count[f]
    start[:] = count[: F + 1]
    for i in range(len(feature)):
        f = feature[i]
        order[count[f]] = i
        count[f] += 1


@jitted
def gathered(first, last, order, token, value, g, tokens, values, gs):
    """Token, value and gradient of the pairs first to last of `order`."""
    for i in range(first, last):
        j = order[i]
        tokens[i], values[i], gs[i] = token[j], value[j], g[j]


@jitted
def gradients(
    first,
    last,
    start,
    token,
    value,
    g,
    scaled,
    inner,
    W_enc,
    W_dec,
    unit,
    slot,
    more_enc,
    more_dec,
    more_b,
    out_enc,
    out_dec,
    out_b,
    squares,
    sums,
):
    """Features first * FEATURES_PER_SUM to last * FEATURES_PER_SUM.

    slot [F]: a feature's row in more_*, -1: none. squares [F] float64; sums [parts, d]: sums of out_b * W_enc over FEATURES_PER_SUM features each.
    """
    F, d = W_dec.shape
    for part in range(first, last):
        total = sums[part]
        for t in range(d):
            total[t] = 0
        for f in range(part * FEATURES_PER_SUM, min(F, (part + 1) * FEATURES_PER_SUM)):
            dec, enc = out_dec[f], out_enc[f]
            bias = np.float32(0)
            s = slot[f]
            if s >= 0:
                bias = more_b[s]
                for t in range(d):
                    dec[t] = more_dec[s, t]
                    enc[t] = more_enc[s, t]
            else:
                for t in range(d):
                    dec[t] = 0
                    enc[t] = 0
            begin, end = start[f], start[f + 1]
            if begin == end and s < 0:
                out_b[f] = 0
                squares[f] = 0
                continue
            _add_rows(dec, scaled, token, value, begin, end)
            _add_rows(enc, inner, token, g, begin, end)
            for j in range(begin, end):
                bias += g[j]
            out_b[f] = bias
            if unit:
                row = W_dec[f]
                along = np.float32(0)
                for t in range(d):
                    along += dec[t] * row[t]
                for t in range(d):
                    dec[t] -= along * row[t]
            row = W_enc[f]
            square = np.float32(0)
            for t in range(d):
                square += dec[t] * dec[t] + enc[t] * enc[t]
                total[t] += bias * row[t]
            squares[f] = np.float64(square) + np.float64(bias) * np.float64(bias)
