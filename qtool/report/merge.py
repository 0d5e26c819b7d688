"""`qtool merge` in words: what goes onto what, and how far the result is from the trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.merge.command import PlannedMerge
from qtool.quantize.run import QuantizeResult
from qtool.report.output import Output
from qtool.report.units import format_bytes, format_rate

if TYPE_CHECKING:
    from qtool.merge.logits import LogitChange


def report_plan(output: Output, planned: PlannedMerge) -> None:
    """Say what will be merged onto what."""
    base, sources = planned.base, planned.sources
    counts = ", ".join(f"{number} {what}" for what, number in sources.count().most_common())
    weights_bytes = sum(shard.weights_bytes for shard in planned.shards)
    num_files = len(planned.shards)
    output.note(f"plan     {planned.adapter.folder} → {_name(planned)} · {planned.precision}")
    output.note(f"         onto the {base.onto} weights ({base.reason})")
    output.note(f"         {counts}")
    files = f"{num_files} file{'s' * (num_files != 1)}"
    output.note(f"         {format_bytes(weights_bytes)} in {files}")
    if sources.untied:
        output.note(f"         {sources.untied} is no longer tied, as in training")
    if planned.adapter.tokenizer_files:
        output.note("         the tokenizer is the adapter's")
    if planned.quant_plan is not None:
        output.note(f"backend  {planned.chosen.backend.name} ({planned.chosen.reason})")


def report_result(
    output: Output, planned: PlannedMerge, result: QuantizeResult, change: LogitChange | None
) -> None:
    """Say what was written, and what it does to the logits."""
    size = format_bytes(result.output_bytes)
    if result.read_bytes:
        rate = format_rate(result.read_bytes, result.seconds)
        done = "complete (continued)" if result.resumed else "complete"
        output.answer_line(f"{done}, {size} in {result.seconds:.1f} s ({rate})")
    else:
        output.answer_line(f"complete already, {size}; nothing to do")
    if change is not None:
        output.answer_line(_change_line(change))
    output.note(f"peak memory {format_bytes(result.peak_host_bytes)}, without the page cache")
    output.note(f"next: qtool generate {planned.request.output}")
    output.document(_document(planned, result, change))


def _name(planned: PlannedMerge) -> str:
    checkpoint = planned.base.checkpoint
    if checkpoint.location == "local":
        return Path(checkpoint.id).resolve().name
    return f"{checkpoint.id}@{checkpoint.revision[:7]}" if checkpoint.revision else checkpoint.id


def _change_line(change: LogitChange) -> str:
    share = f" ({change.merging / change.adapter:.2%})" if change.adapter else ""
    return (
        f"logits differ from base + adapter by at most {change.merging:.4g}, where the adapter "
        f"moves them by up to {change.adapter:.4g}{share}; another token is likeliest after "
        f"{change.num_other_choices} of {change.num_tokens}"
    )


def _document(
    planned: PlannedMerge, result: QuantizeResult, change: LogitChange | None
) -> dict[str, Any]:
    counts = planned.sources.count()
    return {
        "output": str(planned.request.output),
        "quant": planned.precision,
        "onto": planned.base.onto,
        "onto_reason": planned.base.reason,
        "base": planned.base.checkpoint.id,
        "backend": planned.chosen.backend.name,
        "backend_reason": planned.chosen.reason,
        "input_bytes": result.input_bytes,
        "output_bytes": result.output_bytes,
        "weights_bytes": result.weights_bytes,
        "seconds": result.seconds,
        "resumed": result.resumed,
        "tensors": {what: counts[what] for what in ("merged", "replaced", "dequantized", "copied")},
        "max_logit_change": None if change is None else change.merging,
        "adapter_logit_change": None if change is None else change.adapter,
        "prompt_tokens": None if change is None else change.num_tokens,
        "other_choices": None if change is None else change.num_other_choices,
        "peak_host_bytes": result.peak_host_bytes,
        "peak_device_bytes": result.peak_device_bytes,
    }
