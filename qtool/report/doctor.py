"""How `qtool doctor` looks: a line per check as it is made, its fix below, a verdict at the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from qtool.doctor import Check, Status
from qtool.report.output import Output

if TYPE_CHECKING:
    from rich.table import Table

NAME_WIDTH: Final = 16
_SIGNS: Final[dict[Status, tuple[str, str]]] = {
    "ok": ("✓", "green"),
    "info": ("·", "dim"),
    "warn": ("!", "yellow"),
    "fail": ("✗", "bold red"),
}


def report_checks(
    output: Output, checks: Iterable[tuple[str, Check]], model_types: Sequence[str]
) -> bool:
    """Print (section, check) pairs while they come, with --verbose the `model_types` and what each
    section took; True unless one failed.
    """
    seen: list[tuple[str, Check]] = []
    seconds: dict[str, float] = {}
    start_s = time.perf_counter()
    for section, check in checks:
        if section not in seconds:
            output.answer(f"[bold]{section}[/bold]")
        seconds[section] = seconds.get(section, 0) + time.perf_counter() - start_s
        output.answer(_line(check))
        seen.append((section, check))
        start_s = time.perf_counter()
    output.detail(f"seconds: {' · '.join(f'{name} {took:.2f}' for name, took in seconds.items())}")
    if output.verbose:
        known = f"{len(model_types)} are known by name: {', '.join(model_types)}"
        output.answer("[bold]Models[/bold]", _line(Check("types", "info", known)))
    output.answer(_verdict([check for _, check in seen]))
    document = checks_document(seen)
    output.document(document)
    return bool(document["ready"])


def checks_document(checks: Sequence[tuple[str, Check]]) -> dict[str, Any]:
    """The fields of the JSON document, of (section, check) pairs."""
    return {
        "ready": not any(check.status == "fail" for _, check in checks),
        "checks": [{"section": section, **asdict(check)} for section, check in checks],
    }


def _line(check: Check) -> Table:
    from rich.table import Table
    from rich.text import Text

    sign, style = _SIGNS[check.status]
    line = Table.grid(padding=(0, 1))
    line.add_column(width=3, justify="right")
    line.add_column(width=NAME_WIDTH, no_wrap=True)
    line.add_column(overflow="fold")
    line.add_row(Text(sign, style), check.name, Text(check.found))
    if check.fix:
        line.add_row("", "", Text.assemble(("fix: ", "cyan"), check.fix))
    return line


def _verdict(checks: Iterable[Check]) -> str:
    counts = Counter(check.status for check in checks)
    parts = [f"{counts['ok']} ok"]
    if counts["warn"]:
        parts.append(f"[yellow]{_count(counts['warn'], 'warning')}[/yellow]")
    if counts["fail"]:
        parts.append(f"[bold red]{counts['fail']} failed[/bold red]")
    ready = "[bold green]ready[/bold green]" if not counts["fail"] else "[bold red]not ready[/]"
    return f"\n{ready}: {', '.join(parts)}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
