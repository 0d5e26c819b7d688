"""The reciprocal is the correctly rounded one but for a unit, where the table says so."""

from __future__ import annotations

import numpy as np
import pytest

from qtool.formats.reciprocal import CORRECTIONS, reciprocal

SHORT = (1 + np.arange(1024) / 1024).astype(np.float32)


@pytest.mark.parametrize("exponent", [-24, -3, 0, 15, 120])
def test_short_significands_are_corrected_whatever_their_exponent(exponent):
    values = np.ldexp(SHORT, exponent).astype(np.float32)
    units = reciprocal(values).view(np.int32) - (np.float32(1) / values).view(np.int32)
    np.testing.assert_array_equal(units, CORRECTIONS)
    assert (np.count_nonzero(units == 1), np.count_nonzero(units == -1)) == (90, 40)


def test_it_is_within_a_unit_of_the_exact_value():
    exact = 1 / SHORT.astype(np.float64)
    found = reciprocal(SHORT)
    assert np.all(np.abs(found - exact) < np.spacing(found))


def test_all_others_are_correctly_rounded():
    values = np.nextafter(SHORT[1:], np.float32(np.inf))
    np.testing.assert_array_equal(reciprocal(values), np.float32(1) / values)


def test_the_ends_of_the_range():
    values = np.array([0, np.inf, np.nan, 2.0**-126, 2.0**126, 1.5 * 2.0**126], np.float32)
    np.testing.assert_array_equal(reciprocal(values), [np.inf, 0, np.nan, 2.0**126, 2.0**-126, 0])
