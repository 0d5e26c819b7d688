"""The prompt of `qtool generate`: an argument, a file or a pipe."""

from __future__ import annotations

import fcntl
import io
import os
import stat
import sys
import termios
from pathlib import Path
from typing import TextIO

from qtool.errors import Option, QtoolError, Words
from qtool.report.output import Output


def refuse_two(prompt: str | None, prompt_file: Path | None) -> None:
    """QtoolError(usage) if an argument and a file were given."""
    if prompt is not None and prompt_file is not None:
        both = ("both PROMPT and ", Option("prompt_file"), " were given")
        raise _usage_error(both, "give one of them")


def read_prompt(show: Output, prompt: str | None, prompt_file: Path | None) -> str | None:
    """The prompt; None to open a chat. Warns of text on a pipe beside one, which is not read.

    Raises:
        QtoolError: usage, not_found or bad_file.
    """
    is_given = prompt_file is not None or prompt not in (None, "-")
    if is_given and _has_text(sys.stdin):
        show.warn("the text on stdin is not read beside a prompt; leave that out to read it")
    text = _read(prompt, prompt_file)
    if text is None and show.json_mode:
        raise _usage_error((Option("json"), " wants a PROMPT"), "give one, or - for a pipe")
    return text


def _read(prompt: str | None, prompt_file: Path | None) -> str | None:
    try:
        if prompt_file is not None:
            text = prompt_file.read_text(encoding="utf-8").removesuffix("\n")
        elif prompt == "-" or (prompt is None and not sys.stdin.isatty()):
            if isinstance(sys.stdin, io.TextIOWrapper):  # which lets through what is no UTF-8
                sys.stdin.reconfigure(encoding="utf-8", errors="strict")
            text = sys.stdin.read().removesuffix("\n")
        else:
            return prompt
    except FileNotFoundError as error:
        if prompt_file != Path("-"):
            raise
        raise QtoolError(
            f"{prompt_file} does not exist",
            kind="not_found",
            hint=("leave out ", Option("prompt_file"), ": PROMPT takes - for a pipe"),
        ) from error
    except UnicodeDecodeError as error:
        raise QtoolError(
            f"{prompt_file or 'stdin'}: not UTF-8 at byte {error.start}",
            kind="bad_file",
            hint="convert it to UTF-8",
        ) from error
    if not text:
        hint = "write one into it" if prompt_file else "give a PROMPT"
        raise _usage_error(f"{prompt_file or 'stdin'} holds no prompt", hint)
    return text


def _has_text(stream: TextIO) -> bool:
    """Whether bytes wait in a pipe, where they stay; a file may be what a loop goes through."""
    try:
        if not stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode):
            return False
        waiting = fcntl.ioctl(stream.fileno(), termios.FIONREAD, bytes(4))
    except (OSError, ValueError):  # no file, or a closed one
        return False
    return any(waiting)


def _usage_error(message: Words, hint: str) -> QtoolError:
    return QtoolError(message, kind="usage", hint=hint)
