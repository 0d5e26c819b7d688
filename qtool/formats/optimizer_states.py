"""States of optimizers in 8 bit: blocks of 256 values, absmax each, codes of the dynamic maps.

    absmax = max |state| of a block            0 where that is below 2^-100: all codes are zero's
    scaled = state * (1 / absmax)              two float32 roundings
    code   = nearest entry of the map to `scaled`; halfway takes the one nearer to zero
    read back: map[code] * absmax

Where absmax is above 2^20, state and absmax are multiplied by 2^-120 before they are scaled, so
that no reciprocal is subnormal.

First moments have the signed map, second moments, which are never negative, the unsigned one.
The maps and the layout are bitsandbytes'. The signed map has no -1: the code of -1 is 0 (-0.993).
"""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qtool.formats.codebooks import dynamic_map

BLOCKSIZE: Final = 256
# Tensors with fewer values keep their states in float32, as in bitsandbytes.
SMALLEST_8BIT: Final = 4096
# The least absmax, and the least value under a root: both stay far from subnormal numbers.
SMALLEST: Final = np.float32(2.0**-100)
LARGE: Final = np.float32(2.0**20)
LARGE_SCALE: Final = np.float32(2.0**-120)

ZERO_CODE: Final = 127  # of the signed map; the unsigned one has zero at 0

# Codes are looked up by the upper 16 bits of scaled * 2^-103: that makes all that has zero's code,
# which is everything below 2^-23, subnormal, and slots begin at 0.
SLOT_SCALE: Final = np.float32(2.0**-103)
NUM_SLOTS: Final = 25 << 7  # up to 2: a scaled value may round to a little more than 1


@cache
def magnitude_thresholds(signed: bool) -> NDArray[np.float32]:
    """float32 (128,) or (255,): how many of them a magnitude exceeds tells its code.

    They are the midpoints between neighbours, rounded down: a float32 exceeds one if and only if
    it exceeds the other.
    """
    values = dynamic_map(signed)[ZERO_CODE if signed else 0 :].astype(np.float64)
    midpoints = (values[:-1] + values[1:]) / 2
    rounded = midpoints.astype(np.float32)
    thresholds = np.where(rounded > midpoints, np.nextafter(rounded, np.float32(0)), rounded)
    thresholds.setflags(write=False)
    return thresholds


def nearest_codes(scaled: NDArray[np.float32], signed: bool) -> NDArray[np.uint8]:
    """uint8 codes of `scaled` values, of the same shape, from -1 or 0 to 1."""
    exceeded = np.searchsorted(magnitude_thresholds(signed), np.abs(scaled), side="left")
    if not signed:
        return exceeded.astype(np.uint8)
    negative = np.maximum(ZERO_CODE - exceeded, 0)
    return np.where(scaled < 0, negative, ZERO_CODE + exceeded).astype(np.uint8)


@cache
def slot_table(signed: bool) -> NDArray[np.uint32]:
    """uint32 (NUM_SLOTS,): `(table[bits >> 16] + bits) >> 16` is the code of a magnitude.

    `bits` are those of the scaled magnitude * SLOT_SCALE, a float32; codes of the signed map are
    those of positive values. A slot has one threshold at most, and its entry is such that the
    lower 16 bits carry if they exceed it.

    Raises:
        ValueError: two thresholds share a slot.
    """
    slots = np.arange(NUM_SLOTS, dtype=np.uint32)
    first, last = (
        nearest_codes((bits.view(np.float32) / SLOT_SCALE), signed).astype(np.uint32)
        for bits in (slots << np.uint32(16), slots << np.uint32(16) | np.uint32(0xFFFF))
    )
    if np.any(last - first > 1):
        raise ValueError("two thresholds of a dynamic map share a slot")
    thresholds = (magnitude_thresholds(signed) * SLOT_SCALE).view(np.uint32) & np.uint32(0xFFFF)
    next_threshold = np.minimum(first - (ZERO_CODE if signed else 0), thresholds.size - 1)
    carries = np.where(last > first, 0xFFFF - thresholds[next_threshold], 0).astype(np.uint32)
    table = ((first - slots) << np.uint32(16)) + carries
    table.setflags(write=False)
    return table
