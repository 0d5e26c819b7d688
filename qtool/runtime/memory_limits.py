"""What `--max-memory` says. Imports nothing heavy: a mistake in it is told at once."""

from __future__ import annotations

import re
from typing import Final

from qtool.backends.cuda_driver import NoCudaError, find_driver
from qtool.errors import Option, QtoolError

SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)
MAX_MEMORY_EXAMPLE: Final = "0=6GiB,cpu=20GiB"


def parse_max_memory(text: str) -> dict[int | str, int]:
    """ "0=6GiB,cpu=20GiB" -> {0: 6 * 2**30, "cpu": 20 * 2**30}; GB is 10^9, GiB 2^30."""
    limits: dict[int | str, int] = {}
    for entry in text.split(","):
        place, equals, size = entry.partition("=")
        place = place.strip().removeprefix("cuda:")
        match = SIZE.fullmatch(size)
        if not equals or not match or not (place == "cpu" or place.isdecimal()):
            raise QtoolError(
                (
                    Option("max_memory", text),
                    f": {entry!r} is not of the form GPU=SIZE or cpu=SIZE",
                ),
                kind="usage",
                hint=("for example ", Option("max_memory", MAX_MEMORY_EXAMPLE)),
            )
        number, unit, binary = match.groups()
        scale = (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " ")
        limits[int(place) if place != "cpu" else "cpu"] = int(float(number) * scale)
    return limits


def require_max_memory(text: str, device: str) -> None:
    """Refuse limits that are malformed, or of a GPU where none is used. PyTorch knows the rest.

    Raises:
        QtoolError: usage.
    """
    gpus = [place for place in parse_max_memory(text) if isinstance(place, int)]
    if not gpus:
        return
    if device == "cpu":
        raise no_such_gpu(gpus[0], device)
    try:
        find_driver()
    except NoCudaError as error:
        raise no_such_gpu(gpus[0], "cpu") from error


def no_such_gpu(index: int, runs_on: str) -> QtoolError:
    """The error for a limit of GPU `index`, where the model runs on another device."""
    return QtoolError(
        (Option("max_memory"), f" names GPU {index}, but the model runs on {runs_on}"),
        kind="usage",
        hint=("without a GPU give host memory only: ", Option("max_memory", "cpu=20GiB")),
    )
