"""Launches quantize_4bit.cu."""

from __future__ import annotations

from cupy_kernels.launch import THREADS, ceil_div, check_aligned, cuda_dtype, launch
from cupy_kernels.loader import load_kernel
from qtool.formats.precisions import BLOCKSIZES

_CHUNK = 256  # values that a warp reads at once; four of them or a block to a warp, as in the .cu


def quantize_4bit(
    values: int,
    dtype: str,
    num_values: int,
    quant_type: str,
    blocksize: int,
    packed: int,
    absmax: int,
    bad_count: int,
    stream: int,
) -> None:
    """Queue NF4 or FP4 quantization of `num_values` values on `stream`.

    Args:
        values: address of the source, of `dtype` BF16, F16 or F32, (num_values,), 16-byte aligned.
        quant_type: nf4 or fp4.
        packed: address of uint8 (ceil(num_values/2),), 16-byte aligned, filled.
        absmax: address of float32 (ceil(num_values/blocksize),), filled.
        bad_count: address of a uint64, increased by the number of values that are NaN or infinite.

    Raises:
        ValueError: an unknown dtype or block size, or an address that is not aligned.
    """
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize {blocksize} is none of {BLOCKSIZES}")
    check_aligned(values=values, packed=packed)
    if num_values == 0:
        return
    kernel = load_kernel(
        "quantize_4bit",
        SOURCE=cuda_dtype(dtype),
        QUANT_TYPE=quant_type.capitalize(),
        BLOCKSIZE=blocksize,
    )
    num_blocks = ceil_div(num_values, max(4 * _CHUNK, blocksize) * (THREADS // 32))
    launch(kernel, (num_blocks,), THREADS, (values, num_values, packed, absmax, bad_count), stream)
