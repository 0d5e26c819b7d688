"""The products of the CPU kernels against float64 sums over the weights of the reference."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from qtool.backends.cpu import BIT_DTYPES
from qtool.backends.cpu_products import multiply_4bit, multiply_bfloat16, multiply_int8
from qtool.formats import double_quant, floats, four_bit, int8
from qtool.formats.codebooks import CODES, dynamic_map

ROWS = 5


def address(array):
    assert array.flags.c_contiguous
    return array.ctypes.data


class FourBitWeight:
    """Random codes, their absmax plain or quantized, and the weights that they stand for."""

    def __init__(self, size, blocksize, *, dtype="BF16", quant_type="nf4", nested=False, seed=0):
        rng = np.random.default_rng(seed)
        self.size, self.blocksize, self.dtype, self.quant_type = size, blocksize, dtype, quant_type
        self.packed = rng.integers(0, 256, -(-ROWS * size // 2), np.uint8)
        self.absmax = rng.uniform(0.01, 3, -(-ROWS * size // blocksize)).astype(np.float32)
        self.stored, self.nested = self.absmax, (np.zeros(1, np.float32),) * 3
        if nested:
            codes, nested_absmax, offset = double_quant.quantize_absmax(self.absmax)
            self.absmax = double_quant.dequantize_absmax(codes, nested_absmax, offset)
            self.stored = codes
            self.nested = nested_absmax, dynamic_map(), np.array([offset], np.float32)

    def weights(self):
        """float32 (ROWS, size), rounded to the weights' dtype."""
        values = four_bit.dequantize_4bit(
            self.packed, self.absmax, self.quant_type, self.blocksize, ROWS * self.size
        )
        rounded = floats.widen(floats.narrow(values, self.dtype), self.dtype)
        return rounded.reshape(ROWS, self.size)

    def multiply(self, x, *, tokens, ranges=((0, ROWS),)):
        y = np.full((x.shape[0], ROWS), 77, np.float32)
        kernel = multiply_4bit(tokens, x.dtype.type, BIT_DTYPES[self.dtype], self.stored.dtype.type)
        addresses = [address(a) for a in (self.packed, self.stored, *self.nested, x, y)]
        shift = self.blocksize.bit_length() - 1
        for first, last in ranges:
            kernel(
                CODES[self.quant_type], shift, *addresses, x.shape[0], self.size, ROWS, first, last
            )
        return y


def activations(num_tokens, size):
    values = np.random.default_rng(num_tokens).standard_normal((num_tokens, size))
    return values.astype(np.float32)


def as_bfloat16(x):
    """The bits, and the values that they stand for."""
    bits = floats.narrow(x.reshape(-1), "BF16").reshape(x.shape)
    return bits, floats.widen(bits.reshape(-1), "BF16").reshape(x.shape)


def check(y, x, weights):
    """float32 sums of n products are off by less than n units in the last place of the largest."""
    exact = x.astype(np.float64) @ weights.astype(np.float64).T
    bound = x.shape[1] * 2.0**-24 * (np.abs(x) @ np.abs(weights).T)
    np.testing.assert_array_less(np.abs(y - exact), bound + 1e-30)
    assert np.abs(exact).max() > 1000 * bound.max(), "the bound would hide mistakes"


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_four_bit_products(dtype, nested, tokens):
    weight = FourBitWeight(192, 64, dtype=dtype, nested=nested)
    x = activations(tokens, 192)
    check(weight.multiply(x, tokens=tokens), x, weight.weights())


@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bit_products_in_pairs_of_bfloat16(tokens, nested):
    weight = FourBitWeight(384, 64, nested=nested, quant_type="fp4")
    bits, x = as_bfloat16(activations(tokens, 384))
    check(weight.multiply(bits, tokens=tokens), x, weight.weights())


@pytest.mark.parametrize("blocksize", [64, 128, 256, 4096])
def test_blocks_may_cross_rows(blocksize):
    weight = FourBitWeight(640, blocksize, seed=blocksize)
    bits, x = as_bfloat16(activations(2, 640))
    check(weight.multiply(x, tokens=2), x, weight.weights())
    check(weight.multiply(bits, tokens=2), x, weight.weights())


def test_tokens_that_are_missing_count_as_zeros():
    weight, x = FourBitWeight(128, 64), activations(3, 128)
    check(weight.multiply(x, tokens=4), x, weight.weights())


def test_rows_are_the_same_however_they_are_shared_out():
    weight, x = FourBitWeight(256, 64), activations(1, 256)
    whole = weight.multiply(x, tokens=1)
    parts = weight.multiply(x, tokens=1, ranges=[(3, 5), (0, 1), (1, 3)])
    np.testing.assert_array_equal(whole, parts)
    only_one = weight.multiply(x, tokens=1, ranges=[(2, 3)])
    assert only_one[0, 2] == whole[0, 2]
    assert set(only_one[0, [0, 1, 3, 4]]) == {77}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("absmax", [0.0, 1e-39, 1e-45, 1e-7, 6.6e4, 3e38, -2.0])
def test_blocks_out_of_the_ordinary_have_the_weights_of_the_reference(dtype, absmax):
    weight = FourBitWeight(128, 64, dtype=dtype)
    weight.absmax[:] = absmax
    for column in (0, 1, 70):  # one product per sum: no rounding but the weight's
        x = np.zeros((1, 128), np.float32)
        x[0, column] = 1
        y, expected = weight.multiply(x, tokens=1), weight.weights()[:, column]
        if np.isinf(weight.weights()).any():  # zero times infinity is NaN, in the row's sum too
            assert np.isnan(y).all() or np.array_equal(y[0], expected)
        else:
            np.testing.assert_array_equal(y[0], expected)
        if dtype == "BF16":
            np.testing.assert_array_equal(weight.multiply(as_bfloat16(x)[0], tokens=1)[0], y[0])


@pytest.mark.parametrize(("dtype", "step"), [("BF16", 0x8000), ("F16", 0x1000)])
def test_weights_between_two_values_are_rounded_to_the_even_one(dtype, step):
    weight = FourBitWeight(128, 64, dtype=dtype)
    weight.packed[:] = 0xFF  # the table's 1.0: a weight is its block's absmax
    ties = np.array([0x3F800000 + step, 0x3F800000 + 3 * step] * ROWS, np.uint32)
    weight.absmax[:] = ties.view(np.float32)
    x = np.zeros((1, 128), np.float32)
    for column in (1, 70):
        x[:] = np.arange(128) == column
        expected = weight.weights()[:, column]
        assert not np.isin(expected, weight.absmax).any()
        np.testing.assert_array_equal(weight.multiply(x, tokens=1)[0], expected)
        if dtype == "BF16":
            np.testing.assert_array_equal(weight.multiply(as_bfloat16(x)[0], tokens=1)[0], expected)


def test_nan_in_absmax_spoils_its_rows_only():
    weight, x = FourBitWeight(128, 64), activations(1, 128)
    weight.absmax[3] = np.uint32(0x7FFFFFFF).view(np.float32)  # rounding it up would carry over
    assert list(np.isnan(weight.multiply(x, tokens=1)[0])) == [False, True, False, False, False]
    y = weight.multiply(as_bfloat16(x)[0], tokens=1)[0]
    assert list(np.isnan(y)) == [False, True, False, False, False]


@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_int8_products(tokens):
    rng = np.random.default_rng(tokens)
    codes = rng.integers(-127, 128, (ROWS, 192)).astype(np.int8)
    scb = rng.uniform(0.1, 2, ROWS).astype(np.float32)
    x, y = activations(tokens, 192), np.zeros((tokens, ROWS), np.float32)
    addresses = [address(a) for a in (codes, scb, x, y)]
    multiply_int8(tokens)(*addresses, tokens, 192, ROWS, 0, ROWS)
    check(y, x, codes.astype(np.float32) * scb[:, None] * int8.INVERSE_127)


@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_bfloat16_products(tokens):
    bits, weights = as_bfloat16(activations(ROWS, 384))
    x_bits, x = as_bfloat16(activations(tokens, 384) + 1)
    y = np.zeros((tokens, ROWS), np.float32)
    multiply_bfloat16(tokens)(*map(address, (bits, x_bits, y)), tokens, 384, ROWS, 0, ROWS)
    check(y, x, weights)


PROCESSORS = {"haswell": "+avx,+avx2,+fma,+ssse3,+sse4.1,+sse4.2", "x86-64": ""}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86 processors")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_processors_with_fewer_instructions(processor):
    """Code for them runs here too; it is compiled in a process of its own."""
    environment = {
        "NUMBA_CPU_NAME": processor,
        "NUMBA_CPU_FEATURES": PROCESSORS[processor],
    }
    script = (
        "import sys; sys.path.insert(0, '.')\n"
        "import tests.backends.test_cpu_products as t\n"
        "from qtool.backends.cpu_products import has_bfloat16_products\n"
        "assert not has_bfloat16_products()\n"
        "t.test_four_bit_products('BF16', True, 2)\n"
        "t.test_four_bit_products_in_pairs_of_bfloat16(1, False)\n"
        "t.test_int8_products(1)\n"
        "t.test_bfloat16_products(1)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
