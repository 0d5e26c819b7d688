"""config.json as transformers wrote it becomes the config that transformers had."""

from __future__ import annotations

import json
import math
from pathlib import Path

from transformers import Mamba2Config

from qtool.runtime.model_config import parse_config


def test_numbers_that_json_lacks_are_read_as_transformers_writes_them(tmp_path: Path) -> None:
    config = Mamba2Config()
    assert config.time_step_limit[1] == math.inf
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for limit in (written["time_step_limit"], [0.0, {"__float__": "Infinity"}], [0.0, math.inf]):
        read = parse_config(written | {"time_step_limit": limit}, "tiny")
        assert list(read.time_step_limit) == [0.0, math.inf]
