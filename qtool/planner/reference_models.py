"""The models that stand for their size in the guide: what their published config.json says.

Only the keys that decide tensors and cache. Each is the most used dense model of its size with an
attention and vocabulary that others of that size resemble.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtool.checkpoint import Checkpoint
from qtool.planner.model import PlannedModel, describe_model

_COMMON = {"dtype": "bfloat16", "num_key_value_heads": 8}
_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
_QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "head_dim": 128,
}
_MISTRAL = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 131072,
    "max_position_embeddings": 32768,
    "head_dim": 128,
    "sliding_window": None,
}


@dataclass(frozen=True, slots=True)
class ReferenceModel:
    """`size` is what people call it, in billions of parameters; `name` the model."""

    size: str
    name: str
    config: Mapping[str, Any]

    def describe(self) -> PlannedModel:
        """The model, ready to plan."""
        return describe_model(Checkpoint.of_config(self.size, self.config))


def _reference(
    size: str,
    name: str,
    family: Mapping[str, Any],
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    **more: Any,
) -> ReferenceModel:
    config = {
        **_COMMON,
        **family,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": False,
        **more,
    }
    return ReferenceModel(size, name, config)


def reference_models() -> tuple[ReferenceModel, ...]:
    """One per size, smallest first."""
    return (
        _reference("1B", "Llama 3.2 1B", _LLAMA, 2048, 8192, 16, 32, tie_word_embeddings=True),
        _reference("3B", "Llama 3.2 3B", _LLAMA, 3072, 8192, 28, 24, tie_word_embeddings=True),
        _reference("8B", "Llama 3.1 8B", _LLAMA, 4096, 14336, 32, 32),
        _reference("14B", "Qwen3 14B", _QWEN3, 5120, 17408, 40, 40),
        _reference("24B", "Mistral Small 24B", _MISTRAL, 5120, 32768, 40, 32),
        _reference("32B", "Qwen3 32B", _QWEN3, 5120, 25600, 64, 64),
        _reference("70B", "Llama 3.1 70B", _LLAMA, 8192, 28672, 80, 64),
    )
