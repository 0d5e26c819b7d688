"""`qtool demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qtool.cli import options
from qtool.cli.session import verb_session
from qtool.errors import QtoolError

EXAMPLES = (
    "qtool demo",
    "qtool demo --keep ./demo-nf4",
    "qtool demo --json",
)


def demo(
    ctx: typer.Context,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep the quantized model in this folder.", show_default=False
        ),
    ] = None,
    config: options.ConfigFile = None,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    r"""Run the verbs on a small model that ships with qtool.

    Shows estimate, quantize, inspect, generate and sizing. Works offline and takes some seconds.
    The text before and after needs the [run] extra.
    """
    with verb_session(
        ctx, "demo", json_output=json_output, quiet=quiet, verbose=verbose, color=color
    ) as output:
        from qtool.demo import open_demo
        from qtool.report.demo import DemoReport
        from qtool.runtime.requirements import require_run_extra

        with open_demo(keep) as shown:
            report = DemoReport(output, shown, is_kept=keep is not None)
            report.estimate(shown.estimate())
            speed = shown.measure_speed()  # compiles the kernels, before their clock starts
            report.quantize(*shown.quantize(output.on_note), speed)
            report.inspect(shown.inspect(output.on_note))
            try:
                require_run_extra()
            except QtoolError as error:
                output.warn(f"no text before and after: {error.message}; {error.hint}")
            else:
                report.generate()
            report.sizing(shown.sizing())
            report.end()
