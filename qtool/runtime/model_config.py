"""The model's config.json, made safe and turned into transformers' own config, and what it and
generation_config.json say of the weights and of the end of a text.

Nothing in a config may choose code: entries that name Python files, kernels or other weight files
are dropped, and `trust_remote_code` is never given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any, Final, Literal

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from qtool.architecture import Architecture, build_architecture
from qtool.architecture.stored_weights import missing_parameters
from qtool.checkpoint.config_json import MAX_CONFIG_BYTES
from qtool.checkpoint.file_source import read_whole
from qtool.checkpoint.local_folder import LocalFolder
from qtool.checkpoint.records import Checkpoint
from qtool.checkpoint.strict_json import json_type
from qtool.errors import Option, QtoolError
from qtool.formats.bitsandbytes import find_quantized
from qtool.formats.precisions import QuantizedPrecision
from qtool.runtime.compute_dtype import name_dtype
from qtool.runtime.hf_quantizer import wrong_shape
from qtool.runtime.linear import Int8Layer, PackedLayer

# How transformers 5 writes numbers that are none of JSON: {"__float__": "Infinity"}.
FLOAT_KEY: Final = "__float__"
FLOATS: Final = frozenset({"Infinity", "-Infinity", "NaN"})
# Keys that would make transformers fetch or run something, at any depth.
DROPPED_KEYS: Final = frozenset(
    {
        "auto_map",
        "quantization_config",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "custom_generate",
        "fusion_config",
        "kernel_config",
        "use_kernels",
        "transformers_weights",
        "extra_files",
        "_name_or_path",
        "_commit_hash",
        "base_model_tp_plan",
        "base_model_pp_plan",
    }
)
FLOAT_DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

WHOLE_NUMBERS: Final = ("I", "U", "BOOL")  # how safetensors' names of such dtypes begin
GENERATION_CONFIG: Final = "generation_config.json"
DO_NOT_BELONG: Final = (
    "config.json and the weights do not belong together, or the download is incomplete"
)

Int8Threshold = float | Literal["config"]
DEFAULT_INT8_THRESHOLD: Final = 6.0  # bitsandbytes', where a config does not say


def require_runnable(checkpoint: Checkpoint, quant: QuantizedPrecision | None = None) -> None:
    """Raise QtoolError for what config and headers tell against running the model.

    Args:
        checkpoint: its weights may be on the Hub still.
        quant: what it is to be packed in, as `requirements.require_model` found possible.
    """
    model_class = find_model_class(build_config(checkpoint))
    if quant is None:
        check_quantization(checkpoint, find_quantized(checkpoint.tensors))
    require_weights(checkpoint, model_class)


def require_weights(
    checkpoint: Checkpoint, model_class: Any, layers: Mapping[str, PackedLayer] | None = None
) -> None:
    """Raise QtoolError for weights that headers already show to be missing, of another shape, or
    whole numbers that are not packed: transformers would take those for values.

    What cannot be told for sure shows once the weights are loaded: of model types that transformers
    alone knows, and of classes other than the one that the architecture describes.

    Args:
        layers: the packed layers, by stored module name, where their shapes are known.
    """
    try:
        architecture = build_architecture(checkpoint.config)
    except QtoolError:
        return
    if architecture.class_name != model_class.__name__:
        return
    for module, layer in (layers or {}).items():
        _check_packed_shape(checkpoint, architecture, f"{module}.weight", layer)
    packed = find_quantized(checkpoint.tensors)
    parts = {part.name for weight in packed.values() for part in weight.statistics.values()}
    stored = checkpoint.tensors.keys() - parts
    missing = missing_parameters(stored, architecture)
    if missing:
        raise in_no_file(checkpoint, missing)
    for name in sorted(stored - packed.keys()):
        dtype = checkpoint.tensors[name].dtype
        if dtype.startswith(WHOLE_NUMBERS) and architecture.find(name) is not None:
            raise QtoolError(
                f"{place_of(checkpoint, name)}: expected a weight in bf16, fp16 or fp32, found "
                f"dtype {dtype}, and nothing says how it was quantized",
                kind="unsupported",
                hint="convert the checkpoint to bfloat16 first",
            )


def _check_packed_shape(
    checkpoint: Checkpoint, architecture: Architecture, name: str, layer: PackedLayer
) -> None:
    parameter = architecture.find(name)
    if parameter is None or not parameter.is_linear:
        return
    expected = parameter.shape[::-1] if parameter.kind == "conv1d" else parameter.shape
    found = (layer.out_features, layer.in_features)
    if found != expected:
        raise wrong_shape(place_of(checkpoint, name), expected, found)


def place_of(checkpoint: Checkpoint, name: str) -> str:
    """How messages name a tensor: with the model, and its file where it is stored as `name`."""
    stored = checkpoint.tensors.get(name)
    return (
        f"{checkpoint.id}: {name}" if stored is None else f"{checkpoint.id}: {stored.shard}: {name}"
    )


def in_no_file(checkpoint: Checkpoint, names: Collection[str]) -> QtoolError:
    """The error for parameters that are stored nowhere."""
    return QtoolError(
        f"{checkpoint.id}: {first_of(names)} in no file", kind="bad_file", hint=DO_NOT_BELONG
    )


def first_of(names: Collection[str]) -> str:
    """The first name, how many more there are, and the verb: "a.weight and 8 more are"."""
    first, *others = sorted(names)
    return f"{first} and {len(others)} more are" if others else f"{first} is"


def read_generation_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What generation_config.json holds; {} where there is none.

    Less strict than config.json is read: nothing but the end of a text hangs on it here.

    Raises:
        QtoolError: bad_file: too large, no JSON object, or an eos_token_id that is no token.
    """
    assert checkpoint.folder is not None
    source = LocalFolder(checkpoint.folder, only=(GENERATION_CONFIG,))
    if GENERATION_CONFIG not in source.files:
        return {}
    hint = "fetch the file again, or remove it: then config.json says where a text ends"
    data = read_whole(source, GENERATION_CONFIG, max_bytes=MAX_CONFIG_BYTES, hint=hint)
    file = source.describe(GENERATION_CONFIG)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        text = f"{file}: expected JSON, found an error: {error}"
        raise QtoolError(text, kind="bad_file", hint=hint) from error
    if not isinstance(values, dict):
        text = f"{file}: expected a JSON object, found {json_type(values)}"
        raise QtoolError(text, kind="bad_file", hint=hint)
    found = values.get("eos_token_id")
    if not all(token is None or type(token) is int for token in as_list(found)):
        raise QtoolError(
            f"{file}: eos_token_id: expected a whole number or a list of them, found {found!r:.80}",
            kind="bad_file",
            hint=hint,
        )
    return values


def as_list(value: Any) -> list[Any]:
    """A list as it is, anything else as the only entry of one."""
    return value if isinstance(value, list) else [value]


def build_config(checkpoint: Checkpoint) -> Any:
    """transformers' config object for the checkpoint; raises as `parse_config`."""
    return parse_config(checkpoint.config, checkpoint.id)


def parse_config(config: Mapping[str, Any], model_id: str) -> Any:
    """The same for what config.json holds; `model_id` names the model in errors.

    Raises:
        QtoolError: no architecture, one that this transformers does not know, or values it refuses.
    """
    fields = _fields(config)
    model_type = fields.get("model_type")
    if model_type is None:
        raise QtoolError(
            f"{model_id}: config.json says no model_type, so it is not known what to build",
            kind="bad_file",
            hint="fetch config.json again, from a repository in transformers' format",
        )
    if model_type not in CONFIG_MAPPING:
        raise _unknown_type(model_id, model_type)
    try:
        return CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as error:  # each config class has checks of its own, and their own wrapping
        _check_dtype(fields, model_id)
        of_what = f"config.json is not a valid {model_type} config"
        raise bad_config(config, model_id, of_what, error) from error


def bad_config(
    config: Mapping[str, Any], model_id: str, refusal: str, error: Exception
) -> QtoolError:
    """The error for a config that transformers makes nothing of: with key and value where our own
    reading finds what is wrong, else `refusal` and transformers' words."""
    try:
        build_architecture(config)
    except QtoolError as found:
        if found.kind == "bad_file":
            return found.of(model_id)
    words = f"it knows no {error}" if isinstance(error, KeyError) else error.__cause__ or error
    return QtoolError(
        f"{model_id}: {refusal}: {words}",
        kind="bad_file",
        hint="fetch config.json again; QTOOL_DEBUG=1 shows where it fails",
    )


def _check_dtype(fields: Mapping[str, Any], model_id: str) -> None:
    for key in ("dtype", "torch_dtype"):
        found = fields.get(key)
        if isinstance(found, str) and not hasattr(torch, found):
            raise QtoolError(
                f"{model_id}: config.json: {key}: expected the name of a dtype, found "
                f"{found[:80]!r}",
                kind="bad_file",
                hint='write "bfloat16", "float16" or "float32", as the weights are stored',
            )


def _unknown_type(model_id: str, model_type: Any) -> QtoolError:
    from difflib import get_close_matches  # slow to import, and only mistakes need it

    near = get_close_matches(str(model_type)[:80], list(CONFIG_MAPPING), n=3)
    nearest = f" (the nearest that it knows: {', '.join(near)})" if near else ""
    return QtoolError(
        f"{model_id}: config.json says model_type {model_type!r}, which this transformers does not "
        f"know{nearest}; qtool never runs a repository's own code",
        kind="unsupported",
        hint="upgrade transformers if the model is new: pip install --upgrade transformers",
    )


def find_model_class(config: Any) -> Any:
    """The class that generates text with this config; VLMs too, used without images."""
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            found = found[0] if isinstance(found, tuple) else found
            # Some text models stand there for a VLM's config, of which they take only a part.
            if found.config_class is not config.sub_configs.get("text_config"):
                return found
    raise QtoolError(
        f"{config.model_type} models do not generate text",
        kind="unsupported",
        hint="generate runs decoder language models",
    )


def check_quantization(checkpoint: Checkpoint, packed: Collection[str]) -> None:
    """Compare what config.json says about quantization with the packed layers or weights found.

    Raises:
        QtoolError: another method, nothing packed although it says so, or
            llm_int8_has_fp16_weight.
    """
    entry = _quantization_entry(checkpoint)
    if not entry:
        return
    if entry.get("llm_int8_has_fp16_weight"):
        raise QtoolError(
            f"{checkpoint.id}: config.json says llm_int8_has_fp16_weight: its weights are 16-bit "
            "and meant to be quantized anew in every forward pass, so nothing packed is in it",
            kind="unsupported",
            hint="remove quantization_config from its config.json to run it in 16 bit",
        )
    method = entry.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise QtoolError(
            f"{checkpoint.id}: config.json says quant_method {method!r}, expected bitsandbytes",
            kind="unsupported",
            hint=(
                "start from the full-precision model, with ",
                Option("quant", "nf4-dq"),
                " if it should be small",
            ),
        )
    if not packed:
        raise QtoolError(
            f"{checkpoint.id}: config.json says it is quantized, but no packed weight is in it",
            kind="bad_file",
            hint="fetch the weights again, or remove quantization_config from config.json",
        )


def model_dtype(checkpoint: Checkpoint, asked: str | None) -> torch.dtype:
    """The dtype of activations and unpacked weights, see `name_dtype`."""
    return FLOAT_DTYPES[name_dtype(checkpoint, asked)]


def layer_compute_dtype(checkpoint: Checkpoint, asked: str | None) -> torch.dtype | None:
    """What packed layers multiply in: asked for, else what config.json says for 4 bit.

    None follows the activations.
    """
    if asked is not None:
        return FLOAT_DTYPES[asked]
    entry = _quantization_entry(checkpoint)
    if not entry.get("load_in_4bit"):
        return None
    said = entry.get("bnb_4bit_compute_dtype")
    return FLOAT_DTYPES.get(said.removeprefix("torch.")) if isinstance(said, str) else None


def int8_threshold(
    checkpoint: Checkpoint, layers: Mapping[str, PackedLayer], asked: Int8Threshold
) -> float:
    """The outlier threshold that was asked for, in numbers.

    Raises:
        QtoolError: none of the layers is INT8, or config.json holds no threshold that is a number.
    """
    if not any(isinstance(layer, Int8Layer) for layer in layers.values()):
        raise QtoolError(
            (Option("int8_threshold", asked), f": {checkpoint.id} has no INT8 layers"),
            kind="usage",
            hint=("leave it out, or pack a full-precision model with ", Option("quant", "int8")),
        )
    if asked != "config":
        return asked
    found = _quantization_entry(checkpoint).get("llm_int8_threshold", DEFAULT_INT8_THRESHOLD)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < math.inf:
        raise QtoolError(
            f"{checkpoint.id}: config.json says llm_int8_threshold {found!r}, expected a number",
            kind="bad_file",
            hint=(Option("int8_threshold", DEFAULT_INT8_THRESHOLD), " is bitsandbytes' own"),
        )
    return float(found)


def _quantization_entry(checkpoint: Checkpoint) -> Mapping[str, Any]:
    entry = checkpoint.config.get("quantization_config")
    return entry if isinstance(entry, Mapping) else {}


def _fields(value: Any) -> Any:
    """What a config class may have: no dropped keys, and numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        if value.keys() == {FLOAT_KEY} and str(value[FLOAT_KEY]) in FLOATS:
            return float(value[FLOAT_KEY])
        return {key: _fields(item) for key, item in value.items() if key not in DROPPED_KEYS}
    if isinstance(value, list):
        return [_fields(item) for item in value]
    return value
