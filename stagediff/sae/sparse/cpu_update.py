"""numba: one pass over the weights by feature row. Clip, Adam, the pull home, unit norm, the copies in compute type: each value is read and written once."""

import math

import numpy as np

from stagediff.sae.sparse.cpu_bits import jitted, narrowed

__all__ = ["rows", "vector"]


@jitted
def _adam(w, gradient, first, second, home, factor, rate, correction, part1, beta2, part2, eps, pull):
    """One step for the values w [n]; home: [n], or of length 0."""
    for t in range(len(w)):
        g = gradient[t] * factor
        m = first[t] + part1 * (g - first[t])
        v = beta2 * second[t] + part2 * (g * g)
        first[t] = m
        second[t] = v
        w[t] -= rate * m / (np.sqrt(v) * correction + eps)
    if len(home) > 0:
        for t in range(len(w)):
            w[t] += pull * (home[t] - w[t])


@jitted
def rows(begin, end, w, gradient, first, second, home, copy, numbers, unit):
    """Rows `begin` to `end` of w [F, d]. copy: [F, d] in compute type, or [0, d]; numbers: factor, rate, correction, part1, beta2, part2, eps, pull."""
    factor, rate, correction, part1, beta2, part2, eps, pull = numbers
    none = np.empty(0, np.float32)
    for f in range(begin, end):
        row = w[f]
        _adam(
            row,
            gradient[f],
            first[f],
            second[f],
            home[f] if len(home) > 0 else none,
            factor,
            rate,
            correction,
            part1,
            beta2,
            part2,
            eps,
            pull,
        )
        if unit:
            square = np.float32(0)
            for t in range(len(row)):
                square += row[t] * row[t]
            inverse = np.float32(1) / max(np.float32(math.sqrt(square)), np.float32(1e-12))
            for t in range(len(row)):
                row[t] *= inverse
        if len(copy) > 0:
            out = copy[f]
            for t in range(len(row)):
                out[t] = narrowed(out, row[t])


@jitted
def vector(begin, end, w, gradient, first, second, home, numbers):
    """Values `begin` to `end` of w [n]."""
    factor, rate, correction, part1, beta2, part2, eps, pull = numbers
    _adam(
        w[begin:end],
        gradient[begin:end],
        first[begin:end],
        second[begin:end],
        home[begin:end],
        factor,
        rate,
        correction,
        part1,
        beta2,
        part2,
        eps,
        pull,
    )
