"""How products are sampled."""

from __future__ import annotations

import pytest
import torch

from qtool.bench.operations import PRODUCTS
from qtool.bench.products import LAUNCHES, MAX_LAUNCHES, ProductGroup

H200_MULTIPROCESSORS = 132


def launches(tokens, shape, num_multiprocessors=H200_MULTIPROCESSORS):
    group = ProductGroup(torch.device("cpu"), shape, "BF16", tokens, PRODUCTS[:1], False)
    return group.launches(num_multiprocessors)


@pytest.mark.parametrize(
    ("tokens", "shape", "expected"),
    [
        (8192, (28_672, 4096), 21),
        (8192, (8192, 28_672), 11),
        (8192, (4096, 4096), 145),
        (512, (4096, 4096), MAX_LAUNCHES),
        (1 << 20, (28_672, 8192), 1),
    ],
)
def test_long_products_are_sampled_until_the_clock_has_settled(tokens, shape, expected):
    assert launches(tokens, shape) == expected


def test_a_smaller_gpu_has_as_much_for_each_of_its_multiprocessors():
    assert launches(8192, (8192, 28_672), 24) == 2


@pytest.mark.parametrize("tokens", [1, 128])
def test_weights_of_short_products_are_more_than_caches_hold(tokens):
    rows, columns = shape = 1024, 1024
    assert launches(tokens, shape) >= LAUNCHES
    assert launches(tokens, shape) * rows * columns / 2 > 160 << 20  # and absmax
