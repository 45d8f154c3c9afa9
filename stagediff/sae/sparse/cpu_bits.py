"""numba: floats as bit patterns. bf16 lies in int16 arrays, and fp32 that is to be compared as patterns in int32 arrays; arithmetic is in fp32.

The conversions are written as LLVM instructions, so that loops over them become vector loops.
"""

import logging
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.errors import TypingError
from numba.extending import intrinsic as typed_intrinsic

__all__ = ["jitted", "narrowed", "widened"]

log = logging.getLogger("stagediff")
_said = False  # that compiled kernels are not kept


def jitted(function: Callable[..., Any]) -> Any:
    """Compiled at the first call and kept on disk: beside this file, else in the user's cache folder or NUMBA_CACHE_DIR.

    Sums may be reordered into vector lanes, always in the same way; NaN and infinity stay what they are.
    """
    global _said
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "nsz", "contract"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError as error:  # there is no place to keep it
        if not _said:
            log.warning(
                "Compiled kernels are not kept, so that every process compiles them anew: %s. Set NUMBA_CACHE_DIR to a writable folder.",
                error,
            )
        _said = True
        return njit(**options)(function)


intrinsic: Any = typed_intrinsic
"""Its typed form does not say that the first argument is numba's."""

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()


@intrinsic
def widened(typingctx: Any, pattern: Any) -> Any:
    """The fp32 value of a bf16 pattern (int16), of an fp32 pattern (int32), or of itself."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if pattern == types.int16:
            return builder.bitcast(builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16)), _F32)
        return builder.bitcast(args[0], _F32)

    if pattern not in (types.int16, types.int32, types.float32):
        raise TypingError(f"no pattern: {pattern}")
    return types.float32(pattern), generate


@intrinsic
def narrowed(typingctx: Any, array: Any, value: Any) -> Any:
    """An fp32 value as an element of `array`: as it is, or (int16) rounded to the nearest bf16, ties to even, as torch does."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if array.dtype == types.float32:
            return args[1]
        bits = builder.bitcast(args[1], _I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, ir.Constant(_I32, 0x7FFF))), ir.Constant(_I32, 16))
        is_nan = builder.fcmp_unordered("uno", args[1], args[1])
        return builder.trunc(builder.select(is_nan, ir.Constant(_I32, 0x7FC0), rounded), _I16)

    if array.dtype not in (types.int16, types.float32) or value != types.float32:
        raise TypingError(f"no conversion of {value} to {array}")
    return array.dtype(array, value), generate
