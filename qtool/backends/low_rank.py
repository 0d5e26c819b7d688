"""W + scale * L R for tiles of a weight, in float64 and rounded once: what merging an adapter is.

    update = LowRankUpdate(left, right, scale)
    merged = add_low_rank(base, "BF16", update, "BF16")

Products are added in the order of the rank, none is fused with its sum, and nothing depends on how
a weight is cut: the bytes are the same on every machine. Kernels of Numba, compiled on first use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
from numba import types
from numba.extending import overload
from numpy.typing import NDArray

from qtool.backends.cpu_kernels import inlined, kernel
from qtool.backends.cpu_numbers import INLINED, as_float, as_kind, rounded
from qtool.backends.protocol import SourceArray
from qtool.formats.floats import narrow, widen
from qtool.formats.tensors import SourceDtype

# Columns that are worked on for all rows: their part of R at rank 64 is 128 KB, which a core keeps.
COLUMNS: Final = 256
LANES: Final = 8  # partial sums of a row's squares, so that they can be vectorized

f32, f64, u32, u64 = np.float32, np.float64, np.uint32, np.uint64


@dataclass(frozen=True, slots=True, eq=False)
class LowRankUpdate:
    """What is added to a matrix (rows, columns), and what it is multiplied by then.

    `left` is float32 (rows, r), `right` float64 (r, columns). `row_factor` float64 (rows,) or
    `column_factor` (columns,) scale the sum: DoRA's magnitudes over norms.
    """

    left: NDArray[np.float32]
    right: NDArray[np.float64]
    scale: float
    row_factor: NDArray[np.float64] | None = None
    column_factor: NDArray[np.float64] | None = None

    def of(self, rows: slice, columns: slice) -> LowRankUpdate:
        """The part that belongs to a part of the matrix."""
        return LowRankUpdate(
            self.left[rows],
            self.right[:, columns],
            self.scale,
            None if self.row_factor is None else self.row_factor[rows],
            None if self.column_factor is None else self.column_factor[columns],
        )


def add_low_rank(
    base: SourceArray, dtype: SourceDtype, update: LowRankUpdate, to: SourceDtype
) -> SourceArray:
    """The updated matrix, of dtype `to`, from `base` (rows, columns) of `dtype`."""
    num_rows, num_columns = base.shape
    values = _as_kernels_take(base, dtype)
    out: Any = np.empty(base.shape, np.uint16 if to == "BF16" else np.float32)
    no_factor = np.empty(0)
    _add(
        values,
        np.ascontiguousarray(update.left).reshape(-1),
        np.ascontiguousarray(update.right).reshape(-1),
        f64(update.scale),
        no_factor if update.row_factor is None else np.ascontiguousarray(update.row_factor),
        no_factor if update.column_factor is None else np.ascontiguousarray(update.column_factor),
        num_rows,
        num_columns,
        to != "F32",
        out.reshape(-1),
    )
    return narrow(out, to) if to == "F16" else cast(SourceArray, out)


def add_squares(
    base: SourceArray,
    dtype: SourceDtype,
    update: LowRankUpdate,
    *,
    by_row: bool,
    sums: NDArray[np.float64],
) -> None:
    """Add the squares of W + scale * L R, unrounded, to `sums`: one per row, or one per column.

    Rows must come whole, and in their order where the sums are the columns'.
    """
    num_rows, num_columns = base.shape
    squares = _add_squares_of_rows if by_row else _add_squares_of_columns
    squares(
        _as_kernels_take(base, dtype),
        np.ascontiguousarray(update.left).reshape(-1),
        np.ascontiguousarray(update.right).reshape(-1),
        f64(update.scale),
        num_rows,
        num_columns,
        sums,
    )


def _as_kernels_take(base: SourceArray, dtype: SourceDtype) -> NDArray[Any]:
    """Flat bits of bfloat16, else float32."""
    values = np.ascontiguousarray(base)
    return (widen(values, dtype) if dtype == "F16" else values).reshape(-1)


# ---- Kernels ----------------------------------------------------------------------------------


@inlined
def _to_odd(value: Any) -> Any:
    """A float64 as float32, cut off, with its last bit set where that changed it.

    Rounding that to a shorter format is the same as rounding the float64 itself once.
    """
    nearest = f32(value)
    back = f64(nearest)
    bits = u32(nearest.view(np.uint32))
    # the bits of a magnitude count upwards with it, so 1 less is the next one towards zero
    cut = u32(bits - u32(abs(back) > abs(value))) | u32(1)
    inexact = (back != value) & (value == value)
    return u32(cut if inexact else bits).view(np.float32)


def _as_shorter(value: Any, array: Any) -> Any:
    """A float32 rounded to bfloat16's bits where `array` holds those; else itself."""


@overload(_as_shorter, strict=False, jit_options=INLINED)  # type: ignore[untyped-decorator]
def _overload_as_shorter(value: Any, array: Any) -> Any:
    if array.dtype == types.uint16:
        return lambda value, array: as_kind(rounded(value, True), array)
    return lambda value, array: value


@inlined
def _add_products(
    left: Any, right: Any, rank: Any, row: Any, first: Any, size: Any, num_columns: Any, sums: Any
) -> None:
    """Row `row` of L R, columns [first, first + size), into the first `size` of `sums`."""
    for j in range(size):
        sums[j] = f64(0)
    k = u64(0)
    while k + u64(4) <= rank:  # four at once, to look at the sums less often
        a = f64(left[row * rank + k])
        b = f64(left[row * rank + k + u64(1)])
        c = f64(left[row * rank + k + u64(2)])
        d = f64(left[row * rank + k + u64(3)])
        at = k * num_columns + first
        at_b, at_c = at + num_columns, at + u64(2) * num_columns
        at_d = at + u64(3) * num_columns
        for j in range(size):
            total = sums[j] + a * right[at + j]
            total = total + b * right[at_b + j]
            total = total + c * right[at_c + j]
            sums[j] = total + d * right[at_d + j]
        k += u64(4)
    while k < rank:
        a = f64(left[row * rank + k])
        at = k * num_columns + first
        for j in range(size):
            sums[j] += a * right[at + j]
        k += u64(1)


@kernel
def _add(
    base: Any,
    left: Any,
    right: Any,
    scale: Any,
    row_factor: Any,
    column_factor: Any,
    rows: int,
    columns: int,
    to_odd: bool,
    out: Any,
) -> None:
    num_rows, num_columns = u64(rows), u64(columns)
    rank = u64(right.size) // max(num_columns, u64(1))
    sums = np.empty(COLUMNS)
    for first in range(u64(0), num_columns, u64(COLUMNS)):
        size = min(u64(COLUMNS), num_columns - first)
        for row in range(num_rows):
            _add_products(left, right, rank, row, first, size, num_columns, sums)
            at = row * num_columns + first
            if row_factor.size:
                factor = row_factor[row]
                for j in range(size):
                    sums[j] = factor * (f64(as_float(base[at + j])) + scale * sums[j])
            elif column_factor.size:
                for j in range(size):
                    total = f64(as_float(base[at + j])) + scale * sums[j]
                    sums[j] = column_factor[first + j] * total
            else:
                for j in range(size):
                    sums[j] = f64(as_float(base[at + j])) + scale * sums[j]
            if to_odd:
                for j in range(size):
                    out[at + j] = _as_shorter(_to_odd(sums[j]), out)
            else:
                for j in range(size):
                    out[at + j] = as_kind(f32(sums[j]), out)


@kernel
def _add_squares_of_rows(
    base: Any, left: Any, right: Any, scale: Any, rows: int, columns: int, out: Any
) -> None:
    num_rows, num_columns = u64(rows), u64(columns)
    rank = u64(right.size) // max(num_columns, u64(1))
    sums = np.empty(COLUMNS)
    lanes = np.empty(LANES)
    for row in range(num_rows):
        lanes[:] = 0.0
        for first in range(u64(0), num_columns, u64(COLUMNS)):
            size = min(u64(COLUMNS), num_columns - first)
            _add_products(left, right, rank, row, first, size, num_columns, sums)
            at = row * num_columns + first
            for j in range(size):
                total = f64(as_float(base[at + j])) + scale * sums[j]
                lanes[j % u64(LANES)] += total * total
        for lane in range(u64(LANES)):
            out[row] += lanes[lane]


@kernel
def _add_squares_of_columns(
    base: Any, left: Any, right: Any, scale: Any, rows: int, columns: int, out: Any
) -> None:
    num_rows, num_columns = u64(rows), u64(columns)
    rank = u64(right.size) // max(num_columns, u64(1))
    sums = np.empty(COLUMNS)
    for first in range(u64(0), num_columns, u64(COLUMNS)):
        size = min(u64(COLUMNS), num_columns - first)
        for row in range(num_rows):
            _add_products(left, right, rank, row, first, size, num_columns, sums)
            at = row * num_columns + first
            for j in range(size):
                total = f64(as_float(base[at + j])) + scale * sums[j]
                out[first + j] += total * total
