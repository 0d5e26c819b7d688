"""Models to measure on when there is no checkpoint at hand: their config.json, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from qtool.errors import Option, QtoolError

DEFAULT_SHAPE: Final = "llama-3.1-8b"

_LLAMA: Final = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
MODEL_SHAPES: Final[dict[str, Mapping[str, Any]]] = {
    DEFAULT_SHAPE: _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    },
    "llama-3.2-1b": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    # Tensors of the full size, so that what is held per tensor shows; but few of them.
    "llama-3.1-70b-4layers": _LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 4,
    },
    "llama-3.1-405b-2layers": _LLAMA
    | {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_attention_heads": 128,
        "num_hidden_layers": 2,
    },
}

# How many layers the models have whose shapes have few.
FULL_LAYERS: Final = {"llama-3.1-70b-4layers": 80, "llama-3.1-405b-2layers": 126}

# For help and errors.
SHAPE_NAMES: Final = ", ".join(MODEL_SHAPES)


def read_model_shape(name: str, *, option: str = "model_shape") -> tuple[str, Mapping[str, Any]]:
    """A short name and the config of the model shape `name`, or of a config.json or its folder.

    `option` is what the user gave it as.

    Raises:
        QtoolError: usage, if it is neither; bad_file, if the file is no JSON object.
    """
    # Help lists the names, and is to load no checkpoints for it.
    from qtool.checkpoint.config_json import CONFIG_NAME, MAX_CONFIG_BYTES
    from qtool.checkpoint.strict_json import parse_json_object

    if name in MODEL_SHAPES:
        return name, MODEL_SHAPES[name]
    path = Path(name)
    if path.is_dir():
        path /= CONFIG_NAME
    if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
        raise QtoolError(
            (Option(option, name), ": neither a known shape nor a config.json"),
            kind="usage",
            hint=f"{SHAPE_NAMES}, or the path of a model's config.json",
        )
    hint = "give the config.json of a model"
    config = parse_json_object(path.read_bytes(), file=str(path), hint=hint, allow_infinity=True)
    return (path.resolve().parent.name if path.name == CONFIG_NAME else path.stem), config
