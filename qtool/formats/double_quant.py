"""Double quantization, the reference: a tensor's absmax values in 8 bit.

    offset        = mean(absmax)                     float64 in a fixed order, rounded once
    nested_absmax = max |absmax - offset|            per 256 blocks, like absmax itself
    code          = nearest entry of the dynamic map to (absmax - offset) * (1 / nested_absmax)
    read back:      dynamic_map[code] * nested_absmax + offset          two float32 roundings

The mean's order is part of the format, because every backend, number of threads and tile size
must give the same bytes. It is one that a GPU adds in naturally:

    1. widen to float64 and cut into groups of 256, the last one padded with zeros;
    2. halve each group until one value is left: s[i] += s[i + 128] for i < 128, then 64, 32 ... 1;
    3. while more than one sum is left, treat the sums the same way, from 1;
    4. divide by the number of values in float64, round to float32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qtool.formats.codebooks import dynamic_map, dynamic_thresholds
from qtool.formats.floats import flush_subnormals
from qtool.formats.four_bit import scale_blocks
from qtool.formats.precisions import NESTED_BLOCKSIZE

SUM_GROUP = 256


def mean_in_fixed_order(absmax: NDArray[np.float32]) -> np.float32:
    """The mean of `absmax` (m,) as described above; 0 for an empty tensor."""
    if absmax.size == 0:
        return np.float32(0)
    with np.errstate(invalid="ignore", over="ignore"):
        sums = absmax.astype(np.float64)
        while True:
            sums = _halving_sums(sums)
            if sums.size == 1:
                return np.float32(flush_subnormals((sums / absmax.size).astype(np.float32))[0])


def _halving_sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of each group of 256 `values` (m,), float64 (ceil(m/256),)."""
    groups = np.zeros((-(-values.size // SUM_GROUP), SUM_GROUP))
    groups.reshape(-1)[: values.size] = values
    while groups.shape[1] > 1:
        half = groups.shape[1] // 2
        groups = groups[:, :half] + groups[:, half:]
    return groups[:, 0]


def quantize_absmax(
    absmax: NDArray[np.float32],
) -> tuple[NDArray[np.uint8], NDArray[np.float32], np.float32]:
    """`absmax` (m,) -> codes uint8 (m,), nested_absmax float32 (ceil(m/256),), offset."""
    offset = mean_in_fixed_order(absmax)
    with np.errstate(invalid="ignore"):
        scaled, nested_absmax = scale_blocks(absmax - offset, NESTED_BLOCKSIZE)
    return dynamic_codes(scaled)[: absmax.size], nested_absmax, offset


def dynamic_codes(scaled: NDArray[np.float32]) -> NDArray[np.uint8]:
    """8-bit codes (n,) of `scaled` values (n,) in the dynamic map; NaN has code 0."""
    codes = np.searchsorted(dynamic_thresholds(), scaled, side="left")
    return np.where(np.isnan(scaled), 0, codes).astype(np.uint8)


def dequantize_absmax(
    codes: NDArray[np.uint8], nested_absmax: NDArray[np.float32], offset: np.float32
) -> NDArray[np.float32]:
    """The inverse: absmax float32 (m,), as every reader of the format computes it."""
    scale = np.repeat(nested_absmax, NESTED_BLOCKSIZE)[: codes.size]
    with np.errstate(invalid="ignore", over="ignore"):
        return flush_subnormals(flush_subnormals(dynamic_map()[codes] * scale) + offset)
