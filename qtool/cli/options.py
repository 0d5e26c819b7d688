"""Options that several verbs share, declared once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from qtool.cli.option_names import CONFIG_FILE, IDLE_CONFIG, source_of
from qtool.cli.sizes import parse_size
from qtool.errors import Option
from qtool.formats.precisions import BLOCKSIZES
from qtool.report.output import ColorChoice

OUTPUT_PANEL = "Output"
TUNING_PANEL = "Tuning (changes no byte of the output)"

MAX_THREADS = 256  # beyond it they only stand in each other's way

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A local folder, or a Hub id with an optional @revision.",
        show_default=False,
    ),
]
# -- of verbs that write a checkpoint: `quantize` and `merge` ------------------------------------


def check_blocksize(blocksize: int) -> int:
    """A callback of typer's: refuses what no kernel has."""
    if blocksize not in BLOCKSIZES:
        raise typer.BadParameter(f"expected one of {', '.join(map(str, BLOCKSIZES))}")
    return blocksize


def seeds_to(largest: int) -> Callable[[int | None], int | None]:
    """A callback of typer's, whose own range would stand in the help with all its digits."""

    def check_seed(seed: int | None) -> int | None:
        if seed is not None and not 0 <= seed <= largest:
            raise typer.BadParameter(f"{seed} is not between 0 and {largest}")
        return seed

    return check_seed


def parse_path(text: str | Path) -> Path:
    """A path; the empty one, of a variable that is not set, would be the current folder."""
    if not str(text):
        raise typer.BadParameter("expected a name, found an empty one")
    return Path(text)


OutputFolder = Annotated[
    Path | None,
    typer.Option("--output", "-o", parser=parse_path, metavar="OUT", help="The folder to write."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")]
Restart = Annotated[bool, typer.Option("--restart", help="Begin anew instead of continuing.")]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        max=MAX_THREADS,
        rich_help_panel=TUNING_PANEL,
        help="Workers.",
        show_default="cores; at most 6 with cuda",
    ),
]
TileSize = Annotated[
    int | None,
    typer.Option(
        parser=parse_size,
        metavar="SIZE",
        rich_help_panel=TUNING_PANEL,
        help="Source bytes a worker carries at once.",
        show_default="4MiB; 16MiB with cuda",
    ),
]

# -- of all ---------------------------------------------------------------------------------------

Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=OUTPUT_PANEL),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="The answer only: no notes and no progress on stderr.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Say more: what each stage took, lists in full.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
Color = Annotated[
    ColorChoice,
    typer.Option("--color", help="NO_COLOR is honoured too.", rich_help_panel=OUTPUT_PANEL),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Read options from a TOML file; flags and QTOOL_* variables win.",
        rich_help_panel=OUTPUT_PANEL,
        show_default=False,
        is_eager=True,
        callback=lambda ctx, value: load_config_file(ctx, value),
        expose_value=False,
    ),
]


def load_config_file(ctx: typer.Context, path: Path | None) -> None:
    """Make the TOML file's values the defaults of the verb that `ctx` belongs to."""
    if path is not None:
        from qtool.cli.app import build_command
        from qtool.cli.config_file import read_config_file

        ctx.meta[CONFIG_FILE] = path
        root = ctx.find_root()
        verb = ctx.command_path.removeprefix(f"{root.info_name} ")
        ctx.default_map = read_config_file(
            path, verb=verb, verbs=_verbs_of(build_command()), params=ctx.command.params
        )
        # A file that QTOOL_CONFIG names for all verbs need not have something for each.
        if not ctx.default_map and source_of(ctx, "config") == "COMMANDLINE":
            asked = Option("config", path)
            ctx.meta[IDLE_CONFIG] = (asked, f" changes nothing: no option of qtool {verb} is in it")


def _verbs_of(command: Any) -> list[str]:
    """All verbs below `command`; those of a group as "bench kernels"."""
    verbs = []
    for name, verb in getattr(command, "commands", {}).items():
        below = _verbs_of(verb)
        verbs += [f"{name} {each}" for each in below] if below else [name]
    return verbs
