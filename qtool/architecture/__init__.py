"""What a config.json says about a model, without torch: its tensors, which of them are linear
layers, which are tied, and what its attention layers cache.

    architecture = build_architecture(config)          # QtoolError(unsupported) if unknown
    architecture.tensors["model.layers.0.mlp.up_proj.weight"].kind  # "linear"
"""

from __future__ import annotations

from qtool.architecture.build import KNOWN_MODEL_TYPES, build_architecture
from qtool.architecture.records import Architecture, CacheLayer, ModelTensor, TensorKind

__all__ = [
    "KNOWN_MODEL_TYPES",
    "Architecture",
    "CacheLayer",
    "ModelTensor",
    "TensorKind",
    "build_architecture",
]
