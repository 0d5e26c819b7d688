"""The bitsandbytes layout of a quantized linear layer: tensor names, shapes, quant_state, config.

A 4-bit weight `P.weight` (out, in) of n values becomes, in this order:

    P.weight                               U8    ((n + 1) // 2, 1)       two codes per byte
    P.weight.absmax                        F32   (blocks,)               U8 with double quantization
    P.weight.quant_map                     F32   (16,)
    P.weight.nested_absmax                 F32   (ceil(blocks / 256),)   double quantization only
    P.weight.nested_quant_map              F32   (256,)                  double quantization only
    P.weight.quant_state.bitsandbytes__nf4 U8    (bytes of JSON,)        or ...__fp4

An INT8 weight becomes `P.weight` I8 (out, in), `P.SCB` F32 (out,), `P.weight_format` U8 scalar 0.

The JSON is padded with spaces to a length that depends on the shape, the dtype and the format
alone, so that every tensor's size is known before the first value is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qtool.formats.precisions import (
    BLOCKSIZES,
    NESTED_BLOCKSIZE,
    QuantFormat,
    QuantizedPrecision,
    QuantType,
)
from qtool.formats.tensors import DTYPE_BITS, TORCH_NAMES, SourceDtype, TensorLayout

QUANT_STATE_PREFIX: Final = "quant_state.bitsandbytes__"
ROW_MAJOR: Final = 0  # the only weight_format that bitsandbytes still loads

# "-2.2250738585072014e-308", the longest repr of a float.
_OFFSET_CHARS: Final = 24
_QUANT_STATE_ALIGNMENT: Final = 16
_MAX_QUANT_STATE_BYTES: Final = 1 << 16
_STATISTICS_4BIT: Final = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STORAGE_DTYPES: Final = {"uint8": "U8", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class QuantState:
    """What the JSON beside a 4-bit weight says. `dtype` is torch's name of what it decodes to."""

    quant_type: QuantType
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    nested_blocksize: int | None = None
    nested_offset: float | None = None

    @property
    def num_elements(self) -> int:
        """Number of weights before packing."""
        return math.prod(self.shape)

    @property
    def num_blocks(self) -> int:
        """Number of absmax values; the last block may be short."""
        return -(-self.num_elements // self.blocksize)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A packed weight and the statistics that belong to it, as a folder stores them.

    `statistics` is keyed by what follows the weight's name and a dot ("absmax", ...,
    "quant_state.bitsandbytes__nf4"), for INT8 by what follows the module's ("SCB",
    "weight_format").
    """

    name: str
    precision: QuantizedPrecision
    weight: TensorLayout
    statistics: Mapping[str, TensorLayout]

    @property
    def quant_state(self) -> TensorLayout | None:
        """The tensor with the JSON; None for INT8."""
        found = [key for key in self.statistics if key.startswith(QUANT_STATE_PREFIX)]
        return self.statistics[found[0]] if found else None


@dataclass(frozen=True, slots=True)
class LayoutProblem:
    """One rule of the layout that a stored weight breaks."""

    tensor: str
    rule: str
    expected: str
    found: str


# ---- Writing ----------------------------------------------------------------------------------


def packed_layouts(weight: TensorLayout, fmt: QuantFormat) -> tuple[TensorLayout, ...]:
    """What `weight` ("P.weight", (out, in), a source dtype) becomes, the packed weight first.

    The order is the one in which bitsandbytes' modules list their tensors. Raises ValueError for
    a dtype that cannot be quantized, and for a weight whose packed bytes do not fill whole
    elements of `fmt.quant_storage`.
    """
    dtype = _source_dtype(weight)
    return _int8_layouts(weight) if fmt.is_int8 else _four_bit_layouts(weight, dtype, fmt)


def _source_dtype(weight: TensorLayout) -> SourceDtype:
    for dtype in TORCH_NAMES:
        if dtype == weight.dtype:
            return dtype
    raise ValueError(f"{weight.dtype} cannot be quantized, only {', '.join(TORCH_NAMES)}")


def _int8_layouts(weight: TensorLayout) -> tuple[TensorLayout, ...]:
    if len(weight.shape) != 2 or not weight.name.endswith("weight"):
        raise ValueError(
            f"int8 needs a matrix named ...weight, not {weight.name} {list(weight.shape)}"
        )
    module = weight.name.removesuffix("weight")
    return (
        TensorLayout(weight.name, "I8", weight.shape),
        TensorLayout(f"{module}SCB", "F32", weight.shape[:1]),
        TensorLayout(f"{module}weight_format", "U8", ()),
    )


def _four_bit_layouts(
    weight: TensorLayout, dtype: SourceDtype, fmt: QuantFormat
) -> tuple[TensorLayout, ...]:
    num_blocks = -(-weight.num_elements // fmt.blocksize)
    layouts = [
        _packed_weight(weight, fmt),
        TensorLayout(f"{weight.name}.absmax", "U8" if fmt.double_quant else "F32", (num_blocks,)),
        TensorLayout(f"{weight.name}.quant_map", "F32", (16,)),
    ]
    if fmt.double_quant:
        num_nested_blocks = -(-num_blocks // NESTED_BLOCKSIZE)
        layouts += [
            TensorLayout(f"{weight.name}.nested_absmax", "F32", (num_nested_blocks,)),
            TensorLayout(f"{weight.name}.nested_quant_map", "F32", (256,)),
        ]
    blob_bytes = len(_padded_json(weight.shape, dtype, fmt, 0.0))
    name = f"{weight.name}.{QUANT_STATE_PREFIX}{fmt.quant_type}"
    return (*layouts, TensorLayout(name, "U8", (blob_bytes,)))


def _packed_weight(weight: TensorLayout, fmt: QuantFormat) -> TensorLayout:
    """The packed bytes under the label of `fmt.quant_storage`.

    The config names one storage dtype for all layers and loaders go by it, so a tensor that it
    cannot hold is an error rather than an exception to the rule.
    """
    dtype = _STORAGE_DTYPES[fmt.quant_storage]
    packed_bytes = (weight.num_elements + 1) // 2
    num_stored, odd_bytes = divmod(packed_bytes, DTYPE_BITS[dtype] // 8)
    if odd_bytes:
        raise ValueError(
            f"{list(weight.shape)} packs into {packed_bytes} bytes, which quant storage "
            f"{fmt.quant_storage} cannot hold; uint8 can"
        )
    return TensorLayout(weight.name, dtype, (num_stored, 1))


def quant_state_bytes(
    shape: Sequence[int], dtype: SourceDtype, fmt: QuantFormat, nested_offset: float | None
) -> bytes:
    """The quant_state JSON with bitsandbytes' keys and order, padded with spaces.

    `nested_offset` is given for double quantization and only then. The length is a multiple of 16
    and the same for every offset.
    """
    if fmt.double_quant is (nested_offset is None):
        raise ValueError("double quantization has an offset, and nothing else has")
    return _padded_json(shape, dtype, fmt, nested_offset)


def _padded_json(
    shape: Sequence[int], dtype: SourceDtype, fmt: QuantFormat, nested_offset: float | None
) -> bytes:
    state: dict[str, Any] = {
        "quant_type": fmt.quant_type,
        "blocksize": fmt.blocksize,
        "dtype": TORCH_NAMES[dtype],
        "shape": list(shape),
    }
    longest = len(json.dumps(state))
    if fmt.double_quant:
        state |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": 0,
        }
        longest = len(json.dumps(state)) - 1 + _OFFSET_CHARS
        state["nested_offset"] = nested_offset
    padded_length = -(-longest // _QUANT_STATE_ALIGNMENT) * _QUANT_STATE_ALIGNMENT
    return json.dumps(state).encode().ljust(padded_length)


def quantization_config(
    fmt: QuantFormat,
    *,
    compute_dtype: str,
    skip_modules: Sequence[str],
    int8_threshold: float,
) -> dict[str, Any]:
    """The `quantization_config` entry of config.json, every key that transformers writes.

    `compute_dtype` is torch's name. `skip_modules` replaces transformers' default rule, so it must
    name every linear layer that was not quantized.
    """
    in_8bit = fmt.is_int8
    return {
        "_load_in_4bit": not in_8bit,
        "_load_in_8bit": in_8bit,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": fmt.quant_storage,
        # transformers' own defaults where there is nothing in 4 bit to describe
        "bnb_4bit_quant_type": "fp4" if in_8bit else fmt.quant_type,
        "bnb_4bit_use_double_quant": fmt.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skip_modules),
        "llm_int8_threshold": float(int8_threshold),
        "load_in_4bit": not in_8bit,
        "load_in_8bit": in_8bit,
        "quant_method": "bitsandbytes",
    }


# ---- Reading ----------------------------------------------------------------------------------


def parse_quant_state(blob: bytes) -> QuantState:
    """Read a quant_state JSON; ValueError where a key is unknown, missing or out of range."""
    if len(blob) > _MAX_QUANT_STATE_BYTES:
        raise ValueError(f"quant_state has {len(blob)} bytes, at most {_MAX_QUANT_STATE_BYTES}")
    try:
        state = json.loads(blob.decode())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"quant_state is not JSON: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"quant_state is a JSON {type(state).__name__}, not an object")
    required = {"quant_type", "blocksize", "dtype", "shape"}
    nested = {"nested_blocksize", "nested_dtype", "nested_offset"}
    keys = set(state)
    if keys not in (required, required | nested):
        raise ValueError(
            f"quant_state has the keys {sorted(keys)}, expected {sorted(required)}, "
            f"with double quantization also {sorted(nested)}"
        )
    return QuantState(
        quant_type=_one_of(state, "quant_type", ("nf4", "fp4")),
        blocksize=_one_of(state, "blocksize", BLOCKSIZES),
        dtype=_one_of(state, "dtype", tuple(TORCH_NAMES.values())),
        shape=_shape(state["shape"]),
        **_nested_fields(state) if keys > required else {},
    )


def _one_of(state: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> Any:
    value = state[key]
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"quant_state: {key} is {value!r}, expected one of {list(allowed)}")
    return value


def _shape(value: object) -> tuple[int, ...]:
    is_shape = isinstance(value, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in value
    )
    if not is_shape:
        raise ValueError(f"quant_state: shape is {value!r}, expected a list of sizes")
    assert isinstance(value, list)
    return tuple(value)


def _nested_fields(state: Mapping[str, Any]) -> dict[str, Any]:
    _one_of(state, "nested_dtype", ("float32",))
    offset = state["nested_offset"]
    if isinstance(offset, bool) or not isinstance(offset, int | float):
        raise ValueError(f"quant_state: nested_offset is {offset!r}, expected a number")
    return {
        "nested_blocksize": _one_of(state, "nested_blocksize", (NESTED_BLOCKSIZE,)),
        "nested_offset": float(offset),
    }


def find_quantized(tensors: Mapping[str, TensorLayout]) -> dict[str, QuantizedWeight]:
    """Group a folder's tensors into quantized weights, by name, in the order of `tensors`.

    Weights that bitsandbytes wrote are found too, with any quant_storage and without
    weight_format. Incomplete groups are returned as they are; `layout_problems` says what they
    lack.
    """
    found: dict[str, QuantizedWeight] = {}
    for name in tensors:
        quantized = _four_bit_group(name, tensors) or _int8_group(name, tensors)
        if quantized:
            found[quantized.name] = quantized
    return found


def _four_bit_group(name: str, tensors: Mapping[str, TensorLayout]) -> QuantizedWeight | None:
    """The group whose quant_state tensor is `name`, if it is one and its weight is there."""
    weight_name, separator, quant_type = name.rpartition(f".{QUANT_STATE_PREFIX}")
    if not separator or quant_type not in ("nf4", "fp4") or weight_name not in tensors:
        return None
    suffixes = [key for key in _STATISTICS_4BIT if f"{weight_name}.{key}" in tensors]
    statistics = {key: tensors[f"{weight_name}.{key}"] for key in suffixes}
    absmax = statistics.get("absmax")
    double_quant = "nested_absmax" in statistics or (absmax is not None and absmax.dtype == "U8")
    precision: dict[tuple[str, bool], QuantizedPrecision] = {
        ("nf4", False): "nf4",
        ("nf4", True): "nf4-dq",
        ("fp4", False): "fp4",
        ("fp4", True): "fp4-dq",
    }
    return QuantizedWeight(
        name=weight_name,
        precision=precision[quant_type, double_quant],
        weight=tensors[weight_name],
        statistics=statistics | {f"{QUANT_STATE_PREFIX}{quant_type}": tensors[name]},
    )


def _int8_group(name: str, tensors: Mapping[str, TensorLayout]) -> QuantizedWeight | None:
    """The group whose row statistics are `name`, if they are and their int8 weight is there."""
    if name != "SCB" and not name.endswith(".SCB"):
        return None
    module = name.removesuffix("SCB")
    weight = tensors.get(f"{module}weight")
    if weight is None or weight.dtype != "I8":
        return None
    statistics = {
        key: tensors[f"{module}{key}"]
        for key in ("SCB", "weight_format")
        if f"{module}{key}" in tensors
    }
    return QuantizedWeight(weight.name, "int8", weight, statistics)


def stray_statistics(tensors: Mapping[str, TensorLayout]) -> list[str]:
    """Names that look like statistics of a quantized weight but belong to no group."""
    grouped = {
        statistic.name
        for quantized in find_quantized(tensors).values()
        for statistic in quantized.statistics.values()
    }
    endings = (*(f".{key}" for key in _STATISTICS_4BIT), ".SCB", ".weight_format")
    return [
        name
        for name in tensors
        if name not in grouped and (name.endswith(endings) or f".{QUANT_STATE_PREFIX}" in name)
    ]


def layout_problems(
    quantized: QuantizedWeight, state: QuantState | None = None
) -> list[LayoutProblem]:
    """What is wrong with the shapes and dtypes of a stored weight; empty when it can be decoded.

    `state` is the parsed quant_state of a 4-bit weight; without it only the presence and dtypes
    of its statistics are checked.
    """
    if quantized.precision == "int8":
        return _int8_problems(quantized)
    expected = {"absmax": "F32", "quant_map": "F32"}
    if quantized.precision.endswith("-dq"):
        expected |= {"absmax": "U8", "nested_absmax": "F32", "nested_quant_map": "F32"}
    problems = _wrong_statistics(quantized, expected)
    if state is None or problems:
        return problems
    return _four_bit_size_problems(quantized, state)


def _wrong_statistics(
    quantized: QuantizedWeight, expected: Mapping[str, str]
) -> list[LayoutProblem]:
    problems = []
    for suffix, dtype in expected.items():
        statistic = quantized.statistics.get(suffix)
        found = "missing" if statistic is None else statistic.dtype
        if found != dtype:
            name = f"{quantized.name}.{suffix}" if statistic is None else statistic.name
            problems.append(LayoutProblem(name, "statistics", dtype, found))
    return problems


def _four_bit_size_problems(quantized: QuantizedWeight, state: QuantState) -> list[LayoutProblem]:
    weight = quantized.weight
    problems = []
    if (state.nested_offset is not None) is not quantized.precision.endswith("-dq"):
        blob = quantized.quant_state
        assert blob is not None
        found = "no nested_offset" if state.nested_offset is None else "nested_offset"
        problems.append(LayoutProblem(blob.name, "quant_state", quantized.precision, found))
    packed_bytes = (state.num_elements + 1) // 2
    if weight.num_bytes != packed_bytes:
        problems.append(
            LayoutProblem(
                weight.name, "packed size", f"{packed_bytes} bytes", f"{weight.num_bytes} bytes"
            )
        )
    sizes = {"absmax": state.num_blocks, "quant_map": 16}
    if quantized.precision.endswith("-dq"):
        nested_blocks = -(-state.num_blocks // NESTED_BLOCKSIZE)
        sizes |= {"nested_absmax": nested_blocks, "nested_quant_map": 256}
    return problems + _wrong_sizes(quantized, sizes)


def _int8_problems(quantized: QuantizedWeight) -> list[LayoutProblem]:
    weight = quantized.weight
    problems = _wrong_statistics(quantized, {"SCB": "F32"})
    if len(weight.shape) != 2:
        problems.append(LayoutProblem(weight.name, "shape", "(out, in)", str(weight.shape)))
    return problems or _wrong_sizes(quantized, {"SCB": weight.shape[0]})


def _wrong_sizes(quantized: QuantizedWeight, expected: Mapping[str, int]) -> list[LayoutProblem]:
    return [
        LayoutProblem(layout.name, "size", f"{size} elements", f"{layout.num_elements} elements")
        for suffix, size in expected.items()
        if (layout := quantized.statistics[suffix]).num_elements != size
    ]
