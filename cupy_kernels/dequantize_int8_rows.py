"""Launches dequantize_int8_rows.cu."""

from __future__ import annotations

import numpy as np

from cupy_kernels.launch import OCTET, THREADS, ceil_div, check_aligned, cuda_dtype, launch
from cupy_kernels.loader import load_kernel

_MAX_GRID_Y = 65535


def dequantize_int8_rows(
    codes: int, num_rows: int, row_size: int, scb: int, dtype: str, rows: int, stream: int
) -> None:
    """Queue the inverse of `quantize_int8_rows` on `stream`.

    Args:
        codes: address of int8 (num_rows, row_size).
        scb: address of float32 (num_rows,).
        rows: address of the output of `dtype` BF16, F16 or F32, (num_rows, row_size), filled.

    Raises:
        ValueError: an unknown dtype, or an address that is not 16-byte aligned.
    """
    check_aligned(codes=codes, rows=rows)
    if num_rows == 0 or row_size == 0:
        return
    kernel = load_kernel("dequantize_int8_rows", TARGET=cuda_dtype(dtype))
    grid = (ceil_div(row_size, THREADS * OCTET), min(num_rows, _MAX_GRID_Y))
    aligned = np.bool_(row_size % OCTET == 0)
    launch(kernel, grid, THREADS, (codes, num_rows, row_size, aligned, scb, rows), stream)
