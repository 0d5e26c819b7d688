"""`--config FILE.toml`: option values for a verb, from a file or from a recipe that ships.

    quant = "nf4"            # any option of the verb, by its long name: lora-r or lora_r
    [estimate]               # a table named after a verb applies to that verb alone
    context = 8192           # a list for what can be repeated: gpu = ["4090", "L4"]

An unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtool.errors import QtoolError
from qtool.resources import config_path


def read_config_file(
    path: Path, *, verb: str, verbs: Sequence[str], params: Sequence[Any]
) -> dict[str, Any]:
    """The values for `verb`, keyed by parameter name as the command line parser wants them.

    Args:
        path: a TOML file, or the name of a recipe in configs/recipes.
        verbs: all verbs, which tables may be named after.
        params: the verb's command line parameters (`name`, `opts`).
    """
    values = _read_toml(_find(path))
    known = {
        option.lstrip("-"): param
        for param in params
        for option in (*param.opts, *param.secondary_opts)
        if option.startswith("--") and not param.is_eager  # a file names no other, and no help
    }
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    for table, entries in tables.items():
        if table not in verbs:
            inner = next((f"{table} {it}" for it in entries if f"{table} {it}" in verbs), None)
            hint = f'a name of two words wants quotes: ["{inner}"]' if inner else None
            raise _unknown(table, verbs, path, what="table", hint=hint)
    above = {key: value for key, value in values.items() if key not in tables}
    merged: dict[str, Any] = {}
    for entries in (above, tables.get(verb, {})):
        merged.update(_by_option(entries, known, path, verb))
    return {
        known[key].name: _as_given(key, value, known[key], path) for key, value in merged.items()
    }


def _by_option(
    entries: dict[str, Any], known: dict[str, Any], path: Path, verb: str
) -> dict[str, Any]:
    """The values by the long names of options, which may have underscores for dashes."""
    options: dict[str, Any] = {}
    for key, value in entries.items():
        option = key.replace("_", "-")
        if option not in known:
            raise _unknown(key, list(known), path, what=f"option of qtool {verb}")
        if option in options:
            raise QtoolError(
                f"{path}: {option} is there with dashes and with underscores",
                kind="usage",
                hint="leave one of them out",
            )
        options[option] = value
    return options


def _as_given(key: str, value: Any, param: Any, path: Path) -> Any:
    """As text, which the parser reads as it does the command line's: it would cut 1.9 to 1.

    One value of an option that can be repeated needs no brackets.
    """
    is_repeated = getattr(param, "multiple", False)
    if isinstance(value, bool) and f"--{key}" in param.secondary_opts:
        value = not value
    values = value if is_repeated and isinstance(value, list) else [value]
    if not all(isinstance(each, str | int | float) for each in values):
        raise QtoolError(
            f"{path}: {key} = {value} is no value of an option",
            kind="usage",
            hint="write a text in quotes, a number, true or false"
            + "; more than one of them in brackets" * is_repeated,
        )
    texts = [str(each).lower() if isinstance(each, bool) else str(each) for each in values]
    return texts if is_repeated else texts[0]


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    recipe = config_path(f"recipes/{path.name.removesuffix('.toml')}.toml")
    if path.parent == Path() and recipe.is_file():
        return recipe
    raise QtoolError(
        f"{path}: no such file, and no recipe of that name",
        kind="usage",
        hint="recipes: " + ", ".join(sorted(p.stem for p in recipe.parent.glob("*.toml"))),
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise QtoolError(
            f"{path} is not valid TOML: {error}",
            kind="bad_file",
            hint='lines are such as context = 8192 or quant = "nf4"',
        ) from error


def _unknown(
    key: str, known: Sequence[str], path: Path, *, what: str, hint: str | None = None
) -> QtoolError:
    nearest = difflib.get_close_matches(key, known, n=1)
    if hint is None:
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(sorted(known))}"
    return QtoolError(f"{path}: {key!r} is no {what}", kind="usage", hint=hint)
