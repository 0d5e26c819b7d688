"""The `qtool` program: verbs, environment variables, the last line of error handling."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from qtool import __version__
from qtool.cli.session import report_error
from qtool.errors import EXIT_CODES, QtoolError
from qtool.report.output import Output

app = typer.Typer(
    name="qtool",
    help="Does this language model fit my GPU? Plan its memory, quantize it, inspect it, run it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"qtool {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    pass


def _register_verbs() -> None:
    # Modules of verbs are light: they import their packages only when the verb runs.
    from qtool.cli import demo, doctor, estimate, generate, inspect, quantize, sizing

    for verb in (estimate, sizing):
        app.command(rich_help_panel="Plan")(getattr(verb, verb.__name__.rpartition(".")[2]))
    app.command(rich_help_panel="Make")(quantize.quantize)
    app.command(rich_help_panel="Make")(inspect.inspect)
    app.command(rich_help_panel="Use")(generate.generate)
    app.command(rich_help_panel="Help")(demo.demo)
    app.command(rich_help_panel="Help")(doctor.doctor)


def _bind_environment(group: Any) -> None:
    """Every option of every verb can be set by QTOOL_ and its long name: QTOOL_COMPUTE_DTYPE."""
    for command in group.commands.values():
        for param in command.params:
            long_names = [name for name in param.opts if name.startswith("--")]
            if long_names and param.envvar is None and param.name != "help":
                param.envvar = "QTOOL_" + long_names[0].lstrip("-").replace("-", "_").upper()


def build_command() -> Any:
    """The whole command tree, ready to be invoked."""
    _register_verbs()
    group = typer.main.get_command(app)
    _bind_environment(group)
    return group


def main() -> None:
    """Run qtool and exit with the contract's code."""
    command = build_command()
    try:
        result = command(prog_name="qtool", standalone_mode=False)
    except Exception as error:  # usage errors; verbs report their own inside verb_session
        sys.exit(_report_outside_verb(error))
    except KeyboardInterrupt:
        sys.exit(EXIT_CODES["interrupted"])
    sys.exit(result if isinstance(result, int) else 0)


def _report_outside_verb(error: Exception) -> int:
    exit_code = getattr(error, "exit_code", 1)
    if isinstance(error, (typer.Exit, BrokenPipeError)):
        return int(exit_code)
    output = Output("qtool", json_mode="--json" in sys.argv)
    if hasattr(error, "format_message"):  # the command line parser's own errors
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "qtool"
        message = error.format_message()
        if not message:  # no arguments: the help was printed
            return int(exit_code)
        error = QtoolError(message, kind="usage", hint=f"see `{path} --help`")
    report_error(output, error)
    return getattr(error, "exit_code", 1)
