"""Products of a few vectors with many, for attention: one read of the cache serves several.

As in `cpu_vectors`, lanes are LLVM's own; bfloat16 is uint16.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from qtool.backends.cpu_vectors import (
    Emit,
    Vector,
    _add_pairs,
    _add_products,
    _cut,
    _join,
    _join_all,
    _load,
    _repeat,
    has_features,
)

TOKENS: Final = 16  # whose dot products are made at a time
_LANES: Final = 16  # of float32 in the widest register
_PAIRS: Final = 2 * _LANES
_INDEX: Final = ir.IntType(32)


def most_sums() -> int:
    """How many float32 may stay in registers with room for what is added to them."""
    return 256 if has_features(cpu_target.target_context.codegen(), "avx512f") else 64


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def dot_rows(
    typing: Any, rows: Any, first: Any, last: Any, size: Any, x: Any, at: Any
) -> tuple[Any, Emit]:
    """Lane i is the sum of rows[first + i * size + j] * x[at + j], j below `size`, a constant.

    Rows that would begin behind rows[last] are the one that begins there. Where `rows` and `x` are
    bfloat16 both, `size` is a multiple of 32. Sums are halved as `cpu_vectors.halving_sum` does.
    """
    width = size.literal_value
    pairs = x.dtype == types.uint16
    lanes = min(_PAIRS if pairs else _LANES, width & -width)

    def dot(context: Any, builder: Any, operands: Any, start: Any) -> Any:
        sums = ir.Constant(ir.VectorType(ir.FloatType(), lanes // 2 if pairs else lanes), None)
        for offset in range(0, width, lanes):
            row, values = (
                _load(
                    context,
                    builder,
                    array,
                    data,
                    builder.add(begin, begin.type(offset)),
                    Vector(array.dtype, lanes),
                )
                for array, data, begin in (
                    (rows, operands[0], start),
                    (x, operands[4], operands[5]),
                )
            )
            if pairs:
                sums = _add_pairs(context, builder, sums, row, values)
            else:
                sums = _add_products(context, builder, sums, _widen(builder, row), values)
        while sums.type.count < _LANES:
            sums = _join(builder, sums, ir.Constant(sums.type, None))
        return sums

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        _, begin, end, *_ = operands
        found = []
        for token in range(TOKENS):
            start = builder.add(begin, begin.type(token * width))
            start = builder.select(builder.icmp_unsigned("<", start, end), start, end)
            found.append(dot(context, builder, operands, start))
        length = _LANES
        while len(found) > 1:
            length //= 2
            found = [
                _halve(builder, found[i], found[i + 1], length=length)
                for i in range(0, len(found), 2)
            ]
        return found[0]

    result = Vector(types.float32, TOKENS)
    return result(rows, types.uint64, types.uint64, size, x, types.uint64), emit


def _halve(builder: Any, a: Any, b: Any, *, length: int) -> Any:
    """Lanes of a, then of b, in stretches of 2 * `length`: each one's halves added up."""
    lower = [i for i in range(2 * a.type.count) if i % (2 * length) < length]
    halves = (
        builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INDEX, len(mask)), mask))
        for mask in (lower, [i + length for i in lower])
    )
    return builder.fadd(*halves)


@intrinsic  # type: ignore[untyped-decorator]
def sums_of_four(typing: Any, a: Any, b: Any, c: Any, d: Any) -> tuple[Any, Emit]:
    """Four lanes, each the sum of 16, halved as `cpu_vectors.halving_sum` does."""

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        first, second = (_halve(builder, *operands[i : i + 2], length=8) for i in (0, 2))
        found = _halve(builder, first, second, length=4)
        for length in (2, 1):
            # Lanes beyond the first half are the same again, and nobody looks at them.
            found = _halve(builder, found, found, length=length)
        return _cut(builder, found, 4)[0]

    return Vector(types.float32, 4)(a, b, c, d), emit


@intrinsic  # type: ignore[untyped-decorator]
def added_parts(typing: Any, sums: Any) -> tuple[Any, Emit]:
    """The parts of 16 lanes added up, from the first on."""

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        total, *parts = _cut(builder, operands[0], _LANES)
        for part in parts:
            total = builder.fadd(total, part)
        return total

    return Vector(types.float32, _LANES)(sums), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def add_weighted(
    typing: Any, sums: Any, values: Any, first: Any, weights: Any, at: Any, stride: Any, count: Any
) -> tuple[Any, Emit]:
    """`sums` of `count` vectors, side by side, plus values[first:] times a weight for each.

    The weights are weights[at], weights[at + stride] ...; `count` is a constant.
    """
    lanes = sums.lanes // count.literal_value

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        _, source, start, factors, place, step, _ = operands
        kind = Vector(values.dtype, lanes)
        wide = _widen(builder, _load(context, builder, values, source, start, kind))
        totals = []
        for total in _cut(builder, operands[0], lanes):
            factor = _load(context, builder, weights, factors, place, Vector(weights.dtype, 1))
            scalar = builder.extract_element(factor, _INDEX(0))
            parts = zip(
                *(_cut(builder, it, min(_LANES, lanes)) for it in (total, wide)), strict=True
            )
            repeated = _repeat(builder, scalar, min(_LANES, lanes))
            totals.append(
                _join_all(
                    builder,
                    [_add_products(context, builder, sum_, part, repeated) for sum_, part in parts],
                )
            )
            place = builder.add(place, step)
        return _join_all(builder, totals)

    signature = sums(sums, values, types.uint64, weights, types.uint64, types.uint64, count)
    return signature, emit


def _widen(builder: Any, values: Any) -> Any:
    """bfloat16 as float32; float32 as it is."""
    if isinstance(values.type.element, ir.FloatType):
        return values
    words = builder.zext(values, ir.VectorType(_INDEX, values.type.count))
    shifted = builder.shl(words, _repeat(builder, _INDEX(16), values.type.count))
    return builder.bitcast(shifted, ir.VectorType(ir.FloatType(), values.type.count))
