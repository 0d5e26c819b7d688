"""A model's settings that people stumble over: type, compute dtype, pad token, tokenizer, size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from qtool.architecture.model_types import KNOWN_MODEL_TYPES
from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.records import Checkpoint
from qtool.doctor.gpu import NvidiaSmi
from qtool.doctor.machine import GIB, available_memory_bytes
from qtool.doctor.records import Check
from qtool.errors import QtoolError
from qtool.formats.bitsandbytes import find_quantized
from qtool.runtime.requirements import require_run_extra

TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
# Where transformers looks for the pad token; the ids in the configs come second.
PAD_TOKEN_PLACES: Final = (
    ("tokenizer_config.json", "pad_token"),
    ("special_tokens_map.json", "pad_token"),
    ("generation_config.json", "pad_token_id"),
    ("config.json", "pad_token_id"),
)
SMALL_FOR_GPU: Final = 0.8  # of the free memory: beyond, little is left for the context
MIB: Final = 1 << 20


def check_model(model: str, smi: NvidiaSmi) -> Iterator[Check]:
    """Open MODEL (headers only) and look at what its settings will do."""
    try:
        checkpoint = open_checkpoint(model, need="headers", need_weights=True)
    except QtoolError as error:
        yield Check("model", "fail", error.message, error.hint)
        return
    precisions = {weight.precision for weight in find_quantized(checkpoint.tensors).values()}
    held = " and ".join(sorted(precisions)) or "not quantized"
    size = f"{checkpoint.weights_bytes / GIB:.2f} GiB of weights"
    yield Check("model", "ok", f"{model}: {held}, {size}")
    yield from check_architecture(checkpoint)
    yield check_size(checkpoint, smi, packed=bool(precisions))
    yield from check_quantization(checkpoint, in_4bit=bool(precisions - {"int8"}))
    if checkpoint.folder is not None:
        yield from check_tokenizer(checkpoint, checkpoint.folder)


def check_architecture(checkpoint: Checkpoint) -> Iterator[Check]:
    """Whether `generate` can build the model, which is transformers' to say, and `quantize` and the
    planner know its layers, which is ours.
    """
    model_type = str(checkpoint.config.get("model_type", "no model_type"))
    try:
        require_run_extra()
    except QtoolError as error:
        unseen = f"{model_type}; whether transformers knows it is not seen: {error.message}"
        yield Check("architecture", "info", unseen, error.hint)
    else:
        from qtool.runtime.loading import quiet_transformers
        from qtool.runtime.model_config import build_config, find_model_class

        try:
            with quiet_transformers():
                class_name = find_model_class(build_config(checkpoint)).__name__
        except QtoolError as error:
            yield Check("architecture", "fail", error.message, error.hint)
            return
        yield Check("architecture", "ok", f"{model_type}: {class_name}")
    if model_type not in KNOWN_MODEL_TYPES:
        found = f"quantize, finetune and the planner do not know the layers of {model_type}"
        fix = "run it with generate as it is; qtool estimate knows the size of its files alone"
        yield Check("layers", "warn", found, fix)


def check_size(checkpoint: Checkpoint, smi: NvidiaSmi, *, packed: bool) -> Check:
    """Whether the weights fit the freest GPU (or the memory), with room for the context."""
    if smi.free_mib:
        free, where = max(smi.free_mib) * MIB, "the GPU"
    else:
        free, where = available_memory_bytes()[0], "memory"
    share = checkpoint.weights_bytes / max(1, free)
    found = f"weights take {100 * share:.0f} % of the {free / GIB:.1f} GiB free in {where}"
    if share <= SMALL_FOR_GPU:
        return Check("size", "ok", found)
    if packed:
        advice = "context, batch and 16-bit parts need room too"
        return Check("size", "warn", found, f"qtool estimate {checkpoint.id} --gpu auto: {advice}")
    fix = f"qtool quantize {checkpoint.id} -o OUT: 4 bit takes about a quarter"
    return Check("size", "warn", found, fix)


def check_quantization(checkpoint: Checkpoint, *, in_4bit: bool) -> Iterator[Check]:
    """Settings of the quantization entry that make a model slow or unloadable."""
    entry = checkpoint.config.get("quantization_config")
    entry = entry if isinstance(entry, Mapping) else {}
    if entry.get("llm_int8_has_fp16_weight"):
        found = "llm_int8_has_fp16_weight: the weights are 16-bit and nothing is saved"
        fix = "qtool quantize the original model"
        yield Check("quantization", "fail", found, fix)
    compute_dtype = str(entry.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
    if in_4bit and compute_dtype == "float32":
        found = "float32: products run several times slower than in 16 bit"
        fix = 'set "bnb_4bit_compute_dtype": "bfloat16" in config.json, or pass --compute-dtype'
        yield Check("compute dtype", "warn", found, fix)
    elif in_4bit:
        yield Check("compute dtype", "ok", compute_dtype)


def check_tokenizer(checkpoint: Checkpoint, folder: Path) -> Iterator[Check]:
    """The tokenizer's files, and a pad token for batches."""
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if names:
        yield Check("tokenizer", "ok", names[0])
    else:
        fix = "copy the tokenizer's files from the original model into the folder"
        yield Check("tokenizer", "warn", f"none of {', '.join(TOKENIZER_FILES)}", fix)
    places = [
        f"{key} in {name}"
        for name, key in PAD_TOKEN_PLACES
        if _read_json(folder / name).get(key) is not None
    ]
    if places:
        yield Check("pad token", "ok", places[0])
    else:
        fix = "for batches and training: tokenizer.pad_token = tokenizer.eos_token"
        yield Check("pad token", "warn", f"none set for {checkpoint.id}", fix)


def _read_json(path: Path) -> Mapping[str, Any]:
    """The file's object; {} where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
