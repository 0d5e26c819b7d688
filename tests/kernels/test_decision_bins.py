"""The bins that the CUDA kernels look codes up in give the codes of the reference."""

from __future__ import annotations

import numpy as np
import pytest

from cupy_kernels import decision_bins
from cupy_kernels.decision_bins import dynamic_slots, fp4_bins, make_bins, nf4_bins
from qtool.formats import four_bit
from qtool.formats.codebooks import (
    FP4_MAGNITUDE_CODES,
    FP4_THRESHOLDS,
    NF4_THRESHOLDS,
    dynamic_thresholds,
)
from qtool.formats.double_quant import dynamic_codes


def around(thresholds, rng, low, high):
    """Every threshold with its neighbours, zeros, both ends, NaN, and many values between."""
    near = [thresholds]
    for direction in (-np.inf, np.inf):
        near.append(np.nextafter(thresholds, np.float32(direction)))
    ends = np.array([low, high, 0.0, -0.0, np.nan, 2.0**-126], np.float32)
    between = rng.uniform(low, high, 200_000).astype(np.float32)
    return np.concatenate([*near, ends, between]).clip(low, high)


def codes_by_bins(values, bins):
    """What the kernel does: one fused multiply-add, five bits, a threshold and a code."""
    magic = 2.0**23 + bins.zero_bin
    position = (values.astype(np.float64) * bins.scale + magic).astype(np.float32)
    bits = np.where(np.isnan(values), np.uint32(0x7FFFFFFF), position.view(np.uint32))
    index = bits & 31
    with np.errstate(invalid="ignore"):
        above = values > np.asarray(bins.thresholds, np.float32)[index]
    return np.asarray(bins.codes)[index] + above


def test_nf4_bins_give_the_reference_codes():
    values = around(NF4_THRESHOLDS, np.random.default_rng(1), -1, 1)
    np.testing.assert_array_equal(codes_by_bins(values, nf4_bins()), four_bit.nf4_codes(values))


def test_fp4_bins_give_the_reference_codes():
    values = around(FP4_THRESHOLDS, np.random.default_rng(2), 0, 1)
    ranks = codes_by_bins(values, fp4_bins())
    np.testing.assert_array_equal(FP4_MAGNITUDE_CODES[ranks], four_bit.fp4_codes(values))


def test_dynamic_slots_give_the_reference_codes():
    rng = np.random.default_rng(3)
    small = (rng.standard_normal(200_000) * 10.0 ** rng.integers(-9, 0, 200_000)).clip(-1, 1)
    values = np.append(around(dynamic_thresholds(), rng, -1, 1), small.astype(np.float32))
    slots = dynamic_slots()
    num_slots = len(slots.codes) // 2
    bits = np.where(np.isnan(values), np.uint32(0x7FFFFFFF), values.view(np.uint32))
    index = ((bits & 0x7FFFFFFF) >> decision_bins.SLOT_SHIFT).astype(int) - slots.first_slot
    index = index.clip(0, num_slots - 1) + (bits >> 31) * num_slots
    with np.errstate(invalid="ignore"):
        above = values > np.asarray(slots.thresholds, np.float32)[index]
    found = np.asarray(slots.codes)[index] + above
    np.testing.assert_array_equal(found, dynamic_codes(values))


@pytest.mark.parametrize("scale", [4, 40])
def test_a_scale_that_does_not_separate_the_thresholds_is_refused(scale):
    with pytest.raises(ValueError, match="separate"):
        make_bins(NF4_THRESHOLDS, scale, zero_bin=scale)


def test_a_threshold_on_the_edge_of_a_bin_is_refused():
    with pytest.raises(ValueError, match="edge"):
        make_bins(np.array([0.25, 0.75 / 2], np.float32), scale=4, zero_bin=0)
