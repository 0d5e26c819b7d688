"""A checkpoint that is nothing but a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.checkpoint import Checkpoint


def checkpoint_of(config: Mapping[str, Any]) -> Checkpoint:
    """As opening a folder with only that config.json would give."""
    return Checkpoint(
        id="bare",
        location="local",
        revision=None,
        folder=None,
        config=config,
        shards=(),
        tensors={},
        other_files=(),
    )
