"""What is said while a bar is drawn."""

from __future__ import annotations

import re

import pytest

from qtool.events import Advanced, Note, Started
from qtool.report.output import Output


def test_what_is_said_beside_a_bar_has_lines_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    output = Output("quantize", color="always")
    with output.progress() as on_event:
        on_event(Started("reading", 1 << 20))
        on_event(Advanced(1 << 19))
        on_event(Note("a shard is short", level="warning"))
        output.note("said by another")
    captured = capsys.readouterr()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", captured.err)
    lines = re.split(r"[\r\n]+", shown)
    assert any(line.startswith("reading ") for line in lines)
    assert {"warning: a shard is short", "said by another"} <= set(lines)
    assert captured.out == ""
