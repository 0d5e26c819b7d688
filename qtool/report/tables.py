"""Tables of which nothing is cut off: on a terminal names fold, in a pipe lines are as long as
needed, unless COLUMNS gives it a width.

Imported when a table is made, since it loads rich.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

BEHIND_DOTS: Final = re.compile(r"[^.]+\.?|\.")
BEHIND_BARS: Final = re.compile(r"[^._]+[._]?|[._]")
CONTINUED: Final = "  "


class Cells(NamedTuple):
    """How wide a column has to be, and how wide it would like to be."""

    least: int
    most: int


class WholeTable(Table):
    """A table without lines, whose `no_wrap` columns are never narrower than what is in them.

    Where the terminal is too narrow the others fold, at most to their longest word or to their
    `min_width`; where even that is too wide, the terminal folds the lines.
    """

    def least_width(self, console: Console, options: ConsoleOptions) -> int:
        """The cells that a line takes where all that can fold is folded."""
        return sum(cells.least for cells in self._measure(console, options)) + self._gaps

    def whole_width(self, console: Console, options: ConsoleOptions) -> int:
        """The cells that a line takes where nothing is folded."""
        return sum(cells.most for cells in self._measure(console, options)) + self._gaps

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Called by rich with the width at hand."""
        measured = self._measure(console, options)
        has_width = console.is_terminal or "COLUMNS" in os.environ
        width = options.max_width if has_width else sys.maxsize
        spare = max(width - self._gaps - sum(cells.least for cells in measured), 0)
        wanted = sum(cells.most - cells.least for cells in measured)
        share = min(1.0, spare / max(wanted, 1))
        for column, cells in zip(self.columns, measured, strict=True):
            column.width = cells.least + int(share * (cells.most - cells.least))
            column.overflow = "fold"
        needed = sum(column.width or 0 for column in self.columns) + self._gaps
        rendered = super().__rich_console__(console, options.update(max_width=needed))
        segments = [part for part in rendered if isinstance(part, Segment)]  # all that it yields
        yield from _trimmed_lines(segments)

    @property
    def _gaps(self) -> int:
        """The blanks between all columns."""
        _, right, _, left = self.padding
        return (right + left) * (len(self.columns) - 1)

    def _measure(self, console: Console, options: ConsoleOptions) -> list[Cells]:
        unlimited = options.update(max_width=sys.maxsize)
        return [_measure(column, console, unlimited) for column in self.columns]


@dataclass(frozen=True, slots=True)
class Name:
    """The name of a tensor or a module, which folds behind dots, at need behind bars."""

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Called by rich with the column's width."""
        lines, width = [""], options.max_width
        for part in BEHIND_DOTS.findall(self.text):
            fits = len(part) <= width - len(CONTINUED)
            for piece in [part] if fits else BEHIND_BARS.findall(part):
                if len(lines[-1]) + len(piece) > width and lines[-1].strip():
                    lines.append(CONTINUED)
                lines[-1] += piece
        yield Text("\n".join(lines), overflow="fold")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Called by rich for the widths that suit."""
        longest = max(map(len, BEHIND_BARS.findall(self.text)), default=0)
        return Measurement(min(longest + len(CONTINUED), len(self.text)), len(self.text))


@dataclass(frozen=True, slots=True)
class Trimmed:
    """Anything else, without the blanks that folding leaves at the ends of lines."""

    renderable: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Called by rich with the width at hand."""
        yield from _trimmed_lines(console.render(self.renderable, options))


def _trimmed_lines(segments: Iterable[Segment]) -> Iterator[Segment]:
    for line in Segment.split_lines(segments):
        yield from _without_trailing_blanks(line)
        yield Segment.line()


def _without_trailing_blanks(line: list[Segment]) -> list[Segment]:
    while line and not line[-1].text.rstrip():
        line = line[:-1]
    if not line:
        return []
    *before, (text, style, control) = line
    return [*before, Segment(text.rstrip(), style, control)]


def _measure(column: Column, console: Console, options: ConsoleOptions) -> Cells:
    cells = [Measurement.get(console, options, cell) for cell in (column.header, *column.cells)]
    most = max(cell.maximum for cell in cells)
    if column.no_wrap:
        return Cells(most, most)
    least = max(cell.minimum for cell in cells)
    return Cells(min(most, max(least, column.min_width or 0)), most)
