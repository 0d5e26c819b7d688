"""How `qtool sizing` looks: a grid of memory sizes against models, or a table of GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qtool.planner.estimate import DEFAULT_CONTEXT
from qtool.planner.records import Sizing, SizingRow
from qtool.report.estimate import NOT_KNOWN, VERDICT_SIGNS, new_table, shown_name, usable_text
from qtool.report.output import Output
from qtool.report.units import format_gib

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.text import Text

    from qtool.report.tables import WholeTable

KILO_TOKENS: Final = 1024
BETWEEN_GRIDS: Final = 4
SIDE_BY_SIDE_COLUMNS: Final = 136  # two grids of the seven reference models
GPU_CELLS: Final = 24  # of a GPU's name; rather than fold it more, precisions go into more tables


def report_sizing(output: Output, sizing: Sizing) -> None:
    """Print the answer, or its JSON document; warnings first."""
    for warning in sizing.warnings:
        output.warn(warning)
    output.answer(SizingView(sizing))
    output.document(sizing_document(sizing))


def sizing_document(sizing: Sizing) -> dict[str, Any]:
    """The fields of the JSON document."""
    return {
        "reference_models": dict(sizing.reference_models),
        "rows": [_row_fields(row) for row in sizing.rows],
    }


def _row_fields(row: SizingRow) -> dict[str, Any]:
    where = {"gpu": row.gpu.name} if row.vram_gib is None else {"vram_gib": row.vram_gib}
    return {
        **where,
        "gpus": row.gpus,
        "model": row.model,
        "quant": row.quant,
        "verdict": row.verdict,
        "peak_bytes": row.peak_bytes,
        "usable_bytes": row.usable_bytes,
        "max_context": row.max_context,
        "decode_tok_s_ceiling": row.decode_tok_s_ceiling,
        "notes": list(row.notes),
    }


@dataclass(frozen=True, slots=True)
class SizingView:
    """The sizing as text, laid out for the terminal's width."""

    sizing: Sizing

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Called by rich with the width at hand."""
        if self.sizing.reference_models:
            yield from _guide(self.sizing, console, options)
        else:
            for model in _distinct(row.model for row in self.sizing.rows):
                rows = [row for row in self.sizing.rows if row.model == model]
                yield from _model_tables(model, rows, console, options)
        yield _footnote(self.sizing)


# -- the guide: one grid per precision ------------------------------------------------------------


def _guide(sizing: Sizing, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    yield Text("What fits: GPU memory against model size, and the longest context", "bold")
    yield ""
    quants = _distinct(row.quant for row in sizing.rows)
    grids = [_grid([row for row in sizing.rows if row.quant == quant]) for quant in quants]
    widths = [grid.least_width(console, options) for grid in grids]
    is_wide = options.max_width >= max(SIDE_BY_SIDE_COLUMNS, 2 * max(widths) + BETWEEN_GRIDS)
    per_line = 2 if is_wide else 1
    for start in range(0, len(grids), per_line):
        if is_wide:
            line = Table.grid(padding=(0, BETWEEN_GRIDS, 0, 0))
            line.add_row(*grids[start : start + per_line])
            yield line
        else:
            yield grids[start]
        yield ""
    yield f"reference models: {', '.join(sizing.reference_models.values())}"


def _grid(rows: Sequence[SizingRow]) -> WholeTable:
    """One precision: a line per GPU or memory size, a column per model."""
    from rich.text import Text

    table = new_table()
    table.title, table.title_justify = Text(rows[0].quant, "bold"), "left"
    by_memory = rows[0].vram_gib is not None
    table.add_column("GiB" if by_memory else "GPU", justify="right" if by_memory else "left")
    models = _distinct(row.model for row in rows)
    for model in models:
        table.add_column(model, no_wrap=True)
    devices = {row.gpu.name: row for row in rows}
    for name, device in devices.items():
        cells = {row.model: _context_text(row) for row in rows if row.gpu.name == name}
        label = f"{device.vram_gib:g}" if device.vram_gib else device.gpu.short_name
        table.add_row(label, *(cells[model] for model in models))
    return table


# -- models: one table of GPUs each ---------------------------------------------------------------


def _model_tables(
    model: str, rows: Sequence[SizingRow], console: Console, options: ConsoleOptions
) -> Iterable[RenderableType]:
    from rich.text import Text

    yield Text(shown_name(model), "bold")
    quants = _distinct(row.quant for row in rows)
    while quants:
        for count in range(len(quants), 0, -1):
            table = _gpu_table(rows, quants[:count])
            if table.least_width(console, options) <= options.max_width:
                break
        yield table
        yield ""
        quants = quants[count:]


def _gpu_table(rows: Sequence[SizingRow], quants: Sequence[str]) -> WholeTable:
    table = new_table()
    table.add_column("GPU", min_width=GPU_CELLS)
    table.add_column("usable", justify="right", no_wrap=True)
    for quant in quants:
        table.add_column(quant, no_wrap=True)
        table.add_column("tok/s", justify="right", no_wrap=True)
    for name in _distinct(row.gpu.name for row in rows):
        found = {row.quant: row for row in rows if row.gpu.name == name}
        first = found[quants[0]]
        cells = [cell for quant in quants for cell in _quant_cells(found[quant])]
        label = first.gpu.short_name if first.vram_gib is None else first.gpu.name
        table.add_row(label, usable_text(first.gpu, format_gib(first.usable_bytes)), *cells)
    return table


def _quant_cells(row: SizingRow) -> tuple[Text, str]:
    ceiling = row.decode_tok_s_ceiling
    if ceiling is None or row.verdict == "no":
        return _context_text(row), NOT_KNOWN
    return _context_text(row), f"{'~' if row.gpu.bandwidth_is_recalled else ''}{ceiling:,.0f}"


def _context_text(row: SizingRow) -> Text:
    """The verdict's sign and the longest context."""
    from rich.text import Text

    word, style = VERDICT_SIGNS[row.verdict]
    context = row.max_context
    if row.verdict == "no" and context is not None and context < KILO_TOKENS:
        context = 0  # not worth a number
    return Text(f"{word[0]} {_tokens_text(context)}".rstrip(), style)


def _tokens_text(tokens: int | None) -> str:
    if tokens is None:
        return "any"
    if tokens >= KILO_TOKENS:
        return f"{tokens // KILO_TOKENS}k"
    return str(tokens) if tokens else ""


def _footnote(sizing: Sizing) -> Text:
    from rich.text import Text

    sequences = f"{sizing.workload.batch:,} sequence{'s' * (sizing.workload.batch != 1)}"
    tokens = f"up to {DEFAULT_CONTEXT:,}" if sizing.context is None else f"{sizing.context:,}"
    workload, gpus = sizing.workload, sizing.rows[0].gpus
    doing = "" if workload.mode == "generate" else f"{workload.mode}, "
    each = f" on {gpus} of them together ({workload.split})" if gpus > 1 else ""
    parts = [
        f"✓ fits · ! under 5 % left · ✗ too large: for {doing}{sequences} of {tokens} tokens{each}",
        "then the longest context that fits, up to the model's own (k: 1,024 tokens)",
    ]
    if any(row.decode_tok_s_ceiling for row in sizing.rows) and not sizing.reference_models:
        parts.append("tok/s: a ceiling, memory bandwidth over bytes read per token")
    if lacking := _distinct(row.gpu.short_name for row in sizing.rows if row.gpu.lacks_kernels):
        parts.append(f"memory alone: {', '.join(lacking)}, where qtool's own kernels do not run")
    if any(row.gpu.memory_is_recalled or row.gpu.bandwidth_is_recalled for row in sizing.rows):
        parts.append("~ rests on a number not confirmed")
    parts.append("memory in GiB (2^30 bytes)")
    return Text("\n".join(parts), style="dim")


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
