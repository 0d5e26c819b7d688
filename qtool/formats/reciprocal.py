"""1/absmax as bitsandbytes' CUDA kernels compute it.

They are built with fast math: the reciprocal is the hardware's approximation, which for some
numbers is a unit in the last place above or below the correctly rounded one. That decides INT8 and
FP4 codes that lie next to a threshold. Which numbers these are depends on the significand alone;
for significands of 11 bits, which is every absmax of a bfloat16 or float16 weight, the tables below
say it. They were read off an H200. All other numbers have the correctly rounded reciprocal here.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from qtool.formats.floats import flush_subnormals

SIGNIFICAND_BITS: Final = 10  # after the leading one; float32 has 13 more
# The significands whose reciprocal is one unit in the last place above the correctly rounded one,
_ABOVE: Final = (
    11,
    17,
    18,
    20,
    48,
    91,
    97,
    98,
    104,
    105,
    113,
    138,
    147,
    148,
    153,
    203,
    204,
    209,
    225,
    226,
    252,
    260,
    296,
    298,
    304,
    305,
    346,
    371,
    386,
    395,
    396,
    403,
    408,
    409,
    417,
    425,
    439,
    449,
    453,
    454,
    458,
    467,
    481,
    488,
    498,
    505,
    507,
    519,
    520,
    521,
    528,
    531,
    543,
    547,
    563,
    564,
    627,
    647,
    648,
    650,
    651,
    667,
    675,
    676,
    687,
    700,
    701,
    724,
    728,
    785,
    786,
    787,
    789,
    805,
    807,
    813,
    823,
    872,
    874,
    876,
    878,
    893,
    920,
    923,
    928,
    944,
    968,
    987,
    988,
    997,
)
# and those where it is below.
_BELOW: Final = (
    6,
    14,
    32,
    46,
    62,
    70,
    77,
    86,
    87,
    88,
    126,
    127,
    135,
    160,
    176,
    179,
    214,
    219,
    221,
    274,
    287,
    325,
    349,
    401,
    415,
    443,
    445,
    473,
    474,
    558,
    614,
    751,
    783,
    950,
    954,
    956,
    957,
    965,
    1010,
    1016,
)


def _corrections() -> NDArray[np.int8]:
    table = np.zeros(1 << SIGNIFICAND_BITS, np.int8)
    table[list(_ABOVE)] = 1
    table[list(_BELOW)] = -1
    return table


# int8 (1024,): units in the last place to add, by significand.
CORRECTIONS: Final = _corrections()


def reciprocal(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / `values`, of any shape; subnormal results are zero, and zero has an infinite one."""
    with np.errstate(divide="ignore", over="ignore"):
        rounded = np.asarray(flush_subnormals(np.float32(1) / values))
    bits = np.asarray(values).view(np.uint32)
    is_short = (bits & np.uint32((1 << 23 - SIGNIFICAND_BITS) - 1)) == 0
    is_normal = np.isfinite(rounded) & (rounded != 0)
    significands = bits >> np.uint32(23 - SIGNIFICAND_BITS) & np.uint32(CORRECTIONS.size - 1)
    units = np.where(is_short & is_normal, CORRECTIONS[significands], 0)
    return (rounded.view(np.int32) + units).astype(np.int32).view(np.float32)
