"""The frame around every verb: an `Output`, and errors turned into words and exit codes."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import typer

from qtool.cli.option_names import option_names
from qtool.errors import EXIT_TERMINATED, QtoolError
from qtool.report.output import ColorChoice, Output

AGAIN_AFTER_S: Final = 0.05  # by then a destructor is over, or it meets the next one
RUN_AGAIN: Final = "run the command again; `quantize` and `merge` continue where they stopped"


@contextmanager
def verb_session(
    ctx: typer.Context,
    command: str,
    *,
    json_output: bool,
    quiet: bool,
    verbose: bool,
    color: ColorChoice,
) -> Iterator[Output]:
    """Run a verb's body: yields its Output, reports what goes wrong, exits with the right code."""
    output = Output(
        command,
        json_mode=json_output,
        quiet=quiet,
        verbose=verbose,
        color=color,
        name_option=option_names(ctx),
    )
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        with _no_interruption_lost():
            yield output
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except (Exception, KeyboardInterrupt) as error:
        report_error(output, error)
        raise typer.Exit(as_qtool_error(error).exit_code) from error


@contextmanager
def _no_interruption_lost() -> Iterator[None]:
    """Deliver a signal again that arrived in a destructor or a callback, which cannot raise."""
    previous = sys.unraisablehook

    def deliver_again(unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value
        if isinstance(error, KeyboardInterrupt):
            number = signal.SIGINT
        elif isinstance(error, QtoolError) and error.exit_code == EXIT_TERMINATED:
            number = signal.SIGTERM
        else:
            previous(unraisable)
            return
        timer = threading.Timer(AGAIN_AFTER_S, os.kill, [os.getpid(), number])
        timer.daemon = True
        timer.start()

    sys.unraisablehook = deliver_again
    try:
        yield
    finally:
        sys.unraisablehook = previous


def report_error(output: Output, error: BaseException) -> None:
    """Print `error` as a sentence; the traceback only with QTOOL_DEBUG=1."""
    if os.environ.get("QTOOL_DEBUG") == "1":
        traceback.print_exception(error)
    output.error(as_qtool_error(error))


def as_qtool_error(error: BaseException) -> QtoolError:
    """The user-facing form of any exception."""
    if isinstance(error, QtoolError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return QtoolError("interrupted", kind="interrupted", hint=RUN_AGAIN)
    if isinstance(error, MemoryError):
        return QtoolError(
            f"out of memory: {error}", kind="memory", hint="close other programs or use less"
        )
    if isinstance(error, OSError):
        return _from_os_error(error)
    return QtoolError(
        f"unexpected {type(error).__name__}: {error}",
        kind="internal",
        hint="this is a bug in qtool; run again with QTOOL_DEBUG=1 and report the traceback",
    )


def _from_os_error(error: OSError) -> QtoolError:
    where = error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return QtoolError(
            f"{where}: no space left on the device",
            kind="no_space",
            hint="free some space and run the same command again; it continues",
        )
    if error.errno == errno.ENOENT:
        return QtoolError(f"{where} does not exist", kind="not_found", hint="check the path")
    hint = "check the path and its permissions"
    return QtoolError(f"{where}: {error.strerror or error}", kind="bad_file", hint=hint)


def _raise_terminated(signum: int, frame: FrameType | None) -> None:
    raise QtoolError(
        "terminated",
        kind="interrupted",
        hint=RUN_AGAIN,
        exit_code=EXIT_TERMINATED,
    )
