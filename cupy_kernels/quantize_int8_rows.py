"""Launches quantize_int8_rows.cu."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from cupy_kernels.launch import OCTET, THREADS, ceil_div, check_aligned, cuda_dtype, launch
from cupy_kernels.loader import load_kernel

# How many threads keep a row in registers, and how many octets each; longer rows are read twice.
_SIXTEEN_BIT = ((32, 4), (128, 4), (256, 4), (512, 4), (512, 8), (512, 13))
ROW_SHAPES: Final = {
    "Bf16": _SIXTEEN_BIT,
    "F16": _SIXTEEN_BIT,
    "F32": ((32, 4), (128, 4), (256, 4), (512, 4), (1024, 4)),
}


def quantize_int8_rows(
    rows: int,
    dtype: str,
    num_rows: int,
    row_size: int,
    codes: int,
    scb: int,
    bad_count: int,
    stream: int,
) -> None:
    """Queue LLM.int8() quantization of `num_rows` rows on `stream`.

    Args:
        rows: address of the source, of `dtype` BF16, F16 or F32, (num_rows, row_size).
        codes: address of int8 (num_rows, row_size), filled.
        scb: address of float32 (num_rows,), filled with the rows' absmax.
        bad_count: address of a uint64, increased by the number of values that are NaN or infinite
            in float16.

    Raises:
        ValueError: an unknown dtype, or an address that is not 16-byte aligned.
    """
    check_aligned(rows=rows, codes=codes)
    if num_rows == 0:
        return
    source = cuda_dtype(dtype)
    row_threads, octets = row_shape(source, row_size)
    kernel = load_kernel(
        "quantize_int8_rows", SOURCE=source, ROW_THREADS=row_threads, OCTETS=octets
    )
    threads = max(row_threads, THREADS)
    grid = (ceil_div(num_rows, threads // row_threads),)
    aligned = np.bool_(row_size % OCTET == 0)
    arguments = (rows, num_rows, row_size, aligned, codes, scb, bad_count)
    launch(kernel, grid, threads, arguments, stream)


def row_shape(source: str, row_size: int) -> tuple[int, int]:
    """Threads per row, and octets that each of them holds."""
    shapes = ROW_SHAPES[source]
    return next((shape for shape in shapes if row_size <= math.prod(shape) * OCTET), shapes[-1])
