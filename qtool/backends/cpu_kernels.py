"""Numba kernels of the CPU backend: single-threaded, without the GIL, no fast math.

Callers cut the work and run several at once. Sizes and contiguity are the caller's duty: nothing
here checks bounds. The arithmetic is that of `qtool.formats`, operation by operation, because the
bytes must be the same; only its layout differs:

- Work goes in strips of 4096 values, copied to scratch memory that stays in the first-level cache
  and padded with zeros at the end of the data, so that every block is a full one.
- Loops are written for LLVM's vectorizer: unsigned indices (a signed one may be negative and wrap
  around), codes as wide as the values compared (narrower ones are packed after every comparison),
  packing into nibbles as a pass of its own.

16-bit sources are quantized as integers with `decision_tables`. Elsewhere the element type tells
the dtype: uint16 is bfloat16, int16 is the bits of float16, float32 is itself.

Every kernel is compiled on first use and cached on disk. The cache looks at this file only: after a
change to what it imports (the code tables, say), save it anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numba import njit, types
from numba.extending import overload

from qtool.formats.codebooks import FP4_THRESHOLDS, NF4_THRESHOLDS
from qtool.formats.double_quant import SUM_GROUP
from qtool.formats.int8 import INVERSE_127
from qtool.formats.precisions import NESTED_BLOCKSIZE

STRIP: Final = 4096  # the largest block size; all others divide it

# Division by zero gives infinity, as in the reference, instead of an exception.
_OPTIONS: Final = {"nogil": True, "error_model": "numpy"}

_SMALLEST_NORMAL = np.float32(2.0**-126)
_LOWEST = np.float32(np.finfo(np.float32).min)
_INFINITY_BITS = np.uint32(0x7F800000)
_ROUND_TO_INT = np.float32(1.5 * 2**23)  # adding it leaves the rounded integer in the low bits

_T0, _T1, _T2, _T3, _T4, _T5, _T6, _T7, _T8, _T9, _T10, _T11, _T12, _T13, _T14 = NF4_THRESHOLDS
_F0, _F1, _F2, _F3, _F4, _F5, _F6 = FP4_THRESHOLDS

# Numba widens integers to 64 bit at every operation; these keep them small (and indices unsigned).
u64, u32, u16, u8 = np.uint64, np.uint32, np.uint16, np.uint8
i32, i16 = np.int32, np.int16
f32 = np.float32


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


# ---- Strips -----------------------------------------------------------------------------------


@helper
def _load(values: Any, start: int, stop: int, strip: Any) -> None:
    """Copy values[start:stop] into `strip` and pad it with zeros."""
    count = u64(stop - start)
    for j in range(count):
        strip[j] = values[u64(start) + j]
    for j in range(count, u64(STRIP)):
        strip[j] = 0


@helper
def _pack(codes: Any, count: int, packed: Any, first: int) -> None:
    """Pack `count` codes into packed[first:], the earlier one of a pair in the high half."""
    for j in range(u64((count + 1) // 2)):
        packed[u64(first) + j] = u8((codes[j << u64(1)] << 4) | codes[(j << u64(1)) | u64(1)])


# ---- 4 bit from 16-bit sources ----------------------------------------------------------------


@kernel
def quantize_nf4_16bit(
    bits: Any, table: Any, absmax_values: Any, blocksize: int, packed: Any, absmax: Any
) -> int:
    """NF4 from `bits` uint16 (n,) of BF16 or F16; returns how many are not finite.

    Args:
        bits: the values.
        table: int16 (infinity + 1, 15), `decision_tables.nf4_table`.
        absmax_values: float32 (infinity + 1,), `decision_tables.absmax_values`.
        blocksize: values per block.
        packed: uint8 (ceil(n/2),), filled.
        absmax: float32 (ceil(n/blocksize),), filled.
    """
    strip, codes = np.empty(STRIP, np.uint16), np.empty(STRIP, np.int16)
    largest = np.empty(STRIP // blocksize, np.uint16)
    num_bad = 0
    for start in range(0, bits.size, STRIP):
        stop = min(start + STRIP, bits.size)
        _load(bits, start, stop, strip)
        blocks = largest[: (stop - start + blocksize - 1) // blocksize]
        bad = _absmax_16bit(strip, blocksize, absmax_values, blocks, absmax, start // blocksize)
        _nf4_codes_16bit(strip, blocksize, table, blocks, codes)
        if bad:
            _zero_bad_codes(strip, absmax_values.size - 1, codes)
            num_bad += bad
        _pack(codes, stop - start, packed, start // 2)
    return num_bad


@kernel
def quantize_fp4_16bit(
    bits: Any, table: Any, absmax_values: Any, blocksize: int, packed: Any, absmax: Any
) -> int:
    """FP4, as `quantize_nf4_16bit`; `table` is int16 (infinity + 1, 8), `fp4_table`."""
    strip, codes = np.empty(STRIP, np.uint16), np.empty(STRIP, np.int16)
    largest = np.empty(STRIP // blocksize, np.uint16)
    num_bad = 0
    for start in range(0, bits.size, STRIP):
        stop = min(start + STRIP, bits.size)
        _load(bits, start, stop, strip)
        blocks = largest[: (stop - start + blocksize - 1) // blocksize]
        bad = _absmax_16bit(strip, blocksize, absmax_values, blocks, absmax, start // blocksize)
        _fp4_codes_16bit(strip, blocksize, table, blocks, codes)
        if bad:
            _zero_bad_codes(strip, absmax_values.size - 1, codes)
            num_bad += bad
        _pack(codes, stop - start, packed, start // 2)
    return num_bad


@helper
def _absmax_16bit(
    strip: Any, blocksize: int, absmax_values: Any, largest: Any, absmax: Any, first_block: int
) -> int:
    """The strip's `largest` magnitudes per block, as bits, and its `absmax`.

    Returns how many values are not finite.
    """
    infinity = absmax_values.size - 1
    size = u64(blocksize)
    num_bad = 0
    for block in range(u64(largest.size)):
        bits = u16(0)
        for j in range(block * size, (block + u64(1)) * size):
            bits = max(bits, u16(strip[j] & u16(0x7FFF)))
        value = absmax_values[u64(min(bits, infinity))]
        if bits >= infinity:
            bits, bad, is_nan = _finite_max_16bit(strip, block * size, size, infinity)
            value = _LOWEST if is_nan else absmax_values[u64(bits)]
            num_bad += bad
        largest[block] = bits
        absmax[u64(first_block) + block] = value
    return num_bad


@helper
def _finite_max_16bit(strip: Any, first: int, size: int, infinity: int) -> Any:
    """Of a block: the largest magnitude but NaN, the number of bad values, whether all are NaN."""
    largest, num_bad, num_nan = u16(0), 0, 0
    for j in range(first, first + size):
        magnitude = u16(strip[j] & u16(0x7FFF))
        num_bad += int(magnitude >= infinity)
        num_nan += int(magnitude > infinity)
        if magnitude <= infinity:
            largest = max(largest, magnitude)
    return largest, num_bad, num_nan == size


@helper
def _nf4_codes_16bit(strip: Any, blocksize: int, table: Any, largest: Any, codes: Any) -> None:
    size = u64(blocksize)
    for block in range(u64(largest.size)):
        row = u64(largest[block])
        t0, t1, t2, t3 = table[row, 0], table[row, 1], table[row, 2], table[row, 3]
        t4, t5, t6, t7 = table[row, 4], table[row, 5], table[row, 6], table[row, 7]
        t8, t9, t10, t11 = table[row, 8], table[row, 9], table[row, 10], table[row, 11]
        t12, t13, t14 = table[row, 12], table[row, 13], table[row, 14]
        for j in range(block * size, (block + u64(1)) * size):
            bits = i16(strip[j])
            key = i16(bits ^ ((bits >> 15) & 0x7FFF))
            codes[j] = (
                ((key > t0) + (key > t1) + (key > t2) + (key > t3) + (key > t4) + (key > t5))
                + ((key > t6) + (key > t7) + (key > t8) + (key > t9) + (key > t10))
                + ((key > t11) + (key > t12) + (key > t13) + (key > t14))
            )


@helper
def _fp4_codes_16bit(strip: Any, blocksize: int, table: Any, largest: Any, codes: Any) -> None:
    size = u64(blocksize)
    for block in range(u64(largest.size)):
        row = u64(largest[block])
        t0, t1, t2, t3 = table[row, 0], table[row, 1], table[row, 2], table[row, 3]
        t4, t5, t6, t7 = table[row, 4], table[row, 5], table[row, 6], table[row, 7]
        for j in range(block * size, (block + u64(1)) * size):
            bits = i16(strip[j])
            key = i16(bits & 0x7FFF)
            count = i16(
                ((key > t0) + (key > t1) + (key > t2) + (key > t3))
                + ((key > t4) + (key > t5) + (key > t6))
            )
            codes[j] = _fp4_code(count, i16((bits < 0) & (key > t7)))


@helper
def _fp4_code(count: int, sign: int) -> int:
    """Magnitude codes 0 1 6 7 4 5 2 3: bit 2 is flipped where bit 1 is set."""
    return count ^ ((count & 2) << 1) | (sign << 3)


@helper
def _zero_bad_codes(strip: Any, infinity: int, codes: Any) -> None:
    """Code 0 for what is not finite: its scaled value is NaN, which no integer comparison sees."""
    for j in range(u64(STRIP)):
        if (strip[j] & u16(0x7FFF)) >= infinity:
            codes[j] = 0


# ---- 4 bit from float32 -----------------------------------------------------------------------


@kernel
def quantize_nf4_f32(values: Any, blocksize: int, packed: Any, absmax: Any) -> int:
    """NF4 from `values` float32 (n,); the rest as in `quantize_nf4_16bit`."""
    strip, codes = np.empty(STRIP, np.float32), np.empty(STRIP, np.int32)
    num_bad = 0
    for start in range(0, values.size, STRIP):
        stop = min(start + STRIP, values.size)
        _load(values, start, stop, strip)
        num_bad += _scale_blocks(strip, blocksize, absmax, start // blocksize)
        for j in range(u64(STRIP)):
            v = strip[j]
            codes[j] = (
                ((v > _T0) + (v > _T1) + (v > _T2) + (v > _T3) + (v > _T4) + (v > _T5))
                + ((v > _T6) + (v > _T7) + (v > _T8) + (v > _T9) + (v > _T10))
                + ((v > _T11) + (v > _T12) + (v > _T13) + (v > _T14))
            )
        _pack(codes, stop - start, packed, start // 2)
    return num_bad


@kernel
def quantize_fp4_f32(values: Any, blocksize: int, packed: Any, absmax: Any) -> int:
    """FP4 from `values` float32 (n,)."""
    strip, codes = np.empty(STRIP, np.float32), np.empty(STRIP, np.int32)
    num_bad = 0
    for start in range(0, values.size, STRIP):
        stop = min(start + STRIP, values.size)
        _load(values, start, stop, strip)
        num_bad += _scale_blocks(strip, blocksize, absmax, start // blocksize)
        for j in range(u64(STRIP)):
            v = abs(strip[j])
            count = i32(
                ((v > _F0) + (v > _F1) + (v > _F2) + (v > _F3))
                + ((v > _F4) + (v > _F5) + (v > _F6))
            )
            codes[j] = _fp4_code(count, i32(strip[j] < 0))
        _pack(codes, stop - start, packed, start // 2)
    return num_bad


@helper
def _flush(value: Any) -> Any:
    return np.copysign(f32(0), value) if abs(value) < _SMALLEST_NORMAL else value


@helper
def _magnitude_bits(value: Any) -> Any:
    return u32(f32(value).view(np.uint32) & u32(0x7FFFFFFF))


@helper
def _scale_blocks(strip: Any, blocksize: int, absmax: Any, first_block: int) -> int:
    """Multiply each block of the strip by 1/absmax in place and store absmax.

    Returns how many values are not finite.
    """
    size = u64(blocksize)
    num_bad = 0
    for j in range(u64(STRIP)):
        strip[j] = _flush(strip[j])
    for block in range(u64(min(STRIP // blocksize, absmax.size - first_block))):
        first, stop = block * size, (block + u64(1)) * size
        bits = u32(0)
        for j in range(first, stop):
            bits = max(bits, _magnitude_bits(strip[j]))
        value = u32(bits).view(np.float32)
        if bits >= _INFINITY_BITS:
            value, bad = _finite_max(strip, first, stop)
            num_bad += bad
            if bad == size and value == 0:
                value = _LOWEST
        absmax[u64(first_block) + block] = value
        inverse = _flush(f32(1) / value)
        for j in range(first, stop):
            strip[j] = _flush(strip[j] * inverse)
    return num_bad


@helper
def _finite_max(values: Any, first: int, stop: int) -> Any:
    """Of values[first:stop]: the largest magnitude but NaN, and how many are not finite."""
    largest, num_bad = u32(0), 0
    for j in range(first, stop):
        magnitude = _magnitude_bits(values[j])
        num_bad += magnitude >= _INFINITY_BITS
        if magnitude <= _INFINITY_BITS:
            largest = max(largest, magnitude)
    return u32(largest).view(np.float32), num_bad


@kernel
def dequantize_4bit(packed: Any, absmax: Any, code: Any, blocksize: int, values: Any) -> None:
    """Fill `values` (n,) from `packed` uint8, `absmax` float32 and the table `code` float32 (16,).

    A block has 16 different values at most: they are computed and rounded once per block.
    """
    entries = np.empty(16, values.dtype)
    for block in range(absmax.size):
        for c in range(16):
            entries[c] = _narrow(_flush(code[c] * absmax[block]), entries[0])
        first, stop = block * blocksize, min((block + 1) * blocksize, values.size)
        for j in range(u64(first // 2), u64(stop // 2)):
            values[j << u64(1)] = entries[packed[j] >> 4]
            values[(j << u64(1)) | u64(1)] = entries[packed[j] & 15]
        if stop % 2:
            values[stop - 1] = entries[packed[stop // 2] >> 4]


# ---- Double quantization ----------------------------------------------------------------------


@kernel
def mean_in_fixed_order(absmax: Any) -> Any:
    """float32 mean of `absmax` (m,), m > 0, in the order of `qtool.formats.double_quant`."""
    group = np.empty(SUM_GROUP, np.float64)
    count = (absmax.size + SUM_GROUP - 1) // SUM_GROUP
    sums = np.empty(count, np.float64)
    for g in range(count):
        for j in range(SUM_GROUP):
            i = g * SUM_GROUP + j
            group[j] = absmax[i] if i < absmax.size else 0
        sums[g] = _halving_sum(group)
    while count > 1:
        num_values, count = count, (count + SUM_GROUP - 1) // SUM_GROUP
        for g in range(count):
            for j in range(SUM_GROUP):
                i = g * SUM_GROUP + j
                group[j] = sums[i] if i < num_values else 0
            sums[g] = _halving_sum(group)
    return _flush(f32(sums[0] / absmax.size))


@helper
def _halving_sum(group: Any) -> Any:
    half = SUM_GROUP // 2
    while half:
        for j in range(half):
            group[j] += group[half + j]
        half //= 2
    return group[0]


@kernel
def quantize_absmax(
    absmax: Any, offset: float, guesses: Any, steps: Any, codes: Any, nested_absmax: Any
) -> None:
    """8-bit codes (m,) and nested_absmax (ceil(m/256),) of `absmax` (m,) minus `offset`.

    `guesses` and `steps` are `decision_tables.dynamic_guesses` and `dynamic_steps`.
    """
    strip = np.empty(STRIP, np.float32)
    for start in range(0, absmax.size, STRIP):
        stop = min(start + STRIP, absmax.size)
        count = u64(stop - start)
        for j in range(count):
            strip[j] = absmax[u64(start) + j] - offset
        for j in range(count, u64(STRIP)):  # padding has no part in the nested absmax
            strip[j] = 0
        _scale_blocks(strip, NESTED_BLOCKSIZE, nested_absmax, start // NESTED_BLOCKSIZE)
        for j in range(count):
            guess = guesses[f32(strip[j]).view(np.uint32) >> u32(16)]
            codes[u64(start) + j] = guess + (strip[j] > steps[guess])


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
def quantize_int8(values: Any, num_rows: int, row_size: int, codes: Any, scb: Any) -> int:
    """LLM.int8() rows from `values` (num_rows * row_size,); returns how many are not finite.

    `codes` int8 has the size of `values`, `scb` is float32 (num_rows,); both are filled.
    """
    row = np.empty(row_size, np.float32)
    num_bad = 0
    for r in range(num_rows):
        first = u64(r * row_size)
        largest = u32(0)
        for j in range(u64(row_size)):
            row[j] = _as_float16(values[first + j])
            largest = max(largest, _magnitude_bits(row[j]))
        scb[r] = u32(largest).view(np.float32)
        if largest >= _INFINITY_BITS:
            scb[r], bad = _finite_max(row, u64(0), u64(row_size))
            num_bad += bad
        scale = f32(127) * f32(f32(1) / scb[r])
        for j in range(u64(row_size)):
            scaled = row[j] * scale
            rounded = f32(scaled + _ROUND_TO_INT).view(np.uint32)
            codes[first + j] = np.int8(rounded) if scaled == scaled else np.int8(0)
    return num_bad


@kernel
def dequantize_int8(codes: Any, scb: Any, row_size: int, values: Any) -> None:
    """Fill `values` (rows * row_size,) from `codes` int8 of that size and `scb` float32 (rows,)."""
    entries = np.empty(256, values.dtype)
    for r in range(scb.size):
        for c in range(-128, 128):
            entries[c & 255] = _narrow(f32(c) * scb[r] * INVERSE_127, entries[0])
        for j in range(u64(r * row_size), u64((r + 1) * row_size)):
            values[j] = entries[u8(codes[j])]


# ---- Finiteness -------------------------------------------------------------------------------


@kernel
def count_nonfinite(bits: Any, sign: int, infinity: int) -> int:
    """How many of `bits`, an unsigned array, are infinite or NaN when the `sign` bit is cleared."""
    num_bad = 0
    for start in range(0, bits.size, STRIP):
        stop = min(start + STRIP, bits.size)
        largest = bits.dtype.type(0)
        for j in range(u64(start), u64(stop)):
            largest = max(largest, bits.dtype.type(bits[j] & ~sign))
        if largest >= infinity:
            for j in range(start, stop):
                num_bad += (bits[j] & ~sign) >= infinity
    return num_bad


# ---- Float formats ----------------------------------------------------------------------------


def _as_float16(bits: Any) -> Any:
    """The float32 that `bits` (uint16: bfloat16, int16: float16, float32) hold after float16."""


@overload(_as_float16)  # type: ignore[untyped-decorator]
def _overload_as_float16(bits: Any) -> Callable[[Any], Any] | None:
    versions = {
        types.uint16: _bfloat16_as_float16,
        types.int16: _widen_float16,
        types.float32: _float32_as_float16,
    }
    return versions.get(bits)


def _bfloat16_as_float16(bits: Any) -> Any:
    return _round_to_float16(u32(u32(bits) << u32(16)).view(np.float32))


def _float32_as_float16(bits: Any) -> Any:
    return _round_to_float16(bits)


def _widen_float16(bits: Any) -> Any:
    magnitude = u32(u32(bits) & u32(0x7FFF))
    shifted = u32(magnitude << u32(13))
    if magnitude >= u32(0x7C00):  # infinity or NaN
        result = u32(shifted | _INFINITY_BITS)
    elif magnitude >= u32(0x0400):
        result = u32(shifted + u32(112 << 23))
    else:  # subnormal in float16, not in float32
        result = f32(f32(i32(magnitude)) * f32(2.0**-24)).view(np.uint32)
    return u32(result | u32((u32(bits) & u32(0x8000)) << u32(16))).view(np.float32)


@helper
def _round_to_float16(value: Any) -> Any:
    """The nearest float16, as float32; ties to even, beyond its range infinity."""
    bits = f32(value).view(np.uint32)
    magnitude = u32(bits & u32(0x7FFFFFFF))
    rounded = u32((magnitude + u32(0xFFF) + ((magnitude >> u32(13)) & u32(1))) & ~u32(0x1FFF))
    if magnitude > _INFINITY_BITS:
        rounded = magnitude
    elif rounded >= u32(0x47800000):  # 2^16
        rounded = _INFINITY_BITS
    elif magnitude < u32(0x38800000):  # 2^-14: steps of 2^-24, which is float32's ulp below 1
        size = u32(magnitude).view(np.float32)
        rounded = f32((size + f32(0.5)) - f32(0.5)).view(np.uint32)
    return u32(rounded | (bits & u32(0x80000000))).view(np.float32)


def _narrow(value: Any, like: Any) -> Any:
    """`value` float32 rounded to the dtype that `like` stands for, as its bits."""


@overload(_narrow)  # type: ignore[untyped-decorator]
def _overload_narrow(value: Any, like: Any) -> Callable[[Any, Any], Any] | None:
    versions = {
        types.uint16: _narrow_bfloat16,
        types.int16: _narrow_float16,
        types.float32: _narrow_float32,
    }
    return versions.get(like)


def _narrow_float32(value: Any, like: Any) -> Any:
    return value


def _narrow_bfloat16(value: Any, like: Any) -> Any:
    bits = f32(value).view(np.uint32)
    if value != value:
        return u16(bits >> u32(16)) | u16(0x40)
    return u16((bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16))


def _narrow_float16(value: Any, like: Any) -> Any:
    bits = f32(_round_to_float16(value)).view(np.uint32)
    magnitude = bits & u32(0x7FFFFFFF)
    sign = (bits >> u32(16)) & u32(0x8000)
    if magnitude > _INFINITY_BITS:
        result = u32(0x7E00)
    elif magnitude >= u32(0x38800000):  # 2^-14; infinity comes out right too
        result = min((magnitude >> u32(13)) - u32(112 << 10), u32(0x7C00))
    else:
        result = u32(u32(magnitude).view(np.float32) * f32(2.0**24))
    return i16(result | sign)
