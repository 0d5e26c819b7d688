"""16-bit sources quantized without arithmetic: for every absmax, where the codes change.

The scaled value x * (1/absmax) grows with x, so the values whose code is at least k are exactly
those above some value of the source dtype. There are only some 32,000 possible absmax, so all
those values fit into a table, which is computed here by bisection with the reference's own
arithmetic: subnormals, overflow of 1/absmax and zero blocks are right by construction. A kernel
then only compares 16-bit integers, 16 of them per AVX2 instruction.

Values are ordered by their sortable key, int16: the bits of a positive value, the bits of a
negative one with all but the sign inverted.
"""

from __future__ import annotations

from functools import cache
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from qtool.formats.codebooks import FP4_THRESHOLDS, NF4_THRESHOLDS, dynamic_thresholds
from qtool.formats.double_quant import dynamic_codes
from qtool.formats.floats import NUMPY_DTYPES, flush_subnormals, widen

HalfDtype = Literal["BF16", "F16"]

# The bits of infinity; larger magnitudes are NaN.
INFINITY_BITS: Final[dict[HalfDtype, int]] = {"BF16": 0x7F80, "F16": 0x7C00}


@cache
def absmax_values(dtype: HalfDtype) -> NDArray[np.float32]:
    """float32 (INFINITY_BITS + 1,): the absmax that each magnitude's bits stand for."""
    return flush_subnormals(_from_bits(np.arange(INFINITY_BITS[dtype] + 1), dtype))


@cache
def nf4_table(dtype: HalfDtype) -> NDArray[np.int16]:
    """int16 (INFINITY_BITS + 1, 15): row absmax bits, column k: the largest key of code <= k."""
    return _largest_keys(dtype, NF4_THRESHOLDS, lowest=~INFINITY_BITS[dtype])


@cache
def fp4_table(dtype: HalfDtype) -> NDArray[np.int16]:
    """int16 (INFINITY_BITS + 1, 8): the largest magnitude bits that exceed at most k thresholds.

    The last column is for the threshold 0: up to there a negative value has no sign.
    """
    return _largest_keys(dtype, np.append(FP4_THRESHOLDS, np.float32(0)), lowest=0)


def _largest_keys(
    dtype: HalfDtype, thresholds: NDArray[np.float32], lowest: int
) -> NDArray[np.int16]:
    """Bisect between `lowest`, which exceeds no threshold, and infinity, which is taken to."""
    with np.errstate(divide="ignore"):
        inverse = flush_subnormals(np.float32(1) / absmax_values(dtype))[:, None]
    below = np.full((inverse.size, thresholds.size), lowest, np.int32)
    above = np.full_like(below, INFINITY_BITS[dtype])
    while np.any(above - below > 1):
        key = (below + above) >> 1
        values = flush_subnormals(_from_bits(np.where(key < 0, key ^ 0x7FFF, key), dtype))
        with np.errstate(over="ignore", invalid="ignore"):
            exceeds = flush_subnormals(values * inverse) > thresholds
        above = np.where(exceeds, key, above)
        below = np.where(exceeds, below, key)
    return below.astype(np.int16)


def _from_bits(
    bits: NDArray[np.int64] | NDArray[np.int32], dtype: HalfDtype
) -> NDArray[np.float32]:
    return widen(bits.astype(np.uint16).view(NUMPY_DTYPES[dtype]), dtype)


@cache
def dynamic_guesses() -> NDArray[np.uint8]:
    """uint8 (65536,): by the upper 16 bits of a float32, the code of the least value with them.

    Between values that share their upper bits lies one threshold of the dynamic map at most, so
    the code of any of them is its guess, or one more if it exceeds the threshold at the guess.
    """
    upper = np.arange(1 << 16, dtype=np.uint32)
    least = upper << np.uint32(16) | np.where(upper >= 1 << 15, 0xFFFF, 0).astype(np.uint32)
    return dynamic_codes(least.view(np.float32))


@cache
def dynamic_steps() -> NDArray[np.float32]:
    """float32 (256,): the thresholds of the dynamic map, and one that nothing exceeds."""
    return np.append(dynamic_thresholds(), np.float32(np.inf))
