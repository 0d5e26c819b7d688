"""Silence that several threads ask for at once ends with the last of them."""

from __future__ import annotations

import logging
import warnings

from transformers.utils import logging as transformers_logging

from qtool.runtime.quiet import quiet_transformers


def how_loud() -> tuple[object, ...]:
    return (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
        logging.getLogger("accelerate").level,
        list(warnings.filters),
    )


def test_silence_lasts_as_long_as_anybody_wants_it() -> None:
    before = how_loud()
    first, second = quiet_transformers(), quiet_transformers()
    first.__enter__()
    quiet = how_loud()
    assert quiet != before
    second.__enter__()
    first.__exit__(None, None, None)  # as threads do: not in the order in which they came
    assert how_loud() == quiet
    second.__exit__(None, None, None)
    assert how_loud() == before
    with quiet_transformers():
        assert how_loud() == quiet
    assert how_loud() == before
