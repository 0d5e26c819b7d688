"""The bar on a terminal: one line at any width, and rates that somebody measured."""

from __future__ import annotations

import io
import re
import time
import warnings
from collections.abc import Iterator

import pytest
from rich.console import Console

from qtool.events import Advanced, Event, Finished, Started
from qtool.report.bar import STEP_REFRESHES_PER_S, show_bar, show_step

GIB = 1 << 30
NAME = "model.language_model.layers.14.self_attn.q_proj.weight"


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def drawn(width: int, *events: Event | float) -> list[str]:
    """The lines as the bar leaves them; a number among `events` is seconds that pass."""
    clock = Clock()
    console, file = terminal(width, clock)
    with show_bar(console) as on_event:
        for event in events:
            if isinstance(event, float):
                clock.now_s += event
            else:
                on_event(event)
        file.truncate(0)
    return lines_of(file)


def terminal(width: int, clock: Clock) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=width, get_time=clock), file


def lines_of(file: io.StringIO) -> list[str]:
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\0", "")
    return [line.rstrip() for line in re.split(r"[\r\n]+", shown) if line.strip()]


@pytest.mark.parametrize("width", [60, 80, 100, 140])
@pytest.mark.parametrize("stage", ["quantize", f"measure {'a long stage ' * 9}"])
def test_it_is_one_line_at_any_width(width: int, stage: str) -> None:
    started = Started(stage, 1500 * GIB)
    (line,) = drawn(width, started, 10.0, Advanced(1011 * GIB, NAME))
    assert len(line) <= width and line.startswith(stage[:10])


def test_it_shows_the_end_of_a_name_and_what_is_measured() -> None:
    started = Started("quantize", 8 * GIB)
    (line,) = drawn(80, started, 3.0, Advanced(1 * GIB, "other"), 1.0, Advanced(1 * GIB, NAME))
    figures = "2.00/8.00 GiB  0.54 GB/s  0:12"
    assert re.fullmatch(rf"quantize [━╸╺]{{16}} {figures} ….*q_proj\.weight", line)
    assert len(line) == 80


def test_no_rate_is_shown_of_what_was_told_at_once() -> None:
    started = Started("quantize", 8 * GIB)
    (line,) = drawn(80, started, 0.1, Advanced(1 * GIB), Advanced(1 * GIB))
    assert line.endswith("2.00/8.00 GiB")


def test_what_was_there_already_makes_no_rate() -> None:
    started = Started("quantize", 8 * GIB, done_bytes=6 * GIB)
    (line,) = drawn(80, started, 2.0, Advanced(1 * GIB))
    assert line.endswith("7.00/8.00 GiB  0.54 GB/s  0:02")


def test_bytes_that_only_weigh_are_not_shown() -> None:
    started = Started("measure", 8 * GIB, is_transfer=False)
    (line,) = drawn(80, started, 100.0, Advanced(1 * GIB, "qtool"))
    assert re.fullmatch(r"measure [━╸╺]{16} 12%  11:40 qtool", line)


def test_a_stage_that_is_over_makes_room_for_the_next() -> None:
    def stages() -> Iterator[Event]:
        for name in ("first", "second"):
            yield Started(name, GIB)
            yield Advanced(GIB)
            yield Finished(name)
        yield Started("third", GIB)

    (line,) = drawn(80, *stages())
    assert line.startswith("third ")


def test_a_stage_without_bytes_has_a_clock() -> None:
    (line,) = drawn(80, Started("quantize", 0), 2.0)
    assert re.fullmatch(r"quantize [━╸╺]{16} 2\.0 s", line)


def test_a_step_has_a_clock_and_goes_with_its_line() -> None:
    clock = Clock()
    console, file = terminal(80, clock)
    with show_step(console, "loading PyTorch"):
        clock.now_s += 1.4
        time.sleep(3 / STEP_REFRESHES_PER_S)
        file.truncate(0)
        clock.now_s += 1
        time.sleep(3 / STEP_REFRESHES_PER_S)
        drawn_meanwhile = lines_of(file)
    assert drawn_meanwhile[0] == "loading PyTorch 2.4 s"
    assert file.getvalue().endswith("\x1b[2K")  # its line is cleared


def test_warnings_stand_above_a_step() -> None:
    console, file = terminal(80, Clock())
    shown_before = warnings.showwarning
    with warnings.catch_warnings(), show_step(console, "loading PyTorch"):
        warnings.simplefilter("always")
        warnings.warn("[old] name", FutureWarning, stacklevel=1)
        time.sleep(2 / STEP_REFRESHES_PER_S)
        lines = lines_of(file)
    (told,) = (line for line in lines if "FutureWarning: [old] name" in line)
    assert told.startswith(__file__)
    assert lines[-1].startswith("loading PyTorch ")
    assert warnings.showwarning is shown_before
