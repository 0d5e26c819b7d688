"""What `--help` shows: every word of the texts, none of which is taken for markup."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

from qtool.cli.app import VERBS, build_command
from qtool.cli.help import MAX_COLUMNS
from tests.cli.running import run

PATHS = [
    (verb, *below)
    for verb in VERBS
    for below in (
        (),
        *((name,) for name in getattr(import_module(f"qtool.cli.{verb}"), "SUBVERBS", ())),
    )
]


def texts(command: Any) -> Iterator[str]:
    """The command's own, and those of its options."""
    yield command.help
    yield from (param.help for param in command.params if getattr(param, "help", None))


def find_command(path: tuple[str, ...]) -> Any:
    command = build_command()
    for name in path:
        command = command.commands[name]
    return command


@pytest.mark.parametrize("path", [(), *PATHS], ids=" ".join)
@pytest.mark.parametrize("columns", [60, 80, 140])
def test_help_is_whole_at_any_width(
    path: tuple[str, ...], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = run(*path, "--help").stdout
    before, _, examples = shown.partition("Examples:")
    assert max(map(len, before.splitlines())) <= min(columns, MAX_COLUMNS)
    several = r"adafactor, \.\.\.|\[?MODEL\]?\.\.\.|\[ARGS\]\.\.\."
    assert "…" not in shown and "..." not in re.sub(several, "", before)
    assert columns < 80 or max(map(len, examples.splitlines() or [""])) <= 80
    words = set(re.findall(r"[\w-]+", before))
    for param in find_command(path).params:
        names = (*param.opts, *param.secondary_opts)
        assert {name for name in names if name.startswith("-")} <= words


def test_an_option_says_what_it_takes_and_what_it_is_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    shown = run("finetune", "--help").stdout
    assert re.search(r"^  --device DEVICE +auto, cpu, cuda.*\[default: auto\]$", shown, re.M)
    assert re.search(r"^  -o, --output OUT .*\[required\]$", shown, re.M)
    assert "--completion-only / --no-completion-only" in shown
    shown = run("estimate", "--help").stdout
    assert "[default: 0.05; 0<=x<=1]" in shown and "[default: 0; 0<=x<=99]" in shown


def test_brackets_say_what_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    usages = {
        "estimate": "estimate [OPTIONS] MODEL",
        "sizing": "sizing [OPTIONS] [MODEL]...",
        "generate": "generate [OPTIONS] MODEL [PROMPT]",
        "finetune": "finetune [OPTIONS] MODEL DATA",
        "doctor": "doctor [OPTIONS] [MODEL]",
    }
    for verb, usage in usages.items():
        assert run(verb, "--help").stdout.splitlines()[0] == f"Usage: qtool {usage}"
    assert re.search(r"^  MODEL\.\.\.  Local folders", run("sizing", "--help").stdout, re.M)


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_defaults_in_words_look_like_others(
    path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    shown = " ".join(run(*path, "--help").stdout.split())
    assert "[default: (" not in shown
    for param in find_command(path).params:
        if isinstance(said := getattr(param, "show_default", False), str):
            assert f"[default: {said}]" in shown or f"[default: {said}; " in shown


def test_a_narrow_terminal_leaves_half_of_it_to_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (60, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        (line,) = re.findall(r"^  --batch N +Sequences.*$", run("sizing", "--help").stdout, re.M)
        assert line.index("Sequences") <= columns // 2


def test_help_loads_no_rich() -> None:
    program = (
        "import sys; from qtool.cli import main\ntry: main()\nfinally: print('rich' in sys.modules)"
    )
    command = [sys.executable, "-c", program, "estimate", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_help_loses_no_word(path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # no text is wrapped
    command = find_command(path)
    shown = run(*path, "--help").stdout
    words = {word for text in texts(command) for word in text.split()}
    assert len(words) > 20
    missing = [word for word in words if word not in shown]
    assert not missing
