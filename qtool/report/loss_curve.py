"""A loss over steps: a few lines of text for the terminal, and an SVG picture.

    for line in loss_text(losses): print(line)
    svg = loss_svg([(1, 3.4), (2, 3.1)], [(2, 3.2)], title="lora")

Both show means of neighbouring steps where there are more steps than places. The same input gives
the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from typing import Final

Points = Sequence[tuple[int, float]]

TEXT_COLUMNS: Final = 56
TEXT_ROWS: Final = 6
MIN_STEPS: Final = 5  # fewer are no curve
EIGHTHS: Final = " ▁▂▃▄▅▆▇█"

WIDTH: Final = 640
HEIGHT: Final = 320
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 40, 36
MAX_MEANS: Final = 200
INK, PALE, GRID, TRAIN, HELD_OUT = "#1a1a1a", "#5f6368", "#e4e6ea", "#0072b2", "#c95200"


def loss_text(losses: Sequence[float]) -> list[str]:
    """Bars of TEXT_ROWS lines with the scale beside them; nothing for a few steps."""
    if len(losses) < MIN_STEPS:
        return []
    means = [mean for _, mean in _means(list(enumerate(losses)), TEXT_COLUMNS)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    units = [round((mean - low) / span * (8 * TEXT_ROWS - 1)) + 1 for mean in means]
    lines = []
    for row in reversed(range(TEXT_ROWS)):
        label = {TEXT_ROWS - 1: f"{high:8.4f}", 0: f"{low:8.4f}"}.get(row, " " * 8)
        bars = "".join(EIGHTHS[min(max(unit - 8 * row, 0), 8)] for unit in units)
        lines.append(f"{label} ┤{bars}".rstrip())
    return [*lines, f"{'':8} └{'─' * len(means)} {len(losses):,} steps"]


def loss_svg(points: Points, held_out: Points, *, title: str) -> str:
    """The loss of each step in pale, its means on top, held-out losses as dots."""
    values = [value for _, value in (*points, *held_out)]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.5
    low, high = low - margin, high + margin
    last = max(step for step, _ in (*points, *held_out))
    first, name = min(1, last - 1), escape(title)

    def place(point: tuple[float, float]) -> str:
        across = (point[0] - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        down = (high - point[1]) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return f"{LEFT + across:.1f},{TOP + down:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="10" y="22" font-size="14" font-weight="bold" fill="{INK}">{name}</text>',
        *_axes(low, high, first, last),
        _line(map(place, points), TRAIN, 'stroke-width="1" opacity="0.3"'),
        _line(map(place, _means(points, MAX_MEANS // 4)), TRAIN, 'stroke-width="2"'),
    ]
    for point in held_out:
        x, _, y = place(point).partition(",")
        parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{HELD_OUT}"/>')
    parts.append(_legend(has_held_out=bool(held_out)))
    return "\n".join((*parts, "</svg>\n"))


def _axes(low: float, high: float, first: int, last: int) -> Iterable[str]:
    for part in range(5):
        y = TOP + part / 4 * (HEIGHT - TOP - BOTTOM)
        value = high - part / 4 * (high - low)
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>'
        yield (
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="{PALE}">'
            f"{value:.3f}</text>"
        )
    for step in sorted({1, (first + last) // 2, last}):
        x = LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        yield (
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="{PALE}">'
            f"{step:,}</text>"
        )


def _line(places: Iterable[str], colour: str, style: str) -> str:
    return f'<polyline points="{" ".join(places)}" fill="none" stroke="{colour}" {style}/>'


def _legend(*, has_held_out: bool) -> str:
    held_out = f'   <tspan fill="{HELD_OUT}">● held out</tspan>' if has_held_out else ""
    return (
        f'<text x="{WIDTH - RIGHT}" y="22" text-anchor="end" xml:space="preserve">'
        f'<tspan fill="{TRAIN}">━ training loss by step</tspan>{held_out}</text>'
    )


def _means(points: Points, most: int) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of its neighbours."""
    count = min(len(points), most)
    bounds = [len(points) * number // count for number in range(count + 1)]
    groups = [points[start:end] for start, end in pairwise(bounds)]
    return [
        (sum(step for step, _ in group) / len(group), sum(loss for _, loss in group) / len(group))
        for group in groups
    ]
