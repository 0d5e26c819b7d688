"""Widening, rounding and flushing, against torch and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from qtool.formats import floats

DTYPES = ["BF16", "F16", "F32"]


def test_every_bfloat16_survives_widening_and_rounding_back():
    bits = np.arange(1 << 16).astype(np.uint16)
    wide = floats.widen(bits, "BF16")
    back = floats.narrow(wide, "BF16")
    numbers = ~np.isnan(wide)
    assert (back[numbers] == bits[numbers]).all()
    assert np.isnan(floats.widen(back[~numbers], "BF16")).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_torchs(dtype):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    ties = (rng.integers(0, 1 << 16, 5000, dtype=np.uint32) << 16) | 0x8000
    wide = np.concatenate([rng.integers(0, 1 << 32, 50_000, dtype=np.uint32), ties])
    wide = wide.view(np.float32)
    name = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    expected = torch.from_numpy(wide).to(name).float().numpy()
    np.testing.assert_array_equal(floats.widen(floats.narrow(wide, dtype), dtype), expected)


def test_only_subnormals_are_flushed_and_keep_their_sign():
    values = np.array([2**-126, -(2**-126), 2**-127, -(2**-149), 0.0, np.inf, np.nan], np.float32)
    flushed = floats.flush_subnormals(values)
    np.testing.assert_array_equal(flushed, [2**-126, -(2**-126), 0, 0, 0, np.inf, np.nan])
    assert np.signbit(flushed).tolist() == [False, True, False, True, False, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_values_are_counted(dtype):
    wide = np.array([1, np.nan, -np.inf, 0, np.inf, 3], np.float32)
    assert floats.count_nonfinite(floats.narrow(wide, dtype), dtype) == 3
