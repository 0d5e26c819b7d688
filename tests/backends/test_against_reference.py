"""The CPU backend gives the bytes of the reference, whatever the input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.backends import decision_tables
from qtool.backends.cpu import CpuBackend
from qtool.formats import double_quant, floats, four_bit
from qtool.formats.precisions import BLOCKSIZES
from qtool.formats.reciprocal import reciprocal
from tests.backends.reference import (
    ReferenceBackend,
    assert_same_bits,
    dequantize_4bit,
    quantize_4bit,
    quantize_absmax,
    quantize_int8,
)

CPU, REFERENCE = CpuBackend(), ReferenceBackend()
DTYPES = ["BF16", "F16", "F32"]

many_examples = settings(max_examples=120, deadline=None)  # the first one compiles


def _bit_patterns(rng, size):
    return rng.integers(0, 1 << 32, size, dtype=np.uint32).view(np.float32)


def _gaussian(rng, size):
    return rng.standard_normal(size) * 0.02


def _subnormal(rng, size):
    return rng.standard_normal(size) * 2.0 ** rng.integers(-148, -118)


def _float16_subnormal(rng, size):
    return rng.standard_normal(size) * 2.0 ** rng.integers(-24, -9)


def _huge(rng, size):
    return rng.standard_normal(size) * 2.0 ** rng.integers(115, 127)


def _mostly_zero(rng, size):
    return rng.standard_normal(size) * (rng.random(size) < 0.02)


def _with_nan_and_infinity(rng, size):
    values = rng.standard_normal(size)
    values[: size // 3] = np.nan  # whole blocks of it
    for bad in (np.nan, np.inf, -np.inf):
        values[rng.random(size) < 0.003] = bad
    return values


def _negative(rng, size):
    return -np.abs(rng.standard_normal(size))


KINDS = [
    _bit_patterns,
    _gaussian,
    _subnormal,
    _float16_subnormal,
    _huge,
    _mostly_zero,
    _with_nan_and_infinity,
    _negative,
]


def make_values(kind, dtype, size, seed):
    rng = np.random.default_rng(seed)
    if kind is _bit_patterns and dtype != "F32":
        bits = rng.integers(0, 1 << 16, size).astype(np.uint16)
        return bits.view(floats.NUMPY_DTYPES[dtype])
    with np.errstate(over="ignore"):
        return floats.narrow(kind(rng, size).astype(np.float32), dtype)


@st.composite
def weights(draw, max_size=9000):
    """Values of some dtype, of a size near the edges of blocks and strips, and the dtype."""
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(KINDS))
    edge = draw(st.sampled_from([0, 32, 64, 4096, 8192]))
    size = draw(st.integers(0, max_size) | st.integers(max(0, edge - 2), edge + 2))
    return make_values(kind, dtype, size, draw(st.integers(0, 2**32 - 1))), dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.strip("_"))
def test_every_kind_of_value_gives_the_same_bytes(kind, dtype):
    for seed in range(4):
        values = make_values(kind, dtype, 5000, seed)
        for quant_type in ("nf4", "fp4"):
            check_4_bit_quantization(values, dtype, quant_type, 64)
            for target in DTYPES:
                check_4_bit_dequantization(values, dtype, quant_type, 64, target)
        check_double_quantization(values, dtype)
        check_int8_quantization(values.reshape(-1, 100), dtype)


@many_examples
@given(weights(), st.sampled_from(["nf4", "fp4"]), st.sampled_from(BLOCKSIZES))
def test_4_bit_quantization_gives_the_same_bytes(weight, quant_type, blocksize):
    values, dtype = weight
    check_4_bit_quantization(values, dtype, quant_type, blocksize)


def check_4_bit_quantization(values, dtype, quant_type, blocksize):
    packed, absmax, num_bad = quantize_4bit(CPU, values, dtype, quant_type, blocksize)
    expected = quantize_4bit(REFERENCE, values, dtype, quant_type, blocksize)
    assert_same_bits(packed, expected[0], "packed")
    assert_same_bits(absmax, expected[1], "absmax")
    assert num_bad == expected[2]
    assert CPU.count_nonfinite(values, dtype) == num_bad


@many_examples
@given(
    weights(), st.sampled_from(["nf4", "fp4"]), st.sampled_from(BLOCKSIZES), st.sampled_from(DTYPES)
)
def test_4_bit_dequantization_gives_the_same_values(weight, quant_type, blocksize, dtype):
    check_4_bit_dequantization(*weight, quant_type, blocksize, dtype)


def check_4_bit_dequantization(values, source, quant_type, blocksize, dtype):
    packed, absmax, _ = quantize_4bit(REFERENCE, values, source, quant_type, blocksize)
    arguments = (packed, absmax, quant_type, blocksize, dtype, values.size)
    assert_same_values(
        dequantize_4bit(CPU, *arguments), dequantize_4bit(REFERENCE, *arguments), dtype
    )


@many_examples
@given(weights(max_size=70_000))
def test_double_quantization_gives_the_same_bytes_and_offset(weight):
    check_double_quantization(*weight)


def check_double_quantization(values, dtype):
    absmax = floats.flush_subnormals(floats.widen(values, dtype))
    codes, nested, offset = quantize_absmax(CPU, absmax)
    expected = quantize_absmax(REFERENCE, absmax)
    assert_same_bits(offset, expected[2], "offset")
    assert_same_bits(nested, expected[1], "nested_absmax")
    assert_same_bits(codes, expected[0], "codes")

    found, wanted = np.empty_like(absmax), np.empty_like(absmax)
    CPU.dequantize_absmax(codes, nested, offset, found)
    REFERENCE.dequantize_absmax(codes, nested, offset, wanted)
    assert_same_bits(found, wanted, "read back")


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 65_536, 65_537, 70_001])
def test_the_offset_is_summed_in_the_same_order(size):
    """Large values that cancel each other: what is left of the small ones depends on the order."""
    rng = np.random.default_rng(size)
    large = rng.random(size // 3) * 2.0 ** rng.integers(50, 70, size // 3)
    values = np.concatenate([large, -large, rng.random(size - 2 * large.size)])
    values = rng.permutation(values).astype(np.float32)
    _, _, offset = quantize_absmax(CPU, values)
    assert offset == double_quant.mean_in_fixed_order(values)


@many_examples
@given(weights(), st.integers(1, 700), st.sampled_from(DTYPES))
def test_int8_rows_give_the_same_bytes_and_values(weight, row_size, dtype):
    values, source = weight
    rows = values[: values.size // row_size * row_size].reshape(-1, row_size)
    codes, scb = check_int8_quantization(rows, source)
    found = np.empty(rows.shape, floats.NUMPY_DTYPES[dtype])
    wanted = np.empty_like(found)
    CPU.dequantize_int8(codes, scb, dtype, found)
    REFERENCE.dequantize_int8(codes, scb, dtype, wanted)
    assert_same_values(found, wanted, dtype)


def check_int8_quantization(rows, dtype):
    codes, scb, num_bad = quantize_int8(CPU, rows, dtype)
    expected = quantize_int8(REFERENCE, rows, dtype)
    assert_same_bits(codes, expected[0], "codes")
    assert_same_bits(scb, expected[1], "SCB")
    assert num_bad == expected[2]
    return codes, scb


def assert_same_values(found, expected, dtype):
    assert_same_bits(floats.widen(found, dtype), floats.widen(expected, dtype), dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_value_goes_through_float16_as_numpy_rounds_it(dtype):
    bits = np.arange(1 << 16).astype(np.uint16)
    rows = bits.view(floats.NUMPY_DTYPES[dtype]).reshape(-1, 1)
    _, scb, _ = quantize_int8(CPU, rows, dtype)
    with np.errstate(over="ignore"):
        expected = np.abs(floats.widen(rows, dtype).astype(np.float16)).astype(np.float32)
    assert_same_bits(scb, np.nan_to_num(expected, nan=0, posinf=np.inf), dtype)


def test_float32_goes_through_float16_as_numpy_rounds_it_around_every_tie():
    halves = np.arange(0x7C01).astype(np.uint16).view(np.float16).astype(np.float32)
    halves[-1] = 65536  # where infinity stands
    ties = (halves[:-1] + halves[1:]) / 2
    rows = np.stack([np.nextafter(ties, np.float32(0)), ties, np.nextafter(ties, np.float32(1e9))])
    _, scb, num_bad = quantize_int8(CPU, rows.reshape(-1, 1), "F32")
    with np.errstate(over="ignore"):
        expected = rows.astype(np.float16).astype(np.float32)
    assert_same_bits(scb, expected)
    assert num_bad == np.count_nonzero(np.isinf(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_rounded_to_the_nearest_even_as_torch_rounds_them(dtype):
    """Code 15 of NF4 is 1.0, so that each block's values are its absmax, rounded."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    ties = (rng.integers(0, 1 << 16, 4000, dtype=np.uint32) << 16) | 0x8000
    absmax = np.concatenate([_bit_patterns(rng, 40_000), ties.view(np.float32)])
    absmax = floats.flush_subnormals(absmax)
    packed = np.full(absmax.size * 16, 0xFF, np.uint8)
    values = dequantize_4bit(CPU, packed, absmax, "nf4", 32, dtype, absmax.size * 32)
    name = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    expected = torch.from_numpy(absmax).to(name).float().numpy()
    assert_same_bits(floats.widen(values[::32], dtype), expected, dtype)


# ---- The tables that replace arithmetic -------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_threshold_keys_are_the_last_values_before_each_code(dtype, quant_type):
    """Every entry, by the reference: its value does not exceed the threshold, the next one does."""
    infinity = decision_tables.INFINITY_BITS[dtype]
    bits = np.arange(infinity, dtype=np.uint16)  # all but infinity
    absmax = floats.flush_subnormals(_value(bits, dtype))
    inverse = reciprocal(absmax)
    codes_of = four_bit.nf4_codes if quant_type == "nf4" else four_bit.fp4_codes
    rank_of = decision_tables.CODE_ORDER[quant_type].argsort()
    keys = decision_tables.threshold_keys(dtype, quant_type)[: bits.size].astype(np.int32)
    for column in range(15):
        for step in (0, 1):
            key = keys[:, column] + step
            inside = np.abs(key) < infinity
            values = _value(np.where(key < 0, key ^ 0x7FFF, key).astype(np.uint16), dtype)
            with np.errstate(invalid="ignore", over="ignore"):
                scaled = floats.flush_subnormals(floats.flush_subnormals(values) * inverse)
            exceeds = rank_of[codes_of(scaled)][inside & (absmax > 0)] > column
            assert exceeds.all() if step else not exceeds.any()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_search_in_the_tables_ends_at_the_number_of_thresholds_exceeded(quant_type):
    thresholds = decision_tables.threshold_keys("BF16", quant_type)
    tables = decision_tables.search_tables("BF16", quant_type).reshape(-1, 4, 16)
    rng = np.random.default_rng(3)
    for row in rng.integers(0, len(tables), 300):
        for key in [*thresholds[row], *rng.integers(-0x7F80, 0x7F80, 20)]:
            at = 0
            for step in range(4):
                two_bytes = bytes(tables[row, step, [at, (1 << step) + at]])
                at = 2 * at + int(key > int.from_bytes(two_bytes, "little", signed=True))
            assert at == np.count_nonzero(key > thresholds[row])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_16_bit_value_has_the_code_of_the_reference(dtype, quant_type):
    """In blocks whose absmax is ordinary, or makes 1/absmax overflow, subnormal or zero."""
    infinity = decision_tables.INFINITY_BITS[dtype]
    for absmax in (0x3D37, 0x0001, 0x0081, 0x0400, infinity - 1, infinity):
        magnitudes = np.arange(-(-(absmax + 1) // 31) * 31, dtype=np.uint16) % (absmax + 1)
        blocks = np.full((2, magnitudes.size // 31, 32), absmax, np.uint16)
        blocks[:, :, 1:] = magnitudes.reshape(-1, 31)
        blocks[1] |= 0x8000
        values = blocks.reshape(-1).view(floats.NUMPY_DTYPES[dtype])
        check_4_bit_quantization(values, dtype, quant_type, 32)


def _value(bits, dtype):
    return floats.widen(bits.view(floats.NUMPY_DTYPES[dtype]), dtype)


def test_one_threshold_at_most_lies_between_floats_with_the_same_upper_bits():
    guesses = decision_tables.dynamic_guesses().astype(int)
    upper = np.arange(1 << 16, dtype=np.uint32)
    greatest = upper << 16 | np.where(upper >= 1 << 15, 0, 0xFFFF).astype(np.uint32)
    numbers = ~np.isnan(greatest.view(np.float32))
    more = double_quant.dynamic_codes(greatest.view(np.float32)).astype(int) - guesses
    assert set(np.unique(more[numbers])) == {0, 1}
