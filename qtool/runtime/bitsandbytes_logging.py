"""bitsandbytes writes to the log what is no news here: it is held back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

LOGGER: Final = "bitsandbytes"


@contextmanager
def quiet_bitsandbytes() -> Iterator[None]:
    """Hold back its log lines, such as one for every product of bfloat16 activations in INT8."""
    logger = logging.getLogger(LOGGER)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
