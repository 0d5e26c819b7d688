"""Launches dequantize_4bit.cu."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cupy_kernels.launch import THREADS, ceil_div, check_aligned, cuda_dtype, launch
from cupy_kernels.loader import load_kernel

_BLOCK_TILE = 4 * 256 * (THREADS // 32)  # values per thread block, as in the .cu


@dataclass(frozen=True, slots=True)
class NestedAbsmax:
    """absmax after double quantization, as addresses.

    Attributes:
        codes: uint8 (m,).
        nested_absmax: float32 (ceil(m/256),).
        nested_code: float32 (256,), the dynamic map.
        nested_offset: float32 (1,), the mean that was taken off.
    """

    codes: int
    nested_absmax: int
    nested_code: int
    nested_offset: int


def dequantize_4bit(
    packed: int,
    num_values: int,
    absmax: int | NestedAbsmax,
    quant_type: str,
    blocksize: int,
    dtype: str,
    values: int,
    stream: int,
) -> None:
    """Queue the inverse of `quantize_4bit` on `stream`; nested absmax is decoded on the way.

    Args:
        packed: address of uint8 (ceil(num_values/2),), 16-byte aligned.
        absmax: address of float32 (ceil(num_values/blocksize),), or the nested form.
        blocksize: a power of two, at least 8.
        values: address of the output of `dtype` BF16, F16 or F32, (num_values,), 16-byte aligned.

    Raises:
        ValueError: an unknown dtype or block size, or an address that is not aligned.
    """
    if blocksize < 8 or blocksize & (blocksize - 1):
        raise ValueError(f"blocksize {blocksize} is no power of two of at least 8")
    check_aligned(packed=packed, values=values)
    if num_values == 0:
        return
    nested = isinstance(absmax, NestedAbsmax)
    kernel = load_kernel(
        "dequantize_4bit", TARGET=cuda_dtype(dtype), QUANT_TYPE=quant_type, NESTED=int(nested)
    )
    if isinstance(absmax, NestedAbsmax):
        scales = (
            0,
            absmax.codes,
            absmax.nested_absmax,
            absmax.nested_code,
            absmax.nested_offset,
        )
    else:
        scales = (absmax, 0, 0, 0, 0)
    log2 = np.int32(blocksize.bit_length() - 1)
    arguments = (packed, num_values, log2, *scales, values)
    launch(kernel, (ceil_div(num_values, _BLOCK_TILE),), THREADS, arguments, stream)
