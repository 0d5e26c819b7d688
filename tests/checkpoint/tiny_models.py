"""Tiny valid checkpoints for tests, written with Python's json alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# A Llama of one layer, hidden 32, so that every verb can plan it.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 48,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (48, 32),
    "model.layers.0.self_attn.q_proj.weight": (32, 32),
    "model.layers.0.self_attn.k_proj.weight": (16, 32),
    "model.layers.0.self_attn.v_proj.weight": (16, 32),
    "model.layers.0.self_attn.o_proj.weight": (32, 32),
    "model.layers.0.mlp.gate_proj.weight": (64, 32),
    "model.layers.0.mlp.up_proj.weight": (64, 32),
    "model.layers.0.mlp.down_proj.weight": (32, 64),
    "model.layers.0.input_layernorm.weight": (32,),
    "model.layers.0.post_attention_layernorm.weight": (32,),
    "model.norm.weight": (32,),
    "lm_head.weight": (48, 32),
}
INDEX_NAME = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1, "I8": 1, "F64": 8}


def header_json(layouts: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, Any]:
    """A header for `layouts`, name -> (dtype, shape), with contiguous offsets."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, (dtype, shape) in layouts.items():
        num_bytes = ITEM_BYTES[dtype]
        for size in shape:
            num_bytes *= size
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [begin, begin + num_bytes],
        }
        begin += num_bytes
    return header


def file_bytes(header: Mapping[str, Any] | bytes, num_data_bytes: int | None = None) -> bytes:
    """A whole safetensors file: `header` as JSON (or as given), then a pattern of small values."""
    if isinstance(header, bytes):
        text = header
    else:
        text = json.dumps(header, separators=(",", ":")).encode()
        if num_data_bytes is None:
            num_data_bytes = max(
                (v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0
            )
    # Bytes from 0 to 62: as bfloat16 and float16 all finite.
    num_data_bytes = num_data_bytes or 0
    data = (bytes(range(63)) * (num_data_bytes // 63 + 1))[:num_data_bytes]
    return len(text).to_bytes(8, "little") + text + data


def write_single(folder: Path, shapes: Mapping[str, Sequence[int]] = SHAPES) -> Path:
    """config.json, tokenizer.json and one model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    header = header_json({name: ("BF16", shape) for name, shape in shapes.items()})
    (folder / "model.safetensors").write_bytes(file_bytes(header))
    return folder


def write_sharded(folder: Path) -> Path:
    """config.json, tokenizer.json, two shards and their index."""
    write_single(folder)
    (folder / "model.safetensors").unlink()
    names = list(SHAPES)
    weight_map = {}
    for shard, part in ((FIRST, names[:6]), (SECOND, names[6:])):
        header = header_json({name: ("BF16", SHAPES[name]) for name in part})
        (folder / shard).write_bytes(file_bytes(header))
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read_header_json(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file."""
    data = path.read_bytes()
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def edit_header(path: Path, edit: Any) -> None:
    """Rewrite a file with `edit` applied to its parsed header; the data stays."""
    data = path.read_bytes()
    header = read_header_json(path)
    rest = data[8 + int.from_bytes(data[:8], "little") :]
    edit(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
