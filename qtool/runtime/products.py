"""Products with packed layers as PyTorch operators, on a GPU or the CPU.

    y = linear_4bit(x, packed, absmax, quant_type="nf4", blocksize=64, out_features=4096, ...)

They run on the current stream, may be captured in CUDA graphs and compiled by torch.compile, and
have a gradient for x. A few tokens go through kernels that read the packed bytes: up to 64 on a
GPU, and more where one of Hopper is faster that way (up to some thousand); up to 32 on the CPU. The
others go through a dequantized copy and PyTorch's product, or with INT8 weights, where that is
asked for, through an INT8 product (`qtool.runtime.int8_products`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.nn import functional

from cupy_kernels import OLDEST_COMPUTE_CAPABILITY
from qtool.formats.pieces import rows_at_a_time
from qtool.formats.precisions import NESTED_BLOCKSIZE, QuantType
from qtool.runtime.dequantize import dequantize_4bit, dequantize_absmax, dequantize_int8
from qtool.runtime.dequantize_host import KERNEL_DTYPES, SOURCE_DTYPES
from qtool.runtime.int8_products import fits_kernels, multiply_rounded, multiply_rounded_host
from qtool.runtime.products_host import NestedAbsmax, linear_4bit_host, linear_int8_host

# Tokens that go through the kernels for few and some on a GPU, and that are never rounded to INT8.
MAX_PACKED_TOKENS: Final = 64

# Any: PyTorch declares no types for its methods.
_library: Any = torch.library.Library("qtool", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "linear_4bit(Tensor x, Tensor packed, Tensor? absmax, Tensor? absmax_codes, "
    "Tensor? nested_absmax, Tensor? nested_quant_map, Tensor? nested_offset, Tensor? bias, "
    "str quant_type, int blocksize, int out_features, str weight_dtype) -> Tensor"
)
_library.define(
    "linear_int8(Tensor x, Tensor codes, Tensor scb, Tensor? bias, float? threshold=None) -> Tensor"
)


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | NestedAbsmax,
    *,
    quant_type: QuantType,
    blocksize: int,
    out_features: int,
    weight_dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """x @ weight.T + bias; sums in float32, rounded once.

    Args:
        x: bfloat16, float16 or float32 (..., in_features).
        packed: uint8 (ceil(out * in / 2), 1).
        absmax: float32 (m,), or nested.
        weight_dtype: what dequantizing rounds to, where the weight is dequantized.
        bias: (out_features,) of x's dtype.

    Returns:
        x's dtype (..., out_features).

    Raises:
        RuntimeError: x is not as wide as the weight.
    """
    statistics = (
        (None, *absmax.tensors)
        if isinstance(absmax, NestedAbsmax)
        else (absmax, None, None, None, None)
    )
    name = str(weight_dtype).removeprefix("torch.")
    product = torch.ops.qtool.linear_4bit(
        x, packed, *statistics, bias, quant_type, blocksize, out_features, name
    )
    return cast(Tensor, product)


def linear_int8(
    x: Tensor,
    codes: Tensor,
    scb: Tensor,
    bias: Tensor | None = None,
    *,
    threshold: float | None = None,
) -> Tensor:
    """x @ (codes * scb / 127).T + bias.

    Args:
        x: bfloat16, float16 or float32 (..., in_features).
        codes: int8 (out_features, in_features).
        scb: float32 (out_features,), absmax of each row.
        threshold: where `rounds_activations`, x is rounded to INT8 but for columns with a value of
            at least so much (0: all of it); None never rounds. The gradient is that of None.

    Returns:
        x's dtype (..., out_features).

    Raises:
        RuntimeError: x is not as wide as the weight.
    """
    return cast(Tensor, torch.ops.qtool.linear_int8(x, codes, scb, bias, threshold))


def rounds_activations(x: Tensor, codes: Tensor, threshold: float | None) -> bool:
    """Whether a product with INT8 weights rounds x.

    Where that is asked for, and there are more than 64 tokens. On a GPU in 16 bit and with our
    kernels only, in the shapes that they take: elsewhere nothing is rounded, which is more exact.
    """
    if threshold is None or x.numel() <= MAX_PACKED_TOKENS * codes.shape[1]:
        return False
    if x.device.type == "cpu":
        return True
    return has_kernels(x.device) and fits_kernels(x, codes)


def runs_fused(x: Tensor, columns: int) -> bool:
    """Whether products of this shape and dtype, up to 64 tokens, read packed bytes on `x`'s GPU."""
    if x.dtype not in KERNEL_DTYPES or not has_kernels(x.device):
        return False
    from cupy_kernels import linear_few

    num_tokens = x.numel() // columns
    fits = num_tokens <= MAX_PACKED_TOKENS and columns % 64 == 0
    return (
        fits and torch.cuda.get_device_capability(x.device) >= linear_few.OLDEST_COMPUTE_CAPABILITY
    )


def _runs_many(x: Tensor, kind: Any, out_features: int) -> bool:
    num_tokens = x.numel() // kind.columns
    if num_tokens <= MAX_PACKED_TOKENS:
        return False
    from qtool.runtime.packed_products import takes_many

    with torch.cuda.device(x.device):
        return takes_many(kind, (out_features,), num_tokens)


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether our kernels run there; without CuPy PyTorch's own operators dequantize."""
    if device.type != "cuda" or find_spec("cupy") is None:
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST_COMPUTE_CAPABILITY


# -- 4 bit ----------------------------------------------------------------------------------------


def _linear_4bit_cpu(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_codes: Tensor | None,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    weight_dtype: str,
) -> Tensor:
    _check_columns(x, packed, out_features, bits=4)
    nested = (absmax_codes, nested_absmax, nested_quant_map, nested_offset)
    return linear_4bit_host(
        x,
        packed,
        absmax if absmax is not None else NestedAbsmax(*cast(tuple[Tensor, ...], nested)),
        quant_type=cast(QuantType, quant_type),
        blocksize=blocksize,
        out_features=out_features,
        weight_dtype=getattr(torch, weight_dtype),
        bias=bias,
    )


def _linear_4bit_cuda(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_codes: Tensor | None,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    weight_dtype: str,
) -> Tensor:
    _check_columns(x, packed, out_features, bits=4)
    columns = x.shape[-1]
    statistics = (absmax, absmax_codes, nested_absmax, nested_quant_map, nested_offset)
    if x.dtype in KERNEL_DTYPES and has_kernels(x.device) and packed.data_ptr() % 16 == 0:
        from cupy_kernels.linear_few import LinearKind

        kind = LinearKind(
            cast(Any, quant_type),
            columns,
            KERNEL_DTYPES[x.dtype],
            blocksize=blocksize,
            nested=absmax is None,
        )
        if runs_fused(x, columns) or _runs_many(x, kind, out_features):
            return _multiply_packed(x, kind, out_features, (packed, *statistics), bias)
    dtype = getattr(torch, weight_dtype)

    def make_weight(rows: slice) -> Tensor:
        return dequantize_rows_4bit(packed, statistics, rows, columns, quant_type, blocksize, dtype)

    return _multiply_in_pieces(x, make_weight, out_features, bias)


def dequantize_rows_4bit(
    packed: Tensor,
    statistics: tuple[Tensor | None, ...],
    rows: slice,
    columns: int,
    quant_type: str,
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of a weight, by our kernel where it runs.

    Args:
        packed: uint8 (ceil(n/2), 1), all n values of the weight.
        statistics: absmax float32 (m,) and four None; or None and the tensors of `NestedAbsmax`.
        rows: with start and stop.

    Returns:
        `dtype` (stop - start, columns).
    """
    absmax, *nested = statistics
    start, stop = rows.start * columns, rows.stop * columns
    wide = has_kernels(packed.device) and packed.data_ptr() % 16 == 0 and start % 32 == 0
    # A kernel begins with a whole block, and with a whole group of absmax where that is nested.
    step = blocksize if absmax is not None else blocksize * NESTED_BLOCKSIZE
    if wide and start % step == 0 and dtype in SOURCE_DTYPES:
        values = torch.empty(rows.stop - rows.start, columns, dtype=dtype, device=packed.device)
        _launch_dequantize(packed, statistics, start, quant_type, blocksize, values)
        return values
    if absmax is None:
        absmax = dequantize_absmax(*cast(tuple[Tensor, Tensor, Tensor, Tensor], tuple(nested)))
    flat = dequantize_4bit(
        packed,
        absmax,
        quant_type=cast(QuantType, quant_type),
        blocksize=blocksize,
        start=start,
        stop=stop,
        dtype=dtype,
    )
    return flat.view(-1, columns)


def _launch_dequantize(
    packed: Tensor,
    statistics: tuple[Tensor | None, ...],
    start: int,
    quant_type: str,
    blocksize: int,
    values: Tensor,
) -> None:
    """Queue the decoding of the elements from `start` on into `values`."""
    from cupy_kernels.dequantize_4bit import NestedAbsmax as NestedAddresses
    from cupy_kernels.dequantize_4bit import dequantize_4bit as launch

    absmax, *nested = statistics
    block = start // blocksize
    if absmax is not None:
        scales: int | NestedAddresses = absmax.data_ptr() + block * 4
    else:
        codes, nested_absmax, quant_map, offset = (cast(Tensor, t).data_ptr() for t in nested)
        group = block // NESTED_BLOCKSIZE
        scales = NestedAddresses(codes + block, nested_absmax + group * 4, quant_map, offset)
    with torch.cuda.device(packed.device):
        launch(
            packed.data_ptr() + start // 2,
            values.numel(),
            scales,
            quant_type,
            blocksize,
            SOURCE_DTYPES[values.dtype],
            values.data_ptr(),
            torch.cuda.current_stream(packed.device).cuda_stream,
        )


# -- INT8 -----------------------------------------------------------------------------------------


def _linear_int8_cpu(
    x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None, threshold: float | None = None
) -> Tensor:
    _check_columns(x, codes, codes.shape[0], bits=8)
    if threshold is not None and rounds_activations(x, codes, threshold):
        return multiply_rounded_host(x, codes, scb, bias, threshold)
    return linear_int8_host(x, codes, scb, bias=bias)


def _linear_int8_cuda(
    x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None, threshold: float | None = None
) -> Tensor:
    out_features, columns = codes.shape
    _check_columns(x, codes, out_features, bits=8)
    if threshold is not None and rounds_activations(x, codes, threshold):
        return multiply_rounded(x, codes, scb, bias, threshold)
    if x.dtype in KERNEL_DTYPES and has_kernels(x.device) and codes.data_ptr() % 16 == 0:
        from cupy_kernels.linear_few import LinearKind

        kind = LinearKind("int8", columns, KERNEL_DTYPES[x.dtype])
        if runs_fused(x, columns) or _runs_many(x, kind, out_features):
            tensors = codes, scb, None, None, None, None
            return _multiply_packed(x, kind, out_features, tensors, bias)

    def make_weight(rows: slice) -> Tensor:
        return dequantize_rows_int8(codes[rows], scb[rows], x.dtype)

    return _multiply_in_pieces(x, make_weight, out_features, bias)


def dequantize_rows_int8(codes: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    """codes int8 (rows, columns) * scb float32 (rows,) / 127, by our kernel where it runs.

    Returns:
        `dtype` (rows, columns).
    """
    misaligned = codes.data_ptr() % 16 or codes.shape[1] % 16
    if misaligned or dtype not in SOURCE_DTYPES or not has_kernels(codes.device):
        return dequantize_int8(codes, scb, dtype)
    from cupy_kernels.dequantize_int8_rows import dequantize_int8_rows

    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    with torch.cuda.device(codes.device):
        dequantize_int8_rows(
            codes.data_ptr(),
            codes.shape[0],
            codes.shape[1],
            scb.data_ptr(),
            SOURCE_DTYPES[dtype],
            values.data_ptr(),
            torch.cuda.current_stream(codes.device).cuda_stream,
        )
    return values


# -- what both share ------------------------------------------------------------------------------


def _check_columns(x: Tensor, weight: Tensor, out_features: int, *, bits: int) -> None:
    """See that x (..., in_features) is as wide as the weight, by the packed bytes of any dtype.

    Of a single row of 4-bit values they do not tell whether the last nibble is one.

    Raises:
        RuntimeError: it is not, as with PyTorch's own product.
    """
    num_bytes = weight.nbytes
    if -(-out_features * x.shape[-1] * bits // 8) != num_bytes:
        in_features = num_bytes * 8 // bits // out_features
        raise RuntimeError(f"x: expected shape [..., {in_features}], found {list(x.shape)}")


class _LaunchCache(threading.local):
    """Launches by kind, shape and device; a launch's arguments belong to one thread at a time."""

    def __init__(self) -> None:
        self.by_key: dict[Any, Any] = {}


_launch_cache = _LaunchCache()


def _multiply_packed(
    x: Tensor,
    kind: Any,
    out_features: int,
    tensors: tuple[Tensor | None, ...],
    bias: Tensor | None,
) -> Tensor:
    from cupy_kernels.linear_few import LinearWeight

    rows = x.reshape(-1, kind.columns)
    if rows.stride(-1) != 1 or rows.data_ptr() % 16 or rows.stride(0) % 8:
        rows = rows.contiguous()
    if rows.data_ptr() % 16:
        rows = rows.clone()
    out = torch.empty(rows.shape[0], out_features, dtype=x.dtype, device=x.device)
    if rows.shape[0]:
        weight = LinearWeight(
            out_features, *(0 if t is None else t.data_ptr() for t in (*tensors, bias))
        )
        with torch.cuda.device(x.device):
            if rows.shape[0] <= MAX_PACKED_TOKENS:
                _launch_for(kind, weight, rows).queue(rows, out)
            else:
                _launch_for_many(kind, weight, rows).queue(rows, (out,))
    return out.view(*x.shape[:-1], out_features)


def _launch_for(kind: Any, weight: Any, rows: Tensor) -> Any:
    """This thread's launch for such layers and so many tokens, with the addresses of `weight`."""
    from qtool.runtime.packed_products import PackedProduct, tokens_of_kernel

    max_tokens = tokens_of_kernel(rows.shape[0])
    key = (kind, weight.rows, max_tokens, rows.device)
    launch = _launch_cache.by_key.get(key)
    if launch is None:
        launch = _launch_cache.by_key[key] = PackedProduct(kind, weight, max_tokens)
    launch.set_weight(weight)
    return launch


def _launch_for_many(kind: Any, weight: Any, rows: Tensor) -> Any:
    from qtool.runtime.packed_products import ManyProducts, many_shape

    shape = many_shape(kind, (weight.rows,), rows.shape[0])
    key = (kind, weight.rows, shape, rows.device)
    launch = _launch_cache.by_key.get(key)
    if launch is None:
        launch = _launch_cache.by_key[key] = ManyProducts(kind, (weight,), rows.shape[0])
    launch.set_weights((weight,))
    return launch


def row_pieces(out_features: int, columns: int) -> list[slice]:
    """Which rows of a weight (out_features, columns) are dequantized at a time, in order."""
    step = rows_at_a_time(columns)
    return [slice(row, min(row + step, out_features)) for row in range(0, out_features, step)]


def _multiply_in_pieces(
    x: Tensor, make_weight: Callable[[slice], Tensor], out_features: int, bias: Tensor | None
) -> Tensor:
    """x @ weight.T + bias, of whose rows `make_weight` makes so many at a time that they fit."""
    columns = x.shape[-1]
    pieces = row_pieces(out_features, columns)
    if len(pieces) == 1:
        return functional.linear(x, make_weight(pieces[0]).to(x.dtype), bias)
    tokens = x.reshape(-1, columns)
    out = tokens.new_empty(tokens.shape[0], out_features)
    for rows in pieces:
        # No name for a weight, so that it is gone before the next is made.
        if bias is None:
            torch.mm(tokens, make_weight(rows).to(x.dtype).t(), out=out[:, rows])
        else:
            torch.addmm(bias[rows], tokens, make_weight(rows).to(x.dtype).t(), out=out[:, rows])
    return out.view(*x.shape[:-1], out_features)


def _make_output(x: Tensor, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _fake_4bit(x: Tensor, packed: Tensor, *others: Any) -> Tensor:
    out_features: int = others[8]
    _check_columns(x, packed, out_features, bits=4)
    return _make_output(x, out_features)


def _fake_int8(
    x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None, threshold: float | None = None
) -> Tensor:
    _check_columns(x, codes, codes.shape[0], bits=8)
    return _make_output(x, codes.shape[0])


def _keep_4bit(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(t for t in inputs[1:7]))
    ctx.columns = inputs[0].shape[-1]
    ctx.layer = inputs[8:]


def _gradient_4bit(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    packed, *statistics = ctx.saved_tensors
    quant_type, blocksize, _, weight_dtype = ctx.layer
    columns = ctx.columns
    dtype = getattr(torch, weight_dtype)

    def make_weight(rows: slice) -> Tensor:
        return dequantize_rows_4bit(
            packed, tuple(statistics), rows, columns, quant_type, blocksize, dtype
        )

    of_x = _multiply_gradient(gradient, make_weight, columns) if ctx.needs_input_grad[0] else None
    return (of_x, *(None,) * 6, _bias_gradient(ctx, gradient, 7), *(None,) * 4)


def _keep_int8(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _gradient_int8(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    codes, scb = ctx.saved_tensors

    def make_weight(rows: slice) -> Tensor:
        return dequantize_rows_int8(codes[rows], scb[rows], gradient.dtype)

    of_x = None
    if ctx.needs_input_grad[0]:
        of_x = _multiply_gradient(gradient, make_weight, codes.shape[1])
    return of_x, None, None, _bias_gradient(ctx, gradient, 3), None


def _multiply_gradient(
    gradient: Tensor, make_weight: Callable[[slice], Tensor], columns: int
) -> Tensor:
    """gradient @ weight, of whose rows `make_weight` makes so many at a time that they fit."""
    rows = gradient.reshape(-1, gradient.shape[-1])
    total = rows.new_empty(rows.shape[0], columns)
    for piece in row_pieces(rows.shape[1], columns):
        # No name for a weight, so that it is gone before the next is made.
        if piece.start == 0:
            torch.mm(rows[:, piece], make_weight(piece).to(rows.dtype), out=total)
        else:
            total.addmm_(rows[:, piece], make_weight(piece).to(rows.dtype))
    return total.view(*gradient.shape[:-1], columns)


def _bias_gradient(ctx: Any, gradient: Tensor, index: int) -> Tensor | None:
    return gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[index] else None


_library.impl("linear_4bit", _linear_4bit_cpu, "CPU")
_library.impl("linear_4bit", _linear_4bit_cuda, "CUDA")
_library.impl("linear_int8", _linear_int8_cpu, "CPU")
_library.impl("linear_int8", _linear_int8_cuda, "CUDA")
torch.library.register_fake("qtool::linear_4bit", _fake_4bit, lib=_library)
torch.library.register_fake("qtool::linear_int8", _fake_int8, lib=_library)
torch.library.register_autograd(
    "qtool::linear_4bit", _gradient_4bit, setup_context=_keep_4bit, lib=_library
)
torch.library.register_autograd(
    "qtool::linear_int8", _gradient_int8, setup_context=_keep_int8, lib=_library
)
