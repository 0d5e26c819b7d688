"""What is seen while a text is made."""

from __future__ import annotations

import time

import pytest

from qtool.report.bar import STEP_REFRESHES_PER_S
from qtool.report.generate import writing_answer
from qtool.report.output import Output


def test_a_clock_runs_until_the_first_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with writing_answer(Output("generate", color="always")) as write:
        time.sleep(2 / STEP_REFRESHES_PER_S)
        before = capsys.readouterr()
        assert before.out == "" and before.err.count("reading the prompt") >= 2
        write("once")
        first = capsys.readouterr()
        assert first.out == "once" and first.err.endswith("\x1b[2K")  # its line is cleared
        time.sleep(2 / STEP_REFRESHES_PER_S)
        write(" upon")
        assert capsys.readouterr() == (" upon", "")


def test_nothing_is_said_where_no_clock_can_be_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    with writing_answer(Output("generate", color="never")) as write:
        write("once")
    assert capsys.readouterr() == ("once", "")


def test_an_error_before_the_first_text_clears_the_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(MemoryError), writing_answer(Output("generate", color="always")):
        raise MemoryError
    assert capsys.readouterr().err.endswith("\x1b[2K")
