"""Holds back what transformers and accelerate say; qtool says it in its own words."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import transformers

_turn = threading.Lock()
_num_inside = 0
_speaking = ExitStack()  # lets them speak again


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' and accelerate's log lines, warnings and bars.

    They are of the whole process: of threads that are here at once the first silences them, and the
    last lets them speak again.
    """
    global _num_inside
    with _turn:
        if _num_inside == 0:
            _speaking.enter_context(_silence())
        _num_inside += 1
    try:
        yield
    finally:
        with _turn:
            _num_inside -= 1
            if _num_inside == 0:
                _speaking.close()


@contextmanager
def _silence() -> Iterator[None]:
    own = transformers.utils.logging
    verbosity, bars = own.get_verbosity(), own.is_progress_bar_enabled()
    spreading = logging.getLogger("accelerate")  # tells of weights that go to the disk
    level = spreading.level
    own.set_verbosity_error()
    own.disable_progress_bar()
    spreading.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        own.set_verbosity(verbosity)
        if bars:
            own.enable_progress_bar()
        spreading.setLevel(level)
