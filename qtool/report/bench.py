"""How `qtool bench` looks: tables of times, rates and shares; the JSON document as a file too."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qtool.bench.generate_records import GenerateBenchResult, GenerateRun, decode_ratio
from qtool.bench.records import BenchResult, Row, time_ratio
from qtool.errors import Option, QtoolError
from qtool.report.estimate import new_table
from qtool.report.output import JSON_SCHEMA_VERSION, Output
from qtool.report.units import format_bytes
from qtool.report.whole_files import write_whole

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

ENGINE_NAMES: Final = {
    "limit": "the limit",
    "transformers+bitsandbytes": "transformers+bnb",
}
UNITS: Final = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
KERNEL_FOOTNOTE: Final = (
    "time: median ± median absolute deviation of {n} samples; GB/s: 10^9 bytes read and written "
    "per second; of limit: share of the copy's rate"
)
PRODUCT_FOOTNOTE: Final = (
    "linear: activations times weights; torch: its own product, with weights that are not packed; "
    "error: relative, in the Frobenius norm, against float64; copy: of other bytes, for its rate"
)
GENERATE_FOOTNOTE: Final = (
    "mean ± standard deviation of {runs} after one that does not count, tokens of all sequences "
    "added up; of limit: bytes that a step must read, as fast as the device copies ({limit:,.0f} "
    "GB/s, read and written)"
)
OPTIMIZER_FOOTNOTE: Final = (
    "time of a step, host included: median ± median absolute deviation of {n}; GB/s: 10^9 bytes of "
    "parameters, gradients and states per second; of limit: share of a copy's rate ({limit:,.0f} "
    "GB/s); torch: its fused AdamW, with states of the parameters' dtype; all others with states "
    "in 8 bit"
)
MEMORY_FOOTNOTE: Final = "memory: the most that was allocated on the GPU, weights included"

QUANTIZE_FOOTNOTE: Final = (
    "time: median ± median absolute deviation of {runs}; GB/s: 10^9 bytes read and written per "
    "second; of limit: the slower one of raw read and raw write, over the time; source: {source}; "
    "output: {output}"
)
VS_QTOOL: Final = "; vs qtool: time over qtool's"
VS_QTOOL_DECODING: Final = "; vs qtool: time of decoding over qtool's"
BEYOND_THE_LIMIT: Final = (
    "; more than 100 %: a step reads and hardly writes, which can be faster than a copy"
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
            (Option("output", path), ": this file cannot be written"),
            kind="usage",
            hint="name a file in a folder that exists and that you may write to",
        )


def report_kernels(output: Output, result: BenchResult, path: Path | None) -> None:
    """The table, the cost of double quantization, the document."""
    _warn(output, result)
    document = keep_document(output, bench_document(result), path, result.interruption)
    output.answer(*head_lines(result.device, result.versions), *_tables(result.rows))
    for ratio in result.details["double_quant_ratios"]:
        if ratio["engine"] == "qtool":
            where = [ratio["dtype"], ratio["shape"], *_tokens_text(ratio["tokens"])]
            output.answer(
                f"{ratio['op']} takes {ratio['seconds_ratio']:.2f}x the time of "
                f"{ratio['op'].removesuffix('-dq')} ({', '.join(where)})"
            )
    footnote = KERNEL_FOOTNOTE.format(n=result.rows[0].n)
    output.answer(dim_text(footnote + VS_QTOOL * _has_rivals(result.rows)))
    if any(row.tokens is not None for row in result.rows):
        output.answer(dim_text(PRODUCT_FOOTNOTE))
    finish_bench(output, document, path, result.interruption)


def report_quantize(output: Output, result: BenchResult, path: Path | None) -> None:
    """The table, what it means, memory, the document."""
    _warn(output, result)
    document = keep_document(output, bench_document(result), path)
    output.answer(*head_lines(result.device, result.versions), *_tables(result.rows), "")
    for line in _quantize_lines(result):
        output.answer(line)
    n = next(row.n for row in result.rows if row.engine == "qtool")
    footnote = QUANTIZE_FOOTNOTE.format(runs=_runs(n), **result.details["storage"])
    output.answer(dim_text(footnote + VS_QTOOL * _has_rivals(result.rows)))
    finish_bench(output, document, path)


def report_optimizers(output: Output, result: BenchResult, path: Path | None) -> None:
    """The table, what the states take, the document."""
    _warn(output, result)
    document = keep_document(output, bench_document(result), path, result.interruption)
    output.answer(*head_lines(result.device, result.versions), *_tables(result.rows), "")
    for size in result.details["state_sizes"]:
        if size["engine"] == "qtool":
            output.answer(
                f"{size['op']}, {size['case']}: {size['state_bytes_per_parameter']:.3f} bytes of "
                "states per parameter"
            )
    limit = result.limits["copy"].bytes_per_s / 1e9
    footnote = OPTIMIZER_FOOTNOTE.format(n=result.rows[0].n, limit=limit)
    output.answer(dim_text(footnote + VS_QTOOL * _has_rivals(result.rows)))
    finish_bench(output, document, path, result.interruption)


def report_generate(output: Output, result: GenerateBenchResult, path: Path | None) -> None:
    """A table for each size, how qtool ran, what the whole model would do, the document."""
    for warning in result.warnings:
        output.warn(warning)
    document = keep_document(output, generate_document(result), path, result.interruption)
    head_quant = f", output head {result.head_quant}" if result.head_quant else ""
    output.answer(
        *head_lines(result.device, result.versions), f"{result.model}, {result.quant}{head_quant}"
    )
    for size in dict.fromkeys(run.size for run in result.runs):
        runs = [run for run in result.runs if run.size == size]
        output.answer("", size.text, _generate_table(runs))
    for text in dict.fromkeys(_generate_lines(result.runs)):
        output.answer(text)
    limit = result.limit.bytes_per_s / 1e9
    footnote = GENERATE_FOOTNOTE.format(runs=_runs(result.runs[0].n), limit=limit)
    if any(run.bandwidth_share > 1 for run in result.runs):
        footnote += BEYOND_THE_LIMIT
    has_rival = any(run.engine != "qtool" for run in result.runs)
    output.answer(dim_text(footnote + VS_QTOOL_DECODING * has_rival))
    if any(run.allocated_peak_bytes for run in result.runs):
        output.answer(dim_text(MEMORY_FOOTNOTE))
    finish_bench(output, document, path, result.interruption)


def _generate_table(runs: Sequence[GenerateRun]) -> Table:
    table = new_table()
    table.add_column("engine", no_wrap=True)
    has_rival = any(run.engine != "qtool" for run in runs)
    on_gpu = any(run.allocated_peak_bytes for run in runs)
    figures = ("prefill tok/s", "decode tok/s", "of limit")
    for name in (*figures, *("vs qtool",) * has_rival, *("memory",) * on_gpu):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        ratio = decode_ratio(run, runs)
        ratio_text = f"{ratio:.2f}x" if ratio and run.engine != "qtool" else ""
        table.add_row(
            ENGINE_NAMES.get(run.engine, run.engine),
            _rate_text(run.prefill_tok_s, run.prefill_tok_s_sd),
            _rate_text(run.decode_tok_s, run.decode_tok_s_sd),
            f"{run.bandwidth_share:.1%}",
            *[ratio_text] * has_rival,
            *[format_bytes(run.allocated_peak_bytes)] * on_gpu,
            style="bold" if run.engine == "qtool" else None,
        )
        if run.scaled is not None:
            table.add_row(
                f"  {run.scaled.layers} layers",
                _rate_text(run.scaled.prefill_tok_s, None),
                _rate_text(run.scaled.decode_tok_s, None),
                f"{run.scaled.bandwidth_share:.1%}",
            )
    return table


def _generate_lines(runs: Sequence[GenerateRun]) -> Iterable[str]:
    yield from _path_lines([run for run in runs if run.path is not None])
    for run in runs:
        if run.scaled is not None:
            fewer, more = run.scaled.measured_layers
            yield (
                f"{run.scaled.layers} layers: from the time that {more} layers take longer than "
                f"{fewer}"
            )


def _path_lines(runs: Sequence[GenerateRun]) -> Iterable[str]:
    """How qtool ran; where that differs, with the sizes in as few words as tell them apart."""
    taken: dict[tuple[str | None, str | None], list[GenerateRun]] = {}
    for run in runs:
        taken.setdefault((run.path, run.path_reason), []).append(run)
    places: list[dict[str, None]] = []
    for name_size in (_batch_text, _length_text, _size_text):
        places = [dict.fromkeys(map(name_size, group)) for group in taken.values()]
        if len(set().union(*places)) == sum(map(len, places)):
            break
    for (path, reason), names in zip(taken, places, strict=True):
        where = f" ({'; '.join(names)})" if len(taken) > 1 else ""
        yield f"qtool ran on the {path} path{where}: {reason}"


def _batch_text(run: GenerateRun) -> str:
    return f"batch {run.batch}"


def _length_text(run: GenerateRun) -> str:
    return f"{run.prompt_tokens} + {run.new_tokens} tokens"


def _size_text(run: GenerateRun) -> str:
    return run.size.text


def _rate_text(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return ""
    digits = _digits(mean)
    return f"{mean:,.{digits}f}" + ("" if deviation is None else f" ± {deviation:,.{digits}f}")


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


def generate_document(result: GenerateBenchResult) -> dict[str, Any]:
    """The fields of the JSON document."""
    return {
        "argv": sys.argv[1:],
        "device": result.device,
        "host": dict(result.host),
        "versions": dict(result.versions),
        "model": result.model,
        "quant": result.quant,
        "head_quant": result.head_quant,
        "limits": {"copy": asdict(result.limit)},
        "runs": [asdict(run) for run in result.runs],
    }


def keep_document(
    output: Output,
    fields: dict[str, Any],
    path: Path | None,
    interruption: QtoolError | None = None,
) -> dict[str, Any]:
    """Write the document to `path`, before a word on stdout can fail; returns its fields."""
    fields = {**fields, "complete": interruption is None}
    if path is not None:
        head = {"schema": JSON_SCHEMA_VERSION, "command": output.command}
        document = {**head, **fields, "warnings": output.warnings}
        text = json.dumps(document, ensure_ascii=False, indent=1) + "\n"
        write_whole(path, text.encode())
    return fields


def finish_bench(
    output: Output,
    fields: dict[str, Any],
    path: Path | None,
    interruption: QtoolError | None = None,
) -> None:
    """Show the document; then end as interrupted, if it holds only a part."""
    output.document(fields)
    if path is not None:
        output.note(f"written to {path}")
    if interruption is not None:
        raise interruption


def _warn(output: Output, result: BenchResult) -> None:
    for warning in result.warnings:
        output.warn(warning)


# -- the tables -----------------------------------------------------------------------------------


def head_lines(device: str, versions: Mapping[str, str]) -> Iterable[Text]:
    """What was measured on, and with which software."""
    from rich.text import Text

    yield Text(device, "bold")
    yield dim_text(", ".join(f"{name} {version}" for name, version in versions.items()))


def _tables(rows: Sequence[Row]) -> Iterable[Any]:
    """One for each shape, dtype and number of tokens."""
    from rich.text import Text

    for place in dict.fromkeys(map(_place, rows)):
        shape, dtype, tokens = place
        yield ""
        yield Text("  ".join((dtype, shape, *_tokens_text(tokens))), "bold cyan")
        yield _table([row for row in rows if _place(row) == place])


def _place(row: Row) -> tuple[str, str, int | None]:
    return row.shape, row.dtype, row.tokens


def _tokens_text(tokens: int | None) -> tuple[str, ...]:
    """ "8 tokens" for a product, nothing for all else."""
    if tokens is None:
        return ()
    return (f"{tokens} {'token' if tokens == 1 else 'tokens'}",)


def _table(rows: Sequence[Row]) -> Table:
    table = new_table()
    table.add_column("operation", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    has_rivals = _has_rivals(rows)
    with_errors = any(row.relative_error is not None for row in rows)
    figures = ("time", "GB/s", "of limit")
    for name in (*figures, *("vs qtool",) * has_rivals, *("error",) * with_errors):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        errors = ["" if row.relative_error is None else f"{row.relative_error:.1e}"] * with_errors
        ratio = time_ratio(row, rows)
        ratio_text = f"{ratio:.2f}x" if ratio and row.engine != "qtool" else ""
        table.add_row(
            _op_text(row.op),
            ENGINE_NAMES.get(row.engine, row.engine),
            time_text(row.seconds_median, row.seconds_mad if row.n > 1 else None),
            f"{row.bytes_per_s / 1e9:,.{_digits(row.bytes_per_s / 1e9)}f}",
            f"{row.share_of_limit:.1%}" if row.engine != "limit" else "",
            *[ratio_text] * has_rivals,
            *errors,
            style="bold" if row.engine == "qtool" else None,
        )
    return table


def _has_rivals(rows: Iterable[Row]) -> bool:
    """Whether there is anything to compare qtool with."""
    return any(row.engine not in ("qtool", "limit") for row in rows)


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


def dim_text(text: str) -> Text:
    """For what explains."""
    from rich.text import Text

    return Text(text, "dim")


def _runs(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"
