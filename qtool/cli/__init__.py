"""The command line: one module per verb that parses, calls one function and reports. No logic.

Nothing heavy is imported before a verb runs; verbs import their packages inside the command.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from qtool.errors import EXIT_CODES

__all__ = ["main"]


def main() -> None:
    """Run qtool and exit with the contract's code."""
    _open_missing_streams()
    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.default_int_handler:  # else whoever began the program wants another
        signal.signal(signal.SIGINT, _end_at_once)
    try:
        from qtool.cli import app

        app.main()
    finally:
        signal.signal(signal.SIGINT, previous)


def _open_missing_streams() -> None:
    """What the shell has closed goes nowhere, and no file of ours takes its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123


def _end_at_once(signum: int, frame: FrameType | None) -> NoReturn:
    """Ctrl-C before a verb begins, which then has a handler of its own: no traceback."""
    os._exit(EXIT_CODES["interrupted"])
