"""`qtool doctor`: is this machine ready, and if not, what helps?"""

from __future__ import annotations

from typing import Annotated

import typer

from qtool.cli import options
from qtool.cli.session import verb_session

EXAMPLES = (
    "qtool doctor",
    "qtool doctor ./out",
    "qtool doctor --json",
)

CheckedModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Look at this model's settings too: a local folder, or a Hub id.",
        show_default=False,
    ),
]


def doctor(
    ctx: typer.Context,
    model: CheckedModel = None,
    config: options.ConfigFile = None,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Check this machine; each problem comes with its fix.

    Looks at versions, GPU, disk, Hub and CPU, and ends with a real round trip of a small tensor
    through every backend. Exit code 1 if a check failed; warnings do not count.
    """
    with verb_session(
        ctx, "doctor", json_output=json_output, quiet=quiet, verbose=verbose, color=color
    ) as output:
        from qtool.architecture import KNOWN_MODEL_TYPES
        from qtool.doctor import run_checks
        from qtool.report.doctor import report_checks

        if not report_checks(output, run_checks(model), KNOWN_MODEL_TYPES):
            raise typer.Exit(1)
