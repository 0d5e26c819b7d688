"""Code tables and decision thresholds of the 4-bit and 8-bit formats, bit for bit.

A code is the number of thresholds that a scaled value exceeds (strictly), for NF4 and the dynamic
map directly, for FP4 by its magnitude. All tables are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qtool.formats.precisions import QuantType

FloatTable = NDArray[np.float32]


def _frozen(values: FloatTable) -> FloatTable:
    values.setflags(write=False)
    return values


def _float32_from_bits(bits: Sequence[int]) -> FloatTable:
    return _frozen(np.array(bits, dtype=np.uint32).view(np.float32))


# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero at index 7.
NF4_CODE: Final = _float32_from_bits(
    [
        0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0,
        0xBE91A24D, 0xBE3D353F, 0xBDBA7871, 0x00000000,
        0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A,
        0x3EE1A4B8, 0x3F1007AB, 0x3F3913B3, 0x3F800000,
    ]
)  # fmt: skip
# The midpoints between neighbours; a value on a midpoint takes the lower code.
NF4_THRESHOLDS: Final = _frozen(((NF4_CODE[:-1] + NF4_CODE[1:]) / np.float32(2)).astype(np.float32))

# Sign in bit 3, a magnitude code in bits 0..2; not monotone. "Minus zero" (8) is stored as +0.
FP4_CODE: Final = _float32_from_bits(
    [
        0x00000000, 0x3BAAAAAB, 0x3F2AAAAB, 0x3F800000,
        0x3EAAAAAB, 0x3F000000, 0x3E2AAAAB, 0x3E800000,
        0x00000000, 0xBBAAAAAB, 0xBF2AAAAB, 0xBF800000,
        0xBEAAAAAB, 0xBF000000, 0xBE2AAAAB, 0xBE800000,
    ]
)  # fmt: skip
# The decimals that bitsandbytes' CUDA kernel compares magnitudes with: near the midpoints, not on
# them. FP4_MAGNITUDE_CODES[k] is the code of a magnitude that exceeds k thresholds.
FP4_THRESHOLDS: Final = _frozen(
    np.array(
        [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333], np.float32
    )
)
FP4_MAGNITUDE_CODES: Final = np.array([0, 1, 6, 7, 4, 5, 2, 3], dtype=np.uint8)
FP4_SIGN_BIT: Final = 8

# The code of zero in a block that is not all zeros; it pads an odd number of values.
PADDING_CODES: Final[dict[QuantType, int]] = {"nf4": 7, "fp4": 0}
CODES: Final[dict[QuantType, FloatTable]] = {"nf4": NF4_CODE, "fp4": FP4_CODE}


@cache
def dynamic_map(signed: bool = True) -> FloatTable:
    """The 8-bit dynamic map, float32 (256,), ascending.

    Seven decades with 1, 2, 4 ... 64 values each (twice as many where no half is spent on
    negatives), and 0 and 1. The values are the midpoints of equal steps within a decade.
    """
    values: list[np.float32] = [np.float32(0), np.float32(1)]
    for decade in range(7):
        edges = _linspace_like_torch(2**decade + 1 if signed else 2 ** (decade + 1) + 1)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (decade - 6)) * middles
        values.extend(scaled)
        if signed:
            values.extend(-scaled)
    return _frozen(np.sort(np.array(values, dtype=np.float32)))


def _linspace_like_torch(num_points: int) -> FloatTable:
    """`torch.linspace(0.1, 1, num_points)` to the bit, which numpy.linspace is not.

    torch steps up from the start in the first half and down from the end in the second, each
    element rounded once; float64 holds the exact sums.
    """
    start, end = np.float32(0.1), np.float32(1)
    step = np.float64((end - start) / np.float32(num_points - 1))
    index = np.arange(num_points)
    upward = np.float64(start) + step * index
    downward = np.float64(end) - step * (num_points - 1 - index)
    return np.where(index < num_points // 2, upward, downward).astype(np.float32)


@cache
def dynamic_thresholds() -> FloatTable:
    """float32 (255,): a value's code in the signed dynamic map is how many of these it exceeds.

    They are the midpoints between neighbours. bitsandbytes' CUDA search gives a value that lies
    exactly on a midpoint the even one of the two codes, so the midpoints above odd codes are
    lowered by one ulp.
    """
    table = dynamic_map()
    midpoints = (table[:-1] + table[1:]) * np.float32(0.5)
    midpoints[1::2] = np.nextafter(midpoints[1::2], np.float32(-np.inf))
    return _frozen(midpoints)
