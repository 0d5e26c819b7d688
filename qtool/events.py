"""What long-running work tells its caller while it runs.

Capability packages never print: they take an `on_event` callable and pass it these records;
`qtool.report` turns them into a progress bar or log lines. Imports nothing from qtool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Started(NamedTuple):
    """A stage begins; `total_bytes` is what its `Advanced` events will add up to."""

    stage: str
    total_bytes: int


class Advanced(NamedTuple):
    """`num_bytes` more of the stage are done; `item` is the tensor or file in work."""

    num_bytes: int
    item: str = ""


class Finished(NamedTuple):
    """The stage is over."""

    stage: str


class Note(NamedTuple):
    """A sentence for the user; `level` "detail" is shown with -v only."""

    text: str
    level: str = "info"  # detail | info | warning


Event = Started | Advanced | Finished | Note
OnEvent = Callable[[Event], None]


def ignore_events(event: Event) -> None:
    """Drop the event: for callers that show no progress."""
