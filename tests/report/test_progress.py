"""Progress in logs: few lines, however long the work is and however many things it does."""

from __future__ import annotations

import pytest

from qtool.events import Advanced, Event, Finished, Started
from qtool.report import progress
from qtool.report.output import Output

GB = 10**9


class Clock:
    """Goes on by a second with each piece of work."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines_of(
    num_s: int, clock: Clock, capsys: pytest.CaptureFixture[str], **flags: bool
) -> list[str]:
    """What a stage of `num_s` seconds writes, which finishes a tensor in each."""
    output = Output("quantize", color="never", **flags)
    with output.progress() as on_event:
        on_event(Started("quantize", num_s * GB))
        for number in range(num_s):
            clock.now_s += 1
            event: Event = Advanced(GB, f"layer.{number}")
            on_event(event)
        on_event(Finished("quantize"))
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err.splitlines()


def test_long_work_says_how_far_it_is_ever_more_seldom(clock, capsys) -> None:
    lines = lines_of(90, clock, capsys)
    assert [line.split(" after ")[1] for line in lines[:-1]] == ["10 s", "20 s", "40 s", "80 s"]
    assert lines[0] == "quantize: 9.31 GiB of 83.82 GiB after 10 s"
    assert lines[-1] == "quantize: 83.82 GiB in 90.0 s (1.00 GB/s)"


def test_verbose_says_it_sooner_and_what_is_in_work(clock, capsys) -> None:
    lines = lines_of(9, clock, capsys, verbose=True)
    assert [line.rpartition(" after ")[2] for line in lines[:-1]] == [
        "2 s, layer.1",
        "4 s, layer.3",
        "8 s, layer.7",
    ]


def test_short_work_is_told_with_verbose_only(clock, capsys) -> None:
    assert lines_of(0, clock, capsys) == []
    assert lines_of(0, clock, capsys, verbose=True) == ["quantize: 0 B in 0.0 s"]
    assert len(lines_of(1, clock, capsys)) == 1


def test_what_is_no_transfer_has_a_share_and_no_rate(clock, capsys) -> None:
    with Output("bench", color="never").progress() as on_event:
        on_event(Started("measure", 80 * GB, is_transfer=False))
        clock.now_s += 12
        on_event(Advanced(20 * GB, "qtool"))
        on_event(Finished("measure"))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["measure: 25% after 12 s", "measure: 12.0 s"]


def test_what_was_there_already_is_done_but_makes_no_rate(clock, capsys) -> None:
    with Output("quantize", color="never").progress() as on_event:
        on_event(Started("quantize", 80 * GB, done_bytes=60 * GB))
        clock.now_s += 10
        on_event(Advanced(20 * GB, "layer.7"))
        on_event(Finished("quantize"))
    assert capsys.readouterr().err.splitlines() == [
        "quantize: 74.51 GiB of 74.51 GiB after 10 s",
        "quantize: 18.63 GiB in 10.0 s (2.00 GB/s)",
    ]


@pytest.mark.parametrize("flags", [{"quiet": True}, {"json_mode": True}])
def test_quiet_and_json_say_nothing(flags, clock, capsys) -> None:
    assert lines_of(90, clock, capsys, verbose=True, **flags) == []
