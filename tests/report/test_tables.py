"""Tables of which nothing is cut off."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from qtool.report.tables import Name, WholeTable

NAME = "model.layers.0.post_attention_layernorm.weight"
OTHER = "model.layers.0.post_attention_layernorm.bias"
FIGURE = "1,234,567.89 MiB"


def table() -> WholeTable:
    made = WholeTable(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column("tensor")
    made.add_column("size", justify="right", no_wrap=True)
    made.add_column("what")
    made.add_row(Name(NAME), FIGURE, "nf4-dq: linear layer")
    made.add_row(Name(OTHER), "1 B", "copy: norm")
    return made


def lines(width: int, *, on_terminal: bool) -> list[str]:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=on_terminal, color_system=None
    )
    console.print(table(), crop=False)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue().splitlines()
    assert not any(line.endswith(" ") for line in shown)
    return shown


def first_column(shown: list[str]) -> str:
    """The names, as the lines they folded into say them."""
    cells = shown[0].index("size") + len("size") - len(FIGURE)
    return "".join(line[:cells].strip() for line in shown[1:])


def test_in_a_pipe_every_name_stands_on_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    for width in (20, 80, 200):
        shown = lines(width, on_terminal=False)
        assert len(shown) == 3
        assert shown[1].split() == [NAME, "1,234,567.89", "MiB", "nf4-dq:", "linear", "layer"]
        assert OTHER in shown[2] and shown[2].endswith("copy: norm")


@pytest.mark.parametrize("width", [60, 70, 80, 90])
def test_on_a_terminal_names_fold_and_figures_do_not(width: int) -> None:
    shown = lines(width, on_terminal=True)
    assert max(map(len, shown)) <= width
    assert FIGURE in shown[1]
    assert first_column(shown) == NAME + OTHER
    assert "…" not in "".join(shown)


def test_names_fold_behind_dots_where_that_is_enough() -> None:
    shown = lines(60, on_terminal=True)
    first_words = [line.split()[0] for line in shown[1:4]]
    assert first_words == ["model.layers.0.", "post_attention_layernorm.", "weight"]


def test_a_width_in_the_environment_holds_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    assert max(map(len, lines(70, on_terminal=False))) <= 70


def test_what_cannot_fold_is_left_to_the_terminal() -> None:
    shown = lines(20, on_terminal=True)
    assert FIGURE in shown[1] and "…" not in "".join(shown)
    assert first_column(shown) == NAME + OTHER


@pytest.mark.parametrize("name", ["", ".", "a", "a.b", "..a__b..", "x" * 100])
def test_a_name_is_shown_whole_at_any_width(name: str) -> None:
    for width in (3, 5, 8, 13, 40):
        console = Console(file=io.StringIO(), width=width, no_color=True)
        console.print(Name(name))
        assert isinstance(console.file, io.StringIO)
        shown = console.file.getvalue()
        assert "".join(line.strip() for line in shown.splitlines()) == name
