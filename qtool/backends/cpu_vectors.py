"""Vectors of a fixed number of lanes for Numba kernels.

LLVM's loop vectorizer decides for itself how a loop is cut and what stays in registers. Where that
is not good enough, a kernel computes with vectors:

    values = load(source, first, 32)                     # source[first : first + 32]
    keys = values ^ ((values >> 15) & 0x7FFF)            # operators work lane by lane
    store(target, first, convert(keys, np.uint8))

They are LLVM's own, generic vectors, so every instruction set does the work with what it has: 32
lanes of 16 bits are one register of AVX-512, two of AVX2, four of NEON. Only `lookup` names
instructions.

A scalar operand stands for a vector of it, in the dtype of the other operand. A comparison gives
an integer per lane, as wide as the operands: -1 where it holds, else 0. With NaN none holds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

# What an intrinsic's `emit` gets from Numba: the target, LLVM's builder, types, operands.
Emit = Callable[[Any, Any, Any, Any], Any]

_FLOATS: Final = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
_INDEX: Final = ir.IntType(32)


class Vector(types.Type):  # type: ignore[misc]
    """The Numba type of `lanes` values of `dtype`, an integer or a float of 32 or 64 bits."""

    def __init__(self, dtype: Any, lanes: int) -> None:
        self.dtype, self.lanes = dtype, lanes
        super().__init__(f"Vector({dtype}, {lanes})")

    @property
    def llvm(self) -> Any:
        """The type in LLVM."""
        lane = _FLOATS.get(self.dtype) or ir.IntType(self.dtype.bitwidth)
        return ir.VectorType(lane, self.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


# ---- Memory -----------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def load(typing: Any, array: Any, first: Any, lanes: Any) -> tuple[Any, Emit]:
    """array[first : first + lanes], unchecked, at any alignment; `lanes` is a constant."""
    vector = Vector(array.dtype, lanes.literal_value)

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        loaded = builder.load(_address(context, builder, signature, operands, vector))
        loaded.align = array.dtype.bitwidth // 8
        return loaded

    return vector(array, types.uint64, lanes), emit


@intrinsic  # type: ignore[untyped-decorator]
def store(typing: Any, array: Any, first: Any, vector: Any) -> tuple[Any, Emit]:
    """Write `vector` to array[first:], unchecked, at any alignment."""

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        address = _address(context, builder, signature, operands, vector)
        builder.store(operands[2], address).align = array.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, types.uint64, vector), emit


def _address(context: Any, builder: Any, signature: Any, operands: Any, vector: Vector) -> Any:
    array = context.make_array(signature.args[0])(context, builder, operands[0])
    return builder.bitcast(builder.gep(array.data, [operands[1]]), vector.llvm.as_pointer())


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def full(typing: Any, lanes: Any, value: Any, dtype: Any) -> tuple[Any, Emit]:
    """`value` in every lane; `lanes` is a constant."""
    vector = Vector(dtype.instance_type, lanes.literal_value)

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        return _repeat(builder, operands[1], vector.lanes)

    return vector(lanes, vector.dtype, dtype), emit


def _repeat(builder: Any, value: Any, count: int) -> Any:
    one = ir.Constant(ir.VectorType(value.type, 1), ir.Undefined)
    return _pick(builder, builder.insert_element(one, value, _INDEX(0)), [0] * count)


def _pick(builder: Any, lanes: Any, positions: list[int]) -> Any:
    """A vector of the lanes at `positions`."""
    mask = ir.Constant(ir.VectorType(_INDEX, len(positions)), positions)
    return builder.shuffle_vector(lanes, ir.Constant(lanes.type, ir.Undefined), mask)


# ---- Lane by lane -----------------------------------------------------------------------------


def maximum(a: Any, b: Any) -> Any:
    """The larger integer in every lane."""


def _define(operation: Callable[..., Any], emit_lanes: Callable[..., Any]) -> None:
    """Let `operation` of a vector and a vector or scalar be `emit_lanes(builder, a, b, dtype)`."""

    @intrinsic  # type: ignore[untyped-decorator]
    def apply(typing: Any, a: Any, b: Any) -> tuple[Any, Emit]:
        is_mask = operation in _COMPARISONS and isinstance(a.dtype, types.Float)
        result = Vector(types.int32, a.lanes) if is_mask else a

        def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
            left, right = operands
            if not isinstance(b, Vector):
                right = _repeat(builder, right, a.lanes)
            return emit_lanes(builder, left, right, a.dtype)

        return result(a, b if isinstance(b, Vector) else a.dtype), emit

    overload(operation)(lambda a, b: (lambda a, b: apply(a, b)) if isinstance(a, Vector) else None)


def _arithmetic(name: str, builder: Any, a: Any, b: Any, dtype: Any) -> Any:
    prefix = "f" if isinstance(dtype, types.Float) else ""
    return getattr(builder, prefix + name)(a, b)


def _bitwise(name: str, builder: Any, a: Any, b: Any, dtype: Any) -> Any:
    return getattr(builder, name)(a, b)


def _shift_right(builder: Any, a: Any, b: Any, dtype: Any) -> Any:
    return builder.ashr(a, b) if dtype.signed else builder.lshr(a, b)


def _holds(relation: str, builder: Any, a: Any, b: Any, dtype: Any) -> Any:
    if isinstance(dtype, types.Float):
        return builder.fcmp_ordered(relation, a, b)
    compare = builder.icmp_signed if dtype.signed else builder.icmp_unsigned
    return compare(relation, a, b)


def _comparison(relation: str, builder: Any, a: Any, b: Any, dtype: Any) -> Any:
    mask = ir.VectorType(ir.IntType(dtype.bitwidth), a.type.count)
    return builder.sext(_holds(relation, builder, a, b, dtype), mask)


def _maximum(builder: Any, a: Any, b: Any, dtype: Any) -> Any:
    return builder.select(_holds(">", builder, a, b, dtype), a, b)


_ARITHMETIC: Final = {operator.add: "add", operator.sub: "sub", operator.mul: "mul"}
_BITWISE: Final = {
    operator.and_: "and_",
    operator.or_: "or_",
    operator.xor: "xor",
    operator.lshift: "shl",
}
_COMPARISONS: Final = {operator.gt: ">", operator.le: "<="}

for _kind, _names in (
    (_arithmetic, _ARITHMETIC),
    (_bitwise, _BITWISE),
    (_comparison, _COMPARISONS),
):
    for _operation, _name in _names.items():
        _define(_operation, partial(_kind, _name))
_define(operator.rshift, _shift_right)
_define(maximum, _maximum)


# ---- Other types of lanes ---------------------------------------------------------------------


@intrinsic  # type: ignore[untyped-decorator]
def view(typing: Any, vector: Any, dtype: Any) -> tuple[Any, Emit]:
    """The same bits in lanes of `dtype`; of narrower lanes the first has the lowest bits."""
    lane = dtype.instance_type
    result = Vector(lane, vector.lanes * vector.dtype.bitwidth // lane.bitwidth)

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        return builder.bitcast(operands[0], result.llvm)

    return result(vector, dtype), emit


@intrinsic  # type: ignore[untyped-decorator]
def convert(typing: Any, vector: Any, dtype: Any) -> tuple[Any, Emit]:
    """Integers as narrower ones, which drops high bits, or as wider ones of the same value."""
    result = Vector(dtype.instance_type, vector.lanes)

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        if result.dtype.bitwidth < vector.dtype.bitwidth:
            return builder.trunc(operands[0], result.llvm)
        extend = builder.sext if vector.dtype.signed else builder.zext
        return extend(operands[0], result.llvm)

    return result(vector, dtype), emit


# ---- Across lanes -----------------------------------------------------------------------------


@intrinsic  # type: ignore[untyped-decorator]
def largest(typing: Any, vector: Any) -> tuple[Any, Emit]:
    """The largest lane of unsigned integers."""

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        lane = vector.llvm.element
        name = f"llvm.vector.reduce.umax.v{vector.lanes}{lane.intrinsic_name}"
        return _call(builder, name, ir.FunctionType(lane, [vector.llvm]), operands)

    return vector.dtype(vector), emit


@intrinsic  # type: ignore[untyped-decorator]
def halving_sum(typing: Any, vector: Any) -> tuple[Any, Emit]:
    """The sum of floats in a fixed order: with n lanes left, lane i is added to lane i + n/2."""

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        (lanes,) = operands
        while lanes.type.count > 1:
            half = lanes.type.count // 2
            lanes = builder.fadd(
                _pick(builder, lanes, list(range(half))),
                _pick(builder, lanes, list(range(half, 2 * half))),
            )
        return builder.extract_element(lanes, _INDEX(0))

    return vector.dtype(vector), emit


def _call(builder: Any, name: str, signature: Any, operands: Any) -> Any:
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), operands)


# ---- Lookup -----------------------------------------------------------------------------------


@intrinsic  # type: ignore[untyped-decorator]
def lookup(typing: Any, table: Any, index: Any) -> tuple[Any, Emit]:
    """table[index] in every lane, for 16 lanes of uint8 and any number of uint8 below 16."""

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        instruction, width = _byte_shuffle(context, index.lanes)
        look_up = partial(_shuffle, instruction) if instruction else _look_up_one_by_one
        entries = _pick(builder, operands[0], [i % 16 for i in range(width)])
        parts = [
            look_up(builder, entries, _pick(builder, operands[1], list(range(i, i + width))))
            for i in range(0, index.lanes, width)
        ]
        while len(parts) > 1:
            parts = [_join(builder, *parts[i : i + 2]) for i in range(0, len(parts), 2)]
        return parts[0]

    return index(table, index), emit


def _byte_shuffle(context: Any, lanes: int) -> tuple[str, int]:
    """What LLVM calls the target's byte shuffle, and its lanes; no name where there is none.

    There is no generic operation for it, and in code that goes lane by lane LLVM finds the
    instruction only as long as nothing around it is optimized.
    """
    triple, _, features = context.codegen().magic_tuple()
    if triple.startswith(("aarch64", "arm64")):
        return "llvm.aarch64.neon.tbl1.v16i8", 16
    if lanes >= 32 and "+avx2" in features.split(","):
        return "llvm.x86.avx2.pshuf.b", 32
    if "+ssse3" in features.split(","):
        return "llvm.x86.ssse3.pshuf.b.128", 16
    return "", lanes


def _shuffle(instruction: str, builder: Any, entries: Any, indices: Any) -> Any:
    signature = ir.FunctionType(indices.type, [entries.type, indices.type])
    return _call(builder, instruction, signature, [entries, indices])


def _look_up_one_by_one(builder: Any, entries: Any, indices: Any) -> Any:
    result = ir.Constant(indices.type, ir.Undefined)
    for i in range(indices.type.count):
        entry = builder.extract_element(entries, builder.extract_element(indices, _INDEX(i)))
        result = builder.insert_element(result, entry, _INDEX(i))
    return result


def _join(builder: Any, low: Any, high: Any) -> Any:
    lanes = 2 * low.type.count
    mask = ir.Constant(ir.VectorType(_INDEX, lanes), list(range(lanes)))
    return builder.shuffle_vector(low, high, mask)
