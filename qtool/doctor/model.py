"""A model's settings that people stumble over: type, compute dtype, pad token, tokenizer, size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from qtool.architecture import build_architecture
from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.records import Checkpoint
from qtool.doctor.gpu import NvidiaSmi
from qtool.doctor.machine import GIB, available_memory_bytes
from qtool.doctor.records import Check
from qtool.errors import QtoolError
from qtool.formats.bitsandbytes import find_quantized
from qtool.planner.stored_formats import find_format
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
        checkpoint = open_checkpoint(model, need="headers")
        if not checkpoint.shards:
            _refuse_other_formats(model)
    except QtoolError as error:
        yield Check("model", "fail", error.message, error.hint)
        return
    packed = {weight.precision for weight in find_quantized(checkpoint.tensors).values()}
    other = None if packed else _other_format(checkpoint)
    held = " and ".join(sorted(packed)) or other or "not quantized"
    yield _check_weights(checkpoint, held)
    yield from check_architecture(checkpoint)
    yield from check_layers(checkpoint, packed=bool(packed or other))
    if not checkpoint.shards:
        return
    yield check_size(checkpoint, smi, packed=bool(packed or other))
    yield from check_quantization(checkpoint, in_4bit=bool(packed - {"int8"}), other=other)
    if checkpoint.folder is not None:
        yield from check_tokenizer(checkpoint.folder)


def _refuse_other_formats(model: str) -> None:
    """Raise where there are weights that qtool does not read; a bare config.json is fine."""
    try:
        open_checkpoint(model, need="headers", need_weights=True)
    except QtoolError as error:
        if error.kind == "unsupported":
            raise


def _other_format(checkpoint: Checkpoint) -> str | None:
    """What others call the format that they quantized the model to; None if it is none."""
    try:
        architecture = build_architecture(checkpoint.config)
    except QtoolError:  # said by another check
        architecture = None
    found = find_format(checkpoint.config, checkpoint.tensors.values(), architecture)
    return None if found is None else found.method


def _check_weights(checkpoint: Checkpoint, held: str) -> Check:
    if not checkpoint.shards:
        fix = "for more than estimate and sizing fetch its *.safetensors too"
        return Check("model", "warn", f"{checkpoint.id}: config.json alone, no weights", fix)
    num_bytes = checkpoint.weights_bytes
    unit, name = (GIB, "GiB") if num_bytes >= GIB else (MIB, "MiB")
    size = f"{num_bytes / unit:.2f} {name} of weights"
    return Check("model", "ok", f"{checkpoint.id}: {held}, {size}")


def check_architecture(checkpoint: Checkpoint) -> Iterator[Check]:
    """Whether `generate` can build the model, which is transformers' to say."""
    model_type = str(checkpoint.config.get("model_type", "no model_type"))
    try:
        require_run_extra()
    except QtoolError as error:
        unseen = f"{model_type}; whether transformers knows it is not seen: {error.message}"
        yield Check("architecture", "info", unseen, error.hint)
        return
    from qtool.runtime.model_config import build_config, find_model_class
    from qtool.runtime.quiet import quiet_transformers

    try:
        with quiet_transformers():
            class_name = find_model_class(build_config(checkpoint)).__name__
    except QtoolError as error:
        yield Check("architecture", "fail", error.message, error.hint)
    else:
        yield Check("architecture", "ok", f"{model_type}: {class_name}")


def check_layers(checkpoint: Checkpoint, *, packed: bool) -> Iterator[Check]:
    """Whether `quantize`, `finetune` and the planner know the model's layers, in their words."""
    if "model_type" not in checkpoint.config:
        return
    try:
        experts = build_architecture(checkpoint.config).experts
    except QtoolError as error:
        found = f"not known to quantize, finetune and the planner: {error.message}"
        fix = f"{error.hint}; of others estimate knows the size of the files alone"
        yield Check("layers", "warn", found, fix)
        return
    if experts is not None and not packed:
        found = f"a mixture of {experts.num_experts} experts per layer, which quantize refuses"
        fix = "run it with generate, train it with finetune --method lora, both in 16 bit"
        yield Check("layers", "warn", found, fix)


def check_size(checkpoint: Checkpoint, smi: NvidiaSmi, *, packed: bool) -> Check:
    """Whether the weights fit the freest GPU (or the memory), with room for the context."""
    if smi.free_mib:
        free, where = max(smi.free_mib) * MIB, "the GPU"
    else:
        free, where = available_memory_bytes()[0], "memory"
    share = checkpoint.weights_bytes / max(1, free)
    percent = "under 1" if share < 0.01 else f"{100 * share:.0f}"
    found = f"weights take {percent} % of the {free / GIB:.1f} GiB free in {where}"
    if share <= SMALL_FOR_GPU:
        return Check("size", "ok", found)
    if packed:
        advice = "context, batch and 16-bit parts need room too"
        return Check("size", "warn", found, f"qtool estimate {checkpoint.id} --gpu auto: {advice}")
    fix = f"qtool quantize {checkpoint.id} -o OUT: 4 bit takes about a quarter"
    return Check("size", "warn", found, fix)


def check_quantization(
    checkpoint: Checkpoint, *, in_4bit: bool, other: str | None
) -> Iterator[Check]:
    """Settings of the quantization entry that make a model slow or unloadable.

    Args:
        other: a format that is not bitsandbytes', which qtool plans and does not read.
    """
    if other is not None:
        found = f"{other}: generate, quantize and finetune read bitsandbytes' formats alone"
        fix = "start from the full-precision model; estimate plans this one as it is"
        yield Check("quantization", "fail", found, fix)
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


def check_tokenizer(folder: Path) -> Iterator[Check]:
    """The tokenizer's files, and a pad token for batches, which qtool can do without."""
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
        fix = "for batches in other programs: tokenizer.pad_token = tokenizer.eos_token"
        yield Check("pad token", "info", "none set; finetune takes the end-of-text token", fix)


def _read_json(path: Path) -> Mapping[str, Any]:
    """The file's object; {} where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
