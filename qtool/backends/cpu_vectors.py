"""Vectors of a fixed number of lanes for Numba kernels.

LLVM's loop vectorizer decides for itself how a loop is cut and what stays in registers. Where that
is not good enough, a kernel computes with vectors:

    values = load(source, first, 32)                     # source[first : first + 32]
    keys = values ^ ((values >> 15) & 0x7FFF)            # operators work lane by lane
    store(target, first, convert(keys, np.uint8))

They are LLVM's own, generic vectors, so every instruction set does the work with what it has: 32
lanes of 16 bits are one register of AVX-512, two of AVX2, four of NEON. Only the look-ups and
products of pairs name instructions.

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
from numba.np.arrayobj import populate_array

# What an intrinsic's `emit` gets from Numba: the target, LLVM's builder, types, operands.
Emit = Callable[[Any, Any, Any, Any], Any]

_FLOATS: Final = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
_INDEX: Final = ir.IntType(32)

# What makes products of bfloat16 worth it: pairs of them added up, and a look-up of 16 bits.
BFLOAT16_FEATURES: Final = ("avx512bf16", "avx512bw")


class _BfloatType(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    def __str__(self) -> str:
        return "bfloat"


_BFLOAT: Final = _BfloatType()


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
        return _load(context, builder, array, operands[0], operands[1], vector)

    return vector(array, types.uint64, lanes), emit


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing: Any, array: Any, index: Any) -> tuple[Any, Emit]:
    """Have the cache fetch array[index], which may lie beyond the end."""

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        vector = Vector(array.dtype, 1)
        address = _address(context, builder, array, operands[0], operands[1], vector)
        to_read, to_keep, data = _INDEX(0), _INDEX(3), _INDEX(1)
        signature = ir.FunctionType(ir.VoidType(), [address.type, _INDEX, _INDEX, _INDEX])
        _call(builder, "llvm.prefetch.p0", signature, [address, to_read, to_keep, data])
        return context.get_dummy_value()

    return types.void(array, types.uint64), emit


@intrinsic  # type: ignore[untyped-decorator]
def store(typing: Any, array: Any, first: Any, vector: Any) -> tuple[Any, Emit]:
    """Write `vector` to array[first:], unchecked, at any alignment."""

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        data, at, values = operands
        address = _address(context, builder, array, data, at, vector)
        builder.store(values, address).align = array.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, types.uint64, vector), emit


@intrinsic  # type: ignore[untyped-decorator]
def array_at(typing: Any, address: Any, dtype: Any) -> tuple[Any, Emit]:
    """An array of `dtype` at an address; its size is not known, so `size` and slices are 0."""
    result = types.Array(dtype.instance_type, 1, "C")

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        array = context.make_array(result)(context, builder)
        width = context.get_constant(types.intp, result.dtype.bitwidth // 8)
        nothing = context.get_constant(types.intp, 0)
        populate_array(
            array,
            data=builder.inttoptr(operands[0], array.data.type),
            shape=[nothing],
            strides=[width],
            itemsize=width,
            meminfo=None,
        )
        return array._getvalue()

    return result(types.uintp, dtype), emit


def _load(context: Any, builder: Any, array: Any, data: Any, first: Any, vector: Vector) -> Any:
    loaded = builder.load(_address(context, builder, array, data, first, vector))
    loaded.align = array.dtype.bitwidth // 8
    return loaded


def _address(context: Any, builder: Any, array: Any, data: Any, first: Any, vector: Vector) -> Any:
    pointer = context.make_array(array)(context, builder, data).data
    return builder.bitcast(builder.gep(pointer, [first]), vector.llvm.as_pointer())


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
    """Integers as narrower ones, which drops high bits, as wider ones, or signed ones as floats."""
    result = Vector(dtype.instance_type, vector.lanes)

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        if isinstance(result.dtype, types.Float):
            return builder.sitofp(operands[0], result.llvm)
        if result.dtype.bitwidth < vector.dtype.bitwidth:
            return builder.trunc(operands[0], result.llvm)
        extend = builder.sext if vector.dtype.signed else builder.zext
        return extend(operands[0], result.llvm)

    return result(vector, dtype), emit


@intrinsic  # type: ignore[untyped-decorator]
def round_to_bfloat16(typing: Any, vector: Any) -> tuple[Any, Emit]:
    """The bits of the nearest bfloat16, ties to even, as uint16; not for NaN and subnormals.

    For 32 lanes of float32.
    """
    result = Vector(types.uint16, vector.lanes)

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        (values,) = operands
        if has_features(context.codegen(), *BFLOAT16_FEATURES):
            low, high = _cut(builder, values, 16)
            rounded = ir.FunctionType(ir.VectorType(_BFLOAT, 32), [low.type] * 2)
            found = _call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", rounded, [high, low])
            return builder.bitcast(found, result.llvm)
        bits = builder.bitcast(values, ir.VectorType(_INDEX, vector.lanes))
        constant = partial(_repeat, builder, count=vector.lanes)
        upper = builder.lshr(bits, constant(_INDEX(16)))
        half = builder.add(builder.and_(upper, constant(_INDEX(1))), constant(_INDEX(0x7FFF)))
        whole = builder.lshr(builder.add(bits, half), constant(_INDEX(16)))
        return builder.trunc(whole, result.llvm)

    return result(vector), emit


@intrinsic  # type: ignore[untyped-decorator]
def join(typing: Any, low: Any, high: Any) -> tuple[Any, Emit]:
    """The lanes of `low`, then those of `high`, as many."""

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        return _join(builder, *operands)

    return Vector(low.dtype, 2 * low.lanes)(low, high), emit


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
        return _join_all(
            builder, [look_up(builder, entries, part) for part in _cut(builder, operands[1], width)]
        )

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
    lanes = indices.type.count
    result = ir.Constant(ir.VectorType(entries.type.element, lanes), ir.Undefined)
    for i in range(lanes):
        entry = builder.extract_element(entries, builder.extract_element(indices, _INDEX(i)))
        result = builder.insert_element(result, entry, _INDEX(i))
    return result


@intrinsic  # type: ignore[untyped-decorator]
def look_up_floats(typing: Any, table: Any, index: Any) -> tuple[Any, Emit]:
    """table[index % 16] in every lane, for 16 lanes of float32 and 16n of uint32."""

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        entries, indices = operands
        if has_features(context.codegen(), "avx512f"):
            look_up, width = partial(_permute, _PERMUTE_16_FLOATS, entries), 16
        elif has_features(context.codegen(), "avx2"):
            look_up, width = partial(_permute_halves, entries), 8
        else:
            low_bits = _repeat(builder, ir.Constant(_INDEX, 15), index.lanes)
            return _look_up_one_by_one(builder, entries, builder.and_(indices, low_bits))
        return _join_all(builder, [look_up(builder, p) for p in _cut(builder, indices, width)])

    return Vector(table.dtype, index.lanes)(table, index), emit


_PERMUTE_16_FLOATS: Final = "llvm.x86.avx512.permvar.sf.512"
_PERMUTE_8_FLOATS: Final = "llvm.x86.avx2.permps"


def _permute(instruction: str, entries: Any, builder: Any, indices: Any) -> Any:
    """The instruction minds only the bits that an index needs."""
    signature = ir.FunctionType(entries.type, [entries.type, indices.type])
    return _call(builder, instruction, signature, [entries, indices])


def _permute_halves(entries: Any, builder: Any, indices: Any) -> Any:
    """Both halves of the table are looked up; bit 3 of the index, made the sign, chooses."""
    low, high = (
        _permute(_PERMUTE_8_FLOATS, half, builder, indices) for half in _cut(builder, entries, 8)
    )
    signs = builder.shl(indices, _repeat(builder, ir.Constant(_INDEX, 28), 8))
    zeros = ir.Constant(indices.type, None)
    return builder.select(builder.icmp_signed("<", signs, zeros), high, low)


@intrinsic  # type: ignore[untyped-decorator]
def look_up_words(typing: Any, table: Any, index: Any) -> tuple[Any, Emit]:
    """table[index % 32] in every lane, for 32 lanes of uint16 and 32n lanes of indices."""

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        entries, indices = operands
        if has_features(context.codegen(), "avx512bw"):
            parts = _cut(builder, indices, 32)
            return _join_all(
                builder, [_permute(_PERMUTE_WORDS, entries, builder, p) for p in parts]
            )
        low_bits = _repeat(builder, indices.type.element(31), index.lanes)
        return _look_up_one_by_one(builder, entries, builder.and_(indices, low_bits))

    return index(table, index), emit


_PERMUTE_WORDS: Final = "llvm.x86.avx512.permvar.hi.512"


def has_features(codegen: Any, *names: str) -> bool:
    """Whether the processor that `codegen` writes for has what LLVM calls by these names."""
    features = codegen.magic_tuple()[2].split(",")
    return all(f"+{name}" in features for name in names)


def _join_all(builder: Any, parts: list[Any]) -> Any:
    """One vector of 2^k equal ones."""
    while len(parts) > 1:
        parts = [_join(builder, *parts[i : i + 2]) for i in range(0, len(parts), 2)]
    return parts[0]


def _join(builder: Any, low: Any, high: Any) -> Any:
    lanes = 2 * low.type.count
    mask = ir.Constant(ir.VectorType(_INDEX, lanes), list(range(lanes)))
    return builder.shuffle_vector(low, high, mask)


def _cut(builder: Any, lanes: Any, width: int) -> list[Any]:
    return [
        _pick(builder, lanes, list(range(i, i + width))) for i in range(0, lanes.type.count, width)
    ]


# ---- Sums of products -------------------------------------------------------------------------


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def accumulate(
    typing: Any, sums: Any, weights: Any, array: Any, first: Any, tokens: Any
) -> tuple[Any, Emit]:
    """`sums` plus the products of `weights` with the values of several tokens.

    A part is what goes into 16 lanes of float32: 16 float32, or 32 bfloat16 (as uint16) whose
    products are added in pairs. From array[first] on there are `tokens` parts, a constant, for
    every part of `weights`. `sums` has one or more sets of a part per token, which take turns.
    """
    num_tokens, width = tokens.literal_value, _PART_BITS // array.dtype.bitwidth
    values = Vector(array.dtype, width)
    add_products = _add_pairs if array.dtype == types.uint16 else _add_products

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        totals = _cut(builder, operands[0], _PART_BITS // 32)
        parts = _cut(builder, operands[1], width)
        for step in range(len(parts) * num_tokens):
            at = builder.add(operands[3], ir.Constant(operands[3].type, step * width))
            x = _load(context, builder, array, operands[2], at, values)
            slot = step % len(totals)
            totals[slot] = add_products(
                context, builder, totals[slot], parts[step // num_tokens], x
            )
        return _join_all(builder, totals)

    return sums(sums, weights, array, types.uint64, tokens), emit


_PART_BITS: Final = 512


def _add_products(context: Any, builder: Any, sums: Any, a: Any, b: Any) -> Any:
    """sums + a * b, with one rounding where the target has an instruction for that."""
    name = f"llvm.fmuladd.v{sums.type.count}f32"
    return _call(builder, name, ir.FunctionType(sums.type, [sums.type] * 3), [a, b, sums])


def _add_pairs(context: Any, builder: Any, sums: Any, a: Any, b: Any) -> Any:
    """Lane i gains a[2i] * b[2i] + a[2i + 1] * b[2i + 1], all bfloat16."""
    if has_features(context.codegen(), *BFLOAT16_FEATURES):
        pairs = ir.VectorType(_BFLOAT, 2 * sums.type.count)
        signature = ir.FunctionType(sums.type, [sums.type, pairs, pairs])
        operands = [sums, builder.bitcast(a, pairs), builder.bitcast(b, pairs)]
        return _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", signature, operands)
    for widen in (_first_of_pairs, _second_of_pairs):
        sums = _add_products(context, builder, sums, widen(builder, a), widen(builder, b))
    return sums


def _first_of_pairs(builder: Any, pairs: Any) -> Any:
    words = builder.bitcast(pairs, ir.VectorType(_INDEX, pairs.type.count // 2))
    shift = _repeat(builder, _INDEX(16), words.type.count)
    return builder.bitcast(builder.shl(words, shift), _floats(words.type.count))


def _second_of_pairs(builder: Any, pairs: Any) -> Any:
    words = builder.bitcast(pairs, ir.VectorType(_INDEX, pairs.type.count // 2))
    mask = _repeat(builder, _INDEX(0xFFFF0000), words.type.count)
    return builder.bitcast(builder.and_(words, mask), _floats(words.type.count))


def _floats(lanes: int) -> Any:
    return ir.VectorType(ir.FloatType(), lanes)
