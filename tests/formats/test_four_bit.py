"""The 4-bit reference: named edge cases, bitsandbytes' own functions, float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.formats import floats, four_bit
from qtool.formats.codebooks import CODES, NF4_CODE, NF4_THRESHOLDS

LOWEST = np.finfo(np.float32).min
QUANT_TYPES = ["nf4", "fp4"]


def quantize(values, quant_type="nf4", blocksize=64):
    return four_bit.quantize_4bit(np.array(values, np.float32), quant_type, blocksize)


def codes_of(values, quant_type="nf4", blocksize=64):
    packed, _ = quantize(values, quant_type, blocksize)
    return four_bit.unpack_codes(packed, len(values)).tolist()


def test_the_first_of_two_codes_is_in_the_high_half():
    packed, absmax = quantize([1.0, -1.0])
    assert packed.tolist() == [0xF0]
    assert absmax.tolist() == [1.0]


def test_table_values_keep_their_codes():
    assert codes_of(NF4_CODE) == list(range(16))
    assert codes_of(CODES["fp4"], "fp4") == [*range(8), 0, *range(9, 16)]


def test_a_value_on_a_threshold_takes_the_lower_code():
    above = np.nextafter(NF4_THRESHOLDS, np.float32(2))
    assert codes_of([*NF4_THRESHOLDS, 1.0])[:15] == list(range(15))
    assert codes_of([*above, 1.0])[:15] == list(range(1, 16))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_a_block_of_zeros_is_all_code_0_with_absmax_0(quant_type):
    packed, absmax = quantize([0.0, -0.0] * 48, quant_type)
    assert set(packed.tolist()) == {0} and absmax.tolist() == [0, 0]
    assert not four_bit.dequantize_4bit(packed, absmax, quant_type, 64, 96).any()


def test_a_zero_in_a_block_that_is_not_zero_is_exactly_zero():
    assert codes_of([0.0, 5.0])[0] == 7
    assert codes_of([-0.0, 5.0], "fp4")[0] == 0


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_a_short_last_block_is_quantized_like_one_padded_with_zeros(quant_type):
    values = np.random.default_rng(1).standard_normal(64 + 13)
    packed, absmax = quantize(values, quant_type)
    whole_packed, whole_absmax = quantize(np.append(values, np.zeros(51)), quant_type)
    assert packed.tolist() == whole_packed.tolist()[: packed.size]
    assert absmax.tolist() == whole_absmax.tolist()


def test_an_odd_count_is_padded_with_the_code_of_zero():
    assert quantize([1.0])[0].tolist() == [0xF7]
    assert quantize([1.0], "fp4")[0].tolist() == [0x30]
    assert quantize([0.0])[0].tolist() == [0x00]  # where zeros are code 0, so is the padding


def test_nan_has_code_0_and_does_not_count_for_absmax():
    packed, absmax = quantize([np.nan, 2.0, -1.0, 1.0])
    assert absmax.tolist() == [2.0]
    assert four_bit.unpack_codes(packed, 2).tolist() == [0, 15]


def test_signaling_nan_does_not_count_for_absmax_either():
    signaling = np.array([0x7F800001, 0xFF800001], np.uint32).view(np.float32)
    _, absmax = quantize([3.0, *signaling, 2.0])
    assert absmax.tolist() == [3.0]


def test_a_whole_block_of_nan_has_the_lowest_float_as_absmax_a_short_one_zero():
    packed, absmax = quantize([np.nan] * 96)
    assert absmax.tolist() == [LOWEST, 0]
    assert set(packed.tolist()) == {0}


@pytest.mark.parametrize("quant_type,zero", [("nf4", 7), ("fp4", 0)])
def test_beside_an_infinity_finite_values_are_zero_and_infinities_code_0(quant_type, zero):
    packed, absmax = quantize([np.inf, -np.inf, 5.0, -5.0], quant_type)
    assert absmax.tolist() == [np.inf]
    assert four_bit.unpack_codes(packed, 4).tolist() == [0, 0, zero, zero]


def test_subnormals_are_zero():
    tiny = 2.0**-127
    assert quantize([tiny, -tiny])[1].tolist() == [0]
    assert codes_of([2.0**-126, tiny, -tiny]) == [15, 7, 7]
    assert codes_of([1.0, -tiny], "fp4") == [3, 0]  # no sign


def test_absmax_beyond_2_to_126_has_a_reciprocal_of_zero():
    assert codes_of([2.0**127, 2.0**127]) == [7, 7]
    assert codes_of([2.0**126, 2.0**126]) == [15, 15]


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 700),
    st.sampled_from([32, 64, 128]),
    st.sampled_from(QUANT_TYPES),
)
def test_no_code_is_nearer_than_the_one_chosen(seed, size, blocksize, quant_type):
    """In float64, up to what three float32 roundings and CUDA's decimal thresholds may shift."""
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    packed, absmax = four_bit.quantize_4bit(values, quant_type, blocksize)
    scale = np.repeat(absmax.astype(np.float64), blocksize)[:size]
    table = CODES[quant_type].astype(np.float64)
    chosen = table[four_bit.unpack_codes(packed, size)] * scale
    nearest = np.abs(table[None] * scale[:, None] - values[:, None].astype(np.float64)).min(axis=1)
    assert (np.abs(chosen - values) <= nearest + 2e-6 * scale).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocksize", [64, 256])
def test_bitsandbytes_reads_what_the_reference_writes(dtype, quant_type, blocksize):
    """Its CPU dequantization multiplies and rounds as the reference does; whole blocks only."""
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    torch_dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    weight = (torch.randn(24, 512, generator=torch.Generator().manual_seed(3)) * 0.05).to(
        torch_dtype
    )
    wide = weight.float().numpy().reshape(-1)
    packed, absmax = four_bit.quantize_4bit(wide, quant_type, blocksize)
    state = functional.QuantState(
        absmax=torch.from_numpy(absmax),
        shape=weight.shape,
        code=torch.from_numpy(CODES[quant_type].copy()),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=torch_dtype,
    )
    theirs = functional.dequantize_4bit(torch.from_numpy(packed).reshape(-1, 1), state)
    ours = four_bit.dequantize_4bit(packed, absmax, quant_type, blocksize, wide.size)
    rounded = floats.widen(floats.narrow(ours, dtype), dtype)
    np.testing.assert_array_equal(rounded, theirs.float().numpy().reshape(-1))


def test_bitsandbytes_on_the_cpu_gives_the_same_nf4_bytes_for_ordinary_weights():
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours, absmax = four_bit.quantize_4bit(weight.float().numpy().reshape(-1), "nf4", 64)
    assert ours.tobytes() == packed.numpy().tobytes()
    assert absmax.tobytes() == state.absmax.numpy().tobytes()
