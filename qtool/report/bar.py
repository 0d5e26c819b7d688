"""The bar of a stage on a terminal: one line at any width, which goes when the stage is over.

    quantize ━━━━━━━━━━━━━━━━ 1.27/6.27 GiB  1.21 GB/s  0:45  …odel.layers.14.mlp.up_proj.weight

What is no transfer shows the share that is done, and no rate; what has no bytes has a clock:

    loading PyTorch 1.4 s
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TextIO

from rich.measure import Measurement
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from qtool.events import Advanced, Event, Finished, OnEvent, Started
from qtool.report.units import format_done, format_rate

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

REFRESHES_PER_S: Final = 8
STEP_REFRESHES_PER_S: Final = 4  # drawing takes time from imports
BAR_WIDTHS: Final = (4, 16)
OTHERS_WIDTH: Final = 64  # that of stage, figures and an end of a name
LONGEST_STAGE: Final = 0.4  # of the width
# Before, a rate says how many tensors were told of at once.
LEAST_RATED_S: Final = 1.0


@contextmanager
def show_bar(console: Console) -> Iterator[OnEvent]:
    """Yield an `on_event` that draws stages; notes are others' affair."""
    least, most = BAR_WIDTHS
    bar_width = max(least, min(most, console.width - OTHERS_WIDTH))
    with Progress(
        TextColumn("{task.description}", markup=False, table_column=_whole()),
        BarColumn(bar_width, table_column=_whole()),
        _Figures(_whole()),
        _Item(),
        console=console,
        refresh_per_second=REFRESHES_PER_S,
        transient=True,
    ) as progress:
        yield _Stages(progress)


@contextmanager
def show_step(console: Console, text: str) -> Iterator[None]:
    """Draw a line for work that cannot say how far it is; warnings meanwhile stand above it."""
    with (
        _warnings_above(console),
        Progress(
            TextColumn("{task.description}", markup=False, table_column=_whole()),
            _Figures(_whole()),
            console=console,
            refresh_per_second=STEP_REFRESHES_PER_S,
            transient=True,
            redirect_stdout=False,  # imported packages keep the streams that they find
            redirect_stderr=False,
        ) as progress,
    ):
        progress.add_task(text, total=None, started=Started(text, 0))
        yield


@contextmanager
def _warnings_above(console: Console) -> Iterator[None]:
    """Python's own go to the console, which knows where its line is."""
    show = warnings.showwarning

    def print_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if file is not None:
            show(message, category, filename, lineno, file, line)
            return
        text = warnings.formatwarning(message, category, filename, lineno, line)
        console.print(text.rstrip(), markup=False, soft_wrap=True)

    warnings.showwarning = print_warning
    try:
        yield
    finally:
        if warnings.showwarning is print_warning:
            warnings.showwarning = show


class _Stages:
    """Feeds the bar; a stage that is over makes room for the next."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self._close()
                self._task = self._progress.add_task(
                    self._fitting(event.stage),
                    total=event.total_bytes or None,  # a bar without an end
                    completed=event.done_bytes,
                    started=event,
                    item="",
                )
            case Advanced(num_bytes, item) if self._task is not None:
                self._progress.update(self._task, advance=num_bytes, item=item)
            case Finished():
                self._close()
            case _:
                pass

    def _fitting(self, stage: str) -> str:
        longest = int(LONGEST_STAGE * self._progress.console.width)
        return stage if len(stage) <= longest else f"{stage[: longest - 1]}…"

    def _close(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None


class _Figures(ProgressColumn):
    """What is done, how fast, and the time that the rest takes at the mean rate so far; of what has
    no bytes, the seconds since it began: that they go on says that it does."""

    def render(self, task: Task) -> Text:
        """Called by rich."""
        started: Started = task.fields["started"]
        done, total, seconds = int(task.completed), started.total_bytes, task.elapsed or 0.0
        if not total:
            return Text(f"{seconds:.1f} s", "dim")
        new = done - started.done_bytes
        figures = [format_done(done, total) if started.is_transfer else f"{done / total:.0%}"]
        if seconds >= LEAST_RATED_S and new:
            if started.is_transfer:
                figures.append(format_rate(new, seconds))
            figures.append(_clock_text((total - done) * seconds / new))
        return Text("  ".join(figures))


class _Item(ProgressColumn):
    """What is in work, in the room that the others leave."""

    def render(self, task: Task) -> _End:
        """Called by rich."""
        return _End(task.fields["item"])


@dataclass(frozen=True, slots=True)
class _End:
    """The end of a name, where names differ, on a single line."""

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Called by rich with the width at hand."""
        room = options.max_width
        text = self.text if len(self.text) <= room else f"…{self.text[len(self.text) - room + 1 :]}"
        yield Text(text[:room], "dim", no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """The least and the greatest width of use."""
        return Measurement(0, len(self.text))


def _whole() -> Column:
    """A column that is not folded, and narrower only where there is no other way."""
    return Column(no_wrap=True)


def _clock_text(seconds: float) -> str:
    """ "0:45", "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
