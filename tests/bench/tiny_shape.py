"""A model shape that takes milliseconds, and sizes of copies and weights that do too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny_models import llama_config

COPY_BYTES = 1 << 20
CONFIG = llama_config(hidden=128, mlp=192)


def write_tiny_shape(folder: Path) -> Path:
    """Write the config.json of the shape `tiny`."""
    path = folder / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return path


def shrink_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy and rotate over little: nobody looks at the times."""
    monkeypatch.setattr("qtool.bench.torch_device.COPY_BYTES", COPY_BYTES)
    monkeypatch.setattr("qtool.bench.products.ROTATION_BYTES", 1 << 16)
