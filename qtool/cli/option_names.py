"""What the user calls an option: the flag, or the variable or the file that it was set in.

An error that blames `--max-context` helps nobody who set QTOOL_MAX_CONTEXT weeks ago.
"""

from __future__ import annotations

import json
import shlex
from typing import Final

import typer

from qtool.errors import NameOption, Option, name_argument, name_flag

# In the context's `meta`: the file of --config, and words where it has nothing for the verb.
CONFIG_FILE: Final = "qtool.config_file"
IDLE_CONFIG: Final = "qtool.idle_config"


def option_names(ctx: typer.Context) -> NameOption:
    """For errors and warnings of the verb that `ctx` belongs to."""
    params = {flag: param for param in ctx.command.params for flag in param.opts}

    def name(option: Option) -> str:
        param = params.get(option.flag)
        if param is None:
            return name_argument(option) if option.verb else name_flag(option)
        match source_of(ctx, str(param.name)):
            case "ENVIRONMENT":
                value = "" if option.value is None else f"={shlex.quote(str(option.value))}"
                return f"{param.envvar}{value}"
            case "DEFAULT_MAP":
                value = "" if option.value is None else f" = {_in_toml(option.value)}"
                return f"{option.flag.lstrip('-')}{value} in {ctx.meta[CONFIG_FILE]}"
        return name_flag(option)

    return name


def source_of(ctx: typer.Context, name: str) -> str:
    """Where a parameter's value came from: COMMANDLINE, ENVIRONMENT, DEFAULT_MAP (a file) or
    DEFAULT; empty for one that the verb has not."""
    source = ctx.get_parameter_source(name)
    return source.name if source is not None else ""


def is_given(ctx: typer.Context, name: str) -> bool:
    """Whether the user set the option, in whatever way."""
    return source_of(ctx, name) not in ("", "DEFAULT")


def _in_toml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
