"""Small random checkpoints, written without torch and without qtool."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def llama_config(
    *,
    hidden: int = 64,
    layers: int = 2,
    mlp: int = 160,
    vocab: int = 96,
    heads: int = 4,
    tied: bool = False,
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "vocab_size": vocab,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-05,
        "hidden_act": "silu",
    }


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama's tensors, typed in here apart from qtool's own knowledge."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        shapes |= {
            f"{block}.self_attn.q_proj.weight": (hidden, hidden),
            f"{block}.self_attn.k_proj.weight": (kv, hidden),
            f"{block}.self_attn.v_proj.weight": (kv, hidden),
            f"{block}.self_attn.o_proj.weight": (hidden, hidden),
            f"{block}.mlp.gate_proj.weight": (mlp, hidden),
            f"{block}.mlp.up_proj.weight": (mlp, hidden),
            f"{block}.mlp.down_proj.weight": (hidden, mlp),
            f"{block}.input_layernorm.weight": (hidden,),
            f"{block}.post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def random_values(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> NDArray[Any]:
    """Gaussian weights as they lie in a file: uint16 bits for BF16."""
    values = rng.normal(0, 0.02, shape).astype(np.float32)
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype])


def save_tensors(path: Path, tensors: Mapping[str, tuple[str, NDArray[Any]]]) -> None:
    """Write {name: (safetensors dtype, values)}: by hand, since NumPy has no bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, values) in tensors.items():
        begin, end = end, end + values.nbytes
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, values in tensors.values():
            file.write(np.ascontiguousarray(values).tobytes())


def write_llama(
    folder: Path,
    *,
    dtype: str = "BF16",
    num_shards: int = 1,
    seed: int = 0,
    **config_options: Any,
) -> dict[str, Any]:
    """Write a whole Llama folder; returns its config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = llama_config(**config_options)
    rng = np.random.default_rng(seed)
    tensors = {
        name: (dtype, random_values(shape, dtype, rng))
        for name, shape in llama_shapes(config).items()
    }
    write_shards(folder, tensors, num_shards)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text("{}\n")
    return config


def write_shards(
    folder: Path, tensors: Mapping[str, tuple[str, NDArray[Any]]], num_shards: int
) -> None:
    """Spread the tensors over shards with an index, or write one file."""
    if num_shards == 1:
        save_tensors(folder / "model.safetensors", tensors)
        return
    weight_map = {}
    names = list(tensors)
    for number in range(num_shards):
        file_name = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[number * len(names) // num_shards : (number + 1) * len(names) // num_shards]
        save_tensors(folder / file_name, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file_name)
    total = sum(values.nbytes for _, values in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
