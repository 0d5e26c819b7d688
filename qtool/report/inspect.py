"""How `qtool inspect` looks, and its JSON document."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qtool.checkpoint.other_files import MANIFEST
from qtool.inspection import (
    Comparison,
    Difference,
    InspectedTensor,
    Inspection,
    LayerError,
    Problem,
    Total,
    Verification,
)
from qtool.inspection.command import InspectionResult
from qtool.report.estimate import new_table
from qtool.report.output import Output
from qtool.report.units import format_bytes, format_count

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

NUM_WORST_LAYERS: Final = 5
NUM_PROBLEMS_SHOWN: Final = 20
UNRELATED_ERROR: Final = 0.5  # four bits cost a tenth, and weights of another model more than all


def report_inspection(output: Output, result: InspectionResult, *, tensors: bool) -> None:
    """Print everything that was found; all layers with --tensors or --verbose."""
    in_full = tensors or output.verbose
    if result.inspection is not None:
        _report_summary(output, result.inspection, tensors=tensors)
    if result.comparison is not None:
        _report_comparison(output, result.comparison, str(result.against), in_full=in_full)
    if result.verification is not None:
        _report_verification(output, result.verification, Path(result.path))
    output.document(inspection_document(result, tensors=tensors))


def inspection_document(result: InspectionResult, *, tensors: bool) -> dict[str, Any]:
    """The fields of the contract; of a folder that could not be described they are null."""
    document = _summary_fields(result.path, result.inspection)
    if tensors:
        found = result.inspection.tensors if result.inspection else ()
        document["tensors"] = [_tensor_fields(tensor) for tensor in found]
    if result.comparison is not None:
        document["errors"] = [_error_fields(error) for error in result.comparison.errors]
        document["copied"] = {
            "equal": result.comparison.num_equal,
            "different": [_difference_fields(it) for it in result.comparison.differences],
        }
    if result.verification is not None:
        document["verify"] = {
            "ok": result.verification.ok,
            "rules": result.verification.num_rules,
            "problems": [asdict(problem) for problem in result.verification.problems],
        }
    return document


# -- JSON ------------------------------------------------------------------------------------------


def _summary_fields(path: str, inspection: Inspection | None) -> dict[str, Any]:
    return {
        "path": path,
        "quant_method": inspection.quant_method if inspection else None,
        "quant": inspection.quant if inspection else None,
        "compute_dtype": inspection.compute_dtype if inspection else None,
        "parameters": inspection.parameters if inspection else None,
        "weights_bytes": inspection.weights_bytes if inspection else None,
        "bits_per_parameter": inspection.bits_per_parameter if inspection else None,
        "dtypes": {
            dtype: {"tensors": total.num_tensors, "bytes": total.num_bytes}
            for dtype, total in (inspection.dtypes if inspection else {}).items()
        },
        "precisions": {
            precision: {
                "tensors": total.num_tensors,
                "parameters": total.num_parameters,
                "bytes": total.num_bytes,
            }
            for precision, total in (inspection.precisions if inspection else {}).items()
        },
    }


def _tensor_fields(tensor: InspectedTensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "bytes": tensor.num_bytes,
        "quant": tensor.quant,
        "shard": tensor.shard,
    }


def _error_fields(error: LayerError) -> dict[str, Any]:
    return {"name": error.name, **_measures(error), "precision": error.precision}


def _difference_fields(difference: Difference) -> dict[str, Any]:
    """With the measures of an error where it has one."""
    error = difference.error
    measures = _measures(error) if error is not None else {}
    return {"name": difference.name, "reason": difference.reason, **measures}


def _measures(error: LayerError) -> dict[str, float | None]:
    """Infinite and undefined values are null: JSON has no words for them."""
    measures = {
        "mse": error.mse,
        "relative_error": error.relative_error,
        "max_abs_error": error.max_abs_error,
        "sqnr_db": error.sqnr_db,
    }
    return {key: value if math.isfinite(value) else None for key, value in measures.items()}


# -- words -----------------------------------------------------------------------------------------


def _report_summary(output: Output, inspection: Inspection, *, tensors: bool) -> None:
    output.answer(_headline(inspection), "", _precision_table(inspection))
    if len(inspection.dtypes) > len(inspection.precisions):  # packed weights have statistics
        output.answer("", _dtype_table(inspection.dtypes))
    if tensors:
        output.answer("", _tensor_table(inspection.tensors))
    for note in inspection.notes:
        output.warn(note)


def _headline(inspection: Inspection) -> Text:
    from rich.text import Text

    facts = [inspection.quant or "unknown precision", printable(inspection.quant_method or "")]
    if inspection.compute_dtype:
        facts.append(f"compute dtype {printable(inspection.compute_dtype)}")
    sizes = [
        f"{format_count(inspection.parameters)} parameters",
        f"{format_bytes(inspection.weights_bytes)} of weights",
    ]
    if inspection.bits_per_parameter is not None:
        sizes.append(f"{inspection.bits_per_parameter:.2f} bits per parameter")
    return Text.assemble(
        (inspection.path, "bold"),
        "\n",
        " · ".join(fact for fact in facts if fact),
        "\n",
        " · ".join(sizes),
    )


def _precision_table(inspection: Inspection) -> Table:
    rows = [
        (
            precision,
            str(total.num_tensors),
            format_count(total.num_parameters),
            format_bytes(total.num_bytes),
            f"{100 * total.num_bytes / max(1, inspection.weights_bytes):.1f} %",
        )
        for precision, total in inspection.precisions.items()
    ]
    return _table("precision", ("weights", "parameters", "size", "share"), rows)


def _dtype_table(dtypes: Mapping[str, Total]) -> Table:
    rows = [
        (dtype, str(total.num_tensors), format_bytes(total.num_bytes))
        for dtype, total in dtypes.items()
    ]
    return _table("stored as", ("tensors", "size"), rows)


def _tensor_table(tensors: Iterable[InspectedTensor]) -> Table:
    """Every tensor in the files' order, statistics below the weight that they belong to."""
    from qtool.report.tables import Name

    statistics: dict[str, list[InspectedTensor]] = defaultdict(list)
    weights: list[InspectedTensor] = []
    for tensor in tensors:
        (statistics[tensor.belongs_to] if tensor.belongs_to else weights).append(tensor)
    table = new_table()
    table.add_column("tensor")
    for name in ("dtype", "shape"):
        table.add_column(name, no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("quant", no_wrap=True)
    for weight in weights:
        table.add_row(Name(weight.name), *_tensor_cells(weight))
        for tensor in statistics[weight.name]:
            name = f"  .{_suffix(tensor.name, weight.name)}"
            table.add_row(Name(name), *_tensor_cells(tensor), style="dim")
    return table


def _tensor_cells(tensor: InspectedTensor) -> tuple[str, ...]:
    shape = "×".join(map(str, tensor.shape)) or "scalar"
    return tensor.dtype, shape, format_bytes(tensor.num_bytes), tensor.quant or ""


def _suffix(name: str, weight_name: str) -> str:
    """What a statistic adds to its weight's name; INT8's replaces the last part of it."""
    module = weight_name.removesuffix("weight")
    return name.removeprefix(f"{weight_name}.").removeprefix(module)


def _report_comparison(
    output: Output, comparison: Comparison, against: str, *, in_full: bool
) -> None:
    from rich.text import Text

    errors = sorted(comparison.errors, key=_badness, reverse=True)
    changes = [it.error for it in comparison.differences if it.error is not None]
    heading = "error against " if errors or changes else "beside "
    output.answer("", Text.assemble((heading, "bold"), against))
    if errors:
        if all(error.relative_error > UNRELATED_ERROR for error in errors):
            least = f"{100 * errors[-1].relative_error:.0f} %"
            output.warn(
                f"the error is {least} or more in every layer: {against} is hardly the original"
            )
        output.answer(_kind_table(errors), "")
        shown = errors if in_full else errors[:NUM_WORST_LAYERS]
        title = "layer" if len(shown) == len(errors) else f"worst {len(shown)} of {len(errors)}"
        output.answer(_error_table(title, shown), "")
    if changes:
        _report_changes(output, sorted(changes, key=_badness, reverse=True), in_full=in_full)
    other = "other " if errors or changes else ""
    output.answer(f"{comparison.num_equal} {other}tensors equal the original byte for byte")
    unmeasured = [it for it in comparison.differences if it.error is None]
    for line in _difference_lines(unmeasured, in_full=in_full):
        output.answer(line)


def _report_changes(output: Output, changes: Sequence[LayerError], *, in_full: bool) -> None:
    """Tensors of floats that are as they were but for their values, a merged adapter's say."""
    output.answer(_kind_table(changes, title="changed", unit="tensors"), "")
    if in_full:
        output.answer(_error_table("changed tensor", changes), "")


def _difference_lines(differences: Sequence[Difference], *, in_full: bool) -> Iterator[Text]:
    """One line per reason, or with `in_full` per tensor."""
    from rich.text import Text

    by_reason: dict[str, list[str]] = defaultdict(list)
    for difference in differences:
        by_reason[difference.reason].append(difference.name)
    for reason, names in by_reason.items():
        head = f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'}: {reason}"
        yield Text.assemble(("differs  ", "yellow"), head)
        for name in names if in_full else names[:1]:
            more = (
                "" if in_full or len(names) == 1 else f" and {len(names) - 1} more (-v lists them)"
            )
            yield Text(f"         {name}{more}")


def _badness(error: LayerError) -> float:
    """For sorting: an undefined error is the worst."""
    return math.inf if math.isnan(error.relative_error) else error.relative_error


def _kind_table(
    errors: Sequence[LayerError], *, title: str = "kind", unit: str = "layers"
) -> Table:
    kinds: dict[str, list[LayerError]] = defaultdict(list)
    for error in errors:
        kinds[error.kind].append(error)
    rows = []
    for kind, group in kinds.items():
        mean = sum(error.relative_error for error in group) / len(group)
        mean_sqnr_db = sum(error.sqnr_db for error in group) / len(group)
        rows.append((
            kind,
            str(len(group)),
            f"{100 * mean:.2f} %",
            f"{100 * max(map(_badness, group)):.2f} %",
            f"{max(error.max_abs_error for error in group):.3g}",
            f"{mean_sqnr_db:.1f} dB",
        ))  # fmt: skip
    return _table(title, (unit, "mean error", "worst", "max abs", "SQNR"), rows)


def _error_table(title: str, errors: Iterable[LayerError]) -> Table:
    rows = [
        (
            error.name.removesuffix(".weight"),
            f"{100 * error.relative_error:.2f} %",
            f"{error.mse:.2e}",
            f"{error.max_abs_error:.3g}",
            f"{error.sqnr_db:.1f} dB",
        )
        for error in errors
    ]
    return _table(title, ("error", "MSE", "max abs", "SQNR"), rows)


def _report_verification(output: Output, verification: Verification, folder: Path) -> None:
    if verification.ok:
        layers = f", {verification.num_layers} quantized layers" if verification.num_layers else ""
        output.answer(
            f"\n[bold green]ok[/bold green]: all {verification.num_rules} rules hold{layers}"
        )
        return
    problems = verification.problems
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    output.answer(f"\n[bold red]not ok[/bold red]: {count}")
    limit = len(problems) if output.verbose else NUM_PROBLEMS_SHOWN
    for problem in problems[:limit]:
        output.answer(_problem_text(problem))
    if len(problems) > limit:
        output.answer(f"  and {len(problems) - limit} more; -v lists them all")
    output.note(f"next: {_way_out(problems, folder)}")


def _way_out(problems: Iterable[Problem], folder: Path) -> str:
    """--restart overwrites only what a manifest lists."""
    is_listed = (folder / MANIFEST).is_file() and all(it.file != MANIFEST for it in problems)
    if is_listed:
        return "write it anew, with --restart and the command that made it, or fetch it again"
    return "move it away, then write it anew with the command that made it, or fetch it again"


def _problem_text(problem: Problem) -> Text:
    from rich.text import Text

    place = ": ".join(part for part in (problem.file, problem.tensor) if part)
    return Text.assemble(
        ("✗ ", "red"),
        (problem.rule, "bold"),
        f"  {printable(place)}\n    expected  {printable(problem.expected)}"
        f"\n    found     {printable(problem.found)}",
    )


def printable(text: str) -> str:
    """`text` from a file that nobody vouches for, without what would steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _table(first: str, others: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Names left, numbers right."""
    from rich.text import Text

    from qtool.report.tables import Name

    table = new_table()
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(Name(row[0]), *map(Text, row[1:]))  # names may hold what would be markup
    return table
