"""The frame around every verb: an `Output`, and errors turned into words and exit codes."""

from __future__ import annotations

import _thread
import errno
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import typer

from qtool.cli.option_names import IDLE_CONFIG, option_names
from qtool.errors import Option, QtoolError, Terminated, interruption
from qtool.report.output import AnswerLost, ColorChoice, Output, ReaderGone, flush_stdout

Hint = tuple[str | Option, ...]
AGAIN_AFTER_S: Final = 0.05  # by then a destructor is over, or it meets the next one
MAX_POSTPONED: Final = 20  # a second: Ctrl-C has to be answered
SAME_S: Final = 0.03  # `timeout` signals a process, and then the group that it belongs to
JUST_NOW_S: Final = 3.0
IMPORTING: Final = "importlib._bootstrap"
LOCKING: Final = ("threading", "concurrent.futures._base", "concurrent.futures.thread")
STARTING: Final = ("threading", "start")
PRINTING: Final = "rich."  # keeps what it was interrupted in writing, and writes it again
WAITING: Final = [("threading", name) for name in ("wait", "join", "_wait_for_tstate_lock")]
RUN_AGAIN: Final[Hint] = ("run the command again",)
CONTINUING: Final = ("quantize", "merge")  # they go on with what is in OUT, if told nothing


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
    try:
        with _raising_signals() as signals, _no_interruption_lost(), _whole_answer():
            if IDLE_CONFIG in ctx.meta:
                output.warn(ctx.meta[IDLE_CONFIG])
            yield output
    except (typer.Exit, typer.Abort, ReaderGone):
        raise
    except (Exception, KeyboardInterrupt) as error:
        again = _how_again(ctx, command)
        told = as_qtool_error(error, again)
        if told.kind == "internal" and (missed := signals.just_raised):  # an import left halfway
            told = interruption(missed, again)
        report_error(output, error, told)
        raise typer.Exit(told.exit_code) from error


@contextmanager
def _whole_answer() -> Iterator[None]:
    """Find out whether stdout took everything while the error can still be told."""
    try:
        yield
    except typer.Exit:
        flush_stdout()
        raise
    flush_stdout()


@contextmanager
def _no_interruption_lost() -> Iterator[None]:
    """Deliver a signal again that arrived in a destructor or a callback, which cannot raise."""
    previous = sys.unraisablehook

    def deliver_again(unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value
        if isinstance(error, KeyboardInterrupt):
            _send_later(signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
        else:
            previous(unraisable)

    sys.unraisablehook = deliver_again
    try:
        yield
    finally:
        sys.unraisablehook = previous


class _Signals:
    """The handler of SIGINT and SIGTERM: raises KeyboardInterrupt or Terminated, once for both that
    `timeout` sends, and rather not midway through an import, a print or what threads share.

    Modules catch what fails in an import of theirs, and with it KeyboardInterrupt, or fail on what
    was imported halfway. A line whose print is cut short would come again with the next, and a bar
    would leave the cursor hidden. A future's lock that is taken and left to nobody keeps its thread
    waiting for ever, and so the end of the program.
    """

    def __init__(self) -> None:
        self._raised: KeyboardInterrupt | None = None
        self._raised_for = 0
        self._raised_at_s = -math.inf
        self._num_postponed = 0  # since the last that was raised
        self._ignores = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self._ignores or (signum == self._raised_for and self._age_s < SAME_S):
            return
        if _is_midway(frame) and self._num_postponed < MAX_POSTPONED:
            self._num_postponed += 1
            _send_later(signum)
            return
        self._raised = KeyboardInterrupt() if signum == signal.SIGINT else Terminated()
        self._raised_for, self._raised_at_s = signum, time.monotonic()
        self._num_postponed = 0
        raise self._raised

    @property
    def _age_s(self) -> float:
        return time.monotonic() - self._raised_at_s

    def await_postponed(self) -> None:
        """Let one come that was postponed, as long as it can be told."""
        for _ in range(MAX_POSTPONED):
            if self._num_postponed:
                time.sleep(AGAIN_AFTER_S)

    def outlast(self) -> None:
        """Return when none can come any more that belongs to what was raised or was postponed."""
        self._ignores = True
        time.sleep(max(0.0, SAME_S - self._age_s))
        if self._num_postponed:
            time.sleep(2 * AGAIN_AFTER_S)

    @property
    def just_raised(self) -> KeyboardInterrupt | None:
        """What an error now may come from; a chat goes on after those that end an answer."""
        return self._raised if self._age_s < JUST_NOW_S else None


@contextmanager
def _raising_signals() -> Iterator[_Signals]:
    signals = _Signals()
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Ignored ones stay so: shells ignore SIGINT for what runs in the background.
    previous = {number: it for number, it in found.items() if it not in (signal.SIG_IGN, None)}
    for number in previous:
        signal.signal(number, signals)
    try:
        yield signals
        signals.await_postponed()
    except typer.Exit:
        signals.await_postponed()
        raise
    finally:
        signals.outlast()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _is_midway(frame: FrameType | None) -> bool:
    """Whether what runs is an import, a print, the start of a thread, or anything of threads and
    futures but their waiting for others, which leaves things as it found them."""
    stack = []
    while frame is not None:
        stack.append((str(frame.f_globals.get("__name__")), frame.f_code.co_name))
        frame = frame.f_back
    modules = {module for module, _ in stack}
    if IMPORTING in modules or STARTING in stack:
        return True
    if any(module.startswith(PRINTING) for module in modules):
        return True
    return not modules.isdisjoint(LOCKING) and stack[0] not in WAITING


def _send_later(signum: int) -> None:
    # No threading.Timer: what was interrupted may hold the lock that starting one takes.
    _thread.start_new_thread(_send_again, (signum,))


def _send_again(signum: int) -> None:
    time.sleep(AGAIN_AFTER_S)
    os.kill(os.getpid(), signum)


def report_error(output: Output, error: BaseException, told: QtoolError) -> None:
    """Print `error` as `told`; its traceback only with QTOOL_DEBUG=1."""
    if os.environ.get("QTOOL_DEBUG") == "1":
        traceback.print_exception(error)
    output.error(told)


def as_qtool_error(error: BaseException, again: Hint = RUN_AGAIN) -> QtoolError:
    """The user-facing form of any exception; `again` is what to do where nothing else is wrong."""
    if isinstance(error, AnswerLost):
        return error.with_hint((error.hint, ", and ", *again))
    if isinstance(error, QtoolError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return interruption(error, again)
    if isinstance(error, MemoryError):
        return QtoolError(
            f"out of memory: {error}", kind="memory", hint="close other programs or use less"
        )
    if isinstance(error, OSError):
        return _from_os_error(error, again)
    return QtoolError(
        f"unexpected {type(error).__name__}: {error}",
        kind="internal",
        hint="this is a bug in qtool; run again with QTOOL_DEBUG=1 and report the traceback",
    )


def _from_os_error(error: OSError, again: Hint) -> QtoolError:
    where = error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return QtoolError(
            f"{where}: no space left on the device",
            kind="no_space",
            hint=("free some space and ", *again),
        )
    if error.errno == errno.ENOENT:
        return QtoolError(f"{where} does not exist", kind="not_found", hint="check the path")
    if error.errno == errno.EISDIR:
        return QtoolError(
            f"{where} is a folder, expected a file", kind="unsupported", hint="name a file"
        )
    hint = "check the path and its permissions"
    return QtoolError(f"{where}: {error.strerror or error}", kind="bad_file", hint=hint)


def _how_again(ctx: typer.Context, command: str) -> Hint:
    """What to do after an interruption, wherever in the command it came."""
    if ctx.params.get("dry_run") or ctx.params.get("restart"):
        return RUN_AGAIN
    if command in CONTINUING:
        output = ctx.params.get("output")
        # What holds nothing is taken away. Path.exists() fails on names that no file can have.
        is_begun = output is None or os.path.exists(output)  # noqa: PTH110
        return (*RUN_AGAIN, "; it continues where it stopped" if is_begun else "; it begins anew")
    if command == "finetune":  # which begins too, where nothing is saved
        return (*RUN_AGAIN, " with ", Option("resume"))
    return RUN_AGAIN
