"""Codes of optimizer states: the nearest ones, found by slots as by search."""

from __future__ import annotations

import numpy as np
import pytest

from qtool.formats.codebooks import dynamic_map
from qtool.formats.optimizer_states import (
    NUM_SLOTS,
    SLOT_SCALE,
    ZERO_CODE,
    magnitude_thresholds,
    nearest_codes,
    slot_table,
)

SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def next_to_thresholds(signed: bool) -> np.ndarray:
    """Every threshold, with the three floats on both sides."""
    bits = magnitude_thresholds(signed).view(np.int32)[:, None] + np.arange(-3, 4, dtype=np.int32)
    return bits.astype(np.int32).ravel().view(np.float32)


def distances(values: np.ndarray, signed: bool) -> np.ndarray:
    return np.abs(values.astype(np.float64)[:, None] - dynamic_map(signed).astype(np.float64))


@SIGNS
def test_codes_are_the_nearest_of_all(signed: bool) -> None:
    random = np.random.default_rng(0)
    values = np.concatenate(
        [
            next_to_thresholds(signed),
            10.0 ** random.uniform(-8, 0, 20_000),
            random.uniform(0, 1, 20_000),
            [0.0, 1.0],
        ]
    ).astype(np.float32)
    if signed:
        values = np.concatenate([values, -values])
    codes = nearest_codes(values, signed)
    found = distances(values, signed)
    assert np.all(found[np.arange(values.size), codes] == found.min(1))


def test_halfway_takes_the_code_nearer_to_zero() -> None:
    values = dynamic_map().astype(np.float64)
    middles = (values[1:] + values[:-1]) / 2
    exact = middles[middles == middles.astype(np.float32)].astype(np.float32)
    assert exact.size > 50
    codes = nearest_codes(exact, signed=True).astype(int)
    towards_zero = np.abs(dynamic_map()[codes]) < np.abs(exact)
    assert np.all(towards_zero)


def test_minus_one_and_zero() -> None:
    codes = nearest_codes(np.array([-1, 1, 0, -0.0, 1e-8, -1e-8], np.float32), signed=True)
    assert codes.tolist() == [0, 255, ZERO_CODE, ZERO_CODE, ZERO_CODE, ZERO_CODE]
    assert nearest_codes(np.array([0, 1, 1e-8], np.float32), signed=False).tolist() == [0, 255, 0]


@SIGNS
def test_slots_give_the_same_codes(signed: bool) -> None:
    """At both ends of every slot, around every threshold and at random; subnormals included."""
    ends = np.arange(NUM_SLOTS, dtype=np.uint32)[:, None] << np.uint32(16)
    near = (np.abs(next_to_thresholds(signed)) * SLOT_SCALE).view(np.uint32)
    anywhere = np.random.default_rng(1).integers(0, NUM_SLOTS << 16, 200_000, dtype=np.uint32)
    bits = np.concatenate([(ends | np.uint32(0xFFFF)).ravel(), ends.ravel(), near, anywhere])
    codes = (slot_table(signed)[bits >> np.uint32(16)] + bits) >> np.uint32(16)
    assert np.array_equal(codes, nearest_codes(bits.view(np.float32) / SLOT_SCALE, signed))


def test_two_thresholds_in_a_slot_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    close = np.array([0.5, 0.5001, *np.linspace(0.6, 0.99, 126)], np.float32)
    monkeypatch.setattr("qtool.formats.optimizer_states.magnitude_thresholds", lambda signed: close)
    slot_table.cache_clear()
    try:
        with pytest.raises(ValueError, match="share a slot"):
            slot_table(True)
    finally:
        slot_table.cache_clear()
