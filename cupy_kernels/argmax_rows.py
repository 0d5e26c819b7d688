"""Launches argmax_rows.cu."""

from __future__ import annotations

import ctypes
from typing import Final

from cupy_kernels.launch import Launch, cuda_dtype
from cupy_kernels.loader import load_kernel

BLOCKS: Final = 64
WARPS: Final = 8


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("columns", ctypes.c_int),
        ("maxima", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    )


def workspace_bytes(num_rows: int) -> int:
    """Bytes that launches share which do not run at the same time; zero before the first."""
    return num_rows * (8 * BLOCKS + 4)


def argmax_rows(
    values: int,
    dtype: str,
    num_rows: int,
    columns: int,
    *,
    workspace: int,
    out: int,
    overlap: bool = True,
) -> Launch:
    """A launch that finds each row's largest value, to be queued again and again.

    Args:
        values: address of (num_rows, columns) of `dtype` BF16 or F16, contiguous.
        workspace: address of `workspace_bytes` bytes.
        out: address of int64 (num_rows,).
    """
    kernel = load_kernel("argmax_rows", ACTIVATION=cuda_dtype(dtype), BLOCKS=BLOCKS, WARPS=WARPS)
    partial_bytes = 4 * BLOCKS * num_rows
    arguments = _Arguments(
        values=values,
        stride=columns,
        columns=columns,
        maxima=workspace,
        indices=workspace + partial_bytes,
        arrived=workspace + 2 * partial_bytes,
        out=out,
    )
    return Launch(kernel, (BLOCKS, num_rows), WARPS * 32, 0, arguments, overlap=overlap)
