"""The `qtool` program: verbs, environment variables, the last line of error handling."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from inspect import cleandoc
from typing import Annotated, Any

import typer

from qtool import __version__
from qtool.cli.help import MAX_COLUMNS, Program, VerbCommand, VerbGroup
from qtool.cli.option_names import is_given, option_names, source_of
from qtool.cli.session import as_qtool_error, report_error
from qtool.errors import EXIT_NO_READER, Option, QtoolError, interruption
from qtool.report.output import Output, ReaderGone, writing_stdout

# The function of qtool.cli.VERB that bears its name is the command.
# A module with SUBVERBS is a group: they are its commands, and that function is only its help.
VERBS = (
    "estimate",
    "sizing",
    "quantize",
    "inspect",
    "generate",
    "finetune",
    "merge",
    "demo",
    "bench",
    "doctor",
)
HELP = "Does this language model fit my GPU? Plan its memory, quantize, inspect, run and train it."
EPILOG = "Every option can also be set by a variable: --compute-dtype by QTOOL_COMPUTE_DTYPE."


@cache
def build_command(verbs: tuple[str, ...] = VERBS) -> Any:
    """The command tree with these verbs, ready to be invoked."""
    app = typer.Typer(
        name="qtool",
        help=HELP,
        epilog=EPILOG,
        cls=Program,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": MAX_COLUMNS},
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    for verb in verbs:
        _add_verb(app, verb)
    group: Any = typer.main.get_command(app)
    _bind_environment(group)
    return group


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"qtool {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    pass


def _add_verb(app: typer.Typer, verb: str) -> None:
    # Light modules: they import their packages only when the verb runs.
    module = import_module(f"qtool.cli.{verb}")
    subverbs = getattr(module, "SUBVERBS", None)
    if subverbs is None:
        _add_command(app, verb, getattr(module, verb), module.EXAMPLES)
        return
    text = _join_lines(getattr(module, verb).__doc__)
    group = typer.Typer(
        help=text, epilog="\n".join(module.EXAMPLES), cls=VerbGroup, rich_markup_mode=None
    )
    for name in subverbs:
        examples = [line for line in module.EXAMPLES if line.startswith(f"qtool {verb} {name}")]
        _add_command(group, name, getattr(module, name), examples)
    app.add_typer(group, name=verb)


def _add_command(
    app: typer.Typer, name: str, command: Callable[..., None], examples: Sequence[str]
) -> None:
    text = _join_lines(command.__doc__ or "")
    app.command(name, help=text, epilog="\n".join(examples), cls=VerbCommand)(command)


def _join_lines(docstring: str) -> str:
    """Paragraphs on one line each, to be wrapped to the terminal's width."""
    paragraphs = cleandoc(docstring).split("\n\n")
    return "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)


def _bind_environment(group: Any) -> None:
    """Every option of every verb can be set by QTOOL_ and its long name: QTOOL_COMPUTE_DTYPE."""
    for command in group.commands.values():
        if hasattr(command, "commands"):
            _bind_environment(command)
        for param in command.params:
            long_names = [name for name in param.opts if name.startswith("--")]
            if long_names and param.envvar is None and param.name != "help":
                param.envvar = "QTOOL_" + long_names[0].lstrip("-").replace("-", "_").upper()
                param.show_envvar = False  # said once, in the program's help


def main() -> None:
    """Run qtool and exit with the contract's code."""
    _start_quickly()
    arguments = sys.argv[1:]
    # The other verbs take time to describe, and only help and mistakes need them.
    command = build_command(tuple(verb for verb in VERBS if verb in arguments[:1]) or VERBS)
    try:
        with writing_stdout():  # help; verbs report their own errors inside verb_session
            result = command(arguments or ["--help"], prog_name="qtool", standalone_mode=False)
            sys.stdout.flush()
    except Exception as error:
        sys.exit(_report_outside_verb(error))
    except SystemExit as done:
        if isinstance(done.__context__, BrokenPipeError):  # the parser's own way with a closed pipe
            sys.exit(EXIT_NO_READER)
        raise
    except KeyboardInterrupt as signal:
        sys.exit(interruption(signal, "").exit_code)
    finally:
        gc.freeze()  # what is left goes with the process; looking through it takes a while
    sys.exit(result if isinstance(result, int) else 0)


def _start_quickly() -> None:
    """Importing makes many objects and no garbage; and nothing here uses NumPy's linear algebra,
    which starts a thread per core when it is loaded.
    """
    gc.set_threshold(50_000)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _report_outside_verb(error: Exception) -> int:
    if isinstance(error, typer.Exit):
        return int(error.exit_code)
    if isinstance(error, ReaderGone):
        return EXIT_NO_READER
    output = Output("qtool", json_mode="--json" in sys.argv)
    if hasattr(error, "format_message"):  # the command line parser's own errors
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "qtool"
        _blame_the_source(error, context)
        error = QtoolError(error.format_message(), kind="usage", hint=f"see `{path} --help`")
    told = as_qtool_error(error)
    report_error(output, error, told)
    return told.exit_code


def _blame_the_source(error: Any, context: typer.Context | None) -> None:
    """Let the parser's error about a value name the variable or the file that it came from."""
    param = getattr(error, "param", None)
    if context is None or param is None or source_of(context, param.name) == "COMMANDLINE":
        return
    if is_given(context, param.name):
        long_name = next(name for name in param.opts if name.startswith("--"))
        error.param_hint = option_names(context)(Option(long_name.lstrip("-").replace("-", "_")))
