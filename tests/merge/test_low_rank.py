"""W + s L R: the order of its sums, and its one rounding."""

from __future__ import annotations

import numpy as np
import pytest

from qtool.backends.low_rank import LowRankUpdate, add_low_rank, add_squares
from qtool.formats.floats import narrow, widen
from tests.merge.adapters import round_once

DTYPES = ("BF16", "F16", "F32")


def random_update(rows, columns, rank, seed=0):
    rng = np.random.default_rng(seed)
    left = rng.normal(0, 0.1, (rows, rank)).astype(np.float32)
    right = rng.normal(0, 0.1, (rank, columns)).astype(np.float32).astype(np.float64)
    return LowRankUpdate(left, right, 0.37)


def random_base(rows, columns, dtype, seed=1):
    values = np.random.default_rng(seed).normal(0, 0.02, (rows, columns)).astype(np.float32)
    return narrow(values, dtype)


def sum_in_order(base, dtype, update):
    """Product after product, as the rank counts."""
    total = np.zeros(base.shape)
    for k in range(update.left.shape[1]):
        total = total + update.left[:, k : k + 1].astype(np.float64) * update.right[k]
    floats = widen(base.reshape(-1), dtype).reshape(base.shape).astype(np.float64)
    return floats + update.scale * total


@pytest.mark.parametrize("rank", [1, 3, 4, 8, 17])
@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_sum_in_float64_rounded_once(dtype, to, rank):
    base, update = random_base(13, 531, dtype), random_update(13, 531, rank)
    found = add_low_rank(base, dtype, update, to)
    expected = round_once(sum_in_order(base, dtype, update), to)
    assert np.array_equal(widen(found, to).astype(np.float64), expected)


def test_a_sum_just_beside_a_tie_is_not_rounded_twice():
    """Float32 in between would make a tie of it, and round that to even."""
    base = np.full((1, 4), 0x3F80, np.uint16)  # 1.0
    tie, beside = 2.0**-8, 2.0**-50
    deltas = np.array([[tie, tie + beside, 3 * tie, 3 * tie - beside]])
    found = add_low_rank(base, "BF16", LowRankUpdate(np.ones((1, 1), "f4"), deltas, 1.0), "BF16")
    assert found.tolist() == [[0x3F80, 0x3F81, 0x3F82, 0x3F81]]


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (np.nan, 0x7FC0),
        (np.inf, 0x7F80),
        (-np.inf, 0xFF80),
        (1e300, 0x7F80),
        (-3.3961775292304957e38, 0xFF80),  # beyond the last tie before infinity
        (3.3e38, 0x7F78),
        (2.0**-133, 0x0001),
        (1.4e-41, 0x0000),
        (-1e-300, 0x8000),
    ],
)
def test_numbers_at_the_ends_of_the_range(value, bits):
    base = np.full((1, 1), 0x8000, np.uint16)  # -0, to which nothing is lost
    update = LowRankUpdate(np.ones((1, 1), np.float32), np.array([[value]]), 1.0)
    [[found]] = add_low_rank(base, "BF16", update, "BF16")
    assert found == bits or (np.isnan(value) and np.isnan(widen(np.array([found]), "BF16")))


def test_parts_of_a_matrix_are_parts_of_the_result():
    base, update = random_base(40, 700, "BF16"), random_update(40, 700, 6)
    whole = add_low_rank(base, "BF16", update, "BF16")
    rows, columns = slice(7, 19), slice(33, 500)
    part = add_low_rank(base[rows, columns], "BF16", update.of(rows, columns), "BF16")
    assert np.array_equal(part, whole[rows, columns])


@pytest.mark.parametrize("by_row", [True, False])
def test_factors_scale_the_sum_before_it_is_rounded(by_row):
    base, update = random_base(9, 300, "BF16"), random_update(9, 300, 5)
    factor = np.random.default_rng(3).normal(1, 0.3, 9 if by_row else 300)
    scaled = LowRankUpdate(
        update.left,
        update.right,
        update.scale,
        factor if by_row else None,
        None if by_row else factor,
    )
    exact = sum_in_order(base, "BF16", update) * (factor[:, None] if by_row else factor)
    found = widen(add_low_rank(base, "BF16", scaled, "BF16"), "BF16").astype(np.float64)
    assert np.array_equal(found, round_once(exact, "BF16"))


@pytest.mark.parametrize("by_row", [True, False])
def test_squares_add_up_and_do_not_depend_on_the_cut(by_row):
    base, update = random_base(50, 600, "BF16"), random_update(50, 600, 5)
    exact = (sum_in_order(base, "BF16", update) ** 2).sum(axis=1 if by_row else 0)
    whole, cut = np.zeros(exact.shape), np.zeros(exact.shape)
    add_squares(base, "BF16", update, by_row=by_row, sums=whole)
    for start in range(0, 50, 7):
        rows = slice(start, min(start + 7, 50))
        part = cut[rows] if by_row else cut
        columns = slice(0, 600)
        add_squares(base[rows], "BF16", update.of(rows, columns), by_row=by_row, sums=part)
    assert np.array_equal(whole, cut)
    assert np.allclose(whole, exact, rtol=1e-13)
