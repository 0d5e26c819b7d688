"""Double quantization: the order of the mean, nested codes, reading back."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.formats import double_quant
from qtool.formats.codebooks import dynamic_map


def mean_by_hand(absmax):
    """The documented order, one Python float at a time."""
    sums = [float(value) for value in absmax]
    while True:
        groups = [sums[i : i + 256] for i in range(0, len(sums), 256)]
        sums = []
        for group in groups:
            group = group + [0.0] * (256 - len(group))
            half = 128
            while half:
                group = [group[i] + group[i + half] for i in range(half)]
                half //= 2
            sums.append(group[0])
        if len(sums) == 1:
            return np.float32(sums[0] / len(absmax))


@settings(deadline=None)
@given(st.sampled_from([1, 2, 255, 256, 257, 1000, 65_536, 65_537, 70_001]), st.integers(0, 2**32))
def test_the_offset_is_summed_in_the_documented_order(size, seed):
    rng = np.random.default_rng(seed)
    # Large values that cancel each other: what is left of the small ones depends on the order.
    large = rng.random(size // 3) * 2.0 ** rng.integers(50, 70, size // 3)
    values = np.concatenate([large, -large, rng.random(size - 2 * large.size)])
    values = rng.permutation(values).astype(np.float32)
    assert double_quant.mean_in_fixed_order(values) == mean_by_hand(values)


@given(st.lists(st.floats(2**-100, 2**100, width=32), min_size=1, max_size=600))
def test_the_offset_is_the_exact_mean_rounded(values):
    absmax = np.array(values, np.float32)
    exact = math.fsum(absmax.tolist()) / len(values)
    np.testing.assert_allclose(double_quant.mean_in_fixed_order(absmax), exact, rtol=6e-8)


def test_an_empty_tensor_has_offset_0():
    codes, nested, offset = double_quant.quantize_absmax(np.empty(0, np.float32))
    assert (codes.size, nested.size, offset) == (0, 0, 0)


def test_equal_absmax_are_a_zero_nested_block_with_code_0():
    codes, nested, offset = double_quant.quantize_absmax(np.full(300, 0.5, np.float32))
    assert offset == 0.5 and nested.tolist() == [0, 0] and set(codes.tolist()) == {0}
    assert set(double_quant.dequantize_absmax(codes, nested, offset).tolist()) == {0.5}


@given(st.integers(0, 2**32 - 1), st.integers(1, 1000))
def test_nested_codes_are_the_nearest_in_float64(seed, size):
    absmax = np.random.default_rng(seed).random(size).astype(np.float32)
    codes, nested, offset = double_quant.quantize_absmax(absmax)
    difference = (absmax - offset).astype(np.float64)
    scale = np.repeat(nested.astype(np.float64), 256)[:size]
    table = dynamic_map().astype(np.float64)
    nearest = np.abs(table[None] * scale[:, None] - difference[:, None]).min(axis=1)
    assert (np.abs(table[codes] * scale - difference) <= nearest + 3e-7 * scale).all()


def test_one_infinity_makes_the_whole_tensor_infinite_as_in_bitsandbytes():
    absmax = np.ones(1000, np.float32)
    absmax[600] = np.inf
    codes, nested, offset = double_quant.quantize_absmax(absmax)
    assert offset == np.inf
    assert not np.isfinite(double_quant.dequantize_absmax(codes, nested, offset)).any()


def test_bitsandbytes_reads_the_same_absmax():
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    absmax = np.random.default_rng(7).random(1024).astype(np.float32)
    codes, nested, offset = double_quant.quantize_absmax(absmax)
    state = functional.QuantState(
        absmax=torch.from_numpy(nested),
        code=torch.from_numpy(dynamic_map().copy()),
        blocksize=256,
        dtype=torch.float32,
    )
    theirs = functional.dequantize_blockwise(torch.from_numpy(codes), state) + torch.tensor(offset)
    ours = double_quant.dequantize_absmax(codes, nested, offset)
    assert ours.tobytes() == theirs.numpy().tobytes()
