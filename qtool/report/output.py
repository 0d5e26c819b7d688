"""One object owns stdout and stderr for the length of a command.

stdout carries the answer only (`answer`, `write_text`, or one JSON document); everything else goes
to stderr. The mode is decided once, from --json, --quiet, --verbose and --color.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from qtool.errors import NameOption, QtoolError, Words, in_a_row, in_words, name_argument
from qtool.events import Event, Note, OnEvent

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

ColorChoice = Literal["auto", "always", "never"]
JSON_SCHEMA_VERSION = 1


class AnswerLost(QtoolError):
    """stdout took no more: the command did what it was asked to, and cannot say so."""


class ReaderGone(Exception):
    """stdout is a pipe that nobody reads any more, as after `| head`: there is nothing to say."""


@contextmanager
def writing_stdout() -> Iterator[None]:
    """Name stdout where it takes no more.

    Raises:
        ReaderGone: a closed pipe.
        AnswerLost: no_space, or bad_file for other reasons.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:  # a file's own
            raise
        _give_up_stdout()
        if isinstance(error, BrokenPipeError):
            raise ReaderGone from error
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "no space left on the device" if is_full else error.strerror or str(error)
        raise AnswerLost(
            f"stdout: {what}, so the answer is not whole",
            kind="no_space" if is_full else "bad_file",
            hint=f"{'free some space, or ' * is_full}send it elsewhere",
        ) from error


def flush_stdout() -> None:
    """Write what is still buffered; raises as `writing_stdout`."""
    with writing_stdout():
        sys.stdout.flush()


def _give_up_stdout() -> None:
    """Let what is still buffered go nowhere, so that the interpreter does not fail on it again."""
    with suppress(OSError, ValueError):  # where it is no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class Output:
    """Where a command's words go.

    Args:
        command: the verb, for the JSON document.
        json_mode: one JSON document on stdout instead of text; errors as JSON on stderr.
        quiet: no notes and no progress.
        verbose: details too.
        color: "auto" looks at the stream, NO_COLOR and FORCE_COLOR.
        name_option: what the user calls the options that errors and warnings speak of.
    """

    def __init__(
        self,
        command: str,
        *,
        json_mode: bool = False,
        quiet: bool = False,
        verbose: bool = False,
        color: ColorChoice = "auto",
        name_option: NameOption = name_argument,
    ) -> None:
        self.command = command
        self.json_mode = json_mode
        self.quiet = quiet
        self.verbose = verbose
        self.color: ColorChoice = color
        self.name_option = name_option
        self.warnings: list[str] = []

    @property
    def is_silent(self) -> bool:
        """Whether there are no notes and no progress."""
        return self.quiet or self.json_mode

    @property
    def has_bar(self) -> bool:
        """Whether progress is a bar that is drawn again and again, not lines."""
        return not (self.is_silent or self.verbose) and self.stderr.is_interactive

    @cached_property
    def stdout(self) -> Console:
        """The console of the answer."""
        return self._console(stderr=False)

    @cached_property
    def stderr(self) -> Console:
        """The console of all else; one alone, so that what it prints stands above its bar."""
        return self._console(stderr=True)

    def prepare(self) -> None:
        """Import what tables need, while something else keeps the program waiting."""
        if not self.json_mode:
            from rich.table import Table

            self.stdout.render_lines(Table("", box=None))

    # -- the answer: stdout ---------------------------------------------------------------------

    def answer(self, *renderables: RenderableType) -> None:
        """Print text or rich tables to stdout; nothing in JSON mode."""
        if self.json_mode:
            return
        from qtool.report.tables import Trimmed

        with writing_stdout():
            for renderable in renderables:
                self.stdout.print(Trimmed(renderable), crop=False)

    def answer_line(self, text: str) -> None:
        """Print one line to stdout; only a terminal wraps it, so that logs can be searched."""
        if not self.json_mode:
            with writing_stdout():
                self.stdout.print(text, markup=False, soft_wrap=not self.stdout.is_terminal)

    def write_text(self, text: str) -> None:
        """Write `text` to stdout as it is and flush: generated tokens."""
        if not self.json_mode:
            with writing_stdout():
                sys.stdout.write(text)
                sys.stdout.flush()

    def document(self, fields: dict[str, Any]) -> None:
        """Print the command's one JSON document; nothing outside JSON mode."""
        if self.json_mode:
            head = {"schema": JSON_SCHEMA_VERSION, "command": self.command}
            document = {**head, **fields, "warnings": self.warnings}
            with writing_stdout():
                print(json.dumps(document, ensure_ascii=False), flush=True)

    # -- everything else: stderr ----------------------------------------------------------------

    def note(self, text: str) -> None:
        """A sentence beside the answer; silent with --quiet and --json."""
        if not self.is_silent:
            self._say(text, soft_wrap=not self.stderr.is_terminal)

    def detail(self, text: str) -> None:
        """A sentence for --verbose; silent as a note is."""
        if self.verbose and not self.is_silent:
            self._say(text, style="dim", soft_wrap=not self.stderr.is_terminal)

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """A detail about what the stage took, once it is over."""
        start_s = time.perf_counter()
        yield
        self.detail(f"{stage}: {time.perf_counter() - start_s:.2f} s")

    def warn(self, words: Words) -> None:
        """A warning: a line on stderr, or an entry of the JSON document's `warnings`."""
        text = in_words(words, self.name_option)
        if text in self.warnings:
            return
        self.warnings.append(text)
        if not self.json_mode:
            self._message("warning", "yellow", text)

    def error(self, error: QtoolError) -> None:
        """Print the error and its hint, as JSON in JSON mode."""
        message, hint = error.told(self.name_option)
        if self.json_mode:
            fields = {"kind": error.kind, "message": message, "hint": hint}
            with suppress(OSError):
                print(json.dumps({"error": fields}, ensure_ascii=False), file=sys.stderr)
            return
        self._message("error", "bold red", message)
        if hint:
            self._message("  hint", "cyan", hint)

    @contextmanager
    def progress(self) -> Iterator[OnEvent]:
        """Yield an `on_event` that shows progress: a bar on a terminal, lines elsewhere."""
        from qtool.report.progress import show_progress

        with show_progress(self) as on_event:
            yield on_event

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Say what is done until the block ends: on a terminal with a clock beside it."""
        if not self.has_bar:
            self.note(text)
            yield
            return
        from qtool.report.bar import show_step

        with show_step(self.stderr, text):
            yield

    def importing(self, *packages: str) -> AbstractContextManager[None]:
        """Say that the block imports them: it takes seconds, with nothing else to say."""
        return self.step(f"loading {in_a_row(packages)}")

    def on_note(self, event: Event) -> None:
        """An `on_event` for work that has nothing to show but notes."""
        if isinstance(event, Note):
            tell = {"warning": self.warn, "detail": self.detail}.get(event.level, self.note)
            tell(in_words(event.text, self.name_option))

    # -- inside ---------------------------------------------------------------------------------

    def _say(self, text: str | Text, *, style: str | None = None, soft_wrap: bool = False) -> None:
        with suppress(OSError):  # a full log ends no work
            self.stderr.print(text, style=style, markup=False, soft_wrap=soft_wrap)

    def _message(self, label: str, style: str, text: str) -> None:
        from rich.text import Text

        self._say(Text.assemble((f"{label}: ", style), text), soft_wrap=True)

    def _console(self, *, stderr: bool) -> Console:
        from rich.console import Console

        class OurConsole(Console):
            def on_broken_pipe(self) -> None:
                """Rich would exit, whichever stream it is: a log that nobody reads ends no work."""
                raise BrokenPipeError

        forced = {"always": True, "never": False, "auto": None}[self.color]
        if forced is None and os.environ.get("NO_COLOR"):
            forced = False
        return OurConsole(
            stderr=stderr,
            force_terminal=True if forced else None,
            no_color=forced is False,
            color_system="auto" if forced is not False else None,
            soft_wrap=False,
            highlight=False,  # rich would colour the number in "Llama 3.2 1B"
        )
