"""Medians, deviations, shares and ratios, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from qtool.bench.records import Moved, make_row, median_absolute_deviation, time_ratio


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([5.0], 0.0),
        ([1.0, 2.0, 4.0], 1.0),  # distances 1 0 2
        ([1.0, 2.0, 4.0, 100.0], 1.5),  # median 3: 2 1 1 97
    ],
)
def test_the_deviation_is_the_median_distance_from_the_median(samples, expected):
    assert median_absolute_deviation(samples) == expected


def row(engine, samples, limit_seconds=0.5, op="quantize nf4"):
    moved = Moved(input_bytes=300, output_bytes=100)
    return make_row(op, "2x3", "bf16", engine, samples, moved, limit_seconds=limit_seconds)


def test_a_row_has_the_rate_of_all_bytes_and_the_share_of_the_limit_s_time():
    found = row("qtool", [3.0, 1.0, 2.0])
    assert (found.seconds_median, found.seconds_mad, found.n) == (2.0, 1.0, 3)
    assert (found.bytes, found.input_bytes, found.bytes_per_s) == (400, 300, 200.0)
    assert found.share_of_limit == 0.25


def test_ratios_compare_the_same_operation_with_qtool():
    qtool, rival = row("qtool", [2.0]), row("bitsandbytes", [7.0])
    other = row("bitsandbytes", [9.0], op="quantize fp4")
    rows = [qtool, rival, other]
    assert time_ratio(rival, rows) == 3.5
    assert time_ratio(qtool, rows) == 1
    assert time_ratio(other, rows) is None
