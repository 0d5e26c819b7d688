"""What an interrupted measurement says; unlike other verbs it cannot be continued."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qtool.errors import QtoolError

HINT = "nothing is kept of a measurement; run it again from the start"


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn Ctrl-C, and the error of a termination, into one with a hint that is true here."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise QtoolError("interrupted", kind="interrupted", hint=HINT) from error
    except QtoolError as error:
        if error.kind != "interrupted":
            raise
        raise error.with_hint(HINT) from error
