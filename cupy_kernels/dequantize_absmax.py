"""Launches dequantize_absmax.cu."""

from __future__ import annotations

from cupy_kernels.dequantize_4bit import NestedAbsmax
from cupy_kernels.launch import THREADS, ceil_div, launch
from cupy_kernels.loader import load_kernel

_MAX_BLOCKS = 4096


def dequantize_absmax(nested: NestedAbsmax, count: int, absmax: int, stream: int) -> None:
    """Queue decoding of `count` absmax on `stream`.

    Args:
        nested: the nested form.
        absmax: address of float32 (count,), filled.
    """
    if count == 0:
        return
    kernel = load_kernel("dequantize_absmax")
    arguments = (
        nested.codes,
        count,
        nested.nested_absmax,
        nested.nested_code,
        nested.nested_offset,
        absmax,
    )
    grid = (min(ceil_div(count, THREADS), _MAX_BLOCKS),)
    launch(kernel, grid, THREADS, arguments, stream)
