"""`qtool inspect`: what is in a checkpoint, how far from its original, and is it whole?"""

from __future__ import annotations

from typing import Annotated

import typer

from qtool.cli import options
from qtool.cli.session import verb_session
from qtool.errors import EXIT_CODES

EXAMPLES = (
    "qtool inspect ./out",
    "qtool inspect ./out --verify",
    "qtool inspect ./out --against ./Llama-3.1-8B",
    "qtool inspect unsloth/Llama-3.2-1B-bnb-4bit",
    "qtool inspect ./out --tensors --json",
)


def inspect(
    ctx: typer.Context,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A folder with safetensors files, or a Hub id with an optional @revision.",
            show_default=False,
        ),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Measure each layer's error against this full-precision original.",
            show_default=False,
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Check every rule of layout, index, config and manifest."),
    ] = False,
    config: options.ConfigFile = None,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Say what a checkpoint holds; measure and verify it.

    Works on any safetensors folder: full precision, qtool's and bitsandbytes' own. With --verify
    the exit code is 3 if a rule is broken.
    """
    with verb_session(
        ctx, "inspect", json_output=json_output, quiet=quiet, verbose=verbose, color=color
    ) as output:
        from qtool.inspection.command import inspect_path
        from qtool.report.inspect import report_inspection

        with output.progress() as on_event:
            result = inspect_path(path, against=against, verify=verify, on_event=on_event)
        report_inspection(output, result, tensors=tensors)
        if result.verification is not None and not result.verification.ok:
            raise typer.Exit(EXIT_CODES["differs"])
