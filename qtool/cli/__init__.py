"""The command line: one module per verb that parses, calls one function and reports. No logic.

Nothing heavy is imported before a verb runs; verbs import their packages inside the command. Here
and in `qtool` itself nothing is, beside what Python has by then: Ctrl-C is heard from `main` on.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

__all__ = ["main"]

EXIT_INTERRUPTED = 130  # of EXIT_CODES, an import away


def main() -> None:
    """Run qtool and exit with the contract's code."""
    # Else whoever began the program wants another; it stays, for what Python does at its end.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)
    _open_missing_streams()
    from qtool.cli import app

    app.main()


def _open_missing_streams() -> None:
    """What the shell has closed goes nowhere, and no file of ours takes its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123


def _end_at_once(signum: int, frame: FrameType | None) -> NoReturn:
    """Ctrl-C before a verb begins, which has a handler of its own, or after it: no traceback."""
    os._exit(EXIT_INTERRUPTED)
