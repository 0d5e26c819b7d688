"""The one exception that users see, and the table of its kinds and exit codes.

Every raise says what happened (`message`: file, tensor, expected, found) and what to do next
(`hint`: a command, a flag or a change to make). Options are not spelled out in either, since one
user gave a flag, another an argument or a variable:

    QtoolError((Option("top_k", 0), ": expected at least 1"), kind="usage", hint=...)

Imports nothing from qtool.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal

ErrorKind = Literal[
    "usage",
    "not_found",
    "bad_file",
    "unsupported",
    "no_fit",
    "differs",
    "auth",
    "network",
    "no_space",
    "memory",
    "interrupted",
    "internal",
]

EXIT_OK: Final = 0
EXIT_CODES: Final[dict[ErrorKind, int]] = {
    "usage": 2,
    "not_found": 1,
    "bad_file": 1,
    "unsupported": 1,
    "no_fit": 3,
    "differs": 3,
    "auth": 4,
    "network": 1,
    "no_space": 5,
    "memory": 1,
    "interrupted": 130,
    "internal": 1,
}
EXIT_TERMINATED: Final = 143  # "interrupted" by SIGTERM instead of SIGINT
EXIT_NO_READER: Final = 141  # stdout is a pipe that nobody reads any more, as after `| head`


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a command, an argument of a function: who shows the text knows its name there.

    Args:
        name: the argument's, such as "max_context".
        value: what it is or should be set to; None stands for the option alone.
        verb: the one command that has it, for texts that others show too.
    """

    name: str
    value: object = None
    verb: str = ""

    @property
    def flag(self) -> str:
        """Its long name on the command line."""
        return f"--{self.name.replace('_', '-')}"


Words = str | Option | tuple[str | Option, ...]
NameOption = Callable[[Option], str]


def name_argument(option: Option) -> str:
    """What an option is called in Python."""
    if option.verb:  # no function of ours has it
        return f"`qtool {option.verb} {name_flag(option)}`"
    return option.name if option.value is None else f"{option.name}={option.value!r}"


def name_flag(option: Option) -> str:
    """What an option is called on a command line."""
    if option.value is None or option.value is True:
        return option.flag
    if option.value is False:
        return option.flag.replace("--", "--no-", 1)
    return f"{option.flag} {shlex.quote(str(option.value))}"


def in_words(text: Words, name_option: NameOption = name_argument) -> str:
    """The text with its options called as `name_option` has it."""
    parts = text if isinstance(text, tuple) else (text,)
    return "".join(part if isinstance(part, str) else name_option(part) for part in parts)


def in_a_row(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


class QtoolError(Exception):
    """A failure that the user can act on.

    `message` and `hint` are in Python's words; `told` has them in those of a command line.

    Args:
        message: one or two sentences: what, in which file and tensor, expected and found.
        kind: the contract's word for the class of failure; decides the exit code.
        hint: the next step.
        exit_code: only where it differs from the kind's own (SIGTERM).
    """

    def __init__(
        self, message: Words, *, kind: ErrorKind, hint: Words, exit_code: int | None = None
    ) -> None:
        super().__init__(in_words(message))
        self._message = message
        self._hint = hint
        self.kind: ErrorKind = kind
        self.exit_code = EXIT_CODES[kind] if exit_code is None else exit_code

    @property
    def message(self) -> str:
        """What happened."""
        return in_words(self._message)

    @property
    def hint(self) -> str:
        """What to do next."""
        return in_words(self._hint)

    def told(self, name_option: NameOption) -> tuple[str, str]:
        """Message and hint where options are called as `name_option` has it."""
        return in_words(self._message, name_option), in_words(self._hint, name_option)

    def of(self, place: str) -> QtoolError:
        """The same failure with the model or file that it is of before its message."""
        words = self._message if isinstance(self._message, tuple) else (self._message,)
        return QtoolError(
            (f"{place}: ", *words), kind=self.kind, hint=self._hint, exit_code=self.exit_code
        )

    def with_hint(self, hint: Words) -> QtoolError:
        """The same failure with another next step."""
        return QtoolError(self._message, kind=self.kind, hint=hint, exit_code=self.exit_code)


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Put `place`, a model or file, before the message of a QtoolError that is raised meanwhile;
    not before one that is about options."""
    try:
        yield
    except QtoolError as error:
        if error.kind == "usage":
            raise
        raise error.of(place) from error


class Terminated(KeyboardInterrupt):
    """SIGTERM: what ends work on Ctrl-C, or keeps what is done, does so for it too."""


def interruption(signal: KeyboardInterrupt, hint: Words) -> QtoolError:
    """What is said of Ctrl-C or SIGTERM, and the exit code."""
    if isinstance(signal, Terminated):
        return QtoolError("terminated", kind="interrupted", hint=hint, exit_code=EXIT_TERMINATED)
    return QtoolError("interrupted", kind="interrupted", hint=hint)
