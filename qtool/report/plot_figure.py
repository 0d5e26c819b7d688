"""Pictures of plans by matplotlib, as the bytes of an SVG or PNG file. The same input gives the
same bytes; no file, window or global state is touched.

Sizes are in points (1/72 inch) where nothing else is said, memory in GiB.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

from qtool.planner.curves import ContextCurves, MemoryLimit
from qtool.planner.records import Sizing
from qtool.report.plot_frame import (
    COLOURS,
    SIZING_AXIS,
    SizingBar,
    Words,
    context_axis,
    context_ticks,
    context_words,
    crossings,
    limit_text,
    model_name,
    sizing_bars,
    sizing_limits,
    sizing_words,
    split_limits,
    spread,
    tokens_text,
)
from qtool.report.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS_PER_INCH: Final = 72
PNG_DOTS_PER_INCH: Final = 160
FONT_SIZE: Final = 9.0
TITLE_SIZE: Final = 14.0
CHARACTER_WIDTH: Final = 0.6  # of the font size, for the widest fonts in use
INK, PALE_INK, GRID, DASH_INK, PALE_DASH = (
    "#1a1a1a",
    "#5f6368",
    "#e4e6ea",
    "#3c4043",
    "#8a9099",
)

PLOT_WIDTH, PLOT_HEIGHT = 500.0, 300.0
LEFT, TOP, BOTTOM = 52.0, 62.0, 44.0  # around the plot; the footnotes come below
FOOTNOTE_LINE: Final = 12.0
LABEL_GAP: Final = 13.0
LABEL_OFFSET: Final = 16.0  # from the plot to its labels, room for the lines that lead to them
MARGIN: Final = 10.0
BAR_ROW: Final = 17.0
TILT: Final = 55  # degrees, of the limits' names above the bars

STYLE: Final[dict[str, Any]] = {
    "font.family": "DejaVu Sans",
    "font.size": FONT_SIZE,
    "text.color": INK,
    "text.parse_math": False,  # a model's name may hold dollar signs
    "axes.edgecolor": PALE_INK,
    "axes.labelcolor": PALE_INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": PALE_INK,
    "ytick.color": PALE_INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "qtool",
}
METADATA: Final[dict[str, dict[str, str | None]]] = {
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
}


def context_figure(curves: ContextCurves, suffix: str) -> bytes:
    """Peak memory against context, one curve per precision; `suffix` is svg or png."""
    highest_bytes = max(curve.points[-1].high_bytes for curve in curves.precisions)
    drawn, beyond = split_limits(curves.limits, highest_bytes)
    top_gib = 1.05 * max(highest_bytes, *(limit.usable_bytes for limit in drawn), 0) / GIB
    names = [curve.quant for curve in curves.precisions]
    texts = [*names, *map(limit_text, drawn), *(f"↑ {limit_text(limit)}" for limit in beyond)]
    height = max(PLOT_HEIGHT, LABEL_GAP * (len(texts) + 1))
    with _style():
        figure, axes = _frame(
            context_words(curves), LEFT, TOP, height, LABEL_OFFSET + _text_width(texts)
        )
        _context_axes(axes, curves, top_gib)
        for limit in drawn:
            axes.axhline(limit.usable_bytes / GIB, color=DASH_INK, lw=1.1, dashes=(5, 3))
        for number in range(len(curves.precisions)):
            _draw_curve(axes, curves, number)
        ends_gib = [curve.points[-1].peak_bytes / GIB for curve in curves.precisions]
        ends_gib += [limit.usable_bytes / GIB for limit in drawn] + [top_gib] * len(beyond)
        colours = [COLOURS[number % len(COLOURS)] for number in range(len(names))]
        colours += [DASH_INK] * (len(drawn) + len(beyond))
        heights = [end_gib / top_gib * height for end_gib in ends_gib]
        _label_ends(axes, texts, heights, height, colours, num_leading=len(names) + len(drawn))
        return _save(figure, suffix)


def sizing_figure(sizing: Sizing, suffix: str) -> bytes:
    """The peak of each model at each precision as bars; `suffix` is svg or png."""
    bars = sizing_bars(sizing)
    highest_bytes = max(bar.peak_bytes for bar in bars)
    drawn, _ = split_limits(sizing_limits(sizing), highest_bytes)
    end_gib = 1.02 * max(highest_bytes, *(limit.usable_bytes for limit in drawn), 0) / GIB
    models = list(dict.fromkeys(bar.model for bar in bars))
    height = BAR_ROW * (len(bars) + len(models)) + BAR_ROW / 2
    tilted = _text_width([limit.name for limit in drawn])
    top = TOP + LABEL_OFFSET + math.sin(math.radians(TILT)) * tilted
    left = MARGIN + _text_width([bar.quant for bar in bars]) + 8
    overhangs = [
        _text_width([bar.text]) - PLOT_WIDTH * (1 - bar.peak_bytes / GIB / end_gib) for bar in bars
    ]
    right = max(*overhangs, math.cos(math.radians(TILT)) * tilted)
    with _style():
        figure, axes = _frame(sizing_words(sizing), left, top, height, right)
        axes.set_xlim(0, end_gib)
        axes.set_ylim(height, 0)  # in points from the top
        axes.set_xlabel(SIZING_AXIS)
        for limit in drawn:
            axes.axvline(limit.usable_bytes / GIB, color=PALE_DASH, lw=0.8, dashes=(5, 3), zorder=1)
        _label_tops(axes, drawn, end_gib, height)
        _draw_bars(axes, bars, sizing)
        return _save(figure, suffix)


# -- memory against context -----------------------------------------------------------------------


def _context_axes(axes: Axes, curves: ContextCurves, top_gib: float) -> None:
    first, last = curves.contexts[0], curves.contexts[-1]
    ticks = context_ticks(first, last)
    axes.set_xscale("log", base=2)
    axes.set_xlim(first, max(last, first + 1))
    axes.set_xticks(ticks, [tokens_text(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_ylim(0, top_gib)
    axes.grid(visible=True)
    axes.set_ylabel("GiB")
    axes.set_xlabel(context_axis(curves))
    asked = curves.workload.context
    axes.axvline(asked, color=PALE_INK, lw=0.9, dashes=(1, 2))
    axes.annotate(
        f"{asked:,} tokens",
        xy=(asked, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        weight="bold",
    )


def _draw_curve(axes: Axes, curves: ContextCurves, number: int) -> None:
    """The curve, its band, its peak at the context that was asked about, and where it stops."""
    curve, colour = curves.precisions[number], COLOURS[number % len(COLOURS)]
    contexts = curves.contexts
    low_gib = [point.low_bytes / GIB for point in curve.points]
    high_gib = [point.high_bytes / GIB for point in curve.points]
    peaks_gib = [point.peak_bytes / GIB for point in curve.points]
    axes.fill_between(contexts, low_gib, high_gib, color=colour, alpha=0.1, lw=0)
    axes.plot(contexts, peaks_gib, color=colour, lw=2, solid_capstyle="round", zorder=3)
    asked = curves.workload.context
    asked_gib = peaks_gib[contexts.index(asked)]
    axes.plot([asked], [asked_gib], "o", color=colour, ms=4.5, zorder=4, clip_on=False)
    for context, usable_bytes in crossings(curves, curve):
        axes.plot(
            [context], [usable_bytes / GIB], "o", mfc="white", mec=colour, mew=1.5, ms=5, zorder=5
        )


def _label_ends(
    axes: Axes,
    texts: Sequence[str],
    heights: Sequence[float],
    height: float,
    colours: Sequence[str],
    num_leading: int,
) -> None:
    """Write `texts` right of the plot beside `heights`, apart from each other; lines lead from the
    first `num_leading` ends to their texts."""
    places = spread(heights, LABEL_GAP, 0, height)
    for number, (text, place, colour) in enumerate(zip(texts, places, colours, strict=True)):
        axes.annotate(
            text,
            xy=(PLOT_WIDTH, heights[number]),
            xycoords="axes points",
            xytext=(PLOT_WIDTH + LABEL_OFFSET, place),
            textcoords="axes points",
            va="center",
            color=colour,
            annotation_clip=False,
        )
        if number < num_leading:
            _lead(
                axes,
                (PLOT_WIDTH + 2, heights[number]),
                (PLOT_WIDTH + LABEL_OFFSET - 3, place),
                colour,
            )


# -- bars -----------------------------------------------------------------------------------------


def _draw_bars(axes: Axes, bars: Sequence[SizingBar], sizing: Sizing) -> None:
    """Bars from the top down, grouped under their model's name."""
    quants = list(dict.fromkeys(bar.quant for bar in bars))
    places, below, model = [], 0.0, None
    for bar in bars:
        if bar.model != model:
            model = bar.model
            _name_model(axes, model_name(sizing, model), below)
            below += BAR_ROW
        places.append(below + BAR_ROW / 2)
        below += BAR_ROW
    for bar, place in zip(bars, places, strict=True):
        colour = COLOURS[quants.index(bar.quant) % len(COLOURS)]
        axes.barh(place, bar.peak_bytes / GIB, height=0.72 * BAR_ROW, color=colour, zorder=2)
        axes.annotate(
            bar.text,
            xy=(bar.peak_bytes / GIB, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            zorder=4,
            annotation_clip=False,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85},
        )
    axes.set_yticks(places, [bar.quant for bar in bars])
    axes.tick_params(axis="y", length=0)


def _name_model(axes: Axes, name: str, below: float) -> None:
    axes.annotate(
        name,
        xy=(0, below + BAR_ROW * 0.62),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        weight="bold",
        zorder=4,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85},
    )


def _label_tops(
    axes: Axes,
    drawn: Sequence[MemoryLimit],
    end_gib: float,
    height: float,
) -> None:
    """Name the limits above their lines, apart from each other."""
    ends = [limit.usable_bytes / GIB / end_gib * PLOT_WIDTH for limit in drawn]
    for limit, end, place in zip(drawn, ends, spread(ends, LABEL_GAP, 0, PLOT_WIDTH), strict=True):
        _lead(axes, (end, height + 1), (place, height + LABEL_OFFSET - 4), DASH_INK)
        axes.annotate(
            limit.name,
            xy=(place, height + LABEL_OFFSET - 2),
            xycoords="axes points",
            rotation=TILT,
            rotation_mode="anchor",
            color=DASH_INK,
            annotation_clip=False,
        )


# -- the frame around either ----------------------------------------------------------------------


def _frame(
    words: Words, left: float, top: float, height: float, right: float
) -> tuple[Figure, Axes]:
    """A figure with so much room around its plot, and the words in it."""
    from matplotlib.figure import Figure

    below = BOTTOM + FOOTNOTE_LINE * len(words.footnotes)
    width, total = left + PLOT_WIDTH + right, top + height + below
    figure = Figure(figsize=(width / POINTS_PER_INCH, total / POINTS_PER_INCH), facecolor="white")
    plot = (left / width, below / total, PLOT_WIDTH / width, height / total)
    axes = figure.add_axes(plot)
    title_size = min(TITLE_SIZE, (width - MARGIN) / (0.7 * len(words.title)))
    lines = [
        (words.title, 22.0, title_size, INK, "bold"),
        (words.subtitle, 38.0, FONT_SIZE, INK, "normal"),
    ]
    last = total - MARGIN + 2
    for number, line in enumerate(reversed(words.footnotes)):
        lines.append((line, last - number * FOOTNOTE_LINE, FONT_SIZE - 1, PALE_INK, "normal"))
    for text, down, size, colour, weight in lines:
        figure.text(MARGIN / width, 1 - down / total, text, size=size, color=colour, weight=weight)
    return figure, axes


def _lead(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """A thin line from a thing to its label, in points from the plot's corner."""
    axes.annotate(
        "",
        xy=start,
        xytext=end,
        xycoords="axes points",
        textcoords="axes points",
        arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "shrinkA": 0, "shrinkB": 0},
        annotation_clip=False,
    )


def _text_width(texts: Sequence[str]) -> float:
    return CHARACTER_WIDTH * FONT_SIZE * max(map(len, texts), default=0)


def _style() -> AbstractContextManager[None]:
    """The settings of these pictures, whatever the user's matplotlibrc says."""
    import matplotlib.style

    return matplotlib.style.context(["default", STYLE])


def _save(figure: Figure, suffix: str) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # a box stands for a character that the font does not have
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format=suffix, dpi=PNG_DOTS_PER_INCH, metadata=METADATA[suffix])
    return buffer.getvalue()
