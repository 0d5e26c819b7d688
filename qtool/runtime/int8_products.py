"""LLM.int8() products: activations rounded to INT8 rows, their outlier columns apart in 16 bit.

    y = multiply_rounded(x, codes, scb, bias, threshold=6.0)

    absmax     = max |x| of each row, of values below the threshold
    x_codes    = as `qtool.formats.int8` makes them, 0 in columns that hold an outlier
    sums       = x_codes @ codes.T * absmax / 127 + x[:, outliers] @ codes[:, outliers].T
    y          = sums * scb / 127 + bias

An outlier is a value of at least the threshold; 0 stands for none, and then everything is rounded.
Sums of codes are exact, outliers are added up in float32, and the result is rounded once. Which
columns hold outliers, and how many do, stays on the device: nothing waits for it, and a CUDA graph
may hold it all. bitsandbytes makes the same codes of float16 activations, but rounds the weight's
outlier columns to 16 bit, and the result before they are added.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from cupy_kernels.linear_few import OLDEST_COMPUTE_CAPABILITY
from qtool.formats.reciprocal import reciprocal
from qtool.runtime.dequantize import INT8_SCALE
from qtool.runtime.dequantize_host import KERNEL_DTYPES

# Rows of x that are rounded at a time, and INT32 sums that exist at a time (128 MiB).
MAX_ROUNDED_ROWS: Final = 2048
MAX_SUMS: Final = 1 << 25

# Products of so many codes are added up in float32 without rounding: 1024 * 127 * 128 < 2^24.
EXACT_COLUMNS: Final = 1024
_HOST_SUMS: Final = 1 << 22  # on the CPU, at a time


def fits_kernels(x: Tensor, codes: Tensor) -> bool:
    """Whether `multiply_rounded` takes such activations and weights on their GPU with CuPy."""
    out_features, columns = codes.shape
    return (
        x.dtype in KERNEL_DTYPES
        and out_features % 8 == 0
        and columns % 16 == 0
        and codes.data_ptr() % 16 == 0
        and codes.is_contiguous()
        and torch.cuda.get_device_capability(x.device) >= OLDEST_COMPUTE_CAPABILITY
    )


def multiply_rounded(
    x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    """x @ (codes * scb / 127).T + bias of rounded activations, on a GPU.

    Args:
        x: bfloat16 or float16 (..., columns), more than 16 rows.
        codes: int8 (out_features, columns), see `fits_kernels`.
        scb: float32 (out_features,).
        bias: (out_features,) of x's dtype.

    Returns:
        x's dtype (..., out_features).
    """
    out_features, columns = codes.shape
    rows = x.reshape(-1, columns).contiguous()
    if rows.data_ptr() % 16:
        rows = rows.clone()
    out = rows.new_empty(rows.shape[0], out_features)
    with torch.cuda.device(x.device):
        outliers = find_outliers(rows, threshold)
        for first, last in token_pieces(rows.shape[0]):
            rounded = round_activations(rows[first:last], outliers)
            add_product(rounded, codes, scb, bias, out[first:last])
    return out.view(*x.shape[:-1], out_features)


def token_pieces(num_rows: int) -> list[tuple[int, int]]:
    """Rows that are rounded at a time: about as many each, as INT8 products want more than 16."""
    num_pieces = -(-num_rows // MAX_ROUNDED_ROWS)
    return _ranges(num_rows, -(-num_rows // num_pieces))


@dataclass(frozen=True, slots=True)
class Outliers:
    """Which columns of activations are outliers.

    Args:
        marks: uint8 (columns + 16,), 1 for outliers; what is behind them is a counter.
        columns: int32 (1 + columns,): how many there are, and which.
    """

    threshold: float
    marks: Tensor
    columns: Tensor


@dataclass(frozen=True, slots=True)
class RoundedActivations:
    """Activations as the INT8 product takes them.

    Args:
        codes: int8 (num_rows, columns).
        absmax: float32 (num_rows,).
        values: what is not rounded (num_rows, columns): the outlier columns side by side, and none
            of the other places is set; None where nothing is an outlier.
        outliers: None likewise.
    """

    codes: Tensor
    absmax: Tensor
    dtype: torch.dtype
    values: Tensor | None
    outliers: Outliers | None


def find_outliers(x: Tensor, threshold: float) -> Outliers | None:
    """Queue the search in x, 16 bit (num_rows, columns), contiguous; None for a threshold of 0."""
    if threshold == 0:
        return None
    from cupy_kernels import int8_products as kernels

    num_rows, columns = x.shape
    marks = torch.zeros(kernels.workspace_bytes(columns), dtype=torch.uint8, device=x.device)
    found = Outliers(threshold, marks, marks.new_empty(1 + columns, dtype=torch.int32))
    kernels.find_outliers(
        x.data_ptr(),
        KERNEL_DTYPES[x.dtype],
        num_rows,
        columns,
        threshold,
        workspace=marks.data_ptr(),
        list=found.columns.data_ptr(),
        stream=_stream(x),
    )
    return found


def round_activations(x: Tensor, outliers: Outliers | None) -> RoundedActivations:
    """Queue the rounding of x, 16 bit (num_rows, columns), contiguous: of some of the rows in which
    `outliers` were found."""
    from cupy_kernels import int8_products as kernels

    rounded = RoundedActivations(
        codes=torch.empty_like(x, dtype=torch.int8),
        absmax=x.new_empty(x.shape[0], dtype=torch.float32),
        dtype=x.dtype,
        values=None if outliers is None else torch.empty_like(x),
        outliers=outliers,
    )
    columns = None
    if outliers is not None:
        columns = kernels.OutlierColumns(
            outliers.threshold, outliers.marks.data_ptr(), outliers.columns.data_ptr()
        )
    kernels.round_activations(
        x.data_ptr(), KERNEL_DTYPES[x.dtype], _addresses(rounded), columns, _stream(x)
    )
    return rounded


def add_product(
    rounded: RoundedActivations,
    codes: Tensor,
    scb: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    added: bool = False,
) -> None:
    """Queue the product with a weight to `out`, of the activations' dtype.

    Args:
        codes: int8 (out_features, columns), see `fits_kernels`.
        scb: float32 (out_features,).
        bias: (out_features,) of the activations' dtype.
        out: (num_rows, out_features), whose rows may lie apart.
        added: to what is in `out`, before it is rounded.
    """
    from cupy_kernels import int8_products as kernels

    num_rows = rounded.codes.shape[0]
    for first, last in _ranges(codes.shape[0], max(MAX_SUMS // num_rows // 256, 1) * 256):
        sums = torch._int_mm(rounded.codes, codes[first:last].t())
        kernels.finish_product(
            sums.data_ptr(),
            KERNEL_DTYPES[rounded.dtype],
            _addresses(rounded),
            codes=codes.data_ptr() + first * codes.shape[1],
            scb=scb.data_ptr() + first * 4,
            bias=0 if bias is None else bias.data_ptr() + first * bias.itemsize,
            num_columns=last - first,
            out=out.data_ptr() + first * out.itemsize,
            out_stride=out.stride(0),
            added=added,
            stream=_stream(out),
        )


def _addresses(rounded: RoundedActivations) -> Any:
    from cupy_kernels import int8_products as kernels

    num_rows, columns = rounded.codes.shape
    return kernels.RoundedActivations(
        num_rows,
        columns,
        codes=rounded.codes.data_ptr(),
        absmax=rounded.absmax.data_ptr(),
        outliers=0 if rounded.values is None else rounded.values.data_ptr(),
        list=0 if rounded.outliers is None else rounded.outliers.columns.data_ptr(),
    )


def _stream(x: Tensor) -> int:
    stream: int = torch.cuda.current_stream(x.device).cuda_stream
    return stream


def _ranges(stop: int, step: int) -> list[tuple[int, int]]:
    return [(first, min(first + step, stop)) for first in range(0, stop, step)]


def warm_up(widths: Iterable[int], device: torch.device, dtype: torch.dtype) -> None:
    """Compile or load the kernels for activations of so many columns; nothing where none run."""
    capability = torch.cuda.get_device_capability(device)
    if dtype not in KERNEL_DTYPES or capability < OLDEST_COMPUTE_CAPABILITY:
        return
    from cupy_kernels import int8_products as kernels

    with torch.cuda.device(device):
        for columns in sorted(set(widths)):
            kernels.compile_for(KERNEL_DTYPES[dtype], columns)


# -- the same in plain PyTorch --------------------------------------------------------------------


def multiply_rounded_host(
    x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    """`multiply_rounded` on the CPU, for any shape and float32 too; looks at how many outliers.

    The bits are those of the GPU where nothing is an outlier: the rest is a sum in another order.
    """
    out_features, columns = codes.shape
    rows = x.reshape(-1, columns)
    x_codes, absmax, outliers = round_rows(rows, threshold)
    step = (absmax * INT8_SCALE)[:, None]
    beside = rows[:, outliers].float()
    out = rows.new_empty(rows.shape[0], out_features)
    for first, last in _ranges(out_features, max(_HOST_SUMS // rows.shape[0], 1)):
        weight = codes[first:last]
        sums = _exact_sums(x_codes, weight).float() * step
        if outliers.numel():
            sums += beside @ weight[:, outliers].float().t()
        sums *= scb[first:last] * INT8_SCALE
        out[:, first:last] = sums if bias is None else sums + bias[first:last]
    return out.view(*x.shape[:-1], out_features)


def round_rows(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """x (num_rows, columns) rounded, on the CPU.

    Returns:
        codes int8 (num_rows, columns), absmax float32 (num_rows,), and the outlier columns int64.
    """
    wide = x.float()
    is_below = wide.abs() < (threshold or torch.inf)
    kept = wide.masked_fill(~is_below, 0)
    absmax = kept.abs().amax(1)
    if threshold == 0:  # no outlier columns take up what is not finite, so it spoils the row
        absmax.masked_fill_(~is_below.all(1), torch.inf)
    scale = torch.from_numpy(np.float32(127) * reciprocal(absmax.numpy()))
    scaled = (kept * scale[:, None]).round_()
    codes = scaled.nan_to_num_(0).clamp_(-127, 127).to(torch.int8)  # 0 * inf is NaN
    outliers = (~is_below).any(0).nonzero().flatten() if threshold else x.new_empty(0).long()
    codes[:, outliers] = 0
    return codes, absmax, outliers


def _exact_sums(x_codes: Tensor, codes: Tensor) -> Tensor:
    """x_codes @ codes.T, int32.

    By float32 products of so few columns that nothing is rounded: PyTorch's INT8 product saturates
    on processors without instructions for it.
    """
    total = torch.zeros(x_codes.shape[0], codes.shape[0], dtype=torch.int32)
    for first, last in _ranges(codes.shape[1], EXACT_COLUMNS):
        part = x_codes[:, first:last].float() @ codes[:, first:last].float().t()
        total += part.int()
    return total
