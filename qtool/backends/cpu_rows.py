"""Products of one token with a weight, four of its rows at a time.

    sums[i] = sum over k of x[k] * weight[first + i, k]        float32, in a fixed order

Weights have the values, and x the order, of `cpu_products`. With four rows a part of x is fetched
once for all of them, and each needs one vector of sums only. Their bytes come from memory in the
order in which they lie there, a group of rows ahead: four streams side by side would come slower.

What describes a weight is told in `cpu_records`.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from qtool.backends import cpu_records as fields
from qtool.backends.cpu_dots import added_parts, sums_of_four
from qtool.backends.cpu_kernels import helper, inlined
from qtool.backends.cpu_numbers import INLINED
from qtool.backends.cpu_products import (
    _ORDINARY_RANGE,
    _SMALLEST_ORDINARY_BITS,
    GROUP,
    PAIRS_GROUP,
    _exact_pairs_table,
    _exact_table,
    _round,
)
from qtool.backends.cpu_vectors import (
    Emit,
    accumulate,
    array_at,
    convert,
    full,
    join,
    load,
    look_up_floats,
    look_up_words,
    round_to_bfloat16,
    store,
    view,
)
from qtool.formats.int8 import INVERSE_127
from qtool.formats.precisions import NESTED_BLOCKSIZE

ROWS: Final = 4
_SCALES_AT_A_TIME: Final = 256  # that are decoded, where rows are short
_SUMS_OF_ROW: Final = 64  # lanes, where rows are worked on one by one
_PART: Final = 16  # lanes of float32 in the widest register
_LINE: Final = 64  # bytes
# Bytes: fetched so far ahead at least, weights come from memory in time.
_LEAST_AHEAD: Final = 4096
# What is fetched farther ahead would push x out of the first-level cache.
_MOST_AHEAD_IN_FIRST_CACHE: Final = 8192

u64, u32, u16, f32 = np.uint64, np.uint32, np.uint16, np.float32


@helper
def multiply_rows(
    record: Any, place: Any, dtypes: Any, x: Any, first: Any, last: Any, scales: Any, sums: Any
) -> None:
    """Fill sums[: last - first] for the rows [first, last) of a weight, without its bias.

    Args:
        record: int64 array; the weight's own part begins at record[place].
        dtypes: empty arrays of the dtype that is stored (uint8 for two codes of 4 bit, int8, or
            that of plain values, where uint16 is bfloat16); of that of absmax; and of what 4-bit
            weights are rounded to.
        x: float32, or uint16 for pairs of bfloat16.
        scales: float32, room for `most_scales(width)`.
        sums: float32, room for a multiple of ROWS.
    """
    weight = _open(record, place, dtypes[0], dtypes[1], dtypes[2], scales)
    width = u64(record[u64(fields.WIDTH)])
    batch = u64(_rows_of_scales(width))
    for base in range(first, last, batch):
        stop = min(base + batch, last)
        ordinary = _decode_absmax(weight, width, base, stop)
        for row in range(base, stop, u64(ROWS)):
            # Beyond the last row it is taken again.
            second, third = min(row + u64(1), stop - u64(1)), min(row + u64(2), stop - u64(1))
            rows = row, second, third, min(row + u64(3), stop - u64(1))
            if ordinary:
                found = _four_sums(weight, x, width, base, rows)
            else:
                found = _exact_sums(weight, x, width, base, rows)
            store(sums, row - first, sums_of_four(found[0], found[1], found[2], found[3]))


def most_scales(width: int) -> int:
    """How many scales are decoded at a time in layers of up to `width` columns."""
    return max(_SCALES_AT_A_TIME, ROWS * width // GROUP)


@inlined
def _rows_of_scales(width: Any) -> Any:
    """Of how many rows absmax is decoded at a time, a multiple of ROWS."""
    return max(_SCALES_AT_A_TIME * GROUP // (ROWS * width), 1) * ROWS


def _four_sums(weight: Any, x: Any, width: Any, base: Any, rows: Any) -> Any:
    """16 lanes for each of `rows`; scales begin with those of row `base`."""


@overload(_four_sums, jit_options=INLINED)  # type: ignore[untyped-decorator]
def _overload_four_sums(weight: Any, x: Any, width: Any, base: Any, rows: Any) -> Any:
    packed = weight[0].dtype in (types.uint8, types.int8)
    return _sums_together if packed else _sums_one_by_one


def _sums_together(weight: Any, x: Any, width: Any, base: Any, rows: Any) -> Any:
    values, step = weight[0], u64(_columns_of_step(weight, x))
    row_bytes = u64(_step_bytes(weight, x)) * (width // step)
    group_bytes = u64(ROWS) * row_bytes
    ahead = max(group_bytes, u64(_LEAST_AHEAD))
    near = ahead <= u64(_MOST_AHEAD_IN_FIRST_CACHE)
    next_byte = rows[0] * row_bytes + ahead
    a = full(_PART, 0, np.float32)
    b, c, d = a, a, a
    for at in range(u64(0), width, step):
        for line in range(u64(0), u64(ROWS) * u64(_step_bytes(weight, x)), u64(_LINE)):
            _fetch(values, next_byte + line, near)
        next_byte += u64(ROWS) * u64(_step_bytes(weight, x))
        a = accumulate(a, _weights(weight, x, width, base, rows[0], at), x, at, 1)
        b = accumulate(b, _weights(weight, x, width, base, rows[1], at), x, at, 1)
        c = accumulate(c, _weights(weight, x, width, base, rows[2], at), x, at, 1)
        d = accumulate(d, _weights(weight, x, width, base, rows[3], at), x, at, 1)
    return a, b, c, d


def _sums_one_by_one(weight: Any, x: Any, width: Any, base: Any, rows: Any) -> Any:
    """Where nothing has to be decoded, memory is the limit, and gives most in its own order."""
    return (
        _sums_of_row(weight, x, width, base, rows[0]),
        _sums_of_row(weight, x, width, base, rows[1]),
        _sums_of_row(weight, x, width, base, rows[2]),
        _sums_of_row(weight, x, width, base, rows[3]),
    )


@inlined
def _sums_of_row(weight: Any, x: Any, width: Any, base: Any, row: Any) -> Any:
    sums = full(_SUMS_OF_ROW, 0, np.float32)
    for at in range(u64(0), width, u64(_columns_of_step(weight, x))):
        sums = accumulate(sums, _weights(weight, x, width, base, row, at), x, at, 1)
    return added_parts(sums)


# ---- What each format has of its own ----------------------------------------------------------
#
# A weight is a tuple: an array of what is stored, and for 4 bit what else is needed.


def _open(record: Any, place: Any, stored: Any, absmax: Any, like: Any, scales: Any) -> Any:
    """The weight whose record begins at record[place]."""


@overload(_open, jit_options=INLINED)  # type: ignore[untyped-decorator]
def _overload__open(
    record: Any, place: Any, stored: Any, absmax: Any, like: Any, scales: Any
) -> Any:
    kind, absmax_kind = _numpy_dtype(stored), _numpy_dtype(absmax)
    if stored.dtype != types.uint8:

        def open_other(
            record: Any, place: Any, stored: Any, absmax: Any, like: Any, scales: Any
        ) -> Any:
            return (
                array_at(record[place + u64(fields.WEIGHT)], kind),
                array_at(record[place + u64(fields.ABSMAX)], np.float32),
            )

        return open_other

    def open_four_bit(
        record: Any, place: Any, stored: Any, absmax: Any, like: Any, scales: Any
    ) -> Any:
        return (
            array_at(record[place + u64(fields.WEIGHT)], np.uint8),
            load(array_at(record[place + u64(fields.CODE)], np.float32), u64(0), 16),
            u64(record[place + u64(fields.SHIFT)]),
            array_at(record[place + u64(fields.ABSMAX)], absmax_kind),
            array_at(record[place + u64(fields.NESTED_ABSMAX)], np.float32),
            array_at(record[place + u64(fields.NESTED_MAP)], np.float32),
            array_at(record[place + u64(fields.NESTED_OFFSET)], np.float32),
            like,
            scales,
        )

    return open_four_bit


def _numpy_dtype(array: Any) -> Any:
    return getattr(np, str(array.dtype))


_STORED, _CODE, _SHIFT, _ABSMAX, _NESTED, _MAP, _OFFSET, _LIKE, _SCALES = range(9)


def _columns_of_step(weight: Any, x: Any) -> int:
    """How many columns of each row are worked on at once."""
    raise NotImplementedError


@overload(_columns_of_step, strict=False, jit_options=INLINED)  # type: ignore[untyped-decorator]
def _overload_columns_of_step(weight: Any, x: Any) -> Any:
    columns = PAIRS_GROUP if x.dtype == types.uint16 else GROUP
    return lambda weight, x: columns


def _step_bytes(weight: Any, x: Any) -> int:
    """What is stored of those."""
    raise NotImplementedError


@overload(_step_bytes, strict=False, jit_options=INLINED)  # type: ignore[untyped-decorator]
def _overload_step_bytes(weight: Any, x: Any) -> Any:
    columns = PAIRS_GROUP if x.dtype == types.uint16 else GROUP
    stored = weight[0].dtype
    size = columns // 2 if stored == types.uint8 else columns * stored.bitwidth // 8
    return lambda weight, x: size


def _decode_absmax(weight: Any, width: Any, base: Any, stop: Any) -> Any:
    """Fill scales for the rows [base, stop); whether no block is out of the ordinary."""


@overload(_decode_absmax, strict=False)  # type: ignore[untyped-decorator]
def _overload_decode_absmax(weight: Any, width: Any, base: Any, stop: Any) -> Any:
    if weight[0].dtype != types.uint8:
        return lambda weight, width, base, stop: True
    return _nested_scales if weight[_ABSMAX].dtype == types.uint8 else _plain_scales


def _plain_scales(weight: Any, width: Any, base: Any, stop: Any) -> Any:
    shift, absmax, scales = weight[_SHIFT], weight[_ABSMAX], weight[_SCALES]
    first, num = base * width // u64(GROUP), (stop - base) * width // u64(GROUP)
    worst = u32(0)
    for i in range(num):
        scale = absmax[(first + i) >> shift]
        scales[i] = scale
        worst = max(worst, _distance_from_ordinary(scale))
    return worst <= _ORDINARY_RANGE


def _nested_scales(weight: Any, width: Any, base: Any, stop: Any) -> Any:
    first, num = base * width // u64(GROUP), (stop - base) * width // u64(GROUP)
    shift, codes, nested, table = weight[_SHIFT], weight[_ABSMAX], weight[_NESTED], weight[_MAP]
    offset, scales = weight[_OFFSET][0], weight[_SCALES]
    for line in range(u64(0), num >> shift, u64(_LINE)):
        _fetch(codes, ((first + num) >> shift) + line, True)
    for i in range(num):
        scales[i] = table[codes[(first + i) >> shift]]
    worst, group = u32(0), first
    while group < first + num:  # as far as one nested absmax goes
        nest = (group >> shift) // u64(NESTED_BLOCKSIZE)
        end = min(first + num, ((nest + u64(1)) * u64(NESTED_BLOCKSIZE)) << shift)
        factor = nested[nest]
        for i in range(group - first, end - first):
            scale = f32(f32(scales[i] * factor) + offset)
            scales[i] = scale
            worst = max(worst, _distance_from_ordinary(scale))
        group = end
    return worst <= _ORDINARY_RANGE


@inlined
def _distance_from_ordinary(scale: Any) -> Any:
    """At most _ORDINARY_RANGE for an absmax in the range in which no weight is out of it."""
    return u32((f32(scale).view(np.uint32) & u32(0x7FFFFFFF)) - _SMALLEST_ORDINARY_BITS)


def _weights(weight: Any, x: Any, width: Any, base: Any, row: Any, at: Any) -> Any:
    """Those of a step, from column `at` on, in the dtype of x and its order.

    Scales begin with those of row `base`.
    """


@overload(_weights, jit_options=INLINED)  # type: ignore[untyped-decorator]
def _overload_weights(weight: Any, x: Any, width: Any, base: Any, row: Any, at: Any) -> Any:
    pairs = x.dtype == types.uint16
    versions = {
        types.uint8: _four_bit_pairs if pairs else _four_bit_floats,
        types.int8: _int8_floats,
        types.uint16: _plain_pairs if pairs else _widened_floats,
        types.float32: _plain_floats,
    }
    return versions[weight[0].dtype]


def _four_bit_pairs(weight: Any, x: Any, width: Any, base: Any, row: Any, at: Any) -> Any:
    """Two blocks fill a table of 32 entries: 16 lanes look up in each half."""
    packed, code, scales = weight[_STORED], weight[_CODE], weight[_SCALES]
    group = ((row - base) * width + at) // u64(GROUP)
    table = round_to_bfloat16(join(code * scales[group], code * scales[group + u64(1)]))
    return _pairs_from(table, packed, row * width + at)


@inlined
def _pairs_from(table: Any, packed: Any, first: Any) -> Any:
    """The weights from `first` on, looked up in a table of two blocks."""
    half = join(full(_PART, 0, np.uint16), full(_PART, 16, np.uint16))
    halves = join(join(half, half), join(half, half))
    words = view(load(packed, first >> u64(1), 64), np.uint16)
    shifted = join(join(words, words >> 4), join(words >> 8, words >> 12))
    return look_up_words(table, (shifted & 15) | halves)


def _four_bit_floats(weight: Any, x: Any, width: Any, base: Any, row: Any, at: Any) -> Any:
    packed, code, like, scales = weight[_STORED], weight[_CODE], weight[_LIKE], weight[_SCALES]
    scale = scales[((row - base) * width + at) // u64(GROUP)]
    return _floats_from(_round(code * scale, like), packed, row * width + at)


@inlined
def _floats_from(table: Any, packed: Any, first: Any) -> Any:
    """The weights from `first` on, looked up in the table of a block."""
    words = convert(view(load(packed, first >> u64(1), 32), np.uint16), np.uint32)
    shifted = join(join(words, words >> 4), join(words >> 8, words >> 12))
    return look_up_floats(table, shifted)


def _int8_floats(weight: Any, x: Any, width: Any, base: Any, row: Any, at: Any) -> Any:
    wide = convert(load(weight[0], row * width + at, GROUP), np.int32)
    return convert(wide, np.float32) * weight[1][row] * INVERSE_127


def _plain_pairs(weight: Any, x: Any, width: Any, base: Any, row: Any, at: Any) -> Any:
    return load(weight[0], row * width + at, PAIRS_GROUP)


def _widened_floats(weight: Any, x: Any, width: Any, base: Any, row: Any, at: Any) -> Any:
    words = convert(load(weight[0], row * width + at, GROUP), np.uint32)
    return view(words << 16, np.float32)


def _plain_floats(weight: Any, x: Any, width: Any, base: Any, row: Any, at: Any) -> Any:
    return load(weight[0], row * width + at, GROUP)


# ---- Blocks out of the ordinary ---------------------------------------------------------------


def _exact_sums(weight: Any, x: Any, width: Any, base: Any, rows: Any) -> Any:
    """What `_four_sums` gives, where products have to be flushed or rounded to infinity."""


@overload(_exact_sums, strict=False)  # type: ignore[untyped-decorator]
def _overload_exact_sums(weight: Any, x: Any, width: Any, base: Any, rows: Any) -> Any:
    if weight[0].dtype != types.uint8:
        return lambda weight, x, width, base, rows: _four_sums(weight, x, width, base, rows)
    row_sums = _exact_pairs_sums if x.dtype == types.uint16 else _exact_floats_sums

    def exact_sums(weight: Any, x: Any, width: Any, base: Any, rows: Any) -> Any:
        return (
            row_sums(weight, x, width, base, rows[0]),
            row_sums(weight, x, width, base, rows[1]),
            row_sums(weight, x, width, base, rows[2]),
            row_sums(weight, x, width, base, rows[3]),
        )

    return exact_sums


@helper
def _exact_pairs_sums(weight: Any, x: Any, width: Any, base: Any, row: Any) -> Any:
    packed, like, scales = weight[_STORED], weight[_LIKE], weight[_SCALES]
    code, sums = np.empty(16, np.float32), full(_PART, 0, np.float32)
    store(code, u64(0), weight[_CODE])
    for at in range(u64(0), width, u64(PAIRS_GROUP)):
        group = ((row - base) * width + at) // u64(GROUP)
        table = _exact_pairs_table(code, scales[group], scales[group + u64(1)], like)
        sums = accumulate(sums, _pairs_from(table, packed, row * width + at), x, at, 1)
    return sums


@helper
def _exact_floats_sums(weight: Any, x: Any, width: Any, base: Any, row: Any) -> Any:
    packed, like, scales = weight[_STORED], weight[_LIKE], weight[_SCALES]
    code, sums = np.empty(16, np.float32), full(_PART, 0, np.float32)
    store(code, u64(0), weight[_CODE])
    for at in range(u64(0), width, u64(GROUP)):
        table = _exact_table(code, scales[((row - base) * width + at) // u64(GROUP)], like)
        sums = accumulate(sums, _floats_from(table, packed, row * width + at), x, at, 1)
    return sums


# ---- Memory -----------------------------------------------------------------------------------


@inlined
def _fetch(array: Any, byte: Any, near: Any) -> None:
    """Have the first-level cache fetch a byte of what an array holds, or the second-level one."""
    if near:
        _prefetch(array, byte, 3)
    else:
        _prefetch(array, byte, 2)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _prefetch(typing: Any, array: Any, byte: Any, locality: Any) -> tuple[Any, Emit]:
    """See `cpu_vectors.prefetch`; LLVM calls the first-level cache 3 and the second-level one 2."""
    level = locality.literal_value

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        data = context.make_array(array)(context, builder, operands[0]).data
        start = builder.bitcast(data, ir.IntType(8).as_pointer())
        address = builder.gep(start, [operands[1]])
        number = ir.IntType(32)
        fetch = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, fetch, "llvm.prefetch.p0")
        builder.call(function, [address, number(0), number(level), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.uint64, locality), emit
