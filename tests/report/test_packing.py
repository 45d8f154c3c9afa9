"""Packed columns decode to what went in, within the stated error. The decoder here is written from the docstrings, not shared with the page."""

import base64

import numpy as np
import pytest

from stagediff.packing import pack, pack_linear, pack_log


def decode(packed: dict) -> np.ndarray:
    raw = base64.b64decode(packed["b64"])
    if packed["as"] not in ("linear", "log"):
        return np.frombuffer(raw, dtype=packed["as"])
    out = []
    for low_byte, high_byte in zip(raw[::2], raw[1::2], strict=True):
        code = low_byte + 256 * high_byte
        if code == 65535:
            out.append(float("nan"))
        elif packed["as"] == "linear":
            out.append(packed["low"] + packed["span"] * code / 65534)
        else:
            out.append(0.0 if code == 0 else float(np.exp(packed["low"] + packed["span"] * (code - 1) / 65533)))
    return np.array(out)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "int32", "float32"])
def test_typed_columns_are_exact(kind):
    values = np.array([0, 1, 7, 200], dtype=kind)
    assert np.array_equal(decode(pack(values)), values)


def test_a_float64_column_is_refused_rather_than_truncated():
    with pytest.raises(TypeError, match="float64"):
        pack(np.zeros(3))


def test_cosines_are_kept_to_two_hundred_thousandths():
    values = np.random.default_rng(0).uniform(-1, 1, 5000)
    values[[3, 70]] = np.nan, np.inf
    back = decode(pack_linear(values, -1.0, 1.0))
    assert np.isnan(back[[3, 70]]).all()
    finite = np.isfinite(values)
    assert np.abs(back[finite] - values[finite]).max() <= 2 / 131_068 + 1e-12


def test_densities_keep_their_relative_size_over_eight_decades_and_zero_stays_zero():
    values = np.concatenate([[0.0], 10 ** np.random.default_rng(1).uniform(-8, 0, 4000), [np.nan, -1.0]])
    back = decode(pack_log(values))
    assert back[0] == 0
    assert np.isnan(back[-2:]).all()
    assert np.abs(back[1:-2] / values[1:-2] - 1).max() < 1.5e-4


@pytest.mark.parametrize("values", [np.zeros(0), np.full(4, np.nan), np.full(4, 0.25), np.zeros(4)])
def test_degenerate_columns_survive(values):
    for packed in (pack_linear(values), pack_log(values)):
        np.testing.assert_allclose(decode(packed), values, rtol=1e-9)
