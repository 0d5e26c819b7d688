"""What takes long is told before, once a part of it shows how long."""

from __future__ import annotations

from typing import Final

from qtool.events import Note, OnEvent

LONG_S: Final = 5.0


def announce(what: str, seconds: float, on_event: OnEvent) -> None:
    """Say that `what` comes and about how long it takes, if that is long."""
    if seconds > LONG_S:
        on_event(Note(f"{what} come, about {seconds:.0f} s"))
