"""Rules for config.json's `quantization_config`: it says what the files hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from qtool.checkpoint.config_json import CONFIG_NAME
from qtool.checkpoint.names import quoted
from qtool.errors import QtoolError
from qtool.formats.bitsandbytes import QuantizedWeight
from qtool.formats.tensors import TORCH_NAMES
from qtool.inspection.rules.rule import Finding
from qtool.inspection.stored_folder import StoredFolder

# torch's names of the dtypes that packed bytes may be labelled with.
_STORAGE_NAMES: Final = {
    "U8": "uint8",
    "I8": "int8",
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}


def quantization_config(folder: StoredFolder) -> Iterator[Finding]:
    """quantization_config is there iff weights are packed."""
    if not isinstance(folder.config, Mapping):
        return
    entry = folder.quantization
    method = entry.get("quant_method", "bitsandbytes") if entry is not None else None
    if folder.quantized and method != "bitsandbytes":
        found = "none" if entry is None else f"quant_method {method!r}"
        expected = f"quantization_config of bitsandbytes for {len(folder.quantized)} packed weights"
        yield Finding(CONFIG_NAME, None, expected, found)
    if not folder.quantized and method == "bitsandbytes":
        expected = "no quantization_config, for no weight is packed"
        yield Finding(CONFIG_NAME, None, expected, "one of bitsandbytes")


def load_in(folder: StoredFolder) -> Iterator[Finding]:
    """load_in_4bit and load_in_8bit say what the weights are."""
    entry = _entry(folder)
    held = {"8bit" if w.precision == "int8" else "4bit" for w in folder.quantized.values()}
    for bits in ("4bit", "8bit") if entry is not None else ():
        assert entry is not None
        stated = entry.get(f"load_in_{bits}", False)
        if stated is not (bits in held):
            expected = f"load_in_{bits} {_json(bits in held)}"
            yield Finding(CONFIG_NAME, None, expected, _json(stated))


def config_quant_type(folder: StoredFolder) -> Iterator[Finding]:
    """bnb_4bit_quant_type is the weights' code table."""
    held = {weight.precision.removesuffix("-dq") for weight in _four_bit(folder)}
    yield from _one_value(folder, "bnb_4bit_quant_type", held, default="fp4")


def config_double_quant(folder: StoredFolder) -> Iterator[Finding]:
    """bnb_4bit_use_double_quant says how absmax is stored."""
    held = {weight.precision.endswith("-dq") for weight in _four_bit(folder)}
    yield from _one_value(folder, "bnb_4bit_use_double_quant", held, default=False)


def config_quant_storage(folder: StoredFolder) -> Iterator[Finding]:
    """bnb_4bit_quant_storage is the packed weights' dtype."""
    held = {_STORAGE_NAMES.get(w.weight.dtype, w.weight.dtype) for w in _four_bit(folder)}
    yield from _one_value(folder, "bnb_4bit_quant_storage", held, default="uint8")


def config_compute_dtype(folder: StoredFolder) -> Iterator[Finding]:
    """bnb_4bit_compute_dtype is a float dtype."""
    entry = _entry(folder)
    if entry is None or not _four_bit(folder):
        return
    stated = entry.get("bnb_4bit_compute_dtype", "float32")
    if str(stated).removeprefix("torch.") not in TORCH_NAMES.values():
        expected = f"bnb_4bit_compute_dtype: {', '.join(TORCH_NAMES.values())}"
        yield Finding(CONFIG_NAME, None, expected, _json(stated))


def config_fp16_weight(folder: StoredFolder) -> Iterator[Finding]:
    """llm_int8_has_fp16_weight is off."""
    entry = _entry(folder)
    if entry is not None and folder.quantized and entry.get("llm_int8_has_fp16_weight"):
        expected = "llm_int8_has_fp16_weight false: weights are packed"
        yield Finding(CONFIG_NAME, None, expected, "true: weights would be quantized on every use")


def skip_modules(folder: StoredFolder) -> Iterator[Finding]:
    """The packed layers are those that a loader replaces."""
    entry = _entry(folder)
    if entry is None or not folder.quantized or folder.architecture is None:
        return
    find, skip = folder.architecture.find, entry.get("llm_int8_skip_modules")
    if skip is not None and not _is_list_of_names(skip):
        yield Finding(CONFIG_NAME, None, "llm_int8_skip_modules: a list of names", quoted(skip))
        return
    try:
        model = folder.architecture
        rule = model.quantizable() if skip is None else model.replaced(skip)
    except QtoolError as error:  # a name that is no regular expression
        expected = "llm_int8_skip_modules: names or regular expressions"
        yield Finding(CONFIG_NAME, None, expected, error.message)
        return
    for tensor in folder.tensors.values():
        parameter = find(tensor.name)
        if parameter is None:
            continue
        packed = folder.quantized.get(tensor.name)
        if packed and parameter.name not in rule:
            expected = "16 bit, by llm_int8_skip_modules"
            yield Finding(tensor.shard, tensor.name, expected, packed.precision)
        if not packed and parameter.name in rule:
            expected = "packed, by llm_int8_skip_modules"
            yield Finding(tensor.shard, tensor.name, expected, tensor.dtype)


def _entry(folder: StoredFolder) -> Mapping[str, Any] | None:
    """The entry, if it is bitsandbytes'; another method's has rules of its own."""
    entry = folder.quantization
    method = (entry or {}).get("quant_method", "bitsandbytes")
    return entry if method == "bitsandbytes" else None


def _four_bit(folder: StoredFolder) -> list[QuantizedWeight]:
    return [weight for weight in folder.quantized.values() if weight.precision != "int8"]


def _one_value(
    folder: StoredFolder, key: str, held: set[Any], *, default: object
) -> Iterator[Finding]:
    """`key` has the one value that all 4-bit weights have."""
    entry = _entry(folder)
    stated = None if entry is None else entry.get(key, default)
    if entry is not None and held and [stated] != list(held):
        values = " and ".join(sorted(map(_json, held)))
        yield Finding(CONFIG_NAME, None, f"{key} {values}, as the weights are", _json(stated))


def _is_list_of_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _json(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


CONFIG_RULES: Final = (
    quantization_config,
    load_in,
    config_quant_type,
    config_double_quant,
    config_quant_storage,
    config_compute_dtype,
    config_fp16_weight,
    skip_modules,
)
