"""Pictures of plans as one HTML file that needs no network and no other file.

The numbers lie in the page as JSON; the scripts of pages/ draw them as SVG and let the reader ask
for values and leave precisions out.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from qtool.planner.curves import ContextCurves, PrecisionCurve
from qtool.planner.fit import TIGHT_SHARE
from qtool.planner.records import Sizing
from qtool.report.plot_frame import (
    COLOURS,
    DARK_COLOURS,
    SIZING_AXIS,
    SizingBar,
    Words,
    context_axis,
    context_ticks,
    context_words,
    crossings,
    device_name,
    limit_text,
    model_name,
    sizing_bars,
    sizing_limits,
    sizing_words,
    tokens_text,
)

PAGES: Final = Path(__file__).parent / "pages"
PLACE: Final = re.compile(r"\{\{(\w+)\}\}")


def context_page(curves: ContextCurves) -> str:
    """Peak memory against context, as a page."""
    words = context_words(curves)
    plan = {
        "contexts": curves.contexts,
        "ticks": [
            [tick, tokens_text(tick)]
            for tick in context_ticks(curves.contexts[0], curves.contexts[-1])
        ],
        "asked": curves.workload.context,
        "axis": context_axis(curves),
        "tightShare": TIGHT_SHARE,
        "precisions": [_curve_fields(curves, curve) for curve in curves.precisions],
        "limits": [
            {"text": limit_text(limit), "usableBytes": limit.usable_bytes}
            for limit in curves.limits
        ],
    }
    return _page(words, plan, "context.js")


def sizing_page(sizing: Sizing) -> str:
    """The peak of each model at each precision, as a page."""
    plan = {
        "axis": SIZING_AXIS,
        "bars": [_bar_fields(sizing, bar) for bar in sizing_bars(sizing)],
        "limits": [
            {"name": limit.name, "usableBytes": limit.usable_bytes}
            for limit in sizing_limits(sizing)
        ],
    }
    return _page(sizing_words(sizing), plan, "sizing.js")


def _curve_fields(curves: ContextCurves, curve: PrecisionCurve) -> dict[str, Any]:
    return {
        "quant": curve.quant,
        "peakBytes": [point.peak_bytes for point in curve.points],
        "lowBytes": [point.low_bytes for point in curve.points],
        "highBytes": [point.high_bytes for point in curve.points],
        "longest": curve.longest,
        "crossings": crossings(curves, curve),
    }


def _bar_fields(sizing: Sizing, bar: SizingBar) -> dict[str, Any]:
    return {
        "model": bar.model,
        "name": model_name(sizing, bar.model),
        "quant": bar.quant,
        "peakBytes": bar.peak_bytes,
        "text": bar.text,
        "answers": [
            {
                "device": device_name(row),
                "usableBytes": row.usable_bytes,
                "verdict": row.verdict,
                "longest": row.max_context,
            }
            for row in bar.rows
        ],
    }


def _page(words: Words, plan: dict[str, Any], script: str) -> str:
    """The page with its places filled in, each once, whatever the words hold."""
    footnotes = "<br>\n".join(map(html.escape, words.footnotes))
    parts = {
        "title": html.escape(words.title),
        "subtitle": html.escape(words.subtitle),
        "label": html.escape(f"{words.title}: {words.subtitle}"),
        "footnotes": footnotes,
        "colours": _colour_rules(),
        "style": _read("page.css"),
        # No "<" in the data, so that nothing in it can end the element that holds it.
        "plan": json.dumps({**plan, "numColours": len(COLOURS)}).replace("<", "\\u003c"),
        "script": _read("drawing.js") + "\n" + _read(script),
    }
    return PLACE.sub(lambda place: parts[place[1]], _read("page.html"))


def _colour_rules() -> str:
    dark = f"@media (prefers-color-scheme: dark) {{ {_variables(DARK_COLOURS)} }}"
    return f"{_variables(COLOURS)}\n{dark}"


def _variables(colours: Iterable[str]) -> str:
    rules = " ".join(f"--colour-{number}: {colour};" for number, colour in enumerate(colours))
    return f":root {{ {rules} }}"


def _read(name: str) -> str:
    return (PAGES / name).read_text(encoding="utf-8").rstrip()
