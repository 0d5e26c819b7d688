"""`--plot FILE`: a picture of a plan as .svg, .png (both drawn by matplotlib) or .html (by itself).

    check_plot_path(path)  # before any work
    write_plot(path, context_curves(model, estimate))

A picture is drawn in memory and appears under its name when it is complete.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

from qtool.errors import Option, QtoolError
from qtool.planner.curves import ContextCurves
from qtool.planner.records import Sizing
from qtool.report.whole_files import write_whole

SUFFIXES: Final = (".svg", ".png", ".html")
PAGE_SUFFIX: Final = ".html"


def check_plot_path(path: Path) -> None:
    """Find out whether a picture can be written to `path` at all.

    Raises:
        QtoolError: (usage) another suffix, a folder of that name, or no folder to put it in;
            (unsupported) matplotlib is needed and not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise QtoolError(
            (
                Option("plot", path),
                ": expected a name that ends in .svg, .png or .html, "
                f"found {f'one in {suffix}' if suffix else 'one without an ending'}",
            ),
            kind="usage",
            hint=Option("plot", f"{path.stem or 'memory'}.svg"),
        )
    if path.is_dir():
        raise QtoolError(
            (Option("plot", path), ": there is a folder of that name"),
            kind="usage",
            hint="name a file",
        )
    if not path.parent.is_dir():
        raise QtoolError(
            (Option("plot", path), f": there is no folder {path.parent}"),
            kind="usage",
            hint=f"mkdir -p {path.parent}",
        )
    if suffix != PAGE_SUFFIX and importlib.util.find_spec("matplotlib") is None:
        raise QtoolError(
            (Option("plot", path), f": {suffix} needs matplotlib, not installed here"),
            kind="unsupported",
            hint=(
                "pip install 'qtool[plot]', or ",
                Option("plot", f"{path.stem}{PAGE_SUFFIX}"),
                ", which needs none",
            ),
        )


def write_plot(path: Path, curves: ContextCurves) -> None:
    """Draw peak memory against context; QtoolError as from `check_plot_path`."""
    check_plot_path(path)
    if path.suffix.lower() == PAGE_SUFFIX:
        from qtool.report.plot_html import context_page

        write_whole(path, context_page(curves).encode())
    else:
        from qtool.report.plot_figure import context_figure

        write_whole(path, context_figure(curves, path.suffix.lower()[1:]))


def write_sizing_plot(path: Path, sizing: Sizing) -> None:
    """Draw the peak of each model at each precision; QtoolError as from `check_plot_path`."""
    check_plot_path(path)
    if path.suffix.lower() == PAGE_SUFFIX:
        from qtool.report.plot_html import sizing_page

        write_whole(path, sizing_page(sizing).encode())
    else:
        from qtool.report.plot_figure import sizing_figure

        write_whole(path, sizing_figure(sizing, path.suffix.lower()[1:]))
