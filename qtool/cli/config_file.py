"""`--config FILE.toml`: option values for a verb, from a file or from a recipe that ships.

    quant = "nf4"            # any option of the verb, by its long name
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
        if option.startswith("--")
    }
    merged = {key: value for key, value in values.items() if not isinstance(value, dict)}
    for table, entries in values.items():
        if isinstance(entries, dict):
            _check_known(table, verbs, path, what="table")
            merged.update(entries if table == verb else {})
    for key in merged:
        _check_known(key, known, path, what=f"option of qtool {verb}")
    return {known[key].name: _as_given(value, known[key]) for key, value in merged.items()}


def _as_given(value: Any, param: Any) -> Any:
    """One value of an option that can be repeated needs no brackets."""
    is_one = getattr(param, "multiple", False) and not isinstance(value, list)
    return [value] if is_one else value


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


def _check_known(key: str, known: Sequence[str] | dict[str, Any], path: Path, *, what: str) -> None:
    if key in known:
        return
    nearest = difflib.get_close_matches(key, list(known), n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(sorted(known))}"
    raise QtoolError(f"{path}: {key!r} is no {what}", kind="usage", hint=hint)
