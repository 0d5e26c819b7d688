"""What a command says, with and without a bar."""

from __future__ import annotations

import re
from typing import Any

import pytest
from rich.table import Table

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


def test_no_number_is_coloured_because_it_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    output = Output("sizing", color="always")
    output.answer("reference models: Llama 3.2 1B", "[bold]8.03[/bold] B")
    output.answer_line("complete, 2.51 MiB in 0.2 s")
    assert capsys.readouterr().out == (
        "reference models: Llama 3.2 1B\n\x1b[1m8.03\x1b[0m B\ncomplete, 2.51 MiB in 0.2 s\n"
    )


def test_what_folds_leaves_no_blanks_behind(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    output = Output("doctor", color="never")
    line = Table.grid(padding=(0, 1))
    line.add_column(width=8)
    line.add_column(overflow="fold")
    line.add_row("memory", "20 GiB of 24 are there")
    line.add_row("", "fine")
    output.answer("a sentence of some words, and another", "", line)
    shown = capsys.readouterr().out
    assert shown == (
        "a sentence of some\nwords, and another\n\n"
        "memory   20 GiB of\n         24 are\n         there\n         fine\n"
    )


def test_a_detail_is_one_line_of_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    words = "word " * 40
    Output("doctor", verbose=True).detail(words.strip())
    assert capsys.readouterr().err == words.strip() + "\n"


def test_what_a_stage_took_is_a_detail(capsys: pytest.CaptureFixture[str]) -> None:
    for verbose in (True, False):
        with Output("estimate", verbose=verbose).timing("plans"):
            pass
    assert re.fullmatch(r"plans: \d+\.\d\d s\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("term", "options", "said"),
    [
        ("xterm", {}, r"\rloading PyTorch \d\.\d s.*"),
        ("dumb", {}, "loading PyTorch\n"),
        ("xterm", {"verbose": True}, "loading PyTorch\n"),
        ("xterm", {"color": "never"}, "loading PyTorch\n"),  # no terminal
        ("xterm", {"quiet": True}, ""),
        ("xterm", {"json_mode": True}, ""),
    ],
)
def test_a_step_is_drawn_on_a_terminal_and_told_elsewhere(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    term: str,
    options: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setenv("TERM", term)
    with Output("generate", **{"color": "always", **options}).step("loading PyTorch"):
        pass
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert re.fullmatch(said, shown, re.DOTALL), repr(shown)
