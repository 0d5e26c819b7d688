"""What `--help` shows: every word of the texts, none of which is taken for markup."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

from qtool.cli.app import VERBS, build_command
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


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_help_loses_no_word(path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # no text is wrapped
    command = build_command()
    for name in path:
        command = command.commands[name]
    shown = run(*path, "--help").stdout
    words = {word for text in texts(command) for word in text.replace("\\[", "[").split()}
    assert len(words) > 20
    missing = [word for word in words if word not in shown]
    assert not missing
