"""What every drawing of a plan shares: its words, its colours, and where labels go.

The colours are ones that people with colour blindness tell apart, and labels stand beside what they
name, so that nothing rests on colour alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from qtool.planner.curves import ContextCurves, MemoryLimit, PrecisionCurve
from qtool.planner.estimate import DEFAULT_CONTEXT
from qtool.planner.records import Mode, Sizing, SizingRow, Workload
from qtool.report.estimate import shown_name
from qtool.report.units import format_gib

COLOURS: Final = ("#0072b2", "#c95200", "#00805e", "#b3478f", "#806600", "#3f7fbf", "#5b4bb5")
DARK_COLOURS: Final = ("#56b4e9", "#ff9147", "#2cc295", "#e58fc0", "#d9b800", "#9fc9f3", "#a99cf0")
KILO_TOKENS: Final = 1 << 10
MEGA_TOKENS: Final = 1 << 20
MAX_TICKS: Final = 10
# A limit further above the rest than this is named at the edge, lest it flatten what is drawn.
FARTHEST_LIMIT: Final = 1.6

SIZING_AXIS: Final = "peak memory, GiB"
GIB_NOTE: Final = "GiB: 2^30 bytes."

MODES: Final[dict[Mode, str]] = {
    "generate": "generating text",
    "qlora": "QLoRA",
    "lora": "LoRA",
    "full": "full fine-tuning",
}


@dataclass(frozen=True, slots=True)
class Words:
    """The text around a drawing; `footnotes` are lines."""

    title: str
    subtitle: str
    footnotes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SizingBar:
    """One model at one precision; `rows` are its answers, smallest device first."""

    model: str
    quant: str
    rows: tuple[SizingRow, ...]

    @property
    def peak_bytes(self) -> int:
        """The bar's length."""
        return self.rows[0].peak_bytes

    @property
    def text(self) -> str:
        """The peak and the smallest device that holds it."""
        holding = next((row for row in self.rows if row.verdict != "no"), None)
        if holding is None:
            return f"{format_gib(self.peak_bytes)} · fits none of these"
        how = "fits" if holding.verdict == "yes" else "tight on"
        return f"{format_gib(self.peak_bytes)} · {how} {device_name(holding)}"


# -- words ----------------------------------------------------------------------------------------


def context_words(curves: ContextCurves) -> Words:
    """The words around memory against context."""
    workload = curves.workload
    whose = "one GPU" if workload.gpus == 1 else f"the fullest of {workload.gpus} GPUs"
    lines = []
    if workload.mode == "generate":
        prompt = "fed in pieces" if workload.runtime == "vllm" else "in one forward pass"
        lines.append(f"Peak: a prompt that fills the context, {prompt}. Decoding takes less.")
    lines.append("Shaded: from the least to the most that driver and allocator may take.")
    if curves.limits:
        rings = "Rings: the longest context that fits."
        lines.append(f"{_dashed(curves.limits)} {rings}")
    return Words(
        title=shown_name(curves.model.id),
        subtitle=f"Memory of {whose} against context · {_workload_text(workload)}",
        footnotes=(*lines, GIB_NOTE),
    )


def sizing_words(sizing: Sizing) -> Words:
    """The words around the bars of several models."""
    gpus = sizing.rows[0].gpus
    whose = "GPU memory" if gpus == 1 else f"Memory of the fullest of {gpus} GPUs"
    tokens = f"up to {DEFAULT_CONTEXT:,}" if sizing.context is None else f"{sizing.context:,}"
    return Words(
        title="What fits",
        subtitle=f"{whose} at the peak · {_sequences(sizing.workload.batch)} of {tokens} tokens",
        footnotes=(f"{_dashed(sizing_limits(sizing))} Larger ones are left out.", GIB_NOTE),
    )


def context_axis(curves: ContextCurves) -> str:
    """What the horizontal axis counts."""
    most = curves.model.max_context
    made_for = f"; the model was made for {most:,}" if most else ""
    return f"context, tokens per sequence{made_for}"


def model_name(sizing: Sizing, model: str) -> str:
    """A model as its bars are headed: "8B (Llama 3.1 8B)", or the name of a folder."""
    reference = sizing.reference_models.get(model)
    return f"{model} ({reference})" if reference else shown_name(model)


def limit_text(limit: MemoryLimit) -> str:
    """A GPU and what it offers: "RTX 4090  23.52 GiB"."""
    return f"{limit.name}  {'~' if limit.is_recalled else ''}{format_gib(limit.usable_bytes)} GiB"


def tokens_text(tokens: int) -> str:
    """A context as an axis names it: "512", "4k", "1M"."""
    for unit, size in (("M", MEGA_TOKENS), ("k", KILO_TOKENS)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"


def device_name(row: SizingRow) -> str:
    """A row's GPU, or its class of memory size."""
    return row.gpu.name if row.vram_gib is not None else row.gpu.short_name


def _workload_text(workload: Workload) -> str:
    tuning, parts = workload.tuning, [MODES[workload.mode]]
    if workload.mode in ("qlora", "lora"):
        parts[0] += f" r {tuning.lora_r}"
    if workload.mode != "generate":
        parts.append(tuning.optimizer)
        parts += ["gradient checkpointing"] * tuning.gradient_checkpointing
    parts += [_sequences(workload.batch), f"runtime {workload.runtime}"]
    parts += [f"{workload.kv_dtype} cache"] * (workload.kv_dtype != "auto")
    return " · ".join(parts)


def _sequences(batch: int) -> str:
    return f"{batch} sequence{'s' * (batch != 1)}"


def _dashed(limits: Iterable[MemoryLimit]) -> str:
    unconfirmed = " (~: not confirmed)" if any(limit.is_recalled for limit in limits) else ""
    return f"Dashed: what a program can have of a GPU{unconfirmed}."


# -- what is drawn --------------------------------------------------------------------------------


def sizing_bars(sizing: Sizing) -> tuple[SizingBar, ...]:
    """One bar per model and precision, in the sizing's order."""
    groups: dict[tuple[str, str], list[SizingRow]] = {}
    for row in sizing.rows:
        groups.setdefault((row.model, row.quant), []).append(row)
    return tuple(SizingBar(*names, tuple(rows)) for names, rows in groups.items())


def sizing_limits(sizing: Sizing) -> tuple[MemoryLimit, ...]:
    """Each device once, smallest first."""
    rows = {device_name(row): row for row in sizing.rows}
    return tuple(
        MemoryLimit(
            f"~{name}" if row.gpu.memory_is_recalled else name,
            row.usable_bytes,
            row.gpu.memory_is_recalled,
        )
        for name, row in rows.items()
    )


def crossings(curves: ContextCurves, curve: PrecisionCurve) -> list[tuple[int, int]]:
    """Where the curve leaves what a GPU offers: (context, usable bytes)."""
    last = curves.contexts[-1]
    return [
        (context, limit.usable_bytes)
        for limit, context in zip(curves.limits, curve.longest, strict=True)
        if context is not None and curves.contexts[0] <= context < last
    ]


# -- axes and labels ------------------------------------------------------------------------------


def context_ticks(first: int, last: int) -> list[int]:
    """Powers of two from `first` to `last`, as many as stay readable."""
    powers = range((first - 1).bit_length(), last.bit_length())
    step = -(-len(powers) // MAX_TICKS)
    return [1 << power for power in reversed(powers[::-1][::step])]


def split_limits(
    limits: Sequence[MemoryLimit], highest_bytes: int
) -> tuple[list[MemoryLimit], list[MemoryLimit]]:
    """The limits to draw beside something `highest_bytes` high, and those only to name."""
    ordered = sorted(limits, key=lambda limit: limit.usable_bytes)
    reach_bytes = FARTHEST_LIMIT * highest_bytes
    drawn = [limit for limit in ordered if limit.usable_bytes <= reach_bytes]
    return drawn, ordered[len(drawn) :]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places for labels: in the order of `wanted`, `gap` apart, each as near as can be.

    Where they fill more than `low` to `high`, they begin at `low`.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    # Less one gap per label before it, places need only rise: neighbours out of order share a mean.
    pools: list[tuple[float, int]] = []
    for rank, index in enumerate(order):
        mean, count = wanted[index] - rank * gap, 1
        while pools and pools[-1][0] > mean:
            other, others = pools.pop()
            mean = (mean * count + other * others) / (count + others)
            count += others
        pools.append((mean, count))
    highest = max(high - (len(wanted) - 1) * gap, low)
    levels = [min(max(mean, low), highest) for mean, count in pools for _ in range(count)]
    places = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        places[index] = levels[rank] + rank * gap
    return places
