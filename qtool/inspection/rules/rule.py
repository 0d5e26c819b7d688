"""What a rule is and what it yields."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from qtool.errors import QtoolError
from qtool.inspection.stored_folder import StoredFolder


class Finding(NamedTuple):
    """One breach of a rule: where, what was expected, what was found."""

    file: str | None
    tensor: str | None
    expected: str
    found: str


# The first sentence of a rule's docstring is the rule; its name with hyphens is what reports print.
Rule = Callable[[StoredFolder], Iterator[Finding]]


def rule_name(rule: Rule) -> str:
    """The rule's name as problems carry it: "total-size"."""
    return rule.__name__.replace("_", "-")


def unreadable(file: str, error: QtoolError) -> Finding:
    """A finding from an error whose message reads "...: expected X, found Y"."""
    match = re.search(r"\bexpected (.*?), found (.*)", error.message, re.DOTALL)
    if match:
        return Finding(file, None, match.group(1), match.group(2))
    return Finding(file, None, "a readable file", error.message)
