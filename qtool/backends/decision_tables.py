"""16-bit sources quantized without arithmetic: for every absmax, where the codes change.

The scaled value x * (1/absmax) grows with x, and codes change at 15 thresholds, so the values
beyond a threshold are exactly those above some value of the source dtype. There are only some
32,000 possible absmax, so all those values fit into a table, which is computed here by bisection
with the reference's own arithmetic: subnormals, overflow of 1/absmax and zero blocks are right by
construction. A kernel then only compares 16-bit integers, 16 of them per AVX2 instruction.

Values are ordered by their sortable key, int16: the bits of a positive value, the bits of a
negative one with all but the sign inverted. The rank of a value is the number of thresholds that
it exceeds, and so the position of its code among the codes ordered by value.
"""

from __future__ import annotations

from functools import cache
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from qtool.formats.codebooks import (
    FP4_MAGNITUDE_CODES,
    FP4_SIGN_BIT,
    FP4_THRESHOLDS,
    NF4_THRESHOLDS,
    dynamic_thresholds,
)
from qtool.formats.double_quant import dynamic_codes
from qtool.formats.floats import NUMPY_DTYPES, SMALLEST_NORMAL, flush_subnormals, widen
from qtool.formats.precisions import QuantType
from qtool.formats.reciprocal import reciprocal
from qtool.formats.tensors import SourceDtype

HalfDtype = Literal["BF16", "F16"]

# The bits of infinity; larger magnitudes are NaN.
INFINITY_BITS: Final[dict[SourceDtype, int]] = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}

# The code of each rank; FP4 has the negative ones first, then -0 (code 8, stored as +0) and +0.
_FP4_ORDER = np.concatenate([FP4_MAGNITUDE_CODES[::-1] | FP4_SIGN_BIT, FP4_MAGNITUDE_CODES])
CODE_ORDER: Final[dict[QuantType, NDArray[np.uint8]]] = {
    "nf4": np.arange(16, dtype=np.uint8),
    "fp4": _FP4_ORDER.astype(np.uint8),
}
# A magnitude on a threshold has the lower code, so that negative values must exceed what is just
# below it. Between -0 and +0 stands the last float before zero, subnormals being zero.
_FP4_THRESHOLDS = np.concatenate(
    [
        np.nextafter(-FP4_THRESHOLDS[::-1], np.float32(-np.inf)),
        [-SMALLEST_NORMAL],
        FP4_THRESHOLDS,
    ]
)


@cache
def absmax_values(dtype: HalfDtype) -> NDArray[np.float32]:
    """float32 (INFINITY_BITS + 1,): the absmax that each magnitude's bits stand for."""
    return flush_subnormals(_from_bits(np.arange(INFINITY_BITS[dtype] + 1), dtype))


@cache
def threshold_keys(dtype: HalfDtype, quant_type: QuantType) -> NDArray[np.int16]:
    """int16 (INFINITY_BITS + 1, 15): row absmax bits, column k: the largest key of rank <= k."""
    thresholds = NF4_THRESHOLDS if quant_type == "nf4" else _FP4_THRESHOLDS
    code_0 = np.float32(-np.inf if quant_type == "nf4" else 0)  # what NaN has, as a value
    with np.errstate(divide="ignore"):
        inverse = reciprocal(absmax_values(dtype))[:, None]
    below = np.full((inverse.size, thresholds.size), ~INFINITY_BITS[dtype], np.int32)
    above = np.full_like(below, INFINITY_BITS[dtype])
    while np.any(above - below > 1):
        key = (below + above) >> 1
        values = flush_subnormals(_from_bits(np.where(key < 0, key ^ 0x7FFF, key), dtype))
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = flush_subnormals(values * inverse)
        exceeds = np.where(np.isnan(scaled), code_0, scaled) > thresholds
        above = np.where(exceeds, key, above)
        below = np.where(exceeds, below, key)
    return below.astype(np.int16)


@cache
def search_tables(dtype: HalfDtype, quant_type: QuantType) -> NDArray[np.uint8]:
    """uint8 ((INFINITY_BITS + 1) * 64,): `threshold_keys` laid out for binary search.

    A row's 64 bytes are four parts of 16, one for each step of the search. A part has the low
    bytes of the thresholds that the step may compare with, then their high bytes.
    """
    keys = threshold_keys(dtype, quant_type).view(np.uint16)
    rows = np.zeros((len(keys), 4, 16), np.uint8)
    for step in range(4):
        half = 8 >> step
        columns = keys[:, half - 1 :: 2 * half]  # the middle one, the middles of the halves ...
        count = columns.shape[1]
        rows[:, step, :count] = columns & 0xFF
        rows[:, step, count : 2 * count] = columns >> 8
    return rows.reshape(-1)


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
