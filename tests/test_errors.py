"""Errors speak of options as the caller knows them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import qtool
from qtool.errors import Option, QtoolError, Words, in_words, name_argument, name_flag

PACKAGE = Path(qtool.__file__).parent
# Whole commands are the same for everybody.
COMMANDS = re.compile(r"`[^`]*`|pip install.*")


@pytest.mark.parametrize(
    ("option", "argument", "flag"),
    [
        (Option("max_context"), "max_context", "--max-context"),
        (Option("max_context", 9), "max_context=9", "--max-context 9"),
        (Option("gpu", "RTX 4090"), "gpu='RTX 4090'", "--gpu 'RTX 4090'"),
        (Option("chat", True), "chat=True", "--chat"),
        (Option("chat", False), "chat=False", "--no-chat"),
        (Option("skip", "a.b", verb="quantize"), "`qtool quantize --skip a.b`", "--skip a.b"),
    ],
)
def test_an_option_has_a_name_for_each_caller(option: Option, argument: str, flag: str) -> None:
    assert (name_argument(option), name_flag(option)) == (argument, flag)


def test_an_error_tells_python_its_arguments_and_others_what_they_want() -> None:
    error = QtoolError(
        (Option("top_k", 0), ": expected at least 1"),
        kind="usage",
        hint=("leave out ", Option("top_k")),
    )
    assert (error.message, error.hint) == ("top_k=0: expected at least 1", "leave out top_k")
    assert str(error) == error.message
    assert error.told(name_flag) == ("--top-k 0: expected at least 1", "leave out --top-k")
    other = error.with_hint(Option("top_k", 1))
    assert other.told(name_flag) == ("--top-k 0: expected at least 1", "--top-k 1")
    assert (other.kind, other.exit_code) == ("usage", 2)
    assert in_words("text") == "text"


@pytest.mark.parametrize(
    "message", ["too large", (Option("skip", "a"), " is none"), Option("skip")]
)
def test_a_place_before_an_error_leaves_its_options_as_they_are(message: Words) -> None:
    error = QtoolError(message, kind="network", hint=("leave out ", Option("skip")), exit_code=9)
    placed = error.of("a_model")
    said, hint = error.told(name_flag)
    assert placed.told(name_flag) == (f"a_model: {said}", hint)
    assert (placed.kind, placed.exit_code) == ("network", 9)


def test_no_error_spells_a_flag_out() -> None:
    """It would be wrong for who gave an argument or a variable."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "QtoolError":
                words = " ".join(map(str, _texts(call)))
                found += re.findall(r"(?<![\w-])--[a-z][\w-]+", COMMANDS.sub("", words))
    assert not found


def _texts(call: ast.Call) -> list[str]:
    """The literals of a call; what an f-string fills in is x."""
    texts = []
    for node in ast.walk(call):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "x" for part in node.values)
            texts.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts
