"""Writes packed model folders: by transformers and bitsandbytes, and by qtool."""

from __future__ import annotations

import json
import math
import shutil
from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qtool.backends import choose_backend
from qtool.checkpoint import open_checkpoint
from qtool.formats.precisions import QuantFormat
from qtool.quantize.pipeline import PipelineSettings
from qtool.quantize.plan import Recipe, build_plan
from qtool.quantize.run import quantize_checkpoint

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def compute_dtype_of(model_folder: Path) -> str:
    config = json.loads((model_folder / "config.json").read_text())
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def bitsandbytes_config(
    precision: str, *, compute_dtype: str, storage: str = "uint8"
) -> BitsAndBytesConfig:
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=precision.removesuffix("-dq"),
        bnb_4bit_use_double_quant=precision.endswith("-dq"),
        bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
        bnb_4bit_quant_storage=getattr(torch, storage),
    )


def load_stock(folder: Path, **kwargs: Any) -> Any:
    """transformers + bitsandbytes, on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **kwargs)
    return model.eval()


def stock_weight(weight: Any) -> torch.Tensor:
    """What bitsandbytes dequantizes a 4-bit parameter to.

    As one long row: with AVX512 its CPU kernel begins a new block with each row, but the format's
    blocks go on over the ends of rows.
    """
    from bitsandbytes.functional import dequantize_4bit

    state = copy(weight.quant_state)
    shape, state.shape = state.shape, (1, math.prod(state.shape))
    return dequantize_4bit(weight.data.reshape(-1, 1), state).view(shape)


def is_avx512_bf16_cpu() -> bool:
    """bitsandbytes' CPU forward repacks weights there and crashes on odd widths."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


class PackedFolders:
    """Makes each folder when it is first asked for."""

    def __init__(self, sources: Path, target: Path) -> None:
        self.sources = sources
        self._target = target

    def by_bitsandbytes(self, model: str, precision: str, *, storage: str = "uint8") -> Path:
        folder = self._target / f"bnb-{model}-{precision}-{storage}"
        if not folder.exists():
            source = self.sources / model
            config = bitsandbytes_config(
                precision, compute_dtype=compute_dtype_of(source), storage=storage
            )
            packed = load_stock(source, quantization_config=config)
            packed.save_pretrained(folder, max_shard_size="8MB")
            for name in TOKENIZER_FILES:
                if (source / name).exists():
                    shutil.copy(source / name, folder / name)
        return folder

    def by_qtool(
        self, model: str, precision: str, *, blocksize: int = 64, storage: str = "uint8"
    ) -> Path:
        folder = self._target / f"qtool-{model}-{precision}-{blocksize}-{storage}"
        if not folder.exists():
            source = self.sources / model
            checkpoint = open_checkpoint(str(source), need="files")
            recipe = Recipe(
                format=QuantFormat(precision, blocksize, storage),  # type: ignore[arg-type]
                compute_dtype=compute_dtype_of(source),  # type: ignore[arg-type]
            )
            plan = build_plan(checkpoint, recipe)
            quantize_checkpoint(
                checkpoint, plan, folder, choose_backend().backend, PipelineSettings(1, 1 << 20)
            )
        return folder


def edit_tensors(folder: Path, target: Path, edit: Any) -> Path:
    """A copy of a single-file folder whose tensors `edit(dict)` changed in place."""
    shutil.copytree(folder, target, copy_function=shutil.copy)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    index = target / "model.safetensors.index.json"
    if index.exists():
        data = json.loads(index.read_text())
        data["weight_map"] = {
            name: path.name
            for path in sorted(target.glob("*.safetensors"))
            for name in load_file(path)
        }
        index.write_text(json.dumps(data))
    return target


def edit_config(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a folder with other entries in config.json; None removes one."""
    shutil.copytree(folder, target, copy_function=shutil.copy)
    path = target / "config.json"
    path.chmod(0o644)
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target
