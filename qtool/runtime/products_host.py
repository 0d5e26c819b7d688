"""Linear layers over packed weights in host memory: our kernels, on PyTorch's thread count.

    y = linear_4bit_host(x, packed, absmax, quant_type="nf4", blocksize=64, ...)

A few rows of x are multiplied straight from the packed bytes. Many are work for PyTorch's matrix
product, and shapes whose rows are no whole number of groups are rare: for both, pieces of the
weight are dequantized first. No gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qtool.backends.cpu import BIT_DTYPES
from qtool.formats.codebooks import CODES
from qtool.formats.precisions import QuantType
from qtool.runtime.dequantize import dequantize_4bit, dequantize_absmax, dequantize_int8
from qtool.runtime.dequantize_host import SOURCE_DTYPES

# In host memory pieces that the allocator keeps for the next one: fresh pages cost more than the
# decoding (it returns blocks above 32 MiB to the system at once).
MAX_HOST_ELEMENTS: Final = 1 << 22
# Up to as many rows of x the packed weight is the faster one.
MAX_HOST_PACKED_TOKENS: Final = 32
MAX_DENSE_TOKENS: Final = 4  # the same where the weight is not packed
# Rows of x that a kernel takes at once: more of a usual length would not stay in the first cache.
TILE_TOKENS: Final = {torch.bfloat16: 8, torch.float32: 4}
MIN_ELEMENTS_PER_THREAD: Final = 1 << 20  # below, waking a thread takes longer than the work
_PIECES_PER_THREAD: Final = 4  # rows are taken piece by piece, since threads wake late

RowDecoder = Callable[[int, int], Tensor]
RowMultiplier = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class NestedAbsmax:
    """absmax that is quantized itself.

    Args:
        codes: uint8 (m,).
        nested_absmax: float32 (ceil(m/256),).
        nested_quant_map: float32 (256,).
        nested_offset: float32 ().
    """

    codes: Tensor
    nested_absmax: Tensor
    nested_quant_map: Tensor
    nested_offset: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All four, in the order of the fields."""
        return self.codes, self.nested_absmax, self.nested_quant_map, self.nested_offset

    def dequantize(self) -> Tensor:
        """float32 (m,)."""
        return dequantize_absmax(*self.tensors)


def linear_4bit_host(
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
    """x @ weight.T + bias; products and sums in float32, rounded once.

    Args:
        x: float32, bfloat16 or float16 (..., in_features).
        packed: uint8 (ceil(n/2), 1) or (ceil(n/2),), contiguous; n = out_features * in_features.
        absmax: float32 (ceil(n/blocksize),), or the quantized one.
        weight_dtype: what code * absmax is rounded to; float32, bfloat16 or float16.
        bias: (out_features,).

    Returns:
        (..., out_features) in the dtype of x.
    """
    size = x.shape[-1]
    if x.numel() > MAX_HOST_PACKED_TOKENS * size or not _in_groups(size, blocksize):
        decode = _four_bit_decoder(
            packed,
            absmax.dequantize() if isinstance(absmax, NestedAbsmax) else absmax,
            quant_type=quant_type,
            blocksize=blocksize,
            size=size,
            dtype=weight_dtype,
        )
        return _multiply_dequantized(x, decode, out_features, bias)
    scales = absmax.tensors if isinstance(absmax, NestedAbsmax) else (absmax,) * 4
    kernels = _four_bit_kernels(size, x.dtype, weight_dtype, scales[0].dtype == torch.uint8)
    addresses = (tensor.data_ptr() for tensor in (packed, *scales))
    weight = CODES[quant_type], blocksize.bit_length() - 1, *addresses
    return _multiply_packed(x, kernels, weight, out_features, bias)


def linear_int8_host(
    x: Tensor, codes: Tensor, scb: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """The same for LLM.int8() weights: `codes` int8 (out, in), `scb` float32 (out,).

    Weights are float32; activations are not quantized.
    """
    out_features, size = codes.shape
    if x.numel() > MAX_HOST_PACKED_TOKENS * size or not _in_groups(size, size):

        def decode(first: int, last: int) -> Tensor:
            return dequantize_int8(codes[first:last], scb[first:last], torch.float32)

        return _multiply_dequantized(x, decode, out_features, bias)
    weight = codes.data_ptr(), scb.data_ptr()
    return _multiply_packed(x, _int8_kernels(), weight, out_features, bias)


def linear_bfloat16_host(x: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for a weight that is not packed, such as an output head's.

    For one or a few tokens in bfloat16 PyTorch reads it at about half the speed of memory.
    """
    out_features, size = weight.shape
    few = x.dtype == weight.dtype == torch.bfloat16 and x.numel() <= MAX_DENSE_TOKENS * size
    if not few or not weight.is_contiguous() or not _multiplies_pairs(size):
        return functional.linear(x, weight, bias)
    return _multiply_packed(x, _bfloat16_kernels(), (weight.data_ptr(),), out_features, bias)


# ---- Straight from packed weights -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kernels:
    """A kernel per number of rows of x, and the dtype in which it takes them."""

    for_tokens: Callable[[int], Callable[..., None]]
    x_dtype: torch.dtype


@cache
def _in_groups(size: int, blocksize: int) -> bool:
    """Whether rows of `size` weights are made of whole groups, and blocks too."""
    from qtool.backends.cpu_products import GROUP

    return size % GROUP == 0 and blocksize % GROUP == 0


@cache
def _four_bit_kernels(
    size: int, x_dtype: torch.dtype, weight_dtype: torch.dtype, nested: bool
) -> _Kernels:
    from qtool.backends import cpu_products as products

    pairs = x_dtype == weight_dtype == torch.bfloat16 and _multiplies_pairs(size)
    x_bits = np.uint16 if pairs else np.float32
    weight_bits: Any = BIT_DTYPES[SOURCE_DTYPES[weight_dtype]]
    absmax_dtype = np.uint8 if nested else np.float32

    def for_tokens(tokens: int) -> Callable[..., None]:
        return products.multiply_4bit(tokens, x_bits, weight_bits, absmax_dtype)

    return _Kernels(for_tokens, torch.bfloat16 if pairs else torch.float32)


@cache
def _multiplies_pairs(size: int) -> bool:
    """Whether rows of `size` weights are fit for products of pairs, and the processor has them."""
    from qtool.backends.cpu_products import PAIRS_GROUP, has_bfloat16_products

    return size % PAIRS_GROUP == 0 and has_bfloat16_products()


@cache
def _bfloat16_kernels() -> _Kernels:
    from qtool.backends.cpu_products import multiply_bfloat16

    return _Kernels(multiply_bfloat16, torch.bfloat16)


@cache
def _int8_kernels() -> _Kernels:
    from qtool.backends.cpu_products import multiply_int8

    return _Kernels(multiply_int8, torch.float32)


def _multiply_packed(
    x: Tensor, kernels: _Kernels, weight: tuple[Any, ...], out_features: int, bias: Tensor | None
) -> Tensor:
    """`weight` are the kernel's first arguments; it is called for tiles of a few rows of x."""
    size = x.shape[-1]
    rows = x.to(kernels.x_dtype).contiguous()
    y = torch.empty(*x.shape[:-1], out_features, dtype=torch.float32)
    num_rows = y.numel() // out_features
    x_address, x_bytes = rows.data_ptr(), size * rows.itemsize
    y_address, y_bytes = y.data_ptr(), out_features * y.itemsize
    tile_tokens = TILE_TOKENS[kernels.x_dtype]
    for first in range(0, num_rows, tile_tokens):
        num_tokens = min(tile_tokens, num_rows - first)
        kernel = kernels.for_tokens(1 << (num_tokens - 1).bit_length())
        tile = x_address + first * x_bytes, y_address + first * y_bytes, num_tokens
        _share_rows(out_features, size, partial(kernel, *weight, *tile, size, out_features))
    if bias is not None:
        y += bias
    return y if x.dtype == torch.float32 else y.to(x.dtype)


# ---- From dequantized pieces ------------------------------------------------------------------


def _four_bit_decoder(
    packed: Tensor,
    absmax: Tensor,
    *,
    quant_type: QuantType,
    blocksize: int,
    size: int,
    dtype: torch.dtype,
) -> RowDecoder:
    def decode(first: int, last: int) -> Tensor:
        values = dequantize_4bit(
            packed,
            absmax,
            quant_type=quant_type,
            blocksize=blocksize,
            start=first * size,
            stop=last * size,
            dtype=dtype,
        )
        return values.view(last - first, size)

    return decode


def _multiply_dequantized(
    x: Tensor, decode: RowDecoder, out_features: int, bias: Tensor | None
) -> Tensor:
    """`decode` makes rows [first, last) of the weight."""
    step = max(MAX_HOST_ELEMENTS // x.shape[-1], 1)
    pieces = []
    for first in range(0, out_features, step):
        weight = decode(first, min(first + step, out_features))
        # PyTorch adds up products of bfloat16 in float32, and some processors are fast at it.
        dtype = x.dtype if x.dtype == weight.dtype == torch.bfloat16 else torch.float32
        part = None if bias is None else bias[first : first + step].to(dtype)
        pieces.append(functional.linear(x.to(dtype), weight.to(dtype), part).to(x.dtype))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


# ---- Threads ----------------------------------------------------------------------------------

# Threads that products may use although PyTorch's operators run on one; 0 outside of
# `threads_for_products`.
_reserved: ContextVar[int] = ContextVar("threads reserved for products", default=0)


@contextmanager
def threads_for_products() -> Iterator[None]:
    """Run PyTorch's operators on one thread, and products with packed layers on all of its threads.

    For steps of one token: there PyTorch's other threads have next to nothing to do, but spin
    between operators on the cores that the products need.
    """
    num_threads = torch.get_num_threads()
    token = _reserved.set(num_threads)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        _reserved.reset(token)


def _share_rows(num_rows: int, size: int, multiply: RowMultiplier) -> None:
    """Call `multiply(first, last)` for ranges that cover all rows, on several threads.

    The caller begins at once and takes ranges until none is left; the others join when they wake.
    """
    num_threads = num_rows * size // MIN_ELEMENTS_PER_THREAD
    if num_threads > 1:
        num_threads = min(num_threads, _reserved.get() or torch.get_num_threads())
    if num_threads <= 1:
        multiply(0, num_rows)
        return
    step = -(-num_rows // (num_threads * _PIECES_PER_THREAD))
    starts = itertools.count(0, step)  # next() is atomic

    def work() -> None:
        while (first := next(starts)) < num_rows:
            multiply(first, min(first + step, num_rows))

    others = [pool_of_threads(num_threads - 1).submit(work) for _ in range(1, num_threads)]
    work()
    for other in others:
        if not other.cancel():
            other.result()


@cache
def pool_of_threads(num_threads: int) -> ThreadPoolExecutor:
    """The threads that work on products beside their caller's."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix="products")
