"""Vectors in Numba give lane by lane what NumPy gives."""

from __future__ import annotations

import operator

import numpy as np
import pytest
from numba import njit

from qtool.backends import cpu_vectors
from qtool.backends.cpu_vectors import (
    accumulate,
    array_at,
    convert,
    full,
    halving_sum,
    join,
    largest,
    load,
    look_up_floats,
    look_up_words,
    lookup,
    maximum,
    round_to_bfloat16,
    store,
    view,
)
from qtool.formats import floats

u64 = np.uint64
BITWISE = [operator.and_, operator.or_, operator.xor]
ARITHMETIC = [operator.add, operator.sub, operator.mul]
RELATIONS = [operator.gt, operator.le]


def of_two(operation, a, b):
    """`operation` on 32 lanes of `a` and `b`, or on those of `a` and the scalar `b`."""

    @njit
    def with_vector(a, b, out):
        store(out, u64(0), operation(load(a, u64(0), 32), load(b, u64(0), 32)))

    @njit
    def with_scalar(a, b, out):
        store(out, u64(0), operation(load(a, u64(0), 32), b))

    is_mask = operation in RELATIONS
    out = np.zeros(32, f"i{a.dtype.itemsize}" if is_mask else a.dtype)
    (with_vector if isinstance(b, np.ndarray) else with_scalar)(a, b, out)
    return out


def integers(dtype, seed=0):
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, info.max, 32, dtype, endpoint=True)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32])
def test_operators_work_lane_by_lane_on_integers(dtype):
    a, b = integers(dtype), integers(dtype, seed=1)
    b[:4] = a[:4]
    for operation in BITWISE + ARITHMETIC:
        np.testing.assert_array_equal(of_two(operation, a, b), operation(a, b))
    for operation in RELATIONS:
        np.testing.assert_array_equal(of_two(operation, a, b), -operation(a, b).astype(int))


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_shifts_keep_the_sign_of_signed_lanes_only(dtype):
    a = integers(dtype)
    np.testing.assert_array_equal(of_two(operator.rshift, a, 3), a >> 3)
    np.testing.assert_array_equal(of_two(operator.lshift, a, 3), a << 3)


def test_no_relation_holds_with_nan():
    a = np.array([1, 2, np.nan, -np.inf] * 8, np.float32)
    np.testing.assert_array_equal(of_two(operator.gt, a, np.float32(1)), [0, -1, 0, 0] * 8)
    np.testing.assert_array_equal(of_two(operator.le, a, np.float32(1)), [-1, 0, 0, -1] * 8)
    for operation in ARITHMETIC:
        np.testing.assert_array_equal(of_two(operation, a, a[::-1].copy()), operation(a, a[::-1]))


def test_the_maximum_of_unsigned_lanes():
    a, b = integers(np.uint16), integers(np.uint16, seed=1)

    @njit
    def find(a, b, out):
        both = maximum(load(a, u64(0), 32), load(b, u64(0), 32))
        store(out, u64(0), both)
        return largest(both)

    out = np.zeros(32, np.uint16)
    assert find(a, b, out) == np.maximum(a, b).max()
    np.testing.assert_array_equal(out, np.maximum(a, b))


def test_conversions_cut_off_or_extend_and_views_keep_the_bits():
    a = integers(np.int16)

    @njit
    def change(a, narrow, wide, bits, constant):
        values = load(a, u64(0), 32)
        store(narrow, u64(0), convert(values, np.uint8))
        store(wide, u64(0), convert(values, np.int32))
        store(bits, u64(0), view(values, np.uint32))
        store(constant, u64(0), full(8, 0x0100, np.uint16))

    narrow, wide = np.zeros(32, np.uint8), np.zeros(32, np.int32)
    bits, constant = np.zeros(16, np.uint32), np.zeros(8, np.uint16)
    change(a, narrow, wide, bits, constant)
    np.testing.assert_array_equal(narrow, a.astype(np.uint8))
    np.testing.assert_array_equal(wide, a)
    np.testing.assert_array_equal(bits, a.view(np.uint32))
    assert set(constant) == {0x0100}


def test_loads_and_stores_touch_their_lanes_only_at_any_alignment():
    @njit
    def copy(source, target, first):
        store(target, first, load(source, first, 16))

    source, target = integers(np.uint8), np.zeros(32, np.uint8)
    for first in (1, 7):
        target[:] = 0
        copy(source, target, first)
        np.testing.assert_array_equal(target[first : first + 16], source[first : first + 16])
        assert not target[:first].any() and not target[first + 16 :].any()


def test_a_sum_by_halves_depends_on_that_order():
    a = np.array([1e20, 1, -1e20, 3], np.float64)

    @njit
    def add(a):
        return halving_sum(load(a, u64(0), 4))

    assert add(a) == (a[0] + a[2]) + (a[1] + a[3]) == 4


@pytest.mark.parametrize("lanes", [16, 32, 64])
@pytest.mark.parametrize("with_instruction", [True, False])
def test_lookup_takes_the_entry_for_every_lane(lanes, with_instruction, monkeypatch):
    if not with_instruction:
        monkeypatch.setattr(cpu_vectors, "_byte_shuffle", lambda context, lanes: ("", lanes))

    @njit
    def look_up(table, index, out):
        store(out, u64(0), lookup(load(table, u64(0), 16), load(index, u64(0), lanes)))

    rng = np.random.default_rng(lanes)
    table = rng.integers(0, 256, 16, np.uint8)
    index, out = rng.integers(0, 16, lanes, np.uint8), np.zeros(lanes, np.uint8)
    look_up(table, index, out)
    np.testing.assert_array_equal(out, table[index])


@pytest.fixture(params=[None, ["avx2"], []], ids=["this machine", "avx2", "no instructions"])
def features(request, monkeypatch):
    """Code is made as for a processor that has these features at most."""
    has_features = cpu_vectors.has_features

    def both(codegen, *names):
        return has_features(codegen, *names) and set(names) <= set(request.param)

    if request.param is not None:
        monkeypatch.setattr(cpu_vectors, "has_features", both)


def test_float_look_ups_mind_the_low_four_bits_only(features):
    @njit
    def look_up(table, index, out):
        store(out, u64(0), look_up_floats(load(table, u64(0), 16), load(index, u64(0), 32)))

    table = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    index, out = integers(np.uint32), np.zeros(32, np.float32)
    look_up(table, index, out)
    np.testing.assert_array_equal(out, table[index % 16])


def test_word_look_ups_mind_the_low_five_bits_only(features):
    @njit
    def look_up(table, index, out):
        store(out, u64(0), look_up_words(load(table, u64(0), 32), load(index, u64(0), 64)))

    table, index, out = integers(np.uint16), np.tile(integers(np.uint16, 1), 2), np.zeros(64, "u2")
    look_up(table, index, out)
    np.testing.assert_array_equal(out, table[index % 32])


def test_rounding_to_bfloat16_is_to_even(features):
    @njit
    def narrow(values, out):
        store(out, u64(0), round_to_bfloat16(load(values, u64(0), 32)))

    bits = np.random.default_rng(1).integers(0x30000000, 0x50000000, 32).astype(np.uint32)
    bits[:3] = 0x3F808000, 0x3F818000, 0x3F808001  # two ties and one just above a tie
    bits[3] = 0x80000000  # a zero with its sign
    out = np.zeros(32, np.uint16)
    narrow(bits.view(np.float32), out)
    np.testing.assert_array_equal(out, floats.narrow(bits.view(np.float32), "BF16"))


def test_sums_of_products_of_several_tokens_take_turns(features):
    @njit
    def multiply(sums, weights, values, out):
        store(
            out,
            u64(0),
            accumulate(load(sums, u64(0), 64), load(weights, u64(0), 32), values, u64(0), 2),
        )

    rng = np.random.default_rng(2)
    sums, weights = rng.integers(0, 9, 64), rng.integers(0, 9, 32)
    values, out = rng.integers(0, 9, (2, 2, 16)), np.zeros(64, np.float32)
    multiply(*(a.astype(np.float32) for a in (sums, weights, values.reshape(-1))), out)
    expected = sums.reshape(2, 2, 16) + weights.reshape(2, 1, 16) * values  # part, token, lane
    np.testing.assert_array_equal(out, expected.reshape(-1))


def test_products_of_bfloat16_are_added_in_pairs(features):
    @njit
    def multiply(weights, values, out):
        weights, zeros = load(weights, u64(0), 32), full(16, 0, np.float32)
        store(out, u64(0), accumulate(zeros, weights, values, u64(0), 1))

    numbers = np.random.default_rng(3).integers(-9, 9, (2, 32)).astype(np.float32)
    weights, values = (floats.narrow(row, "BF16") for row in numbers)
    out = np.zeros(16, np.float32)
    multiply(weights, values, out)
    np.testing.assert_array_equal(out, (numbers[0] * numbers[1]).reshape(16, 2).sum(1))


def test_arrays_at_an_address_read_and_write_there():
    @njit
    def double(address):
        values = array_at(address, np.int16)
        store(values, u64(1), join(load(values, u64(1), 4), load(values, u64(1), 4)))
        values[0] = 7

    values = np.arange(16, dtype=np.int16)
    double(values.ctypes.data)
    np.testing.assert_array_equal(values, [7, 1, 2, 3, 4, 1, 2, 3, 4, *range(9, 16)])


def test_signed_integers_become_floats():
    @njit
    def widen(integers, out):
        store(out, u64(0), convert(convert(load(integers, u64(0), 32), np.int32), np.float32))

    a, out = integers(np.int8), np.zeros(32, np.float32)
    widen(a, out)
    np.testing.assert_array_equal(out, a)
