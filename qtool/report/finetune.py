"""`qtool finetune` in words: the plan, the steps as they pass, and what was learned."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qtool.events import OnEvent
from qtool.finetune.plan import PlannedRun
from qtool.finetune.records import FinetuneResult, OnProgress, Progress
from qtool.finetune.run import Prepared, is_main_process
from qtool.planner.records import MemoryPlan
from qtool.report.estimate import GROUPS, estimate_document, shown_name
from qtool.report.loss_curve import loss_svg, loss_text
from qtool.report.output import Output
from qtool.report.units import format_bytes, format_count, format_done
from qtool.report.whole_files import write_whole

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

CURVE_NAME: Final = "loss.svg"
REFRESHES_PER_S: Final = 4
LINE_EVERY_S: Final = 30.0  # in a log
WIDE_COLUMNS: Final = 120


def report_plan(output: Output, prepared: Prepared, *, dry_run: bool) -> None:
    """Say what will be trained and what it takes; for a dry run that is the answer."""
    say = output.answer_line if dry_run else output.note
    for line in _plan_lines(prepared):
        say(line)
    if dry_run:
        rows = [file._asdict() for file in prepared.files]
        output.document({**estimate_document(prepared.planned.estimate), "data": rows})


def report_result(output: Output, prepared: Prepared, result: FinetuneResult) -> None:
    """Draw the loss, then say what was written and what it took."""
    _write_curve(result)
    planned = prepared.planned
    for line in loss_text([step.loss for step in result.history]):
        output.note(line)
    held_out = "" if result.eval_loss is None else f", held out {result.eval_loss:.4f}"
    trained = format_count(result.trainable_parameters)
    kind = "checkpoint" if result.method == "full" else "adapter"
    output.answer_line(
        f"{result.output}: {kind}, {trained} parameters trained in {_steps(result.steps)}, loss "
        f"{result.first_loss:.4f} → {result.final_loss:.4f}{held_out}"
    )
    for line in _statistics(result):
        output.note(line)
    if result.method == "full":
        output.note(f"next: qtool generate {result.output} PROMPT")
    else:
        # The base that it learned on: `generate` would take one that is not packed as it is.
        quant = f" --quant {planned.loads_quant}" if planned.loads_quant else ""
        model = f"{planned.request.model} PROMPT{quant}"
        output.note(f"next: qtool generate {model} --adapter {result.output}")
    output.document(result.to_dict())


@contextmanager
def run_progress(output: Output, prepared: Prepared) -> Iterator[tuple[OnEvent, OnProgress]]:
    """Yield what shows loading, and each step: a bar on a terminal, elsewhere lines."""
    if output.is_silent or not is_main_process():
        yield output.on_note, lambda progress: None
        return
    planned = prepared.planned
    memory_bytes = planned.plan.allocated_peak_bytes if planned.is_known else None
    with ExitStack() as shown:
        on_event = shown.enter_context(output.progress())
        if output.has_bar:
            yield on_event, _Bar(shown, output.stderr, memory_bytes)
        else:
            every_s = 0.0 if output.verbose else LINE_EVERY_S
            yield on_event, _Lines(output, memory_bytes, every_s=every_s)


# -- steps ----------------------------------------------------------------------------------------


class _Bar:
    """One line that is drawn again; with the first step it takes the place of what is `shown`."""

    def __init__(self, shown: ExitStack, console: Console, planned_bytes: int | None) -> None:
        self._shown = shown
        self._console = console
        self._planned_bytes = planned_bytes
        self._bar: Bar | None = None

    def __call__(self, progress: Progress) -> None:
        if self._bar is None:
            self._shown.close()
            self._bar = self._shown.enter_context(_new_bar(self._console))
            self._bar.add_task("training", total=progress.total_steps, item="")
        [task] = self._bar.task_ids
        item = " · ".join(_parts(progress, self._planned_bytes))
        self._bar.update(task, completed=progress.step, item=item)


class _Lines:
    """A line for the first and the last step, and one every `every_s` seconds."""

    def __init__(self, output: Output, planned_bytes: int | None, *, every_s: float) -> None:
        self._output = output
        self._planned_bytes = planned_bytes
        self._every_s = every_s
        self._last_s: float | None = None
        self._last_step = 0

    def __call__(self, progress: Progress) -> None:
        now_s = time.perf_counter()
        is_due = self._last_s is None or now_s - self._last_s >= self._every_s
        is_last = progress.step == progress.total_steps
        if progress.step == self._last_step or not (is_due or is_last):
            return
        self._last_s, self._last_step = now_s, progress.step
        parts = " · ".join(_parts(progress, self._planned_bytes))
        self._output.note(f"step {progress.step:,}/{progress.total_steps:,} · {parts}")


def _new_bar(console: Console) -> Bar:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30 if console.width >= WIDE_COLUMNS else 8),
        MofNCompleteColumn(),
        TextColumn("{task.fields[item]}"),
        console=console,
        refresh_per_second=REFRESHES_PER_S,
        transient=True,
    )


def _parts(progress: Progress, planned_bytes: int | None) -> Iterator[str]:
    held_out = "" if progress.eval_loss is None else f" ({progress.eval_loss:.3f})"
    yield f"loss {progress.loss:.3f}{held_out}"
    yield f"{progress.tokens_per_s:,.0f} tok/s"
    if progress.memory_bytes is not None:
        held = progress.memory_bytes
        yield format_bytes(held) if planned_bytes is None else format_done(held, planned_bytes)
    yield f"{_duration(progress.left_s)} left"


def _duration(seconds: float) -> str:
    """ "42 s", "12 min", "3 h 05"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d}"


# -- before and after -----------------------------------------------------------------------------


def _plan_lines(prepared: Prepared) -> Iterator[str]:
    planned = prepared.planned
    request, facts = planned.request, planned.model.facts
    revision = f"@{facts.revision[:7]}" if facts.revision else ""
    base = planned.quant or planned.plan.quant
    how = f"{request.method} on {base}" if request.method != "full" else f"full, {base}"
    rank = "" if request.method == "full" else f", r {request.lora.r}"
    yield (
        f"plan     {shown_name(facts.id)}{revision} ({facts.architecture or 'unknown'}) · {how}"
        f"{rank}, {request.training.optimizer}"
    )
    accum, batch = request.training.grad_accum, request.training.batch
    yield (
        f"         steps of {accum} x {batch} sequence{'s' * (accum * batch != 1)} of at most "
        f"{planned.max_length:,} tokens"
    )
    if planned.is_known:
        yield f"memory   {_memory_text(planned)}"
    for note in planned.plan.notes:
        if "--runtime" not in note:  # which `estimate` has
            yield f"         {note}"
    rows = " + ".join(f"{file.rows:,}" for file in prepared.files)
    counted = "" if prepared.rows.kind == "running text" else f", {rows} row{'s' * (rows != '1')}"
    yield f"data     {prepared.rows.source}: {prepared.rows.kind}{counted}"


def _steps(count: int) -> str:
    return f"{count:,} step{'s' * (count != 1)}"


def _memory_text(planned: PlannedRun) -> str:
    plan = planned.plan
    parts = ", ".join(_group_texts(plan))
    text = f"{format_bytes(plan.peak_bytes)} at the peak ({parts})"
    for fit in plan.fits:
        verdict = {"yes": "fits", "tight": "just fits", "no": "does not fit"}[fit.verdict]
        text += f"; {verdict} {format_bytes(fit.usable_bytes)} of {fit.gpu.short_name}"
    return text


def _group_texts(plan: MemoryPlan) -> Iterator[str]:
    for name, _, _, members in GROUPS:
        found = [plan.components[member].bytes for member in members if member in plan.components]
        if found:
            yield f"{name} {format_bytes(sum(found))}"


def _statistics(result: FinetuneResult) -> Iterator[str]:
    resumed = result.resumed_from_step
    since = ""
    if resumed is not None:
        since = f", resumed after step {resumed:,}; {result.tokens:,} tokens in all"
    yield (
        f"{result.tokens - result.earlier_tokens:,} tokens, {result.tokens_per_s:,.0f} tok/s, "
        f"{_duration(result.seconds)} on {result.device}{since}"
    )
    peak, planned = result.allocated_peak_bytes, result.planned_allocated_peak_bytes
    if peak is not None:
        beside = "" if planned is None else f", {format_bytes(planned, beside=peak)} planned"
        yield f"{format_bytes(peak)} allocated at the peak{beside}"


def _write_curve(result: FinetuneResult) -> None:
    points = [(step.step, step.loss) for step in result.history]
    svg = loss_svg(points, result.eval_history, title=Path(result.output).name)
    write_whole(Path(result.output) / CURVE_NAME, svg.encode())
