"""Which names a checkpoint may use for its files and tensors, and how hostile ones are printed."""

from __future__ import annotations

import re
from typing import Final

MAX_TENSOR_NAME_BYTES: Final = 512
SHARD_NAME: Final = re.compile(r"[A-Za-z0-9_][\w.-]*\.safetensors", re.ASCII)
SHOWN_CHARACTERS: Final = 80


def is_shard_name(name: str) -> bool:
    """Whether `name` is a plain safetensors file name: no folder, nothing a shell would mind."""
    return len(name) <= 255 and SHARD_NAME.fullmatch(name) is not None


def fault_of_tensor_name(name: str) -> str | None:
    """What is wrong with a tensor's name, in words that follow "found"; None if nothing is."""
    if not name:
        return "an empty name"
    if not name.isprintable():  # control characters, NUL, lone surrogates, line separators
        return f"a name with unprintable characters, {quoted(name)}"
    if len(name.encode()) > MAX_TENSOR_NAME_BYTES:
        return f"a name of {len(name.encode())} bytes, {quoted(name)}"
    if name != name.strip():
        return f"a name that begins or ends with a space, {quoted(name)}"
    if name[0] in "/\\" or ".." in name.replace("\\", "/").split("/"):
        return f"a name that is a path, {quoted(name)}"
    return None


def quoted(value: object) -> str:
    """`value` as Python would write it, in ASCII and cut to a length that fits a message."""
    text = ascii(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
