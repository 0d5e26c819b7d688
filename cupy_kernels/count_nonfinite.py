"""Launches count_nonfinite.cu."""

from __future__ import annotations

from cupy_kernels.launch import OCTET, THREADS, ceil_div, check_aligned, cuda_dtype, launch
from cupy_kernels.loader import load_kernel

_MAX_BLOCKS = 4096


def count_nonfinite(values: int, dtype: str, num_values: int, bad_count: int, stream: int) -> None:
    """Queue counting of NaN and infinity on `stream`.

    Args:
        values: address of the values, of `dtype` BF16, F16 or F32, (num_values,), 16-byte aligned.
        bad_count: address of a uint64, increased.

    Raises:
        ValueError: an unknown dtype, or an address that is not aligned.
    """
    check_aligned(values=values)
    if num_values == 0:
        return
    kernel = load_kernel("count_nonfinite", SOURCE=cuda_dtype(dtype))
    grid = (min(ceil_div(num_values, THREADS * OCTET), _MAX_BLOCKS),)
    launch(kernel, grid, THREADS, (values, num_values, bad_count), stream)
