"""What launches of adapters take, and how adapter_inner.cu is specialised; without a GPU."""

from __future__ import annotations

import ctypes

import pytest

from cupy_kernels.adapter_inner import AdapterInner, InnerKind, specialise
from cupy_kernels.linear_few import (
    AdapterWeight,
    LinearFew,
    LinearKind,
    LinearWeight,
    NormWeight,
    _adapted_type,
    arguments_type,
)

KIND = InnerKind(4096, 48, "BF16")


def test_thread_blocks_have_whole_rows_of_a():
    for rows in (8, 48, 256, 264, 768):
        for columns in (64, 4096, 14336, 28672):
            defines = specialise(InnerKind(columns, rows, "BF16"), 3)
            assert rows % defines["ROWS"] == 0
            assert defines["TOKENS"] == 4
    assert specialise(InnerKind(4096, 16, "BF16"), 1)["ROWS"] == 1


@pytest.mark.parametrize(
    ("kind", "max_tokens", "message"),
    [
        (KIND, 0, "0 tokens, the kernel takes 1 to 8"),
        (KIND, 9, "9 tokens, the kernel takes 1 to 8"),
        (InnerKind(4096, 12, "BF16"), 1, "A is 12 x 4096, no multiples of 8"),
        (InnerKind(4100, 16, "BF16"), 1, "A is 16 x 4100, no multiples of 8"),
        (InnerKind(4096, 0, "BF16"), 1, "A is 0 x 4096"),
        (InnerKind(4096, 16, "BF16", "rms"), 1, "the norm is rms, its weight None"),
    ],
)
def test_inner_values_that_the_kernel_does_not_make(kind, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        AdapterInner(kind, a=1 << 20, scales=1 << 20, max_tokens=max_tokens)


def test_a_norm_that_the_kind_does_not_name():
    norm = NormWeight(1 << 20, 1e-5)
    with pytest.raises(ValueError, match="the norm is none"):
        AdapterInner(KIND, a=1 << 20, scales=1 << 20, max_tokens=1, norm=norm)


@pytest.mark.parametrize(
    ("adapted", "adapters", "message"),
    [
        (True, [], "0 adapters for 1 adapted layers"),
        (False, [AdapterWeight()], "1 adapters for 1 plain layers"),
        (True, [AdapterWeight(1 << 20, 12)], "rank 12 from 0, no multiples of 8"),
        (True, [AdapterWeight(1 << 20, 16, 4)], "rank 16 from 4, no multiples of 8"),
    ],
)
def test_products_that_the_kernel_does_not_take(adapted, adapters, message):
    kind = LinearKind("nf4", 4096, "BF16", adapted=adapted)
    with pytest.raises(ValueError, match=message):
        LinearFew(kind, [LinearWeight(256, 1 << 20)], max_tokens=1, adapters=adapters)


@pytest.mark.parametrize("num_weights", [1, 2, 3])
def test_arguments_have_no_gaps(num_weights):
    """So that every compiler lays `AdaptedArguments` out alike."""
    layers, adapted = arguments_type(num_weights), _adapted_type(num_weights)
    assert ctypes.sizeof(layers) % 8 == 0
    assert ctypes.sizeof(adapted) == ctypes.sizeof(layers) + 16 * num_weights + 24
