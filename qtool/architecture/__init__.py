"""What a config.json says about a model, without torch: its tensors, which of them are linear
layers, which are tied, and what its layers keep between tokens.

    architecture = build_architecture(config)          # QtoolError(unsupported) if unknown
    architecture.tensors["model.layers.0.mlp.up_proj.weight"].kind  # "linear"
"""

from __future__ import annotations

from qtool.architecture.build import build_architecture
from qtool.architecture.cache import (
    AttentionCache,
    CacheLayer,
    CompressedCache,
    LatentCache,
    RecurrentState,
)
from qtool.architecture.model_types import KNOWN_MODEL_TYPES
from qtool.architecture.records import Architecture, Experts, ModelTensor, TensorKind

__all__ = [
    "KNOWN_MODEL_TYPES",
    "Architecture",
    "AttentionCache",
    "CacheLayer",
    "CompressedCache",
    "Experts",
    "LatentCache",
    "ModelTensor",
    "RecurrentState",
    "TensorKind",
    "build_architecture",
]
