"""What one check has to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# "info": a fact that is neither good nor bad (an optional package that is not installed).
Status = Literal["ok", "info", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report: what was looked at, what was found, what to do about it.

    `fix` is a command or a change to make; empty where there is nothing to do.
    """

    name: str
    status: Status
    found: str
    fix: str = ""
