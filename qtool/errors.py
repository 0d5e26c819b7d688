"""The one exception that users see, and the table of its kinds and exit codes.

Every raise says what happened (`message`: file, tensor, expected, found) and what to do next
(`hint`: a command, a flag or a change to make). Imports nothing from qtool.
"""

from __future__ import annotations

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


class QtoolError(Exception):
    """A failure that the user can act on.

    Args:
        message: one or two sentences: what, in which file and tensor, expected and found.
        kind: the contract's word for the class of failure; decides the exit code.
        hint: the next step.
        exit_code: only where it differs from the kind's own (SIGTERM).
    """

    def __init__(
        self, message: str, *, kind: ErrorKind, hint: str, exit_code: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.kind: ErrorKind = kind
        self.hint = hint
        self.exit_code = EXIT_CODES[kind] if exit_code is None else exit_code
