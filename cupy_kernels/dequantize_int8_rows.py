"""Launches dequantize_int8_rows.cu."""

from __future__ import annotations

import ctypes

from cupy_kernels.launch import OCTET, THREADS, Launch, ceil_div, check_aligned, cuda_dtype
from cupy_kernels.loader import load_kernel

_MAX_GRID_Y = 65535


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scb", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("row_size", ctypes.c_int64),
    )


class DequantizeInt8Rows:
    """The inverse of `quantize_int8_rows` of given codes, to be queued again and again.

    Args:
        codes: address of int8 (num_rows, row_size), 16-byte aligned; neither is zero.
        scb: address of float32 (num_rows,).
        dtype: BF16, F16 or F32.

    Raises:
        ValueError: an unknown dtype, or an address that is not aligned.
    """

    def __init__(self, codes: int, num_rows: int, row_size: int, scb: int, dtype: str) -> None:
        check_aligned(codes=codes)
        kernel = load_kernel("dequantize_int8_rows", TARGET=cuda_dtype(dtype))
        grid = (ceil_div(row_size, THREADS * OCTET), min(num_rows, _MAX_GRID_Y))
        arguments = _Arguments(codes=codes, scb=scb, num_rows=num_rows, row_size=row_size)
        self._launch = Launch(kernel, grid, THREADS, 0, arguments, overlap=False)

    def queue(self, rows: int, stream: int) -> None:
        """Queue it on `stream`; the output (num_rows, row_size) goes to the address `rows`."""
        check_aligned(rows=rows)
        self._launch.arguments.target = rows
        self._launch(stream)


def dequantize_int8_rows(
    codes: int, num_rows: int, row_size: int, scb: int, dtype: str, rows: int, stream: int
) -> None:
    """Queue the inverse of `quantize_int8_rows` once, see `DequantizeInt8Rows`."""
    if num_rows > 0 and row_size > 0:
        DequantizeInt8Rows(codes, num_rows, row_size, scb, dtype).queue(rows, stream)
