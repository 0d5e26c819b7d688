"""Codes found with one comparison: the thresholds of a code table, sorted into bins.

NF4 and FP4 have 32 bins, one per lane of a warp; see quantize_4bit.cu.
The decided value (v for NF4, |v| for FP4) times `scale`, rounded to an integer, plus `zero_bin`
is its bin. `scale` is such that every bin contains one threshold at most, and none lies so near to
the edge of a bin that rounding could take its neighbourhood to the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qtool.formats.codebooks import FP4_THRESHOLDS, NF4_THRESHOLDS, dynamic_thresholds
from qtool.formats.double_quant import dynamic_codes

NUM_BINS = 32
NAN_BIN = 31  # NaN has ones in its lowest bits
UNREACHED = 2.0  # the threshold of a bin that contains none: no scaled value is above it
EDGE_MARGIN = 2.0**-12  # in units of bins; float32 sums near 2^23 are exact to a half of 2^-23


@dataclass(frozen=True, slots=True)
class DecisionBins:
    """`codes[i]`, and one more above `thresholds[i]`."""

    scale: int
    zero_bin: int
    thresholds: tuple[float, ...]
    codes: tuple[int, ...]


def nf4_bins() -> DecisionBins:
    """For v in [-1, 1], codes 0 to 15."""
    return make_bins(NF4_THRESHOLDS, scale=15, zero_bin=15)


def fp4_bins() -> DecisionBins:
    """For |v| in [0, 1], ranks 0 to 7 of the magnitude."""
    return make_bins(FP4_THRESHOLDS, scale=28, zero_bin=0)


def make_bins(thresholds: NDArray[np.float32], scale: int, zero_bin: int) -> DecisionBins:
    """Sort ascending float32 `thresholds` (k,) into bins.

    Raises:
        ValueError: two thresholds share a bin, or one lies on an edge.
    """
    positions = thresholds.astype(np.float64) * scale + zero_bin
    bins = np.rint(positions).astype(int)
    if np.unique(bins).size < bins.size or bins.min() < 0 or bins.max() >= NAN_BIN:
        raise ValueError(f"scale {scale} does not separate the thresholds: bins {bins.tolist()}")
    if np.abs(np.abs(positions - bins) - 0.5).min() < EDGE_MARGIN:
        raise ValueError(f"scale {scale} puts a threshold on the edge of a bin")
    table = np.full(NUM_BINS, UNREACHED, np.float32)
    table[bins] = thresholds
    codes = np.searchsorted(bins, np.arange(NUM_BINS), side="left")
    codes[NAN_BIN] = 0
    return DecisionBins(scale, zero_bin, tuple(map(float, table)), tuple(map(int, codes)))


@dataclass(frozen=True, slots=True)
class DynamicSlots:
    """The dynamic map by the upper 15 bits of a value, magnitudes from `first_slot` on.

    `codes[i]`, and one more above `thresholds[i]`; positive values first, then negative ones.
    """

    first_slot: int
    thresholds: tuple[float, ...]
    codes: tuple[int, ...]


SLOT_SHIFT = 17  # sign, exponent and 6 bits of mantissa are left
FIRST_EXPONENT = -23  # below it everything has the code of zero


def dynamic_slots() -> DynamicSlots:
    """The slots for magnitudes up to 1 and a little more; the last of each sign is for NaN.

    Raises:
        ValueError: two thresholds share a slot.
    """
    first_slot = (127 + FIRST_EXPONENT) << 6
    slots = np.arange(first_slot, 128 << 6, dtype=np.uint32)
    nearest = slots << SLOT_SHIFT
    farthest = nearest | np.uint32((1 << SLOT_SHIFT) - 1)
    nearest[0] = 0  # what is smaller shares the first slot
    sign = np.uint32(1 << 31)
    codes = np.concatenate([_codes(nearest), _codes(farthest | sign)])  # of the least value
    if np.any(np.concatenate([_codes(farthest), _codes(nearest | sign)]) - codes > 1):
        raise ValueError("two thresholds of the dynamic map share a slot")
    thresholds = np.append(dynamic_thresholds(), np.float32(UNREACHED))[codes]
    codes[[slots.size - 1, -1]] = 0
    return DynamicSlots(first_slot, tuple(map(float, thresholds)), tuple(map(int, codes)))


def _codes(bits: NDArray[Any]) -> NDArray[np.int64]:
    return dynamic_codes(bits.view(np.float32)).astype(np.int64)
