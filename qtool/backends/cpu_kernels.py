"""Numba kernels of the CPU backend: single-threaded, without the GIL, no fast math.

Callers cut the work and run several at once. Sizes and contiguity are the caller's duty: nothing
here checks bounds, and the 4-bit kernels take whole blocks only. The arithmetic is that of
`qtool.formats`, operation by operation, because the bytes must be the same.

Values come and go as their bits, and the element type tells the dtype: uint16 is bfloat16, int16
is float16, uint32 is float32.

There are two styles of loop. Where the cost of a weight hangs on what stays in registers, a kernel
computes with the vectors of `cpu_vectors`. All else is plain loops that LLVM vectorizes, given
unsigned indices (a signed one may be negative and wrap around).

Every kernel is compiled on first use and cached on disk. The cache looks at this file only: after a
change to what it imports (the vectors or the code tables, say), save it anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numba import njit, types
from numba.extending import overload

from qtool.backends.cpu_vectors import (
    convert,
    full,
    halving_sum,
    largest,
    load,
    lookup,
    maximum,
    store,
    view,
)
from qtool.formats.codebooks import FP4_THRESHOLDS, NF4_THRESHOLDS
from qtool.formats.double_quant import SUM_GROUP
from qtool.formats.int8 import INVERSE_127
from qtool.formats.precisions import NESTED_BLOCKSIZE
from qtool.formats.reciprocal import CORRECTIONS

LANES: Final = 32  # the smallest block size; all others are multiples
_HALF_LANES: Final = LANES // 2
_STRIP: Final = 4096  # values that are looked at again if one of them is not finite

# Division by zero gives infinity, as in the reference, instead of an exception.
_OPTIONS: Final = {"nogil": True, "error_model": "numpy"}

_SMALLEST_NORMAL = np.float32(2.0**-126)
_LARGEST_SUBNORMAL_BITS = 0x007FFFFF
_LOWEST = np.float32(np.finfo(np.float32).min)
_MAGNITUDE_BITS = np.uint32(0x7FFFFFFF)
_INFINITY_BITS = np.uint32(0x7F800000)
_ROUND_TO_INT = np.float32(1.5 * 2**23)  # adding it leaves the rounded integer in the low bits

# Numba widens integers to 64 bit at every operation; these keep them small (and indices unsigned).
u64, u32, u16, u8 = np.uint64, np.uint32, np.uint16, np.uint8
i16, f32 = np.int16, np.float32


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first call; keep the result beside the source or in the user's cache folder.

    Where neither can be written, every process compiles anew.
    """
    try:
        compiled = njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no place for the cache
        compiled = njit(**_OPTIONS)(function)
    return compiled  # type: ignore[no-any-return]


def helper(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile what only kernels call, without entry points from Python, which take a while."""
    compiled = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)(function)
    return compiled  # type: ignore[no-any-return]


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile into every caller, so that vectors stay in registers."""
    compiled = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True, **_OPTIONS)(
        function
    )
    return compiled  # type: ignore[no-any-return]


# ---- Magnitudes -------------------------------------------------------------------------------


@inlined
def _magnitude_mask(bits: Any) -> Any:
    """What is left of a value's bits without the sign."""
    return bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)


@inlined
def _largest_magnitude(bits: Any, first: int, size: int) -> Any:
    """The largest magnitude among `size` values, as bits."""
    mask = _magnitude_mask(bits)
    found = load(bits, first, LANES) & mask
    for j in range(first + u64(LANES), first + size, u64(LANES)):
        found = maximum(found, load(bits, j, LANES) & mask)
    return largest(found)


@helper
def _finite_max(bits: Any, infinity: int, first: int, size: int) -> Any:
    """The largest magnitude but NaN, as bits, and how many values are not finite."""
    mask, found, num_bad = _magnitude_mask(bits), 0, 0
    for j in range(first, first + size):
        magnitude = int(bits[j]) & int(mask)
        num_bad += int(magnitude >= infinity)
        if magnitude <= infinity:
            found = max(found, magnitude)
    return found, num_bad


# ---- 4 bit ------------------------------------------------------------------------------------


@inlined
def _pack(pairs: Any, width: int) -> Any:
    """Bytes of two codes, the earlier one in the high half.

    A pair of codes of `width` bits is one integer here, with the earlier code in its low half.
    """
    return convert((pairs << 4) | (pairs >> width), np.uint8)


@kernel
def quantize_4bit_16bit(
    tables: Any,
    order: Any,
    absmax_values: Any,
    blocksize: int,
    bits: Any,
    packed: Any,
    absmax: Any,
) -> int:
    """NF4 or FP4 from the bits of BF16 or F16; returns how many values are not finite.

    Args:
        tables: uint8 ((infinity + 1) * 64,), `decision_tables.search_tables`.
        order: uint8 (16,), `decision_tables.CODE_ORDER`.
        absmax_values: float32 (infinity + 1,), `decision_tables.absmax_values`.
        blocksize: values per block.
        bits: uint16 (n,), whole blocks.
        packed: uint8 (n/2,), filled.
        absmax: float32 (n/blocksize,), filled.
    """
    size, num_blocks = u64(blocksize), u64(absmax.size)
    infinity = u64(absmax_values.size - 1)
    num_bad = 0
    if num_blocks == 0:
        return num_bad
    following = _largest_magnitude(bits, u64(0), size)
    for block in range(num_blocks):
        # The maximum is found one block ahead, so that the search need not wait for it.
        first, after = block * size, min(block + u64(1), num_blocks - u64(1)) * size
        row, following = u64(following), _largest_magnitude(bits, after, size)
        absmax[block] = absmax_values[min(row, infinity)]
        bad = row >= infinity
        if bad:
            found, count = _finite_max(bits, infinity, first, size)
            row, num_bad = u64(found), num_bad + count
            absmax[block] = absmax_values[row] if row or u64(count) < size else _LOWEST
        for j in range(first, first + size, u64(LANES)):
            ranks = _ranks(load(bits, j, LANES), tables, row * u64(64))
            codes = lookup(load(order, u64(0), 16), ranks)
            store(packed, j >> u64(1), _pack(view(codes, np.uint16), 8))
        if bad:
            _clear_bad_codes(bits, infinity, first, size, packed)
    return num_bad


@inlined
def _ranks(bits: Any, tables: Any, row: int) -> Any:
    """How many of the row's 15 thresholds each value exceeds, by binary search."""
    values = view(bits, np.int16)
    keys = values ^ ((values >> 15) & 0x7FFF)
    at = view(full(LANES, 0x0100, np.uint16), np.uint8)
    at = _descend(keys, tables, row, at)
    at = _descend(keys, tables, row + u64(16), at)
    at = _descend(keys, tables, row + u64(32), at)
    at = _descend(keys, tables, row + u64(48), at)
    return convert(view(at, np.uint16), np.uint8)


@inlined
def _descend(keys: Any, tables: Any, step: int, at: Any) -> Any:
    """From the threshold `at` of one step to one of the two below it, left or right.

    There are 2^s thresholds at step s. Threshold i has its low byte at entry i of the step's table
    and its high byte at entry 2^s + i; `at` holds both positions, for every key. Below it are 2i
    and 2i + 1, so positions double, and grow by one where the key exceeds the threshold. After the
    last step the first position is the number of thresholds exceeded.
    """
    thresholds = view(lookup(load(tables, step, 16), at), np.int16)
    return at + at - view(keys > thresholds, np.uint8)


@helper
def _clear_bad_codes(bits: Any, infinity: int, first: int, size: int, packed: Any) -> None:
    """Code 0 for what is not finite: its scaled value is NaN, which no integer comparison sees."""
    for j in range(first, first + size):
        if u64(bits[j] & u16(0x7FFF)) >= infinity:
            packed[j >> u64(1)] &= u8(0xF0) if j & u64(1) else u8(0x0F)


# ---- 4 bit from float32 -----------------------------------------------------------------------


@kernel
def quantize_4bit_f32(is_nf4: bool, blocksize: int, bits: Any, packed: Any, absmax: Any) -> int:
    """NF4 or FP4 from the bits of F32, uint32 (n,); the rest as in `quantize_4bit_16bit`."""
    size, num_blocks = u64(blocksize), u64(absmax.size)
    num_bad = 0
    if num_blocks == 0:
        return num_bad
    following = _largest_magnitude(bits, u64(0), size)
    for block in range(num_blocks):
        first, after = block * size, min(block + u64(1), num_blocks - u64(1)) * size
        found, following = following, _largest_magnitude(bits, after, size)
        absmax[block], count = _absmax_f32(bits, found, first, size)
        num_bad += count
        inverse = _reciprocal(absmax[block])
        for j in range(first, first + size, u64(LANES)):
            scaled = _flushed(load(bits, j, LANES)) * inverse
            codes = _nf4_codes_f32(scaled) if is_nf4 else _fp4_codes_f32(scaled)
            store(packed, j >> u64(1), _pack(view(codes, np.uint64), 32))
    return num_bad


@helper
def _absmax_f32(bits: Any, found: int, first: int, size: int) -> Any:
    """absmax of a block whose largest magnitude is `found`, and how many are not finite."""
    if found < _INFINITY_BITS:
        return _flush(u32(found).view(np.float32)), 0
    magnitude, num_bad = _finite_max(bits, _INFINITY_BITS, first, size)
    if magnitude == 0 and u64(num_bad) == size:
        return _LOWEST, num_bad
    return _flush(u32(magnitude).view(np.float32)), num_bad


@helper
def _flush(value: Any) -> Any:
    """See `qtool.formats.floats.flush_subnormals`."""
    return np.copysign(f32(0), value) if abs(value) < _SMALLEST_NORMAL else value


@helper
def _reciprocal(value: Any) -> Any:
    """See `qtool.formats.reciprocal`."""
    rounded = _flush(f32(1) / value)
    bits = f32(value).view(np.uint32)
    if (bits & u32(0x1FFF)) == 0 and rounded != 0 and abs(rounded) < np.inf:
        units = CORRECTIONS[u64((bits >> u32(13)) & u32(0x3FF))]
        rounded = u32(f32(rounded).view(np.uint32) + units).view(np.float32)
    return rounded


@inlined
def _flushed(bits: Any) -> Any:
    """The float32 behind the bits of each lane; +0 for what is subnormal."""
    normal = (bits & _MAGNITUDE_BITS) > _LARGEST_SUBNORMAL_BITS
    return view(bits & normal, np.float32)


@inlined
def _nf4_codes_f32(scaled: Any) -> Any:
    """Counts the thresholds exceeded; a comparison that holds is -1."""
    codes = full(LANES, 0, np.int32)
    for k in range(u64(NF4_THRESHOLDS.size)):
        codes = codes - (scaled > NF4_THRESHOLDS[k])
    return codes


@inlined
def _fp4_codes_f32(scaled: Any) -> Any:
    """Magnitudes that exceed 0, 1, 2 ... thresholds have the codes 0 1 6 7 4 5 2 3.

    That is the count with bit 2 flipped where bit 1 is set. A subnormal is zero, without a sign.
    """
    magnitudes = view(view(scaled, np.uint32) & _MAGNITUDE_BITS, np.float32)
    count = full(LANES, 0, np.int32)
    for k in range(u64(FP4_THRESHOLDS.size)):
        count = count - (magnitudes > FP4_THRESHOLDS[k])
    sign = (scaled <= -_SMALLEST_NORMAL) & 8
    return (count ^ ((count & 2) << 1)) | sign


# ---- 4 bit back -------------------------------------------------------------------------------


@kernel
def dequantize_4bit(code: Any, blocksize: int, packed: Any, absmax: Any, bits: Any) -> None:
    """Fill `bits` (n,), whole blocks, from `packed` uint8, `absmax` and the table `code` (16,).

    A block has 16 different values at most: they are computed and rounded once, then looked up.
    """
    size = u64(blocksize)
    entries = np.empty(16, bits.dtype)
    for block in range(u64(absmax.size)):
        for c in range(16):
            entries[c] = _narrow(_flush(code[c] * absmax[block]), bits)
        _look_up(entries, packed, block * size, size, bits)


def _look_up(entries: Any, packed: Any, first: Any, size: Any, bits: Any) -> None:
    """Fill bits[first : first + size] with the entries that the packed codes name."""


@overload(_look_up)  # type: ignore[untyped-decorator]
def _overload_look_up(
    entries: Any, packed: Any, first: Any, size: Any, bits: Any
) -> Callable[[Any, Any, Any, Any, Any], None]:
    return _look_up_32bit if bits.dtype.bitwidth == 32 else _look_up_16bit


def _look_up_16bit(entries: Any, packed: Any, first: Any, size: Any, bits: Any) -> None:
    table = load(entries, u64(0), 16)
    low_bytes, high_bytes = convert(table, np.uint8), convert(table >> 8, np.uint8)
    for j in range(first, first + size, u64(LANES)):
        pairs = convert(load(packed, j >> u64(1), _HALF_LANES), np.uint16)
        codes = view((pairs | (pairs << 12)) >> 4, np.uint8)  # the high half comes first
        low, high = lookup(low_bytes, codes), lookup(high_bytes, codes)
        store(bits, j, convert(low, np.uint16) | (convert(high, np.uint16) << 8))


def _look_up_32bit(entries: Any, packed: Any, first: Any, size: Any, bits: Any) -> None:
    for j in range(first >> u64(1), (first + size) >> u64(1)):
        bits[j << u64(1)] = entries[packed[j] >> 4]
        bits[(j << u64(1)) | u64(1)] = entries[packed[j] & 15]


# ---- Double quantization ----------------------------------------------------------------------


@kernel
def mean_in_fixed_order(absmax: Any) -> Any:
    """float32 mean of `absmax` (m,), m > 0, in the order of `qtool.formats.double_quant`."""
    group = np.empty(SUM_GROUP, np.float64)
    count = (absmax.size + SUM_GROUP - 1) // SUM_GROUP
    sums = np.empty(count, np.float64)
    _sum_groups(absmax, group, sums)
    while count > 1:
        num_values, count = count, (count + SUM_GROUP - 1) // SUM_GROUP
        _sum_groups(sums[:num_values], group, sums[:count])
    return _flush(f32(sums[0] / absmax.size))


@helper
def _sum_groups(values: Any, group: Any, sums: Any) -> None:
    """The sum of each group of `values`, the last one padded with zeros; may write in place."""
    for g in range(u64(sums.size)):
        first = g * u64(SUM_GROUP)
        count = min(u64(values.size) - first, u64(SUM_GROUP))
        for j in range(count):
            group[j] = values[first + j]
        for j in range(count, u64(SUM_GROUP)):
            group[j] = 0
        sums[g] = _group_sum(group)


@helper
def _group_sum(group: Any) -> Any:
    """The sum of SUM_GROUP float64 values."""
    return halving_sum(load(group, u64(0), SUM_GROUP))


@kernel
def quantize_absmax(
    absmax: Any, offset: float, guesses: Any, steps: Any, codes: Any, nested_absmax: Any
) -> None:
    """8-bit codes (m,) and nested_absmax (ceil(m/256),) of `absmax` (m,) minus `offset`.

    `guesses` and `steps` are `decision_tables.dynamic_guesses` and `dynamic_steps`.
    """
    size = u64(NESTED_BLOCKSIZE)
    values = np.empty(NESTED_BLOCKSIZE, np.float32)
    bits = values.view(np.uint32)
    for block in range(u64(nested_absmax.size)):
        first = block * size
        count = min(u64(absmax.size) - first, size)
        for j in range(count):
            values[j] = _flush(absmax[first + j] - offset)
        for j in range(count, size):  # padding has no part in the nested absmax
            values[j] = 0
        found = _largest_magnitude(bits, u64(0), size)
        nested_absmax[block], _ = _absmax_f32(bits, found, u64(0), size)
        inverse = _reciprocal(nested_absmax[block])
        for j in range(size):
            values[j] = _flush(values[j] * inverse)
        for j in range(count):
            guess = guesses[bits[j] >> u32(16)]
            codes[first + j] = u8(guess + u8(values[j] > steps[guess]))


@kernel
def dequantize_absmax(
    codes: Any, nested_absmax: Any, offset: float, dynamic_map: Any, absmax: Any
) -> None:
    """Fill `absmax` float32 (m,) from `codes` uint8 (m,)."""
    for j in range(codes.size):
        scaled = _flush(dynamic_map[codes[j]] * nested_absmax[j // NESTED_BLOCKSIZE])
        absmax[j] = _flush(scaled + offset)


# ---- INT8 rows --------------------------------------------------------------------------------


@kernel
def quantize_int8(
    infinity: int, overflow: int, row_size: int, bits: Any, codes: Any, scb: Any
) -> int:
    """LLM.int8() rows; returns how many values are not finite in float16.

    Args:
        infinity: the bits of infinity in the dtype of `bits`.
        overflow: the bits of the least magnitude that float16 takes for infinity.
        row_size: values per row.
        bits: the values (rows * row_size,).
        codes: int8 (rows * row_size,), filled.
        scb: float32 (rows,), filled.
    """
    num_bad = 0
    for r in range(scb.size):
        first, stop = u64(r * row_size), u64((r + 1) * row_size)
        scb[r], count = _row_absmax(bits, infinity, overflow, first, stop)
        if scb[r] == 0 or scb[r] == np.inf:  # all zeros, or all is nothing beside infinity
            for j in range(first, stop):
                codes[j] = 0
        else:
            scale = f32(127) * _reciprocal(scb[r])
            for j in range(first, stop):
                rounded = f32(f32(_as_float16(bits[j]) * scale) + _ROUND_TO_INT)
                codes[j] = np.int8(rounded.view(np.uint32))
            if count:
                _clear_nan_codes(bits, infinity, first, stop, codes)
        num_bad += count
    return num_bad


@helper
def _row_absmax(bits: Any, infinity: int, overflow: int, first: int, stop: int) -> Any:
    """The largest magnitude but NaN in float16, and how many values are not finite in it."""
    found, num_bad, mask = bits.dtype.type(0), 0, _magnitude_mask(bits)
    for j in range(first, stop):
        found = max(found, bits.dtype.type(bits[j] & mask))
    if found >= overflow:
        found = bits.dtype.type(0)
        for j in range(first, stop):
            magnitude = bits.dtype.type(bits[j] & mask)
            num_bad += int(magnitude >= overflow)
            if magnitude <= infinity:
                found = max(found, magnitude)
    return _as_float16(found) if found < overflow else f32(np.inf), num_bad


@helper
def _clear_nan_codes(bits: Any, infinity: int, first: int, stop: int, codes: Any) -> None:
    """Code 0 for NaN; only without infinities, beside which every code is 0."""
    for j in range(first, stop):
        if (bits[j] & _magnitude_mask(bits)) > infinity:
            codes[j] = 0


@kernel
def dequantize_int8(row_size: int, codes: Any, scb: Any, bits: Any) -> None:
    """Fill `bits` (rows * row_size,) from `codes` int8 of that size and `scb` float32 (rows,)."""
    for r in range(scb.size):
        for j in range(u64(r * row_size), u64((r + 1) * row_size)):
            bits[j] = _narrow(f32(f32(codes[j]) * scb[r]) * INVERSE_127, bits)


# ---- Finiteness -------------------------------------------------------------------------------


@kernel
def count_nonfinite(infinity: int, bits: Any) -> int:
    """How many of `bits` are not finite; `infinity` has the bits of infinity in their dtype."""
    num_bad, mask = 0, _magnitude_mask(bits)
    for start in range(0, bits.size, _STRIP):
        stop = min(start + _STRIP, bits.size)
        found = bits.dtype.type(0)
        for j in range(u64(start), u64(stop)):
            found = max(found, bits.dtype.type(bits[j] & mask))
        if found >= infinity:
            for j in range(start, stop):
                num_bad += int((bits[j] & mask) >= infinity)
    return num_bad


# ---- Float formats ----------------------------------------------------------------------------


def _as_float16(bits: Any) -> Any:
    """The value behind `bits` rounded to float16, as float32; not for what is infinite there."""


@overload(_as_float16)  # type: ignore[untyped-decorator]
def _overload_as_float16(bits: Any) -> Callable[[Any], Any] | None:
    versions = {
        types.uint16: _bfloat16_as_float16,
        types.int16: _widen_float16,
        types.uint32: _float32_as_float16,
    }
    return versions.get(bits)


def _bfloat16_as_float16(bits: Any) -> Any:
    return _round_to_float16(u32(u32(bits) << u32(16)).view(np.float32))


def _float32_as_float16(bits: Any) -> Any:
    return _round_to_float16(u32(bits).view(np.float32))


def _widen_float16(bits: Any) -> Any:
    normal = u32(((u32(bits) & u32(0x7FFF)) << u32(13)) + u32(112 << 23))
    # A subnormal t came out as 2^-15 + t/2. Twice that less 2^-14 is t, and more for all others.
    twice = u32(normal + u32(1 << 23)).view(np.float32)
    magnitude = min(normal, f32(twice - f32(2.0**-14)).view(np.uint32))
    return u32(magnitude | ((u32(bits) & u32(0x8000)) << u32(16))).view(np.float32)


@helper
def _round_to_float16(value: Any) -> Any:
    """The nearest float16, as float32, ties to even; for magnitudes up to 65536.

    Adding 1.5 * 2^13 times the power of two below the value (2^-14 for what is subnormal in
    float16) and taking it away again leaves the bits that float16 has.
    """
    power = max(f32(value).view(np.uint32) & _INFINITY_BITS, u32(113 << 23))
    shift = u32(power + u32((13 << 23) | (1 << 22))).view(np.float32)
    return f32(f32(value + shift) - shift)


def _narrow(value: Any, bits: Any) -> Any:
    """`value` float32 rounded to the dtype that the array `bits` holds, as its bits."""


@overload(_narrow)  # type: ignore[untyped-decorator]
def _overload_narrow(value: Any, bits: Any) -> Callable[[Any, Any], Any] | None:
    versions = {
        types.uint16: _narrow_to_bfloat16,
        types.int16: _narrow_to_float16,
        types.uint32: _narrow_to_float32,
    }
    return versions.get(bits.dtype)


def _narrow_to_float32(value: Any, bits: Any) -> Any:
    return f32(value).view(np.uint32)


def _narrow_to_bfloat16(value: Any, bits: Any) -> Any:
    whole = f32(value).view(np.uint32)
    if value != value:
        return u16(whole >> u32(16)) | u16(0x40)
    return u16((whole + u32(0x7FFF) + ((whole >> u32(16)) & u32(1))) >> u32(16))


def _narrow_to_float16(value: Any, bits: Any) -> Any:
    whole = f32(value).view(np.uint32)
    capped = min(whole & _MAGNITUDE_BITS, u32(0x47800000))  # 2^16, whose bits become infinity's
    rounded = f32(_round_to_float16(u32(capped).view(np.float32)))
    result = u32(u32(rounded.view(np.uint32) >> u32(13)) - u32(112 << 10))
    if rounded < f32(2.0**-14):  # a multiple of 2^-24, by which the floats from 0.5 on differ
        result = u32(f32(rounded + f32(0.5)).view(np.uint32) - u32(0x3F000000))
    if value != value:
        result = u32(0x7E00)
    return i16(result | ((whole >> u32(16)) & u32(0x8000)))
