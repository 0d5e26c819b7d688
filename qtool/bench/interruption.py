"""What an interrupted measurement says; unlike other verbs it cannot be continued."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from qtool.errors import QtoolError, interruption

NOTHING_KEPT: Final = "nothing is kept of a measurement; run it again from the start"
PART_KEPT: Final = "what was measured until then is shown; the rest has to be measured again"

T = TypeVar("T")


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn Ctrl-C or SIGTERM into an error with a hint that is true here."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise interruption(error, NOTHING_KEPT) from error


def gather(results: Iterable[T], kept: list[T]) -> QtoolError | None:
    """Append `results` to `kept` until somebody interrupts.

    Returns:
        The interruption, for who has shown what is kept; None where all results came.

    Raises:
        QtoolError: the interruption, where nothing is kept.
    """
    try:
        with interruptible():
            for result in results:
                kept.append(result)
    except QtoolError as error:
        if error.kind != "interrupted" or not kept:
            raise
        return error.with_hint(PART_KEPT)
    return None
