"""Quantized folders built from the reference formats, and ways to break them.

`FolderParts` holds a folder's content as plain values; tests change one thing and write it out.
Index and manifest are made anew on writing, so that a change breaks nothing else, unless a test
replaces them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qtool.formats import double_quant, floats, four_bit, int8
from qtool.formats.bitsandbytes import packed_layouts, quant_state_bytes, quantization_config
from qtool.formats.codebooks import CODES, dynamic_map
from qtool.formats.precisions import QuantFormat
from qtool.formats.tensors import TensorLayout
from tests.tiny_models import llama_config, llama_shapes, random_values, save_tensors

INDEX = "model.safetensors.index.json"
MANIFEST = "qtool_manifest.json"
# An odd width, so that packed square weights end in half a byte.
ODD_LLAMA = {"hidden": 21, "mlp": 33, "heads": 3, "vocab": 40, "layers": 2}

Tensor = tuple[str, NDArray[Any]]  # safetensors' dtype name, values (uint16 bits for BF16)


@dataclass
class FolderParts:
    """A folder in memory: {shard: {tensor name: (dtype, values)}} and the rest."""

    config: dict[str, Any] | None
    shards: dict[str, dict[str, Tensor]]
    metadata: dict[str, Any] = field(default_factory=dict)  # of the index, over what is right
    has_index: bool = True
    has_manifest: bool = False
    other_files: dict[str, bytes] = field(default_factory=dict)

    def shard_of(self, name: str) -> dict[str, Tensor]:
        return next(tensors for tensors in self.shards.values() if name in tensors)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.shard_of(name)[name][1]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.shard_of(name)[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self.shard_of(name)[name]

    @property
    def quantization(self) -> dict[str, Any]:
        assert self.config is not None
        return self.config["quantization_config"]

    def quant_state(self, weight: str) -> dict[str, Any]:
        return json.loads(self[state_name(self, weight)].tobytes())

    def change_quant_state(self, weight: str, **values: Any) -> None:
        text = json.dumps(self.quant_state(weight) | values)
        self[state_name(self, weight)] = ("U8", np.frombuffer(text.encode(), np.uint8))

    def write(self, path: Path) -> Path:
        path.mkdir(parents=True)
        for shard, tensors in self.shards.items():
            save_tensors(path / shard, tensors)
        if self.has_index:
            (path / INDEX).write_text(json.dumps(self.index()))
        if self.config is not None:
            (path / "config.json").write_text(json.dumps(self.config))
        for name, data in self.other_files.items():
            (path / name).write_bytes(data)
        if self.has_manifest:
            write_manifest(path)
        return path

    def index(self) -> dict[str, Any]:
        tensors = [values for shard in self.shards.values() for _, values in shard.values()]
        total_size = sum(values.nbytes for values in tensors)
        return {
            "metadata": {"total_size": total_size} | self.metadata,
            "weight_map": {name: shard for shard, part in self.shards.items() for name in part},
        }


def state_name(parts: FolderParts, weight: str) -> str:
    names = (name for shard in parts.shards.values() for name in shard)
    return next(name for name in names if name.startswith(f"{weight}.quant_state."))


def write_manifest(path: Path) -> None:
    files = {
        file.name: {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in sorted(path.iterdir())
        if file.is_file() and file.name != MANIFEST
    }
    manifest = {"schema": 1, "qtool_version": "0", "source": {}, "options": {}, "files": files}
    (path / MANIFEST).write_text(json.dumps(manifest))


def quantized_llama(
    fmt: QuantFormat, *, seed: int = 0, dtype: str = "BF16", **config_options: Any
) -> tuple[FolderParts, FolderParts]:
    """(quantized, original) folders in two shards; all linear layers but lm_head are packed."""
    config = llama_config(**(config_options or ODD_LLAMA))
    rng = np.random.default_rng(seed)
    original = {
        name: (dtype, random_values(shape, dtype, rng))
        for name, shape in llama_shapes(config).items()
    }
    packed: dict[str, Tensor] = {}
    for name, (_, values) in original.items():
        is_linear = "_proj." in name
        packed |= pack(name, values, dtype, fmt) if is_linear else {name: (dtype, values)}
    entry = quantization_config(
        fmt, compute_dtype="bfloat16", skip_modules=["lm_head"], int8_threshold=6.0
    )
    quantized_config = config | {"quantization_config": entry}
    return (
        FolderParts(quantized_config, in_two_shards(packed)),
        FolderParts(config, in_two_shards(original)),
    )


def pack(name: str, values: NDArray[Any], dtype: Any, fmt: QuantFormat) -> dict[str, Tensor]:
    """A weight's tensors by the reference rules."""
    layouts = packed_layouts(TensorLayout(name, dtype, values.shape), fmt)
    if fmt.is_int8:
        arrays = [*int8.quantize_int8(values, dtype), np.zeros((), np.uint8)]
        return {layout.name: (layout.dtype, a) for layout, a in zip(layouts, arrays, strict=True)}
    flat = floats.widen(values, dtype).reshape(-1)
    codes, absmax = four_bit.quantize_4bit(flat, fmt.quant_type, fmt.blocksize)
    statistics: list[NDArray[Any]] = [absmax, CODES[fmt.quant_type]]
    offset = None
    if fmt.double_quant:
        nested_codes, nested_absmax, offset = double_quant.quantize_absmax(absmax)
        statistics = [nested_codes, CODES[fmt.quant_type], nested_absmax, dynamic_map()]
    state = quant_state_bytes(values.shape, dtype, fmt, None if offset is None else float(offset))
    arrays = [codes.reshape(-1, 1), *statistics, np.frombuffer(state, np.uint8)]
    if fmt.quant_storage == "bfloat16":
        arrays[0] = codes.view(np.uint16).reshape(-1, 1)
    return {layout.name: (layout.dtype, a) for layout, a in zip(layouts, arrays, strict=True)}


def in_two_shards(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    names = list(tensors)
    half = len(names) // 2
    return {
        "model-00001-of-00002.safetensors": {name: tensors[name] for name in names[:half]},
        "model-00002-of-00002.safetensors": {name: tensors[name] for name in names[half:]},
    }
