"""What long-running work tells its caller while it runs.

Capability packages never print: they take an `on_event` callable and pass it these records;
`qtool.report` turns them into a progress bar or log lines. Imports nothing from qtool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from qtool.errors import Words


class Started(NamedTuple):
    """A stage begins; `total_bytes` is what `done_bytes`, there from an earlier run, and its
    `Advanced` events will add up to. If it is no transfer, bytes only weigh its parts."""

    stage: str
    total_bytes: int
    done_bytes: int = 0
    is_transfer: bool = True


class Advanced(NamedTuple):
    """`num_bytes` more of the stage are done; `item` is the tensor or file in work."""

    num_bytes: int
    item: str = ""


class Finished(NamedTuple):
    """The stage is over."""

    stage: str


class Note(NamedTuple):
    """A sentence for the user; `level` "detail" is shown with -v only."""

    text: Words
    level: str = "info"  # detail | info | warning


Event = Started | Advanced | Finished | Note
OnEvent = Callable[[Event], None]


def ignore_events(event: Event) -> None:
    """Drop the event: for callers that show no progress."""
