"""Launches int8_outliers.cu, int8_activations.cu, int8_sums.cu: LLM.int8() beside its INT8 product.

    find_outliers(...)       which columns of the activations are outliers
    round_activations(...)   INT8 rows, and the outlier columns in 16 bit
    finish_product(...)      INT32 sums of the rows' product with a weight, to its result

Addresses are integers and 16-byte aligned. Nothing is read back: how many outlier columns there are
is known on the device alone.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from cupy_kernels.launch import (
    Launch,
    ceil_div,
    check_aligned,
    cuda_dtype,
    launch,
    num_multiprocessors,
)
from cupy_kernels.loader import load_kernel
from cupy_kernels.quantize_int8_rows import row_shape

if TYPE_CHECKING:
    import cupy

# As in the .cu files.
COLUMN_MULTIPLE: Final = 16  # of activations
OUT_MULTIPLE: Final = 8  # of a weight's rows
_THREADS: Final = 256
_OUTLIER_COLUMNS: Final = 2048  # of a thread block
_OUTLIER_ROWS: Final = 16
_SUMS_COLUMNS: Final = 256
_SUMS_ROWS: Final = 32  # of a tile
# A thread block fetches the weight's outlier columns once for all of its rows, which are as many as
# leave each multiprocessor so many thread blocks.
_SUMS_BLOCKS: Final = 4


class _ActivationArguments(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("threshold", ctypes.c_float),
        ("marks", ctypes.c_void_p),
        ("list", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("outliers", ctypes.c_void_p),
    )


class _SumArguments(ctypes.Structure):
    _fields_ = (
        ("sums", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("outliers", ctypes.c_void_p),
        ("list", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scb", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("num_columns", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("block_rows", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class OutlierColumns:
    """Addresses of which columns are outliers.

    Args:
        threshold: from which |x| on.
        marks: uint8 (columns,), 1 for outliers.
        list: int32 (1 + columns,): how many there are, and which.
    """

    threshold: float
    marks: int
    list: int


@dataclass(frozen=True, slots=True)
class RoundedActivations:
    """Addresses of activations that were rounded.

    Args:
        num_rows: their number, of `columns` values each.
        codes: int8 (num_rows, columns), 0 in outlier columns.
        absmax: float32 (num_rows,).
        outliers: (num_rows, columns) in 16 bit: outlier columns side by side; 0 for none.
        list: that of `OutlierColumns`; 0 for none.
    """

    num_rows: int
    columns: int
    codes: int
    absmax: int
    outliers: int = 0
    list: int = 0


def workspace_bytes(columns: int) -> int:
    """Of what `find_outliers` wants zeroed: marks, and a counter behind them."""
    return columns + 16


def find_outliers(
    x: int,
    dtype: str,
    num_rows: int,
    columns: int,
    threshold: float,
    *,
    workspace: int,
    list: int,
    stream: int,
) -> None:
    """Queue the search for columns that hold a value of at least `threshold`, or NaN.

    Args:
        x: (num_rows, columns) of `dtype` BF16 or F16, columns a multiple of 16.
        workspace: `workspace_bytes` zeros; the marks remain in it.
        list: int32 (1 + columns,), filled.
    """
    check_aligned(x=x, workspace=workspace)
    _check_columns(columns)
    kernel = _outliers_kernel(dtype)
    grid = ceil_div(columns, _OUTLIER_COLUMNS), ceil_div(num_rows, _OUTLIER_ROWS)
    arguments = (x, num_rows, columns, np.float32(threshold), workspace, workspace + columns, list)
    launch(kernel, grid, _THREADS, arguments, stream)


def round_activations(
    x: int,
    dtype: str,
    rounded: RoundedActivations,
    outliers: OutlierColumns | None,
    stream: int,
) -> None:
    """Queue the rounding of x (num_rows, columns), rows of those that `outliers` were found in.

    Without outliers, NaN and infinity make a row's absmax infinite, and its products NaN.
    """
    check_aligned(x=x, codes=rounded.codes, outliers=rounded.outliers)
    _check_columns(rounded.columns)
    kernel = _activations_kernel(dtype, rounded.columns)
    row_threads, _ = row_shape(cuda_dtype(dtype), rounded.columns)
    arguments = _ActivationArguments(
        x=x,
        num_rows=rounded.num_rows,
        columns=rounded.columns,
        threshold=outliers.threshold if outliers else math.inf,
        marks=outliers.marks if outliers else None,
        list=outliers.list if outliers else None,
        codes=rounded.codes,
        absmax=rounded.absmax,
        outliers=rounded.outliers or None,
    )
    threads = max(row_threads, _THREADS)
    grid = (ceil_div(rounded.num_rows, threads // row_threads),)
    Launch(kernel, grid, threads, 0, arguments, overlap=False)(stream)


def finish_product(
    sums: int,
    dtype: str,
    rounded: RoundedActivations,
    *,
    codes: int,
    scb: int,
    bias: int,
    num_columns: int,
    out: int,
    out_stride: int,
    added: bool,
    stream: int,
) -> None:
    """Queue what makes a result of the INT32 sums of an INT8 product.

    Args:
        sums: int32 (num_rows, num_columns).
        codes: int8 (num_columns, columns), the weight; its outlier columns are read.
        scb: float32 (num_columns,).
        bias: (num_columns,) of `dtype`; 0 for none.
        num_columns: a multiple of 8.
        out: (num_rows, num_columns) of `dtype`, rows `out_stride` values apart, a multiple of 8.
        added: to what is in `out`.
    """
    check_aligned(sums=sums, out=out)
    if num_columns % OUT_MULTIPLE or out_stride % OUT_MULTIPLE:
        raise ValueError(f"{num_columns}, {out_stride} are no multiples of {OUT_MULTIPLE}")
    kernel = _sums_kernel(dtype, added=added)
    block_rows = _rows_of_block(rounded.num_rows, num_columns)
    arguments = _SumArguments(
        sums=sums,
        absmax=rounded.absmax,
        outliers=rounded.outliers or None,
        list=rounded.list or None,
        codes=codes,
        scb=scb,
        bias=bias or None,
        out=out,
        num_rows=rounded.num_rows,
        num_columns=num_columns,
        depth=rounded.columns,
        out_stride=out_stride,
        block_rows=block_rows,
    )
    grid = ceil_div(num_columns, _SUMS_COLUMNS), ceil_div(rounded.num_rows, block_rows)
    Launch(kernel, grid, _THREADS, 0, arguments, overlap=False)(stream)


def compile_for(dtype: str, columns: int) -> None:
    """Compile the kernels for activations of so many columns, or load them from the cache."""
    _outliers_kernel(dtype)
    _activations_kernel(dtype, columns)
    for added in (False, True):
        _sums_kernel(dtype, added=added)


def _outliers_kernel(dtype: str) -> cupy.RawKernel:
    return load_kernel("int8_outliers", SOURCE=cuda_dtype(dtype))


def _activations_kernel(dtype: str, columns: int) -> cupy.RawKernel:
    source = cuda_dtype(dtype)
    row_threads, octets = row_shape(source, columns)
    return load_kernel("int8_activations", SOURCE=source, ROW_THREADS=row_threads, OCTETS=octets)


def _sums_kernel(dtype: str, *, added: bool) -> cupy.RawKernel:
    return load_kernel("int8_sums", ACTIVATION=cuda_dtype(dtype), ADDED=int(added))


def _rows_of_block(num_rows: int, num_columns: int) -> int:
    tiles = ceil_div(num_rows, _SUMS_ROWS)
    wanted = _SUMS_BLOCKS * num_multiprocessors()
    blocks = min(max(wanted // ceil_div(num_columns, _SUMS_COLUMNS), 1), tiles)
    return ceil_div(tiles, blocks) * _SUMS_ROWS


def _check_columns(columns: int) -> None:
    if columns % COLUMN_MULTIPLE:
        raise ValueError(f"{columns} columns are no multiple of {COLUMN_MULTIPLE}")
