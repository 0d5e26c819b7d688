"""The records that describe a model's structure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# "linear": weight [out, in] of an nn.Linear. "conv1d": weight [in, out] of transformers' Conv1D
# (GPT-2), stored transposed. Everything else is never quantized.
TensorKind = Literal["linear", "conv1d", "bias", "embedding", "norm", "other"]


@dataclass(frozen=True, slots=True)
class ModelTensor:
    """One parameter of the model as transformers builds it, by its state-dict name."""

    name: str
    shape: tuple[int, ...]
    kind: TensorKind
    tied_to: str | None = None  # the parameter whose storage it shares; that one is counted


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """What one layer keeps per token: keys of `num_kv_heads * head_dim`, values alike.

    `window` limits the tokens kept (sliding attention); None keeps the whole context.
    """

    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model's structure, computed from its config.json alone.

    `skipped_modules` are the names that transformers' default rule keeps in 16 bit (output head,
    tied weights, ...). `unmodelled` names parts whose memory `cache_layers` does not cover.
    """

    model_type: str
    class_name: str
    tensors: Mapping[str, ModelTensor]
    skipped_modules: tuple[str, ...]
    cache_layers: tuple[CacheLayer, ...]
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int | None
    tied_embeddings: bool
    unmodelled: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Parameters, tied weights counted once."""
        return sum(math.prod(t.shape) for t in self.tensors.values() if t.tied_to is None)
