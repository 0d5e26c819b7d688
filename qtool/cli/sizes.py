"""Numbers as people write them: sizes ("5GB", "512MiB", "4096"), and a threshold or a word."""

from __future__ import annotations

import math
import re
from typing import Literal

import typer

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
}


def parse_size(text: str | int) -> int:
    """A positive number of bytes; KB, MB, GB, TB are powers of 1000, KiB, MiB, ... of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if not match or match[2].upper() not in _UNITS:
        raise typer.BadParameter(f'{text!r} is no size; expected one such as "5GB" or "512MiB"')
    num_bytes = int(float(match[1]) * _UNITS[match[2].upper()])
    if num_bytes < 1:
        raise typer.BadParameter(f"{text!r} is no positive size")
    return num_bytes


def parse_threshold(text: str | float) -> float | Literal["config"]:
    """A number from 0 on, or the word "config"."""
    if text == "config":
        return "config"
    try:
        threshold = float(text)
    except ValueError:
        threshold = math.nan
    if not 0 <= threshold < math.inf:
        raise typer.BadParameter(f'{text!r} is no threshold; expected 0 or more, or "config"')
    return threshold
