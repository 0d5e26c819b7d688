"""What a model computes in, by its name: known without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from qtool.checkpoint.records import Checkpoint
from qtool.formats.precisions import ComputeDtype

COMPUTE_DTYPES: Final[tuple[ComputeDtype, ...]] = ("bfloat16", "float16", "float32")


def name_dtype(checkpoint: Checkpoint, asked: str | None) -> ComputeDtype:
    """That of activations and unpacked weights: asked for, config.json's, or the weights'."""
    config = checkpoint.config
    text = config.get("text_config")
    for fields in (config, text if isinstance(text, Mapping) else {}):
        asked = asked or fields.get("dtype") or fields.get("torch_dtype")
    for name in COMPUTE_DTYPES:
        if name == asked:
            return name
    stored = {t.dtype for t in checkpoint.tensors.values() if t.name.endswith("weight")}
    if "BF16" in stored:
        return "bfloat16"
    return "float16" if "F16" in stored else "float32"
