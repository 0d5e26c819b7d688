"""`qtool quantize` in words: the plan, and what the run did."""

from __future__ import annotations

from collections import Counter
from typing import Any

from qtool.quantize.command import PlannedRequest
from qtool.quantize.plan import QuantPlan, TensorPlan
from qtool.quantize.run import QuantizeResult, model_name, output_file_bytes
from qtool.report.estimate import new_table
from qtool.report.output import Output
from qtool.report.units import format_bytes, format_rate
from qtool.runtime.tokenizer_files import passes_on_no_tokenizer


def warn_of_plan(output: Output, planned: PlannedRequest) -> None:
    """Say what the user may not have meant."""
    for words in planned.plan.warnings():
        output.warn(words)
    if passes_on_no_tokenizer(planned.checkpoint, planned.plan.architecture):
        output.warn(
            f"{planned.checkpoint.id} brings no tokenizer along, so the output has none; "
            "`qtool generate` will need one there"
        )


def report_plan(output: Output, planned: PlannedRequest, *, dry_run: bool) -> None:
    """Say what will happen; for a dry run that is the answer, with every tensor."""
    for line in _plan_lines(planned):
        output.note(line)
    if dry_run:
        output.answer(_tensor_table(planned.plan))
        output.answer(_totals(planned.plan))
        output.document(_dry_run_document(planned))


def report_result(output: Output, planned: PlannedRequest, result: QuantizeResult) -> None:
    """Say what was written, how fast, and with how much memory."""
    size = format_bytes(result.output_bytes, beside=planned.plan.input_bytes)
    if result.read_bytes:
        rate = format_rate(result.read_bytes, result.seconds)
        done = "complete (continued)" if result.resumed else "complete"
        what = f"{done}, {size} in {result.seconds:.1f} s ({rate} of input)"
    else:
        what = f"complete already, {size}; nothing to do"
    output.answer_line(what)
    if result.read_bytes:  # else it is that of the imports
        peak = format_bytes(result.peak_host_bytes)
        output.note(f"peak memory {peak}, without the page cache")
    output.note(f"next: qtool inspect {planned.request.output} --verify")
    output.document(_document(planned, result))


def _plan_lines(planned: PlannedRequest) -> list[str]:
    plan, fmt = planned.plan, planned.plan.recipe.format
    checkpoint = planned.checkpoint
    revision = f"@{checkpoint.revision[:7]}" if checkpoint.revision else ""
    model = f"{model_name(checkpoint)}{revision}"
    size = f" · blocksize {fmt.blocksize}" if not fmt.is_int8 else ""
    reasons = Counter(t.reason for t in plan.tensors if t.action == "copy")
    kept = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return [
        f"plan     {model} ({plan.architecture.class_name}) · {fmt.precision}{size}",
        f"         {plan.count('quantize')} of {len(plan.tensors)} tensors → {fmt.precision}, "
        f"{plan.count('copy')} copied ({kept})",
        f"         {_totals(plan)} in {len(plan.shards)} file{'s' * (len(plan.shards) != 1)}",
        f"backend  {planned.chosen.backend.name} ({planned.chosen.reason})",
    ]


def _totals(plan: QuantPlan) -> str:
    bits = 8 * plan.weights_bytes / plan.architecture.num_parameters
    before = plan.input_bytes
    after = format_bytes(plan.weights_bytes, beside=before)
    return f"{format_bytes(before)} → {after}, {bits:.2f} bits per parameter"


def _tensor_table(plan: QuantPlan) -> Any:
    from rich.text import Text

    from qtool.report.tables import Name

    table = new_table()
    table.add_column("tensor")
    table.add_column("shape", no_wrap=True)
    table.add_column("in", justify="right", no_wrap=True)
    table.add_column("out", justify="right", no_wrap=True)
    table.add_column("what and why")
    for tensor in plan.tensors:
        what = plan.recipe.format.precision if tensor.action == "quantize" else "copy"
        table.add_row(
            Name(tensor.source.name),
            "×".join(map(str, tensor.source.shape)) or "scalar",
            format_bytes(tensor.source.num_bytes),
            format_bytes(tensor.output_bytes),
            Text(f"{what}: {tensor.reason}"),
        )
    return table


def _dry_run_document(planned: PlannedRequest) -> dict[str, Any]:
    plan = planned.plan
    return {
        **_common_fields(planned),
        "output_bytes": output_file_bytes(plan),
        "weights_bytes": plan.weights_bytes,
        "seconds": 0,
        "resumed": False,
        "peak_host_bytes": 0,
        "peak_device_bytes": 0,
        "plan": [_plan_entry(tensor) for tensor in plan.tensors],
    }


def _document(planned: PlannedRequest, result: QuantizeResult) -> dict[str, Any]:
    return {
        **_common_fields(planned),
        "output_bytes": result.output_bytes,
        "weights_bytes": result.weights_bytes,
        "seconds": result.seconds,
        "resumed": result.resumed,
        "peak_host_bytes": result.peak_host_bytes,
        "peak_device_bytes": result.peak_device_bytes,
    }


def _common_fields(planned: PlannedRequest) -> dict[str, Any]:
    plan, request = planned.plan, planned.request
    return {
        "output": str(request.output) if request.output else None,
        "quant": plan.recipe.format.precision,
        "backend": planned.chosen.backend.name,
        "backend_reason": planned.chosen.reason,
        "input_bytes": sum(shard.file_bytes for shard in planned.checkpoint.shards),
        "tensors": {"quantized": plan.count("quantize"), "copied": plan.count("copy")},
    }


def _plan_entry(tensor: TensorPlan) -> dict[str, Any]:
    return {
        "name": tensor.source.name,
        "action": tensor.action,
        "dtype": tensor.source.dtype,
        "shape": list(tensor.source.shape),
        "input_bytes": tensor.source.num_bytes,
        "output_bytes": tensor.output_bytes,
        "reason": tensor.reason,
    }
