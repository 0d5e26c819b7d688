"""Numba's update kernels against the reference, bit by bit."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import torch

from qtool.backends.cpu import BIT_DTYPES
from qtool.backends.cpu_optimizer import update_kernel
from qtool.optim.reference import update
from qtool.optim.rules import Hyperparameters, scalars_of
from qtool.optim.states import DTYPES
from tests.optim.steps import assert_equal_bits, blocks, moments, odd_gradient, random_state

SETTINGS = Hyperparameters(1e-3, 0.9, 0.999, 1e-8, 0.01)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", ["adam", "lion", "momentum"])
def test_same_bits_as_the_reference(algorithm: str, dtype: torch.dtype, bits: int) -> None:
    state_type = np.uint8 if bits == 8 else np.float32
    kernel = update_kernel(algorithm, BIT_DTYPES[DTYPES[dtype]], state_type)
    scalars = scalars_of(algorithm, SETTINGS, 4)
    for count in (1, 256, 300, 5000):
        values = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
        gradient = odd_gradient(count, dtype, count)
        state = random_state(count, algorithm, bits, count)
        expected, new = update(algorithm, scalars, values, gradient, moments(state))
        addresses = [
            state[name].data_ptr() if name in state else 0
            for name in ("state1", "state2", "absmax1", "absmax2")
        ]
        packed = np.array(astuple(scalars), np.float32)
        tensors = values.data_ptr(), gradient.data_ptr(), *addresses
        middle = blocks(count) // 2
        for first, last in ((0, middle), (middle, blocks(count))):
            kernel(*tensors, count, packed, first, last)
        assert_equal_bits(values, expected, f"{count} values")
        for found, wanted in zip(moments(state), new, strict=True):
            assert_equal_bits(found.values, wanted.values, f"states of {count}")
            if found.absmax is not None and wanted.absmax is not None:
                assert_equal_bits(found.absmax, wanted.absmax, f"absmax of {count}")
