"""LLM.int8() rows: named edge cases, bitsandbytes' own functions, float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.formats import int8


def quantize(rows, dtype="F32"):
    codes, scb = int8.quantize_int8(np.array(rows, np.float32), dtype)
    return codes.tolist(), scb.tolist()


def test_the_row_maximum_becomes_127():
    assert quantize([[-2.0, 1.0, 0.5]]) == ([[-127, 64, 32]], [2.0])  # 63.5 and 31.75


def test_weights_go_through_float16():
    codes, scb = quantize([[1.0 + 2**-12, 0.5], [65_520.0, 1.0]])
    assert scb == [1.0, np.inf]
    assert codes[1] == [0, 0]


def test_the_scale_is_127_times_the_reciprocal_not_a_quotient():
    """Half steps of which CUDA, whose division multiplies by the reciprocal, gave these codes."""
    assert quantize([[-0.026184082, 0.052368164]])[0] == [[-64, 127]]
    assert quantize([[0.024490356, 0.048980713]])[0] == [[63, 127]]


def test_rows_of_zeros_and_nan_have_code_0_and_scb_0():
    assert quantize([[0.0, -0.0], [np.nan, np.nan]]) == ([[0, 0], [0, 0]], [0.0, 0.0])


def test_nan_has_code_0_and_does_not_count_for_scb():
    signaling = np.array([0x7F800001], np.uint32).view(np.float32)[0]
    assert quantize([[4.0, np.nan, signaling, -4.0]]) == ([[127, 0, 0, -127]], [4.0])


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 300))
def test_values_come_back_within_half_a_step(seed, num_rows, row_size):
    rows = np.random.default_rng(seed).standard_normal((num_rows, row_size)).astype(np.float16)
    codes, scb = int8.quantize_int8(rows, "F16")
    error = np.abs(int8.dequantize_int8(codes, scb) - rows.astype(np.float64))
    assert (error <= scb[:, None] / 127 * 0.50003).all()  # float32 rounds the scaled value


def test_bitsandbytes_on_the_cpu_agrees_but_for_ties():
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = (torch.randn(200, 512, generator=torch.Generator().manual_seed(9)) * 0.05).half()
    theirs, scb, _ = functional.int8_vectorwise_quant(weight)
    codes, our_scb = int8.quantize_int8(weight.numpy(), "F16")
    assert our_scb.tobytes() == scb.numpy().tobytes()
    difference = np.abs(codes.astype(int) - theirs.numpy())
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-2
    back = functional.int8_vectorwise_dequant(torch.from_numpy(codes), scb)
    assert int8.dequantize_int8(codes, our_scb).tobytes() == back.numpy().tobytes()
