"""What every backend asks of its arguments.

Kernels check nothing, and a wrong size would write into foreign memory: ValueError before they run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qtool.backends.protocol import SourceArray
from qtool.formats.floats import NUMPY_DTYPES
from qtool.formats.precisions import BLOCKSIZES, NESTED_BLOCKSIZE
from qtool.formats.tensors import SourceDtype


def check_values(values: SourceArray, dtype: SourceDtype) -> None:
    """`values` of `dtype`, of any shape."""
    _check("values", values, NUMPY_DTYPES[dtype], values.shape)


def check_four_bit(
    values: SourceArray,
    dtype: SourceDtype,
    blocksize: int,
    packed: NDArray[np.uint8],
    absmax: NDArray[np.float32],
) -> None:
    """`values` (n,), `packed` (ceil(n/2),), `absmax` (ceil(n/blocksize),)."""
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize {blocksize} is none of {BLOCKSIZES}")
    _check("values", values, NUMPY_DTYPES[dtype], (values.size,))
    _check("packed", packed, np.uint8, (-(-values.size // 2),))
    _check("absmax", absmax, np.float32, (-(-values.size // blocksize),))


def check_nested(
    absmax: NDArray[np.float32], codes: NDArray[np.uint8], nested_absmax: NDArray[np.float32]
) -> None:
    """`absmax` (m,), `codes` (m,), `nested_absmax` (ceil(m/256),)."""
    _check("absmax", absmax, np.float32, (absmax.size,))
    _check("codes", codes, np.uint8, absmax.shape)
    _check("nested_absmax", nested_absmax, np.float32, (-(-absmax.size // NESTED_BLOCKSIZE),))


def check_int8(
    rows: SourceArray, dtype: SourceDtype, codes: NDArray[np.int8], scb: NDArray[np.float32]
) -> None:
    """`rows` (r, c), `codes` (r, c), `scb` (r,)."""
    if rows.ndim != 2:
        raise ValueError(f"rows: expected two dimensions, found {rows.shape}")
    _check("rows", rows, NUMPY_DTYPES[dtype], rows.shape)
    _check("codes", codes, np.int8, rows.shape)
    _check("scb", scb, np.float32, rows.shape[:1])


def _check(name: str, array: NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        layout = "contiguous" if array.flags.c_contiguous else "strided"
        raise ValueError(
            f"{name}: expected contiguous {np.dtype(dtype)} {shape}, "
            f"found {layout} {array.dtype} {array.shape}"
        )
