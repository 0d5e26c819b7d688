"""How `qtool estimate` looks: one row per precision, stacked bars, each GPU's answer.

Memory is in GiB, that of tiny models in MiB. Colour repeats what signs and words say already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from qtool.planner.gpus import Gpu
from qtool.planner.records import (
    Basis,
    ComponentName,
    Estimate,
    Fit,
    MemoryPlan,
    Verdict,
    Workload,
)
from qtool.report.output import Output
from qtool.report.units import MIB, format_count, format_gib, format_mib

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
    from rich.text import Text

    from qtool.report.tables import WholeTable

MAX_BAR_CELLS: Final = 72
MIN_LABEL_CELLS: Final = 12  # behind a bar, so that bars of most models are alike
TINY_BYTES: Final = 128 * MIB  # of weights: two digits of GiB would not show what is less
EQUAL_SHARE: Final = 5e-5  # a difference that two digits do not show
NOT_KNOWN: Final = "-"

VERDICT_SIGNS: Final[dict[Verdict, tuple[str, str]]] = {
    "yes": ("✓ yes", "green"),
    "tight": ("! tight", "yellow"),
    "no": ("✗ no", "red"),
}
WEIGHTS_ORIGINS: Final[dict[Basis, str]] = {
    "header": "the file headers, exact",
    "exact": "config.json, exact if it is right",
    "formula": "config.json, by the format's formula",
    "heuristic": "not known, unpacked at most",
}
TRAINING: Final = "training"
Key = TypeVar("Key")
Size = Callable[[int], str]  # bytes in words
# What a column or a bar's stretch adds up, with the sign and colour of the stretch.
Group = tuple[str, str, str, tuple[ComponentName, ...]]
GROUPS: Final[tuple[Group, ...]] = (
    ("weights", "█", "blue", ("weights",)),
    ("KV cache", "▓", "cyan", ("kv_cache",)),
    (TRAINING, "▚", "green", ("adapters", "gradients", "optimizer")),
    ("activations", "▒", "magenta", ("activations", "logits", "dequant_buffer")),
    ("overhead", "░", "bright_black", ("workspace", "runtime_overhead", "allocator")),
)
WIDE_GROUPS: Final[tuple[tuple[str, tuple[ComponentName, ...]], ...]] = (
    ("weights", ("weights",)),
    ("KV cache", ("kv_cache",)),
    ("activations", ("activations",)),
    ("logits", ("logits",)),
    ("adapters", ("adapters",)),
    ("gradients", ("gradients",)),
    ("optimizer", ("optimizer",)),
    ("dequantized", ("dequant_buffer",)),
    ("workspace", ("workspace",)),
    ("driver", ("runtime_overhead",)),
    ("allocator", ("allocator",)),
)


def report_estimate(output: Output, estimate: Estimate) -> None:
    """Print the answer, or its JSON document; warnings first."""
    for warning in estimate.warnings:
        output.warn(warning)
    output.answer(EstimateView(estimate))
    if not estimate.gpus:
        output.note("next: add --gpu 'RTX 4090', or --gpu auto, to see whether it fits")
    output.document(estimate_document(estimate))


def estimate_document(estimate: Estimate) -> dict[str, Any]:
    """The fields of the JSON document."""
    model = estimate.model._asdict()
    del model["max_context"]
    best = zip(estimate.gpus, estimate.best_quants, strict=True)
    return {
        "model": model,
        "plans": [_plan_fields(plan) for plan in estimate.plans],
        "best": [{"gpu": gpu.name, "quant": quant} for gpu, quant in best],
    }


def _plan_fields(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "quant": plan.quant,
        "mode": plan.workload.mode,
        "runtime": plan.workload.runtime,
        "batch": plan.workload.batch,
        "context": plan.workload.context,
        "kv_dtype": plan.workload.kv_dtype,
        "prefill_chunk": plan.workload.prefill_chunk if plan.workload.is_own else None,
        "head_quant": plan.workload.head_quant if plan.workload.is_own else None,
        "int8_threshold": plan.int8_threshold,
        "adapter": _adapter_fields(plan.workload),
        "gpus": plan.workload.gpus,
        "split": plan.workload.split if plan.workload.gpus > 1 else None,
        "components": {name: part._asdict() for name, part in plan.components.items()},
        "checkpoint_bytes": plan.checkpoint_bytes,
        "steady_bytes": plan.steady_bytes,
        "allocated_peak_bytes": plan.allocated_peak_bytes,
        "peak_bytes": plan.peak_bytes,
        "load_peak_bytes": plan.load_peak_bytes,
        "peak_low_bytes": plan.peak_low_bytes,
        "peak_high_bytes": plan.peak_high_bytes,
        "exact": plan.exact._asdict() if plan.exact else None,
        "suggestions": [suggestion._asdict() for suggestion in plan.suggestions],
        "notes": list(plan.notes),
        "fits": [_fit_fields(fit) for fit in plan.fits],
    }


def _adapter_fields(workload: Workload) -> dict[str, Any] | None:
    adapter = workload.adapter
    if adapter is None or not workload.is_own:
        return None
    return {"id": adapter.name, "rank": adapter.rank, "layers": len(adapter.layers)}


def _fit_fields(fit: Fit) -> dict[str, Any]:
    return {
        "gpu": fit.gpu.name,
        "gpus": fit.gpus,
        "usable_bytes": fit.usable_bytes,
        "verdict": fit.verdict,
        "max_context": fit.max_context,
        "max_batch": fit.max_batch,
        "max_lora_r": fit.max_lora_r,
        "notes": list(fit.notes),
    }


@dataclass(frozen=True, slots=True)
class EstimateView:
    """The estimate as text, laid out for the terminal's width."""

    estimate: Estimate

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Called by rich with the width at hand."""
        plans = self.estimate.plans
        yield from _heading(self.estimate)
        yield ""
        wide = _wide_table(plans)  # every component in a column of its own
        is_wide = wide.whole_width(console, options) <= options.max_width
        yield wide if is_wide else _table(plans)
        if not is_wide:
            yield from _adapter_line(plans)
        yield ""
        yield from _bars(plans, options.max_width)
        if self.estimate.gpus:
            yield ""
            yield _fits_table(self.estimate)
            yield from _best(self.estimate)
            yield from _advice(plans)
        yield from _exact_lines(plans)
        yield from _notes(plans)
        yield ""
        yield _provenance(self.estimate)


def shown_name(model: str) -> str:
    """What people call the model: the folder's name, or the Hub id."""
    path = Path(model).resolve()
    if not path.exists():
        return model
    return path.name if path.is_dir() else path.parent.name


def verdict_text(verdict: Verdict) -> Text:
    """The verdict as sign, word and colour."""
    from rich.text import Text

    sign, style = VERDICT_SIGNS[verdict]
    return Text(sign, style)


def usable_text(gpu: Gpu, usable: str) -> str:
    """Usable memory, with ~ where it rests on a number that nobody looked up."""
    return f"{'~' if gpu.memory_is_recalled else ''}{usable}"


def limit_text(limit: int | None) -> str:
    """A largest context or batch."""
    return "any" if limit is None else f"{limit:,}" if limit else NOT_KNOWN


def _size_of(plans: Sequence[MemoryPlan]) -> Size:
    """How bytes are written: in GiB, or in MiB where all are little."""
    is_tiny = max(plan.checkpoint_bytes for plan in plans) < TINY_BYTES
    return format_mib if is_tiny else format_gib


def _unit_of(plans: Sequence[MemoryPlan]) -> str:
    return "MiB" if _size_of(plans) is format_mib else "GiB"


def _heading(estimate: Estimate) -> Iterable[Text]:
    from rich.text import Text

    facts, first = estimate.model, estimate.plans[0]
    revision = f"@{facts.revision[:7]}" if facts.revision else ""
    about = facts.architecture or "unknown architecture"
    about += f" · {format_count(facts.parameters)} parameters"
    yield Text.assemble((f"{shown_name(facts.id)}{revision}", "bold"), f"  {about}")
    workload = first.workload
    sequences = f"{workload.batch:,} sequence{'s' * (workload.batch != 1)}"
    is_within = workload.context <= (facts.max_context or 0)  # a warning says what is beyond
    most = f" of at most {facts.max_context:,}" if is_within else ""
    each = f" on each of {workload.gpus} GPUs ({workload.split})" if workload.gpus > 1 else ""
    yield Text(f"{_doing(estimate.plans)}: {sequences} of {workload.context:,}{most} tokens")
    unit = _unit_of(estimate.plans)
    yield Text(f"GPU memory in {unit} (2^{30 if unit == 'GiB' else 20} bytes){each}")


def _doing(plans: Sequence[MemoryPlan]) -> str:
    """What is planned: "generate with qtool, output head nf4-dq", "qlora with transformers, r 16,
    adamw".
    """
    workload = plans[0].workload
    words = f"{workload.mode} with {workload.runtime}"
    if workload.mode == "generate":
        return words + "".join(f", {part}" for part in _own_parts(plans))
    tuning = workload.tuning
    rank = "" if workload.mode == "full" else f", r {tuning.lora_r}"
    how = "" if tuning.gradient_checkpointing else ", activations kept"
    return f"{words}{rank}, {tuning.optimizer}{how}"


def _own_parts(plans: Sequence[MemoryPlan]) -> Iterable[str]:
    """What only qtool's own runtime knows."""
    workload = plans[0].workload
    if not workload.is_own:
        return
    if workload.head_quant:
        yield f"output head {workload.head_quant}"
    for threshold in {plan.int8_threshold for plan in plans} - {None}:
        yield f"in int8 also the activations of prompts, threshold {threshold:g}"
    if (adapter := workload.adapter) is not None:
        rank = "" if adapter.rank is None else f" (rank {adapter.rank})"
        yield f"adapter {shown_name(adapter.name)}{rank}"


def new_table() -> WholeTable:
    """A table without lines, its numbers held apart by blanks."""
    from qtool.report.tables import WholeTable

    return WholeTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")


def _table(plans: Sequence[MemoryPlan]) -> Table:
    table = new_table()
    table.add_column("quant", no_wrap=True)
    groups = [(name, names) for name, _, _, names in GROUPS if _is_shown(plans, names)]
    if _has_adapter(plans):  # a column more would be too many
        groups = [(name, names) for name, names in groups if name != TRAINING]
        groups[0] = ("weights", ("weights", "adapters"))
    for name in ("on disk", *(name for name, _ in groups), "peak", "range"):
        table.add_column(name, justify="right", no_wrap=True)
    size = _size_of(plans)
    for plan in plans:
        table.add_row(
            plan.quant,
            size(plan.checkpoint_bytes),
            *(_sum_text(plan, names, size) for _, names in groups),
            _bold(size(plan.peak_bytes)),
            _range_text(plan, size),
        )
    return table


def _wide_table(plans: Sequence[MemoryPlan]) -> WholeTable:
    table = new_table()
    table.add_column("quant", no_wrap=True)
    groups = [group for group in WIDE_GROUPS if _is_shown(plans, group[1])]
    steady = "decoding" if plans[0].workload.mode == "generate" else "between steps"
    for name in ("on disk", *(name for name, _ in groups), "peak", "range", steady, "loading"):
        table.add_column(name, justify="right", no_wrap=True)
    size = _size_of(plans)
    for plan in plans:
        table.add_row(
            plan.quant,
            size(plan.checkpoint_bytes),
            *(_sum_text(plan, names, size) for _, names in groups),
            _bold(size(plan.peak_bytes)),
            _range_text(plan, size),
            size(plan.steady_bytes),
            size(plan.load_peak_bytes),
        )
    return table


def _name_of(group: Group, plans: Sequence[MemoryPlan]) -> str:
    """What generates has no more of training than an adapter."""
    return "adapter" if _has_adapter(plans) and group[0] == TRAINING else group[0]


def _has_adapter(plans: Sequence[MemoryPlan]) -> bool:
    """Whether one is there to generate with."""
    workload = plans[0].workload
    return workload.is_own and workload.adapter is not None


def _adapter_line(plans: Sequence[MemoryPlan]) -> Iterable[Text]:
    """How much of the weights' column is the adapter's."""
    from rich.text import Text

    if _has_adapter(plans):
        sizes = [_size_of(plans)(plan.components["adapters"].bytes) for plan in plans]
        yield Text(f"the adapter's {' or '.join(dict.fromkeys(sizes))} are among the weights")


def _is_shown(plans: Iterable[MemoryPlan], names: Iterable[ComponentName]) -> bool:
    """Whether a plan has any of these parts at all."""
    return any(name in plan.components for plan in plans for name in names)


def _sum_bytes(plan: MemoryPlan, names: Iterable[ComponentName]) -> int | None:
    found = [plan.components[name].bytes for name in names if name in plan.components]
    return sum(found) if found else None


def _sum_text(plan: MemoryPlan, names: Iterable[ComponentName], size: Size) -> str:
    num_bytes = _sum_bytes(plan, names)
    return NOT_KNOWN if num_bytes is None else size(num_bytes)


def _range_text(plan: MemoryPlan, size: Size) -> str:
    ends = (size(plan.peak_low_bytes), size(plan.peak_high_bytes))
    # Hundredths of MiB would be too many digits, for a line and for what they are.
    return "–".join(end.partition(".")[0] if size is format_mib else end for end in ends)


def _bold(text: str) -> Text:
    from rich.text import Text

    return Text(text, "bold")


def _bars(plans: tuple[MemoryPlan, ...], width: int) -> Iterable[Text]:
    """One stacked bar per plan, all to the scale of the largest peak, and a legend."""
    from rich.text import Text

    name_cells = max(len(plan.quant) for plan in plans) + 2
    size = _size_of(plans)
    label_cells = max(MIN_LABEL_CELLS, *(len(size(plan.peak_bytes)) + 1 for plan in plans))
    cells = max(min(width - name_cells - label_cells, MAX_BAR_CELLS), 1)
    scale = cells / max(plan.peak_bytes for plan in plans)
    for plan in plans:
        bar = Text(plan.quant.ljust(name_cells))
        drawn, end_bytes = 0, 0
        for _, sign, style, names in GROUPS:
            end_bytes += _sum_bytes(plan, names) or 0
            end = round(end_bytes * scale)
            bar.append(sign * (end - drawn), style)
            drawn = end
        bar.append(f" {size(plan.peak_bytes)}")
        yield bar
    legend = Text(" " * (name_cells - 3))
    for group in GROUPS:
        _, sign, style, names = group
        if not _is_shown(plans, names):
            continue
        legend.append(f"   {sign}", style)
        legend.append(f" {_name_of(group, plans)}")
    yield legend


def _fits_table(estimate: Estimate) -> Table:
    table = new_table()
    table.add_column("GPU")
    table.add_column("usable", justify="right", no_wrap=True)
    table.add_column("quant", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for name in ("left", "max context", "max batch"):
        table.add_column(name, justify="right", no_wrap=True)
    size = _size_of(estimate.plans)
    for index, gpu in enumerate(estimate.gpus):
        for plan in estimate.plans:
            fit, is_first = plan.fits[index], plan is estimate.plans[0]
            left_bytes = fit.usable_bytes - plan.peak_bytes
            table.add_row(
                gpu.short_name if is_first else "",
                usable_text(gpu, size(fit.usable_bytes)) if is_first else "",
                plan.quant,
                verdict_text(fit.verdict),
                f"{'-' if left_bytes < 0 else ''}{size(abs(left_bytes))}",
                limit_text(fit.max_context),
                limit_text(fit.max_batch),
            )
    return table


def _best(estimate: Estimate) -> Iterable[Text]:
    """The precision that loses least of those that fit, GPUs of one answer in one line."""
    from rich.text import Text

    if len(estimate.plans) < 2:
        return
    best = zip(estimate.best_quants, estimate.gpus, strict=True)
    names = _collected((quant, gpu.short_name) for quant, gpu in best if quant is not None)
    for quant, gpus in names.items():
        yield Text.assemble("best that fits ", (", ".join(gpus), "bold"), f": {quant}")


def _advice(plans: Sequence[MemoryPlan]) -> Iterable[Text]:
    """What would make each plan fit that fits nowhere."""
    from rich.text import Text

    for plan in plans:
        if any(fit.verdict != "no" for fit in plan.fits):
            continue
        changes = ", or ".join(
            f"{it.change} (saves {_size_of(plans)(it.saves_bytes)} {_unit_of(plans)})"
            for it in plan.suggestions
        )
        helps = f"fits with {changes}" if changes else "no single change makes it fit"
        yield Text.assemble((f"{plan.quant}: ", "bold"), helps)


def _exact_lines(plans: Sequence[MemoryPlan]) -> Iterable[Text]:
    """What running the model under fake tensors allocated, beside the closed form."""
    from rich.text import Text

    size = _size_of(plans)
    for plan in plans:
        if plan.exact is not None:
            ours, theirs = plan.allocated_peak_bytes, plan.exact.allocated_peak_bytes
            yield Text(
                f"{plan.quant}: allocated {size(ours)}, with --exact {size(theirs)} "
                f"({_difference_text(ours / theirs - 1)}; {plan.exact.seconds:.1f} s)"
            )


def _difference_text(difference: float) -> str:
    return "equal" if abs(difference) < EQUAL_SHARE else f"{difference:+.2%}"


def _notes(plans: Sequence[MemoryPlan]) -> Iterable[Text]:
    """What the runtime does that one may not expect, once each."""
    from rich.text import Text

    about = _collected((note, plan.quant) for plan in plans for note in plan.notes)
    lines = [f"{', '.join(quants)}: {note}" for note, quants in about.items()]
    lines += _gpu_lines(plans)
    yield from map(Text, ["", *lines] if lines else ())


def _gpu_lines(plans: Sequence[MemoryPlan]) -> Iterable[str]:
    """The same about GPUs that hold a plan; precisions are named where it is not about all."""
    held = [(plan.quant, fit) for plan in plans for fit in plan.fits if fit.verdict != "no"]
    held_by = _collected((fit.gpu.short_name, quant) for quant, fit in held)
    about = _collected(
        ((fit.gpu.short_name, note), quant) for quant, fit in held for note in fit.notes
    )
    together = _collected(
        ((() if quants == held_by[gpu] else tuple(quants), note), gpu)
        for (gpu, note), quants in about.items()
    )
    for (quants, note), gpus in together.items():
        yield f"{', '.join(quants)}{' on ' * bool(quants)}{', '.join(gpus)}: {note}"


def _collected(pairs: Iterable[tuple[Key, str]]) -> dict[Key, list[str]]:
    """What belongs to each key, in order."""
    found: dict[Key, list[str]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def _weights_origin(plans: Sequence[MemoryPlan]) -> str:
    """Where the weights' sizes come from, and of which plans where that differs."""
    about = _collected(
        (WEIGHTS_ORIGINS[plan.components["weights"].basis], plan.quant) for plan in plans
    )
    if len(about) == 1:
        return next(iter(about))
    return "; ".join(f"{origin} ({', '.join(quants)})" for origin, quants in about.items())


def _provenance(estimate: Estimate) -> Text:
    """Where the numbers come from."""
    from rich.text import Text

    parts = [f"on disk, weights: {_weights_origin(estimate.plans)}"]
    if any("kv_cache" in plan.components for plan in estimate.plans):
        parts.append("KV cache: exact")
    for name in ("adapters", "optimizer", "activations"):
        bases = {plan.components[name].basis for plan in estimate.plans if name in plan.components}
        if bases:
            parts.append(f"{name}: {' or '.join(sorted(bases))}")
    parts.append("overhead: measured on other machines, hence the range")
    if any(gpu.memory_is_recalled for gpu in estimate.gpus):
        parts.append("a GPU's memory marked ~ is not confirmed")
    return Text(" · ".join(parts), style="dim")
