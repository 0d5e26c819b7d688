"""Checkpoints as folders of tensors: where MODEL lies, what its headers say, how bytes are read.

Knows safetensors, the index, config.json as data, the Hub; nothing of quantization or layers.

    checkpoint = open_checkpoint("org/model@main", need="headers")
    checkpoint.tensors["lm_head.weight"].shape
"""

from __future__ import annotations

from qtool.checkpoint.open import open_checkpoint
from qtool.checkpoint.records import Checkpoint, Shard, TensorInfo

__all__ = ["Checkpoint", "Shard", "TensorInfo", "open_checkpoint"]
