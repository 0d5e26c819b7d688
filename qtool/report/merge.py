"""`qtool merge` in words: what goes onto what, and how far the result is from the trained model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtool.checkpoint.safetensors_header import encode_header
from qtool.merge.base import short_name
from qtool.merge.check import LogitCheck
from qtool.merge.codes import ChangedCodes
from qtool.merge.command import PlannedMerge
from qtool.quantize.plan import TensorPlan
from qtool.quantize.run import QuantizeResult
from qtool.report.output import Output
from qtool.report.units import format_bytes, format_rate

if TYPE_CHECKING:
    from qtool.merge.logits import LogitChange


def report_plan(output: Output, planned: PlannedMerge, *, dry_run: bool) -> None:
    """Say what will be merged onto what; for a dry run that is the answer."""
    say = output.answer_line if dry_run else output.note
    base, sources = planned.base, planned.sources
    counts = ", ".join(f"{number} {what}" for what, number in sources.count().most_common())
    weights_bytes = sum(shard.weights_bytes for shard in planned.shards)
    num_files = len(planned.shards)
    name = short_name(base.checkpoint)
    say(f"plan     {planned.adapter.place} → {name} · {planned.precision}")
    say(f"         onto the {base.onto} weights ({base.reason})")
    say(f"         {counts}")
    files = f"{num_files} file{'s' * (num_files != 1)}"
    say(f"         {format_bytes(weights_bytes)} in {files}")
    if sources.untied:
        say(f"         {sources.untied} is no longer tied, as in training")
    if planned.adapter.tokenizer_files:
        say("         the tokenizer is the adapter's")
    if planned.quant_plan is not None:
        say(f"backend  {planned.chosen.backend.name} ({planned.chosen.reason})")
    if dry_run:
        output.document(_dry_run_document(planned))


def report_result(
    output: Output,
    planned: PlannedMerge,
    result: QuantizeResult,
    codes: ChangedCodes | None,
    checked: LogitCheck | None,
) -> None:
    """Say what was written, and what it does to the logits."""
    change = checked.change if checked else None
    size = format_bytes(result.output_bytes)
    if result.read_bytes:
        rate = format_rate(result.read_bytes, result.seconds)
        done = "complete (continued)" if result.resumed else "complete"
        output.answer_line(f"{done}, {size} in {result.seconds:.1f} s ({rate})")
    else:
        output.answer_line(f"complete already, {size}; nothing to do")
    if codes is not None:
        share = f"{codes.changed:,} of {codes.compared:,} ({codes.changed / codes.compared:.2%})"
        output.answer_line(f"{share} of the adapted weights' codes differ from the base's")
    if change is not None:
        output.answer_line(_change_line(change))
    peak = format_bytes(result.peak_host_bytes)
    if checked is not None and change is not None:
        peak += f" merging, {format_bytes(checked.peak_host_bytes)} checking"
    output.note(f"peak memory {peak}, without the page cache")
    output.note(f"next: qtool generate {planned.request.output}")
    output.document(_document(planned, result, codes, checked))


def _change_line(change: LogitChange) -> str:
    share = f" ({change.merging / change.adapter:.2%})" if change.adapter else ""
    return (
        f"logits differ from base + adapter by at most {change.merging:.4g}, where the adapter "
        f"moves them by up to {change.adapter:.4g}{share}; another token is likeliest after "
        f"{change.num_other_choices} of {change.num_tokens}"
    )


def _dry_run_document(planned: PlannedMerge) -> dict[str, Any]:
    tensors = [tensor for shard in planned.shards for tensor in shard.tensors]
    return {
        **_common_fields(planned),
        "output_bytes": sum(encode_header(s.outputs()).file_bytes for s in planned.shards),
        "weights_bytes": sum(shard.weights_bytes for shard in planned.shards),
        "seconds": 0,
        "resumed": False,
        "peak_host_bytes": 0,
        "peak_device_bytes": 0,
        "plan": [_plan_entry(planned, tensor) for tensor in tensors],
    }


def _plan_entry(planned: PlannedMerge, tensor: TensorPlan) -> dict[str, Any]:
    source = planned.sources.by_name.get(tensor.source.name)
    return {
        "name": tensor.source.name,
        "action": tensor.action,
        "dtype": tensor.source.dtype,
        "shape": list(tensor.source.shape),
        "input_bytes": tensor.source.num_bytes,
        "output_bytes": tensor.output_bytes,
        "reason": tensor.reason if source is None else source.reason,
    }


def _document(
    planned: PlannedMerge,
    result: QuantizeResult,
    codes: ChangedCodes | None,
    checked: LogitCheck | None,
) -> dict[str, Any]:
    change = checked.change if checked else None
    checking_bytes = checked.peak_host_bytes if checked else 0
    return {
        **_common_fields(planned),
        "output_bytes": result.output_bytes,
        "weights_bytes": result.weights_bytes,
        "seconds": result.seconds,
        "resumed": result.resumed,
        "changed_codes": None if codes is None else codes.changed,
        "compared_codes": None if codes is None else codes.compared,
        "max_logit_change": None if change is None else change.merging,
        "adapter_logit_change": None if change is None else change.adapter,
        "prompt_tokens": None if change is None else change.num_tokens,
        "other_choices": None if change is None else change.num_other_choices,
        "peak_host_bytes": max(result.peak_host_bytes, checking_bytes),
        "peak_device_bytes": result.peak_device_bytes,
    }


def _common_fields(planned: PlannedMerge) -> dict[str, Any]:
    counts = planned.sources.count()
    return {
        "output": str(planned.request.output),
        "quant": planned.precision,
        "onto": planned.base.onto,
        "onto_reason": planned.base.reason,
        "base": planned.base.checkpoint.id,
        "backend": planned.chosen.backend.name,
        "backend_reason": planned.chosen.reason,
        "input_bytes": planned.input_bytes,
        "tensors": {what: counts[what] for what in ("merged", "replaced", "dequantized", "copied")},
    }
