"""How `qtool bench` looks: tables of times, rates and shares; the JSON document as a file too."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qtool.bench.records import BenchResult, Row, time_ratio
from qtool.errors import QtoolError
from qtool.report.estimate import new_table
from qtool.report.output import JSON_SCHEMA_VERSION, Output
from qtool.report.units import format_bytes

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

ENGINE_NAMES: Final = {"limit": "the limit", "transformers+bitsandbytes": "transformers+bnb"}
UNITS: Final = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
KERNEL_FOOTNOTE: Final = (
    "time: median ± median absolute deviation of {n} samples; GB/s: 10^9 bytes read and written "
    "per second; of limit: share of the copy's rate; vs qtool: time over qtool's"
)

QUANTIZE_FOOTNOTE: Final = (
    "time: median ± median absolute deviation of {n} runs; GB/s: 10^9 bytes read and written per "
    "second; of limit: the slower one of raw read and raw write, over the time; vs qtool: time "
    "over qtool's; source: {source}; output: {output}"
)


def check_output(path: Path | None) -> None:
    """Refuse now what could not be written after minutes of measuring.

    Raises:
        QtoolError: usage, if `path` is a folder or its folder is missing or not writable.
    """
    if path is None:
        return
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise QtoolError(
            f"--output {path}: this file cannot be written",
            kind="usage",
            hint="name a file in a folder that exists and that you may write to",
        )


def report_kernels(output: Output, result: BenchResult, path: Path | None) -> None:
    """The table, the cost of double quantization, the document."""
    _warn(output, result)
    output.answer(*_head(result), *_tables(result.rows))
    for ratio in result.details["double_quant_ratios"]:
        if ratio["engine"] == "qtool":
            output.answer(
                f"{ratio['op']} takes {ratio['seconds_ratio']:.2f}x the time of "
                f"{ratio['op'].removesuffix('-dq')} ({ratio['dtype']}, {ratio['shape']})"
            )
    output.answer(_dim(KERNEL_FOOTNOTE.format(n=result.rows[0].n)))
    _finish(output, result, path)


def report_quantize(output: Output, result: BenchResult, path: Path | None) -> None:
    """The table, what it means, memory, the document."""
    _warn(output, result)
    output.answer(*_head(result), *_tables(result.rows), "")
    for line in _quantize_lines(result):
        output.answer(line)
    n = next(row.n for row in result.rows if row.engine == "qtool")
    output.answer(_dim(QUANTIZE_FOOTNOTE.format(n=n, **result.details["storage"])))
    _finish(output, result, path)


def _quantize_lines(result: BenchResult) -> Iterable[str]:
    details, runs = result.details, result.details["runs"]
    wall_s = statistics.median(run["wall_seconds"] for run in runs)
    inside_s = statistics.median(run["seconds"] for run in runs)
    limit_s = details["limit_seconds"]
    yield (
        f"{format_bytes(details['input_bytes'])} → {format_bytes(details['output_bytes'])} in "
        f"{wall_s:.2f} s from start to exit: {details['times_limit']:.2f}x the limit of "
        f"{limit_s:.2f} s, or {wall_s - limit_s:.2f} s above it; {inside_s:.2f} s without the "
        "start of the process"
    )
    host = max(run["peak_host_bytes"] for run in runs)
    outside = max(run["memory"]["total_bytes"] for run in runs)
    device = max(run["peak_device_bytes"] for run in runs)
    yield (
        f"memory: {format_bytes(host)} anonymous and page-locked by its own count, "
        f"{format_bytes(outside)} RssAnon + RssShmem from outside"
        + (f", {format_bytes(device)} of the GPU" if device else "")
    )


# -- the document ---------------------------------------------------------------------------------


def bench_document(result: BenchResult) -> dict[str, Any]:
    """The fields of the JSON document."""
    return {
        "argv": sys.argv[1:],
        "device": result.device,
        "host": dict(result.host),
        "versions": dict(result.versions),
        "limits": {name: asdict(limit) for name, limit in result.limits.items()},
        "rows": [asdict(row) for row in result.rows],
        **result.details,
    }


def _finish(output: Output, result: BenchResult, path: Path | None) -> None:
    fields = bench_document(result)
    output.document(fields)
    if path is not None:
        head = {"schema": JSON_SCHEMA_VERSION, "command": output.command}
        document = {**head, **fields, "warnings": output.warnings}
        path.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        output.note(f"written to {path}")


def _warn(output: Output, result: BenchResult) -> None:
    for warning in result.warnings:
        output.warn(warning)


# -- the tables -----------------------------------------------------------------------------------


def _head(result: BenchResult) -> Iterable[Text]:
    from rich.text import Text

    yield Text(result.device, "bold")
    yield _dim(", ".join(f"{name} {version}" for name, version in result.versions.items()))


def _tables(rows: Sequence[Row]) -> Iterable[Any]:
    """One for each shape and dtype."""
    from rich.text import Text

    for shape, dtype in dict.fromkeys((row.shape, row.dtype) for row in rows):
        yield ""
        yield Text(f"{dtype}  {shape}", "bold cyan")
        yield _table([row for row in rows if (row.shape, row.dtype) == (shape, dtype)])


def _table(rows: Sequence[Row]) -> Table:
    table = new_table()
    table.add_column("operation", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    for name in ("time", "GB/s", "of limit", "vs qtool"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        ratio = time_ratio(row, rows)
        table.add_row(
            _op_text(row.op),
            ENGINE_NAMES.get(row.engine, row.engine),
            time_text(row.seconds_median, row.seconds_mad if row.n > 1 else None),
            f"{row.bytes_per_s / 1e9:,.{_digits(row.bytes_per_s / 1e9)}f}",
            f"{row.share_of_limit:.1%}" if row.engine != "limit" else "",
            f"{ratio:.2f}x" if ratio and row.engine != "qtool" else "",
            style="bold" if row.engine == "qtool" else None,
        )
    return table


def _op_text(op: str) -> str:
    """A part of an operation, such as "quantize nf4: load", stands indented below the whole."""
    _, colon, part = op.partition(": ")
    return f"  {part}" if colon else op


def time_text(median_s: float, deviation_s: float | None) -> str:
    """Both in the unit that suits the median: "138.2 ± 0.3 µs"; one sample has no deviation."""
    unit, scale = next((pair for pair in UNITS if median_s >= pair[1]), UNITS[-1])
    digits = _digits(median_s / scale)
    deviation = "" if deviation_s is None else f" ± {deviation_s / scale:,.{digits}f}"
    return f"{median_s / scale:,.{digits}f}{deviation} {unit}"


def _digits(value: float) -> int:
    """Decimal places that leave three or four digits."""
    return 0 if value >= 1000 else 1 if value >= 100 else 2


def _dim(text: str) -> Text:
    from rich.text import Text

    return Text(text, "dim")
