"""Folders that others quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny_models import llama_shapes, save_tensors, write_llama


def write_fp8(folder: Path, **config: Any) -> None:
    """A Llama whose linear layers are FP8, with a scale each."""
    written = write_llama(folder)
    tensors = {}
    for name, shape in llama_shapes(written).items():
        if "proj" in name:
            tensors[name] = ("F8_E4M3", np.zeros(shape, np.uint8))
            tensors[name.replace(".weight", ".weight_scale")] = ("F32", np.ones(1, np.float32))
        else:
            tensors[name] = ("BF16", np.zeros(shape, np.uint16))
    save_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({**written, **config}))
