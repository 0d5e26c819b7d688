"""What `--help` prints: the parser's own plain text, with options under the headings of their
panels, examples line by line, and nothing cut. It loads no rich."""

from __future__ import annotations

import math
import re
from typing import Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

MAX_COLUMNS: Final = 120  # longer lines are hard to read
NAMES_COLUMNS: Final = 34
NAMES_SHARE: Final = 0.45  # of a narrow terminal
BRACKETS: Final = str.maketrans("", "", "[]{}")
# What the parser writes of defaults in words; what it says of values has none.
PARENTHESES: Final = re.compile(r"\[default: \((.*)\)(?=[;\]])", re.DOTALL)


class _Layout:
    """How a command writes its parts, see `typer.core.TyperCommand`."""

    params: list[Any]
    epilog: str | None

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """One line; brackets are around what may be left out, and nothing is around the rest."""
        pieces = [piece.strip("{}") for piece in ctx.command.collect_usage_pieces(ctx)]
        formatter.write_usage(ctx.command_path, " ".join(pieces))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments and options, in the order of the code; verbs."""
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in ctx.command.get_params(ctx):
            record = param.get_help_record(ctx)
            is_argument = param.param_type_name == "argument"
            # `--help` is the parser's own, and has no panel.
            panel = getattr(param, "rich_help_panel", None)
            panel = panel or ("Arguments" if is_argument else "Options")
            if record:
                name = record[0].translate(BRACKETS) if is_argument else record[0]
                text = PARENTHESES.sub(r"[default: \1", record[1])
                panels.setdefault(panel, []).append((name, text))
        verbs = getattr(self, "commands", {})
        panels["Commands"] = [
            (name, verb.help.partition("\n\n")[0]) for name, verb in verbs.items()
        ]
        names_columns = min(NAMES_COLUMNS, int(NAMES_SHARE * formatter.width))
        for heading, rows in panels.items():
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows, col_max=names_columns)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Examples, one a line, as they can be typed."""
        with formatter.section("Examples"):
            for line in (self.epilog or "").splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


class VerbCommand(_Layout, TyperCommand):
    """A verb; its epilog is its examples, and no number of its options is infinite or none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See `typer.core.TyperCommand`; the parser's own ranges let NaN through."""
        rest: list[str] = super().parse_args(ctx, args)
        for param in self.params:
            given = ctx.params.get(param.name)
            for value in given if isinstance(given, list | tuple) else [given]:
                if isinstance(value, float) and not math.isfinite(value):
                    raise typer.BadParameter(f"{value} is no finite number", ctx=ctx, param=param)
        return rest


class VerbGroup(_Layout, TyperGroup):
    """Verbs below a verb; the same."""


class Program(_Layout, TyperGroup):
    """The program itself, whose epilog is a sentence."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """See `_Layout`."""
        formatter.write_paragraph()
        formatter.write_text(self.epilog or "")
