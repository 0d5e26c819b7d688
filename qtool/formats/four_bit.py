"""NF4 and FP4, the reference: what every backend must reproduce, written for reading.

A weight is flattened row by row and cut into blocks, the last one padded with zeros. Per block

    absmax = max |x|            NaN does not count; float32
    v      = x * (1 / absmax)   the reciprocal first (`reciprocal.py`), then the product
    code   = decision(v)        NF4: thresholds exceeded; FP4: sign, and thresholds |v| exceeds

with float32 subnormals flushed to zero at every step (`floats.flush_subnormals`). Comparisons with
NaN are false, which decides what has no value: a block of zeros (0 * inf), a NaN, and an infinity
(inf * 0) have code 0; beside an infinity everything finite is scaled to 0. A block of nothing but
NaN has absmax -FLT_MAX. All of this is what bitsandbytes' CUDA kernels do.

Two codes share a byte, the earlier one in the high half; an odd count is padded with a zero, which
takes the code that zeros have in its block:

    element   0  1   2  3   4  -
    byte      [0 |1] [2 |3] [4 |0]
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qtool.formats.codebooks import (
    CODES,
    FP4_MAGNITUDE_CODES,
    FP4_SIGN_BIT,
    FP4_THRESHOLDS,
    NF4_THRESHOLDS,
)
from qtool.formats.floats import flush_subnormals
from qtool.formats.precisions import QuantType
from qtool.formats.reciprocal import reciprocal

_LOWEST = np.finfo(np.float32).min


def quantize_4bit(
    values: NDArray[np.float32], quant_type: QuantType, blocksize: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """float32 `values` (n,) -> packed uint8 (ceil(n/2),), absmax float32 (ceil(n/blocksize),)."""
    scaled, absmax = scale_blocks(values, blocksize)
    codes = nf4_codes(scaled) if quant_type == "nf4" else fp4_codes(scaled)
    return pack_codes(codes)[: -(-values.size // 2)], absmax


def scale_blocks(
    values: NDArray[np.float32], blocksize: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`values` (n,) padded to whole blocks and times 1/absmax; absmax (ceil(n/blocksize),)."""
    num_blocks = -(-values.size // blocksize)
    padded = np.zeros(num_blocks * blocksize, np.float32)
    padded[: values.size] = flush_subnormals(values)
    blocks = padded.reshape(num_blocks, blocksize)
    # Not np.fmax: it takes a signaling NaN for the maximum.
    absmax = np.where(np.isnan(blocks), _LOWEST, np.abs(blocks)).max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = reciprocal(absmax)
        scaled = flush_subnormals(blocks * inverse[:, None])
    return scaled.reshape(-1), absmax


def nf4_codes(scaled: NDArray[np.float32]) -> NDArray[np.uint8]:
    """NF4 codes uint8 (n,) of `scaled` values (n,)."""
    return _thresholds_exceeded(scaled, NF4_THRESHOLDS)


def fp4_codes(scaled: NDArray[np.float32]) -> NDArray[np.uint8]:
    """FP4 codes uint8 (n,) of `scaled` values (n,)."""
    magnitude = FP4_MAGNITUDE_CODES[_thresholds_exceeded(np.abs(scaled), FP4_THRESHOLDS)]
    return magnitude | np.where(scaled < 0, FP4_SIGN_BIT, 0).astype(np.uint8)


def _thresholds_exceeded(
    scaled: NDArray[np.float32], thresholds: NDArray[np.float32]
) -> NDArray[np.uint8]:
    count = np.searchsorted(thresholds, scaled, side="left")
    return np.where(np.isnan(scaled), 0, count).astype(np.uint8)


def pack_codes(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An even number of codes, uint8 (n,) -> bytes (n/2,)."""
    return codes[0::2] << np.uint8(4) | codes[1::2]


def unpack_codes(packed: NDArray[np.uint8], num_values: int) -> NDArray[np.uint8]:
    """The inverse of `pack_codes`: uint8 codes (num_values,)."""
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:num_values]


def dequantize_4bit(
    packed: NDArray[np.uint8],
    absmax: NDArray[np.float32],
    quant_type: QuantType,
    blocksize: int,
    num_values: int,
) -> NDArray[np.float32]:
    """float32 (num_values,): table entry times absmax; round with `floats.narrow`."""
    values = CODES[quant_type][unpack_codes(packed, num_values)]
    with np.errstate(invalid="ignore", over="ignore"):
        return flush_subnormals(values * np.repeat(absmax, blocksize)[:num_values])
