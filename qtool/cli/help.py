"""What `--help` prints: the parser's own plain text, with options under the headings of their
panels, examples line by line, and nothing cut. It loads no rich."""

from __future__ import annotations

from typing import Any, Final

from typer.core import TyperCommand, TyperGroup

MAX_COLUMNS: Final = 120  # longer lines are hard to read
NAMES_COLUMNS: Final = 34


class _Layout:
    """How a command writes its parts, see `typer.core.TyperCommand`."""

    params: list[Any]
    epilog: str | None

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments and options, in the order of the code; verbs."""
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in ctx.command.get_params(ctx):
            record = param.get_help_record(ctx)
            usual = "Arguments" if param.param_type_name == "argument" else "Options"
            # `--help` is the parser's own, and has no panel.
            panel = getattr(param, "rich_help_panel", None) or usual
            panels.setdefault(panel, []).extend([record] if record else [])
        verbs = getattr(self, "commands", {})
        panels["Commands"] = [
            (name, verb.help.partition("\n\n")[0]) for name, verb in verbs.items()
        ]
        for heading, rows in panels.items():
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows, col_max=NAMES_COLUMNS)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Examples, one a line, as they can be typed."""
        with formatter.section("Examples"):
            for line in (self.epilog or "").splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


class VerbCommand(_Layout, TyperCommand):
    """A verb; its epilog is its examples."""


class VerbGroup(_Layout, TyperGroup):
    """Verbs below a verb; the same."""


class Program(_Layout, TyperGroup):
    """The program itself, whose epilog is a sentence."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """See `_Layout`."""
        formatter.write_paragraph()
        formatter.write_text(self.epilog or "")
