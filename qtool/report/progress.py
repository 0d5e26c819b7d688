"""Progress of byte-counted work: one bar with bytes, GB/s and time left, or plain lines.

The bar appears only when stderr is a terminal; elsewhere each stage that takes
a second or more prints one line when it ends, and a long one says now and then
how far it is. With --verbose all stages have their line, and long ones say so
sooner, and what is in work; names are not listed one by one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qtool.events import Advanced, Event, Finished, Note, OnEvent, Started
from qtool.report.units import format_bytes, format_rate

if TYPE_CHECKING:
    from qtool.report.output import Output

WORTH_A_LINE_S = 1.0  # quicker stages are not worth a line in a log
WORTH_A_RATE_BYTES = 64 << 20  # of less most time goes to something else
# When a stage first says how far it is; then after twice as long, and so on: logs stay short.
FIRST_LINE_S = {False: 10.0, True: 2.0}  # by --verbose


@contextmanager
def show_progress(output: Output) -> Iterator[OnEvent]:
    """Yield an `on_event` for the length of the work."""
    if output.is_silent:
        yield output.on_note
    elif output.has_bar:
        from qtool.report.bar import show_bar

        with show_bar(output.stderr) as on_stage:

            def on_event(event: Event) -> None:
                on_stage(event)
                output.on_note(event)

            yield on_event
    else:
        yield _LineEvents(output)


class _LineEvents:
    """Prints one line per finished stage, and few while it lasts."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._stage = Started("", 0)
        self._start_s = 0.0
        self._next_line_s = 0.0
        self._done_bytes = 0

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self._stage = event
                self._start_s, self._done_bytes = time.perf_counter(), 0
                self._next_line_s = FIRST_LINE_S[self._output.verbose]
            case Advanced(num_bytes, item):
                self._done_bytes += num_bytes
                self._say_how_far(item, time.perf_counter() - self._start_s)
            case Finished(stage):
                self._report(stage, time.perf_counter() - self._start_s)
            case Note():
                self._output.on_note(event)

    def _say_how_far(self, item: str, seconds: float) -> None:
        if seconds < self._next_line_s:
            return
        self._next_line_s = 2 * seconds
        in_work = f", {item}" if item and self._output.verbose else ""
        self._output.note(f"{self._stage.stage}: {self._how_far()} after {seconds:.0f} s{in_work}")

    def _how_far(self) -> str:
        done_bytes, total_bytes = self._stage.done_bytes + self._done_bytes, self._stage.total_bytes
        if self._stage.is_transfer:
            return f"{format_bytes(done_bytes)} of {format_bytes(total_bytes)}"
        return f"{done_bytes / total_bytes:.0%}"

    def _report(self, stage: str, seconds: float) -> None:
        line = f"{stage}: {seconds:.1f} s"
        if self._stage.is_transfer:
            line = f"{stage}: {format_bytes(self._done_bytes)} in {seconds:.1f} s"
            if self._done_bytes >= WORTH_A_RATE_BYTES:
                line += f" ({format_rate(self._done_bytes, seconds)})"
        if seconds >= WORTH_A_LINE_S and self._stage.total_bytes:  # else a note has told of it
            self._output.note(line)
        else:
            self._output.detail(line)
