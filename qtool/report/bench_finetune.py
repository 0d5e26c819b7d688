"""How `qtool bench finetune` looks: a table of steps and memory, and the JSON document."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qtool.bench.finetune import FinetuneBenchResult, FinetuneRun
from qtool.report.bench import (
    VS_QTOOL,
    dim_text,
    finish_bench,
    head_lines,
    keep_document,
    time_text,
)
from qtool.report.estimate import new_table
from qtool.report.output import Output
from qtool.report.units import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

FOOTNOTE: Final = "step: median ± median absolute deviation of {n}, after two that do not count"
MEMORY_FOOTNOTE: Final = (
    "memory: the most that PyTorch handed out; plan: what `estimate --mode qlora` says of it"
)


def report_finetune(output: Output, result: FinetuneBenchResult, path: Path | None) -> None:
    """The table, the document."""
    for warning in result.warnings:
        output.warn(warning)
    document = keep_document(output, _document(result), path, result.interruption)
    request = result.request
    checkpointing = "" if request.gradient_checkpointing else ", no checkpointing"
    output.answer(
        *head_lines(result.device, result.versions),
        f"{result.model}, {request.quant}, {request.batch} x {result.length} tokens, "
        f"LoRA of rank {request.lora_r}{checkpointing}",
        "",
        _table(result.runs),
    )
    footnote = FOOTNOTE.format(n=result.runs[0].n)
    output.answer(dim_text(footnote + VS_QTOOL * (len(result.runs) > 1)))
    if _on_gpu(result.runs):
        output.answer(dim_text(MEMORY_FOOTNOTE))
    finish_bench(output, document, path, result.interruption)


def _table(runs: tuple[FinetuneRun, ...]) -> Table:
    table = new_table()
    table.add_column("engine", no_wrap=True)
    on_gpu = _on_gpu(runs)
    has_rival = len(runs) > 1
    memory = ("memory", "plan") if on_gpu else ()
    for name in ("step", "tokens/s", *("vs qtool",) * has_rival, *memory):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        cells = [*_cells(run), *_ratio_cells(run, runs[0]) * has_rival]
        cells += _memory_cells(run) if on_gpu else ()
        table.add_row(*cells, style="bold" if run is runs[0] else None)
    return table


def _on_gpu(runs: tuple[FinetuneRun, ...]) -> bool:
    return any(run.allocated_peak_bytes for run in runs)


def _cells(run: FinetuneRun) -> Iterator[str]:
    yield run.engine.replace("bitsandbytes", "bnb")
    yield time_text(run.step_seconds_median, run.step_seconds_mad if run.n > 1 else None)
    yield f"{run.tokens_per_s:,.0f}"


def _ratio_cells(run: FinetuneRun, own: FinetuneRun) -> tuple[str]:
    return ("" if run is own else f"{run.step_seconds_median / own.step_seconds_median:.2f}x",)


def _memory_cells(run: FinetuneRun) -> Iterator[str]:
    yield format_bytes(run.allocated_peak_bytes)
    planned = run.planned_peak_bytes
    if planned is None:
        yield ""
    else:
        yield f"{format_bytes(planned)} ({planned / run.allocated_peak_bytes - 1:+.1%})"


def _document(result: FinetuneBenchResult) -> dict[str, Any]:
    request = result.request
    return {
        "argv": sys.argv[1:],
        "device": result.device,
        "host": result.host,
        "versions": result.versions,
        "model": result.model,
        "quant": request.quant,
        "batch": request.batch,
        "context": result.length,
        "lora_r": request.lora_r,
        "gradient_checkpointing": request.gradient_checkpointing,
        "runs": [asdict(run) for run in result.runs],
    }
