"""Numbers as people read them."""

from __future__ import annotations

import pytest

from qtool.report.units import GIB, KIB, MIB, format_bytes, format_done


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1.00 KiB"),
        (MIB - 1, "1,024.00 KiB"),
        (3 * MIB + MIB // 4, "3.25 MiB"),
        (1500 * GIB, "1,500.00 GiB"),
    ],
)
def test_bytes_have_the_unit_that_keeps_their_digits(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("num_bytes", "beside", "text"),
    [
        (512 * MIB, 2 * GIB, "0.50 GiB"),
        (3 * GIB, 7 * MIB, "3,072.00 MiB"),
        (2 * KIB, 100, "2048 B"),
        (0, GIB, "0.00 GiB"),
    ],
)
def test_or_that_of_what_they_stand_beside(num_bytes: int, beside: int, text: str) -> None:
    assert format_bytes(num_bytes, beside=beside) == text


@pytest.mark.parametrize(
    ("num_bytes", "total_bytes", "text"),
    [(512 * MIB, 2 * GIB, "0.50/2.00 GiB"), (0, 0, "0/0 B"), (100, 1000, "100/1000 B")],
)
def test_a_part_is_in_the_unit_of_the_whole(num_bytes: int, total_bytes: int, text: str) -> None:
    assert format_done(num_bytes, total_bytes) == text
