"""The reference and the backends against bytes that bitsandbytes' CUDA kernels wrote."""

from __future__ import annotations

import numpy as np
import pytest

from qtool.backends import decision_tables
from qtool.backends.cpu import CpuBackend
from qtool.backends.cuda import CudaBackend
from qtool.formats import double_quant, floats, four_bit
from qtool.formats.codebooks import NF4_THRESHOLDS
from tests.backends.golden import read_golden
from tests.backends.reference import (
    ReferenceBackend,
    assert_same_bits,
    dequantize_4bit,
    quantize_4bit,
    quantize_absmax,
    quantize_int8,
)

# FP4's magnitude codes from 0 to 1; neighbours in this list are neighbours in value.
FP4_ORDER = [0, 1, 6, 7, 4, 5, 2, 3]


@pytest.fixture(scope="module")
def golden(test_data):
    cases = read_golden(test_data)
    assert len(cases) == 67
    return cases


@pytest.fixture(
    params=[
        pytest.param(ReferenceBackend, id="reference"),
        pytest.param(CpuBackend, id="cpu"),
        pytest.param(CudaBackend, id="cuda", marks=pytest.mark.gpu),
    ]
)
def backend(request):
    return request.param()


def test_nf4_bytes_from_16_bit_sources_are_bitsandbytes_own(golden, backend):
    for case in (case for case in golden if case.dtype != "F32"):
        packed, absmax, _ = quantize_4bit(backend, case.values, case.dtype, "nf4", case.blocksize)
        assert_same_bits(packed, case.of("nf4.packed"), f"packed of case {case.number}")
        assert_same_bits(absmax, case.of("nf4.absmax"), f"absmax of case {case.number}")


def test_nf4_from_float32_differs_only_within_an_ulp_of_a_threshold(golden, backend):
    num_different = num_codes = 0
    for case in (case for case in golden if case.dtype == "F32"):
        packed, absmax, _ = quantize_4bit(backend, case.values, "F32", "nf4", case.blocksize)
        assert_same_bits(absmax, case.of("nf4.absmax"), f"absmax of case {case.number}")
        ours, theirs = (
            four_bit.unpack_codes(p, 2 * p.size) for p in (packed, case.of("nf4.packed"))
        )
        scaled, _ = four_bit.scale_blocks(case.values, case.blocksize)
        for where in np.flatnonzero(ours != theirs):
            assert abs(int(ours[where]) - int(theirs[where])) == 1
            threshold = NF4_THRESHOLDS[min(ours[where], theirs[where])]
            assert abs(scaled[where] - threshold) <= np.spacing(abs(threshold))
        num_different += np.count_nonzero(ours != theirs)
        num_codes += ours.size
    print(f"NF4 fp32: {num_different} of {num_codes} codes differ")
    assert num_different <= 4


def test_fp4_bytes_from_16_bit_sources_are_bitsandbytes_own(golden, backend):
    for case in (case for case in golden if case.dtype != "F32"):
        packed, absmax, _ = quantize_4bit(backend, case.values, case.dtype, "fp4", case.blocksize)
        assert_same_bits(packed, case.of("fp4.packed"), f"packed of case {case.number}")
        assert_same_bits(absmax, case.of("fp4.absmax"), f"absmax of case {case.number}")


def test_fp4_from_float32_differs_in_under_5e_4_of_codes_by_a_neighbour(golden, backend):
    num_different = num_codes = 0
    for case in (case for case in golden if case.dtype == "F32"):
        packed, absmax, _ = quantize_4bit(backend, case.values, case.dtype, "fp4", case.blocksize)
        assert_same_bits(absmax, case.of("fp4.absmax"), f"absmax of case {case.number}")
        ours, theirs = (
            four_bit.unpack_codes(p, 2 * p.size) for p in (packed, case.of("fp4.packed"))
        )
        for a, b in zip(ours[ours != theirs], theirs[ours != theirs], strict=True):
            rank_a, rank_b = FP4_ORDER.index(a & 7), FP4_ORDER.index(b & 7)
            assert a & 8 == b & 8 and abs(rank_a - rank_b) == 1
        num_different += np.count_nonzero(ours != theirs)
        num_codes += ours.size
    print(f"FP4: {num_different} of {num_codes} codes differ")
    assert num_different < 5e-4 * num_codes


def test_int8_codes_and_row_statistics_are_bitsandbytes_own(golden, backend):
    cases = [case for case in golden if "int8.codes" in case.tensors]
    assert cases
    for case in cases:
        codes, scb, _ = quantize_int8(backend, case.tensors["input"], case.dtype)
        assert_same_bits(codes, case.of("int8.codes"), f"codes of case {case.number}")
        assert_same_bits(scb, case.of("int8.scb"), f"SCB of case {case.number}")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_nested_codes_at_the_same_offset_are_bitsandbytes_own(golden, quant_type):
    from qtool.backends import cpu_kernels

    for case in golden:
        absmax, offset = case.of(f"{quant_type}.absmax"), case.of(f"{quant_type}.nested_offset")[0]
        scaled, by_reference = four_bit.scale_blocks(absmax - offset, 256)
        codes, nested = np.empty(absmax.size, np.uint8), np.empty_like(by_reference)
        guesses, steps = decision_tables.dynamic_guesses(), decision_tables.dynamic_steps()
        cpu_kernels.quantize_absmax(absmax, offset, guesses, steps, codes, nested)

        expected_codes = case.of(f"{quant_type}.nested_codes")
        expected_nested = case.of(f"{quant_type}.nested_absmax")
        reference_codes = double_quant.dynamic_codes(scaled)[: absmax.size]
        assert_same_bits(reference_codes, expected_codes, f"reference, case {case.number}")
        assert_same_bits(codes, expected_codes, f"CPU, case {case.number}")
        assert_same_bits(by_reference, expected_nested, f"reference, case {case.number}")
        assert_same_bits(nested, expected_nested, f"CPU, case {case.number}")


def test_the_offset_is_the_mean_up_to_the_last_bits_of_float32(golden, backend):
    for case in golden:
        _, _, offset = quantize_absmax(backend, case.of("nf4.absmax"))
        np.testing.assert_allclose(offset, case.of("nf4.nested_offset")[0], rtol=1.3e-7)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantized_values_are_bitsandbytes_own(golden, backend, quant_type):
    """Equal as numbers: CUDA's FP4 tree gives -0 for code 8, the stored table has +0."""
    for case in golden:
        packed, stored = case.of(f"{quant_type}.packed"), case.of(f"{quant_type}.absmax")
        nested = np.empty_like(stored)
        backend.dequantize_absmax(
            case.of(f"{quant_type}.nested_codes"),
            case.of(f"{quant_type}.nested_absmax"),
            case.of(f"{quant_type}.nested_offset")[0],
            nested,
        )
        for absmax, name in ((stored, "dequantized"), (nested, "dequantized_dq")):
            values = dequantize_4bit(
                backend, packed, absmax, quant_type, case.blocksize, case.dtype, case.values.size
            )
            np.testing.assert_array_equal(
                floats.widen(values, case.dtype),
                floats.widen(case.of(f"{quant_type}.{name}"), case.dtype),
                err_msg=f"{name} of case {case.number}",
            )
