"""Number columns packed for a page: base64 of typed arrays, quantised where that is invisible, decoded by `stagediff.column` in the script.

A page about 262,144 features holds more than thirty numbers per feature; as JSON that is hundreds of megabytes, packed about fifteen.
Every function returns a JSON-able dict `{"as": encoding, "n": length, "b64": …}` with what the decoder needs.
"""

import base64
from typing import Any

import numpy as np

__all__ = ["pack", "pack_linear", "pack_log"]

_MISSING = 65535
"""The 16-bit code of NaN."""
_TOP = 65534


def pack(values: np.ndarray) -> dict[str, Any]:
    """Exact: uint8, uint16, uint32, int32 or float32 as they are (little endian). Raises TypeError for other types."""
    values = np.ascontiguousarray(values)
    if values.dtype.name not in ("uint8", "uint16", "uint32", "int32", "float32"):
        raise TypeError(f"a page cannot hold {values.dtype}; convert it to uint8, uint16, uint32, int32 or float32")
    raw = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    return {"as": values.dtype.name, "n": int(values.size), "b64": base64.b64encode(raw).decode("ascii")}


def pack_linear(values: np.ndarray, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """16 bits, even steps between `low` and `high` (default: the finite values' range); NaN and infinities decode as NaN.

    The error is at most (high - low) / 131,068: 1.6e-5 for a cosine. Values outside the range are clipped to it.
    """
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    low = _edge(values[finite], low, np.min)
    high = _edge(values[finite], high, np.max)
    span = high - low if high > low else 1.0
    codes = np.full(values.shape, _MISSING, dtype=np.uint16)
    codes[finite] = np.rint(np.clip((values[finite] - low) / span, 0, 1) * _TOP).astype(np.uint16)
    return {**pack(codes), "as": "linear", "low": low, "span": span}


def pack_log(values: np.ndarray) -> dict[str, Any]:
    """16 bits, even steps in the logarithm: for densities and other positive values over many decades. 0 stays 0; negative and non-finite decode as NaN.

    The relative error is half a step: 1.1e-4 for a range of six decades.
    """
    values = np.asarray(values, dtype=np.float64)
    positive = np.isfinite(values) & (values > 0)
    logs = np.log(values[positive])
    low, high = _edge(logs, None, np.min), _edge(logs, None, np.max)
    span = high - low if high > low else 1.0
    codes = np.full(values.shape, _MISSING, dtype=np.uint16)
    codes[values == 0] = 0
    codes[positive] = 1 + np.rint((logs - low) / span * (_TOP - 1)).astype(np.uint16)
    return {**pack(codes), "as": "log", "low": low, "span": span}


def _edge(values: np.ndarray, given: float | None, of: Any) -> float:
    if given is not None:
        return float(given)
    return float(of(values)) if values.size else 0.0
