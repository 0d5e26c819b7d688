"""Reads a model's config.json as data: bounded, unambiguous JSON, nothing of its meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qtool.checkpoint.file_source import FileSource, read_whole
from qtool.checkpoint.strict_json import parse_json_object

CONFIG_NAME: Final = "config.json"
MAX_CONFIG_BYTES: Final = 1_000_000


def read_config(source: FileSource, name: str = CONFIG_NAME) -> Mapping[str, Any]:
    """The parsed config.

    Raises:
        QtoolError: bad_file, if it is too large or not one JSON object.
    """
    hint = "restore config.json from the model's original source"
    data = read_whole(source, name, max_bytes=MAX_CONFIG_BYTES, hint=hint)
    return parse_json_object(data, file=source.describe(name), hint=hint, allow_infinity=True)
