"""Numba kernels that multiply activations by packed weights, which never exist unpacked in memory.

    y[t, row] = sum over k of x[t, k] * weight[row, k]      float32, in a fixed order

A weight has the value that `cpu_kernels` dequantizes it to; products and sums are float32. A row is
worked on by one thread, so results do not depend on how rows are shared out.

In a block of 4-bit codes there are 16 different weights: they are computed and rounded once and
stay in a register, in which the codes are looked up. How codes lie in bytes would make neighbours
of every fourth weight; so activations are put into that order instead, once per call:

    two bytes, low one first    | 1 | 0 | 3 | 2 |     weight in the bits 0-3, 4-7, 8-11, 12-15

One lane takes two bytes; four shifts by 4 bits bring up its four codes.

A kernel handles `tokens` rows of x at once, a constant of its code; where x has fewer, zeros stand
in. Each weight is looked up once for all of them. Sizes are the caller's duty, as in `cpu_kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
from numba import types
from numba.core.registry import cpu_target
from numba.extending import overload

from qtool.backends import cpu_kernels
from qtool.backends.cpu_kernels import _flush, _narrow, helper, inlined, kernel
from qtool.backends.cpu_vectors import (
    BFLOAT16_FEATURES,
    accumulate,
    array_at,
    convert,
    full,
    halving_sum,
    has_features,
    join,
    load,
    look_up_floats,
    look_up_words,
    maximum,
    prefetch,
    round_to_bfloat16,
    store,
    view,
)
from qtool.formats.int8 import INVERSE_127
from qtool.formats.precisions import NESTED_BLOCKSIZE

GROUP: Final = 64  # weights of a step in float32; rows are multiples
PAIRS_GROUP: Final = 128  # of a step in pairs of bfloat16
_PART: Final = 16  # lanes of float32 in the widest register
# As many sums at least hide that each addition waits for the one before.
_MIN_PARTS: Final = 4
# Bytes: fetched so far ahead, weights come from memory in time.
_AHEAD: Final = 4096
_ORDER = np.array([1, 0, 3, 2])  # see above
_PARTS_IN_ORDER = np.array([0, 16, 32, 48])
_PAIRS_IN_ORDER = np.array([0, 32, 64, 96])

_MAGNITUDE_BITS = np.uint32(0x7FFFFFFF)
_INFINITY_BITS = np.uint32(0x7F800000)
_LARGEST_FLOAT16 = np.float32(65504)
_SMALLEST_ORDINARY_BITS = np.uint32((127 - 100) << 23)  # 2^-100
_ORDINARY_RANGE = np.uint32(200 << 23)  # up to 2^100

u64, u32, u16, f32 = np.uint64, np.uint32, np.uint16, np.float32


@cache
def has_bfloat16_products() -> bool:
    """Whether this processor multiplies bfloat16, the faster way."""
    return has_features(cpu_target.target_context.codegen(), *BFLOAT16_FEATURES)


# ---- 4 bit ------------------------------------------------------------------------------------


@cache
def multiply_4bit(
    tokens: int, x_dtype: Any, weight_dtype: Any, absmax_dtype: Any
) -> Callable[..., None]:
    """The kernel for up to `tokens` (1, 2, 4 or 8) rows of x.

    x is np.float32, its rows a multiple of GROUP; or np.uint16, for weights in bfloat16 and rows a
    multiple of PAIRS_GROUP: pairs of bfloat16 are multiplied. Weights are rounded to the dtype that
    `weight_dtype` names as in `cpu_kernels`; absmax is np.float32, or np.uint8 where it is
    quantized itself. Its arguments, the large ones as addresses, which cost the caller least:

        code: float32 (16,), the table of the format.
        shift: the block size is 2^shift, a multiple of GROUP.
        packed: uint8 (num_rows * size / 2,).
        absmax: (blocks,); the next three count where it is quantized.
        nested_absmax: float32 (ceil(blocks/256),).
        nested_map: float32 (256,).
        nested_offset: float32 (1,).
        x: (num_tokens, size), num_tokens at most `tokens`.
        y: float32 (num_tokens, num_rows), filled from first_row to last_row.
        num_tokens, size, num_rows: as above.
        first_row, last_row: the rows [first_row, last_row) of the weight.
    """
    sets = max(_MIN_PARTS // tokens, 1)
    lanes = _PART * tokens * sets
    part = _PART if x_dtype is np.float32 else 2 * _PART

    @kernel
    def multiply(
        code: Any,
        shift: int,
        packed: int,
        absmax: int,
        nested_absmax: int,
        nested_map: int,
        nested_offset: int,
        x: int,
        y: int,
        num_tokens: int,
        size: int,
        num_rows: int,
        first_row: int,
        last_row: int,
    ) -> None:
        bits, width = u64(shift), u64(size)
        absmaxes = (
            array_at(absmax, absmax_dtype),
            array_at(nested_absmax, np.float32),
            array_at(nested_map, np.float32),
            array_at(nested_offset, np.float32),
        )
        scales, scratch = np.empty((size >> shift) + 2, np.float32), np.empty(lanes, np.float32)
        codes, like = array_at(packed, np.uint8), array_at(packed, weight_dtype)
        weight = code, like, bits, codes, scales
        arranged = _arrange(array_at(x, x_dtype), num_tokens, size, tokens, part, 4, _ORDER)
        zeros, sums_of = full(lanes, 0, np.float32), array_at(y, np.float32)
        for row in range(u64(first_row), u64(last_row)):
            first = row * width
            blocks = first >> bits, (first + width - u64(1)) >> bits
            if _decode_scales(absmaxes, blocks, scales):
                sums = _row_sums(zeros, weight, first, width, arranged, tokens, False)
            else:
                sums = _row_sums(zeros, weight, first, width, arranged, tokens, True)
            store(scratch, u64(0), sums)
            _add_parts(scratch, tokens, sets, num_tokens, row, sums_of, num_rows)

    return multiply


@inlined
def _decode_scales(absmaxes: Any, blocks: Any, scales: Any) -> Any:
    """Fill `scales` with the absmax of the first to the last of `blocks`; whether all are ordinary.

    In those no weight but zero is subnormal, and none is infinite in float32.
    """
    first, last = blocks
    num_other = u64(0)
    for block in range(first, last + u64(1)):
        scale = _scale(absmaxes, block)
        scales[block - first] = scale
        magnitude = f32(scale).view(np.uint32) & _MAGNITUDE_BITS
        num_other += u64(u32(magnitude - _SMALLEST_ORDINARY_BITS) > _ORDINARY_RANGE)
    return num_other == u64(0)


def _scale(absmaxes: Any, block: Any) -> Any:
    """The absmax of a block, which may be quantized itself."""


@overload(_scale)  # type: ignore[untyped-decorator]
def _overload_scale(absmaxes: Any, block: Any) -> Callable[[Any, Any], Any]:
    return _nested_scale if absmaxes[0].dtype == types.uint8 else _plain_scale


def _plain_scale(absmaxes: Any, block: Any) -> Any:
    return absmaxes[0][block]


def _nested_scale(absmaxes: Any, block: Any) -> Any:
    codes, nested_absmax, nested_map, offset = absmaxes
    scaled = f32(nested_map[codes[block]] * nested_absmax[block // u64(NESTED_BLOCKSIZE)])
    return f32(scaled + offset[0])


def _row_sums(
    sums: Any, weight: Any, first: Any, size: Any, arranged: Any, tokens: Any, exact: Any
) -> Any:
    """`sums` plus the products of the row that begins at element `first`.

    `weight` are the table of the format, an array of the weights' dtype, log2 of the block size,
    the packed bytes and the absmax of the row's blocks; `exact` is set where one is not ordinary.
    """


_INLINED: Final = {"forceinline": True}


@overload(_row_sums, prefer_literal=True, jit_options=_INLINED)  # type: ignore[untyped-decorator]
def _overload_row_sums(
    sums: Any, weight: Any, first: Any, size: Any, arranged: Any, tokens: Any, exact: Any
) -> Callable[..., Any]:
    return _row_sums_of_pairs if arranged.dtype == types.uint16 else _row_sums_of_floats


def _row_sums_of_floats(
    sums: Any, weight: Any, first: Any, size: Any, arranged: Any, tokens: Any, exact: Any
) -> Any:
    code, like, shift, packed, scales = weight
    codes, first_block = load(code, u64(0), 16), first >> shift
    for at in range(u64(0), size, u64(GROUP)):
        scale = scales[((first + at) >> shift) - first_block]
        table = _exact_table(code, scale, like) if exact else _round(codes * scale, like)
        words = convert(view(load(packed, (first + at) >> u64(1), 32), np.uint16), np.uint32)
        prefetch(packed, ((first + at) >> u64(1)) + u64(_AHEAD))
        shifted = join(join(words, words >> 4), join(words >> 8, words >> 12))
        weights = look_up_floats(table, shifted)
        sums = accumulate(sums, weights, arranged, at * u64(tokens), tokens)
    return sums


def _row_sums_of_pairs(
    sums: Any, weight: Any, first: Any, size: Any, arranged: Any, tokens: Any, exact: Any
) -> Any:
    """Two blocks fill a table of 32 entries: 16 lanes look up in each half."""
    code, like, shift, packed, scales = weight
    codes, first_block = load(code, u64(0), 16), first >> shift
    half = join(full(_PART, 0, np.uint16), full(_PART, 16, np.uint16))
    halves = join(join(half, half), join(half, half))
    for at in range(u64(0), size, u64(PAIRS_GROUP)):
        low = scales[((first + at) >> shift) - first_block]
        high = scales[((first + at + u64(GROUP)) >> shift) - first_block]
        if exact:
            table = _exact_pairs_table(code, low, high, like)
        else:
            table = round_to_bfloat16(join(codes * low, codes * high))
        words = view(load(packed, (first + at) >> u64(1), 64), np.uint16)
        prefetch(packed, ((first + at) >> u64(1)) + u64(_AHEAD))
        shifted = join(join(words, words >> 4), join(words >> 8, words >> 12))
        weights = look_up_words(table, (shifted & 15) | halves)
        sums = accumulate(sums, weights, arranged, at * u64(tokens), tokens)
    return sums


def _round(products: Any, like: Any) -> Any:
    """16 weights of an ordinary block rounded to the dtype that `like` names, as float32."""


@overload(_round)  # type: ignore[untyped-decorator]
def _overload_round(products: Any, like: Any) -> Callable[[Any, Any], Any] | None:
    versions = {
        types.uint16: _round_to_bfloat16,
        types.int16: _round_to_float16,
        types.uint32: _keep_float32,
    }
    return versions.get(like.dtype)


def _keep_float32(products: Any, like: Any) -> Any:
    return products


def _round_to_bfloat16(products: Any, like: Any) -> Any:
    bits = view(products, np.uint32)
    return view((bits + ((bits >> 16) & 1) + 0x7FFF) & 0xFFFF0000, np.float32)


def _round_to_float16(products: Any, like: Any) -> Any:
    """See `cpu_kernels._round_to_float16`."""
    bits = view(products, np.uint32)
    magnitude = bits & _MAGNITUDE_BITS
    power = maximum(magnitude & _INFINITY_BITS, full(_PART, 113 << 23, np.uint32))
    shift = view(power + ((13 << 23) | (1 << 22)), np.float32)
    rounded = (view(magnitude, np.float32) + shift) - shift
    overflow = view(rounded > _LARGEST_FLOAT16, np.uint32) & _INFINITY_BITS
    sign = bits & 0x80000000
    return view(view(rounded, np.uint32) | overflow | sign, np.float32)


@helper
def _exact_table(code: Any, scale: Any, like: Any) -> Any:
    """The weights of any block, as `cpu_kernels` dequantizes them, in float32."""
    bits, values = np.empty(16, like.dtype), np.empty(16, np.float32)
    for c in range(16):
        bits[c] = _narrow(_flush(code[c] * scale), like)
        values[c] = _widen(bits, c)
    return load(values, u64(0), 16)


@helper
def _exact_pairs_table(code: Any, low: Any, high: Any, like: Any) -> Any:
    """Those of two blocks, as bits."""
    bits = np.empty(32, like.dtype)
    for c in range(16):
        bits[c] = _narrow(_flush(code[c] * low), like)
        bits[16 + c] = _narrow(_flush(code[c] * high), like)
    return load(bits, u64(0), 32)


def _widen(bits: Any, j: Any) -> Any:
    """The float32 behind bits[j]."""


@overload(_widen)  # type: ignore[untyped-decorator]
def _overload_widen(bits: Any, j: Any) -> Callable[[Any, Any], Any] | None:
    versions = {
        types.uint16: _widen_bfloat16,
        types.int16: _widen_float16,
        types.uint32: _view_float32,
    }
    return versions.get(bits.dtype)


def _widen_bfloat16(bits: Any, j: Any) -> Any:
    return u32(u32(bits[j]) << u32(16)).view(np.float32)


def _widen_float16(bits: Any, j: Any) -> Any:
    half = u32(bits[j])
    if (half & u32(0x7C00)) == u32(0x7C00):  # infinite or NaN
        return u32(((half & u32(0x83FF)) << u32(13)) | _INFINITY_BITS).view(np.float32)
    return _finite_float16(bits[j])


def _view_float32(bits: Any, j: Any) -> Any:
    return u32(bits[j]).view(np.float32)


_finite_float16 = helper(cpu_kernels._widen_float16)


# ---- INT8 -------------------------------------------------------------------------------------


@cache
def multiply_int8(tokens: int) -> Callable[..., None]:
    """The kernel for up to `tokens` (1, 2, 4 or 8) rows of x in float32, multiples of GROUP.

    Its arguments are those of `multiply_4bit`, with these for the weight:
        codes: int8 (num_rows, size).
        scb: float32 (num_rows,).
    """
    sets = max(_MIN_PARTS // tokens, 1)
    lanes = _PART * tokens * sets

    @kernel
    def multiply(
        codes: int,
        scb: int,
        x: int,
        y: int,
        num_tokens: int,
        size: int,
        num_rows: int,
        first_row: int,
        last_row: int,
    ) -> None:
        integers, scales = array_at(codes, np.int8), array_at(scb, np.float32)
        arranged = _arrange(
            array_at(x, np.float32), num_tokens, size, tokens, _PART, 1, _PARTS_IN_ORDER
        )
        scratch, sums_of = np.empty(lanes, np.float32), array_at(y, np.float32)
        for row in range(u64(first_row), u64(last_row)):
            sums = full(lanes, 0, np.float32)
            for at in range(u64(0), u64(size), u64(GROUP)):
                first = row * u64(size) + at
                prefetch(integers, first + u64(_AHEAD))
                wide = convert(load(integers, first, GROUP), np.int32)
                weights = convert(wide, np.float32) * scales[row] * INVERSE_127
                sums = accumulate(sums, weights, arranged, at * u64(tokens), tokens)
            store(scratch, u64(0), sums)
            _add_parts(scratch, tokens, sets, num_tokens, row, sums_of, num_rows)

    return multiply


# ---- bfloat16 ---------------------------------------------------------------------------------


@cache
def multiply_bfloat16(tokens: int) -> Callable[..., None]:
    """The kernel for weights that are not packed and up to `tokens` (1, 2, 4 or 8) rows of x.

    Its arguments are those of `multiply_4bit`, x in bfloat16, rows multiples of PAIRS_GROUP, and:
        weights: uint16 (num_rows, size), bfloat16.
    """
    sets = max(_MIN_PARTS // tokens, 1)
    lanes = _PART * tokens * sets

    @kernel
    def multiply(
        weights: int,
        x: int,
        y: int,
        num_tokens: int,
        size: int,
        num_rows: int,
        first_row: int,
        last_row: int,
    ) -> None:
        values, sums_of = array_at(weights, np.uint16), array_at(y, np.float32)
        arranged = _arrange(
            array_at(x, np.uint16), num_tokens, size, tokens, 2 * _PART, 1, _PAIRS_IN_ORDER
        )
        scratch = np.empty(lanes, np.float32)
        for row in range(u64(first_row), u64(last_row)):
            sums = full(lanes, 0, np.float32)
            for at in range(u64(0), u64(size), u64(PAIRS_GROUP)):
                first = row * u64(size) + at
                for line in range(u64(0), u64(PAIRS_GROUP), u64(2 * _PART)):
                    prefetch(values, first + line + u64(_AHEAD // 2))
                group = load(values, first, PAIRS_GROUP)
                sums = accumulate(sums, group, arranged, at * u64(tokens), tokens)
            store(scratch, u64(0), sums)
            _add_parts(scratch, tokens, sets, num_tokens, row, sums_of, num_rows)

    return multiply


# ---- Activations in, sums out -----------------------------------------------------------------


@helper
def _arrange(
    x: Any, num_tokens: int, size: int, tokens: int, lanes: int, step: int, offsets: Any
) -> Any:
    """x (num_tokens, size) in the order in which the weights come.

    Every 4 * `lanes` activations of a token make four parts of `lanes`: part p has those at
    offsets[p], offsets[p] + step, offsets[p] + 2 * step ... The first parts of all tokens come
    first, then all second ones. Tokens that x lacks are zeros.
    """
    num_parts = offsets.size
    arranged = np.zeros(size * tokens, x.dtype)
    for token in range(num_tokens):
        for first in range(0, size, lanes * num_parts):
            for part in range(num_parts):
                to = u64(first * tokens + (part * tokens + token) * lanes)
                start = u64(token * size + first + offsets[part])
                for lane in range(u64(lanes)):
                    arranged[to + lane] = x[start + lane * u64(step)]
    return arranged


@inlined
def _add_parts(
    scratch: Any, tokens: int, sets: int, num_tokens: int, row: Any, y: Any, num_rows: int
) -> None:
    """y[token, row] of y (num_tokens, num_rows) from the sums of `sets` parts per token."""
    for token in range(num_tokens):
        total = load(scratch, u64(token * _PART), _PART)
        for other in range(1, sets):
            total = total + load(scratch, u64((other * tokens + token) * _PART), _PART)
        y[u64(token * num_rows) + row] = halving_sum(total)
