"""What a measurement says: rows, limits, and the two statistics that every row has."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qtool.errors import QtoolError

Engine = Literal[
    "limit",
    "qtool",
    "bitsandbytes",
    "torch",
    "transformers",
    "transformers+bitsandbytes",
    "peft+bitsandbytes",
]


@dataclass(frozen=True, slots=True)
class Moved:
    """The bytes that an operation reads and writes."""

    input_bytes: int
    output_bytes: int

    @property
    def num_bytes(self) -> int:
        """Both."""
        return self.input_bytes + self.output_bytes


@dataclass(frozen=True, slots=True)
class Row:
    """One engine at one operation.

    `bytes` are what the operation has to move at least, each input once and each output once;
    `input_bytes` are the inputs' part.
    `share_of_limit` is 1 where it is as fast as the limit that was measured beside it. A product
    has the `tokens` that it multiplies at a time, and the `relative_error` of its result in the
    Frobenius norm against float64, where it was compared.
    """

    op: str
    shape: str
    dtype: str
    engine: Engine
    seconds_median: float
    seconds_mad: float
    n: int
    bytes: int
    input_bytes: int
    bytes_per_s: float
    share_of_limit: float
    tokens: int | None = None
    relative_error: float | None = None


@dataclass(frozen=True, slots=True)
class Limit:
    """What the machine does at best with `bytes` bytes, read and written ones added up."""

    bytes: int
    seconds_median: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class BenchResult:
    """A whole measurement.

    `details` are the command's own fields of the JSON document, beside those that all have.
    `interruption` is what ended it early, after some of its rows.
    """

    device: str
    host: Mapping[str, Any]
    versions: Mapping[str, str]
    limits: Mapping[str, Limit]
    rows: tuple[Row, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    interruption: QtoolError | None = None


def make_row(
    op: str,
    shape: str,
    dtype: str,
    engine: Engine,
    samples: Sequence[float],
    moved: Moved,
    *,
    limit_seconds: float,
) -> Row:
    """The row of `samples` in seconds; `limit_seconds` is what the limit takes for `moved`."""
    median = statistics.median(samples)
    return Row(
        op=op,
        shape=shape,
        dtype=dtype,
        engine=engine,
        seconds_median=median,
        seconds_mad=median_absolute_deviation(samples),
        n=len(samples),
        bytes=moved.num_bytes,
        input_bytes=moved.input_bytes,
        bytes_per_s=moved.num_bytes / median,
        share_of_limit=limit_seconds / median,
    )


def make_limit(row: Row) -> Limit:
    """The limit that a row of engine "limit" stands for."""
    return Limit(row.bytes, row.seconds_median, row.bytes_per_s)


def median_absolute_deviation(samples: Sequence[float]) -> float:
    """The median distance from the median, which single outliers do not move."""
    median = statistics.median(samples)
    return statistics.median(abs(sample - median) for sample in samples)


def time_ratio(row: Row, rows: Iterable[Row]) -> float | None:
    """How many times as long as qtool `row` takes at the same thing; None without a qtool row."""
    same = (row.op, row.shape, row.dtype, row.tokens)
    for other in rows:
        found = (other.op, other.shape, other.dtype, other.tokens)
        if other.engine == "qtool" and found == same:
            return row.seconds_median / other.seconds_median
    return None
