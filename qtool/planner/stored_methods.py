"""How methods that others quantize with store a matrix, read off their entry in config.json.

Only what the entry says: a method that is not in the table, or one that stores layers in several
ways, has no layout here. Keys and layouts are those of transformers' `quantization_config.py` and
its integrations, of vLLM's readers where transformers has none.

    packed_layout("gptq", {"bits": 4, "group_size": 128}).num_bytes((4096, 14336))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Final

from qtool.planner.units import FLOAT32_BYTES, HALF_BYTES

Entry = Mapping[str, Any]

EXPONENT_BYTES: Final = 1  # scales that are powers of two (E8M0), or FP8

USUAL_GROUP: Final = 128  # of GPTQ's kind of integers, where an entry names none
HQQ_GROUP: Final = 64
LARGEST_BITS: Final = 16  # of an integer that stands for a weight


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """A matrix [out, in] as codes of `bits`, and per block of them a scale and a zero point.

    A block is `rows` x `columns`, 0 for all of them; its scale has `scale_bytes`, its zero point
    `zero_bits`. `matrix_bytes` are stored once per matrix.
    """

    bits: int | Fraction
    scale_bytes: int = 0
    rows: int = 0
    columns: int = 0
    zero_bits: int | Fraction = 0
    matrix_bytes: int = 0

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Of one matrix, or of several in one tensor [..., out, in]."""
        *matrices, rows, columns = shape
        blocks = -(-rows // (self.rows or rows)) * -(-columns // (self.columns or columns))
        code_bytes = -(-rows * columns * self.bits // 8)
        zero_bytes = -(-blocks * self.zero_bits // 8)
        one_bytes = code_bytes + blocks * self.scale_bytes + zero_bytes + self.matrix_bytes
        return math.prod(matrices) * one_bytes


Reader = Callable[[Entry], PackedLayout | None]

FP8_TENSOR: Final = PackedLayout(8, FLOAT32_BYTES)
FP8_ROWS: Final = PackedLayout(8, FLOAT32_BYTES, rows=1)
MXFP4: Final = PackedLayout(4, EXPONENT_BYTES, rows=1, columns=32)
MXFP8: Final = PackedLayout(8, EXPONENT_BYTES, rows=1, columns=32)
NVFP4: Final = PackedLayout(4, EXPONENT_BYTES, rows=1, columns=16, matrix_bytes=FLOAT32_BYTES)
INT8_ROWS: Final = PackedLayout(8, HALF_BYTES, rows=1)
TERNARY: Final = PackedLayout(2, HALF_BYTES)


def packed_layout(method: str, entry: Entry) -> PackedLayout | None:
    """How `method` stores the matrices that it packs; None where that is not known."""
    read = READERS.get(method)
    return read(entry) if read is not None else None


def integers(bits: int | None, group: int | None, *, zero_bits: int = 0) -> PackedLayout | None:
    """Integers with a 16-bit scale per group of a row; a group of 0 is the whole row."""
    if bits is None or bits > LARGEST_BITS or group is None:
        return None
    return PackedLayout(bits, HALF_BYTES, rows=1, columns=group, zero_bits=zero_bits)


def _with_zeros(layout: PackedLayout | None) -> PackedLayout | None:
    """The same with zero points in 16 bit."""
    return replace(layout, zero_bits=8 * HALF_BYTES) if layout is not None else None


# -- one reader per method ------------------------------------------------------------------------


def _fp8(entry: Entry) -> PackedLayout | None:
    block = _pair(entry.get("weight_block_size"))
    if entry.get("expert_dtype", "fp8") != "fp8":  # linear layers in FP8, experts in FP4
        return None
    if block is None:
        return FP8_TENSOR
    scale_bytes = EXPONENT_BYTES if entry.get("scale_fmt") == "ue8m0" else FLOAT32_BYTES
    return PackedLayout(8, scale_bytes, *block)


def _gptq(entry: Entry) -> PackedLayout | None:
    """Zero points are stored even where they are all the same (`sym`)."""
    bits = _count(entry.get("bits"))
    return integers(bits, _group(entry.get("group_size", USUAL_GROUP)), zero_bits=bits or 0)


def _awq(entry: Entry) -> PackedLayout | None:
    bits = _count(entry.get("bits", entry.get("w_bit", 4)))
    group = _group(entry.get("group_size", entry.get("q_group_size", USUAL_GROUP)))
    has_zeros = entry.get("zero_point", True) is not False
    return integers(bits, group, zero_bits=bits if bits and has_zeros else 0)


def _auto_round(entry: Entry) -> PackedLayout | None:
    return _gptq({"bits": 4, **entry}) if not entry.get("extra_config") else None


def _compressed_tensors(entry: Entry) -> PackedLayout | None:
    """The layout of all groups, if they have the same one."""
    if entry.get("sparsity_config") or "24" in str(entry.get("format", "")):
        return None
    groups = entry.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return _named_format(str(entry.get("format", "")))
    found = {_compressed_group(entry, group) for group in groups.values()}
    return found.pop() if len(found) == 1 else None


def _compressed_group(entry: Entry, group: object) -> PackedLayout | None:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(group, Mapping) or not isinstance(weights, Mapping):
        return None
    named = _named_format(str(group.get("format") or entry.get("format", "")))
    if named is not None:
        return named
    block = _compressed_block(weights)
    rows = integers(_count(weights.get("num_bits")), 0)
    if block is None or rows is None:
        return None
    zero_bits = rows.bits if weights.get("symmetric") is False else 0
    return replace(rows, rows=block[0], columns=block[1], zero_bits=zero_bits)


def _compressed_block(weights: Entry) -> tuple[int, int] | None:
    """The rows and columns that share a scale."""
    group = _group(weights.get("group_size"))
    strategy = weights.get("strategy") or ("group" if group else "tensor")
    if strategy == "block":
        return _pair(weights.get("block_structure"))
    if strategy == "group":
        return (1, group) if group else None
    return {"tensor": (0, 0), "channel": (1, 0)}.get(str(strategy))


def _named_format(name: str) -> PackedLayout | None:
    named = {"nvfp4-pack-quantized": NVFP4, "mxfp4-pack-quantized": MXFP4}
    return named.get(name.lower())


def _modelopt(entry: Entry) -> PackedLayout | None:
    algorithm = str(entry.get("quant_algo", "")).upper()
    if algorithm in ("INT4_AWQ", "W4A16_AWQ"):
        return integers(4, _group(entry.get("group_size", USUAL_GROUP)))
    return MODELOPT.get(algorithm)


MODELOPT: Final = {
    "FP8": FP8_TENSOR,
    "FP8_PER_CHANNEL_PER_TOKEN": FP8_ROWS,
    "FP8_PB_WO": PackedLayout(8, FLOAT32_BYTES, 128, 128),
    "MXFP8": MXFP8,
    "NVFP4": NVFP4,
    "NVFP4_AWQ": NVFP4,
}


def _quanto(entry: Entry) -> PackedLayout | None:
    """A scale per row of 8-bit weights, and per group of smaller ones a scale and a shift."""
    bits = {"int2": 2, "int4": 4, "int8": 8, "float8": 8}.get(str(entry.get("weights", "int8")))
    return INT8_ROWS if bits == 8 else _with_zeros(integers(bits, USUAL_GROUP))


def _hqq(entry: Entry) -> PackedLayout | None:
    """A scale and a zero point, both in 16 bit, per group of the weights."""
    named = entry.get("quant_config", entry)
    weights = named.get("weight_quant_params", named) if isinstance(named, Mapping) else {}
    bits = _count(weights.get("nbits")) if isinstance(weights, Mapping) else None
    if bits not in (1, 2, 4, 8):  # 3 bits are ten to 32, and layers may have settings of their own
        return None
    return _with_zeros(integers(bits, _group(weights.get("group_size", HQQ_GROUP))))


def _torchao(entry: Entry) -> PackedLayout | None:
    """Weight-only configs and those that quantize activations too, by name, older and newer."""
    found = entry.get("quant_type")
    settings: object = entry.get("quant_type_kwargs")
    if isinstance(found, Mapping):
        config = found.get("default")
        found, settings = None, None
        if isinstance(config, Mapping):
            found, settings = config.get("_type"), config.get("_data")
    settings = settings if isinstance(settings, Mapping) else {}
    name = str(found).lower().replace("_", "").removesuffix("config")
    if name in ("int8weightonly", "int8dynamicactivationint8weight"):
        return INT8_ROWS if settings.get("group_size") is None else None
    if name in ("float8weightonly", "float8dynamicactivationfloat8weight"):
        return FP8_ROWS
    if name == "int4weightonly":
        return _with_zeros(integers(4, _group(settings.get("group_size", USUAL_GROUP))))
    return None


def _quark(entry: Entry) -> PackedLayout | None:
    """The entry of all layers, unless some have one of their own."""
    if entry.get("layer_quant_config") or entry.get("layer_type_quant_config"):
        return None
    found = entry.get("global_quant_config")
    weights = found.get("weight") if isinstance(found, Mapping) else None
    if not isinstance(weights, Mapping):
        return None
    dtype, scheme = weights.get("dtype"), weights.get("qscheme")
    if dtype == "fp4" and weights.get("scale_format") == "e8m0" and weights.get("group_size") == 32:
        return MXFP4
    if dtype in ("fp8_e4m3", "fp8_e5m2"):
        return {"per_tensor": FP8_TENSOR, "per_channel": FP8_ROWS}.get(str(scheme))
    bits = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8}.get(str(dtype))
    zero_bits = bits if bits and str(dtype).startswith("u") else 0
    if scheme == "per_group":
        return integers(bits, _group(weights.get("group_size")), zero_bits=zero_bits)
    return integers(bits, 0, zero_bits=zero_bits) if scheme == "per_channel" else None


def _aqlm(entry: Entry) -> PackedLayout | None:
    """Groups of weights as indices into codebooks of 16-bit vectors, a scale per group of rows."""
    rows, columns = _count(entry.get("out_group_size", 1)), _count(entry.get("in_group_size", 8))
    codebooks = _count(entry.get("num_codebooks", 1))
    bits = _count(entry.get("nbits_per_codebook", 16))
    if not (rows and columns and codebooks and bits) or bits > LARGEST_BITS:
        return None
    index_bits = 8 if bits <= 8 else 16
    return PackedLayout(
        Fraction(codebooks * index_bits, rows * columns),
        HALF_BYTES,
        rows=rows,
        matrix_bytes=codebooks * 2**bits * rows * columns * HALF_BYTES,
    )


def _bitnet(entry: Entry) -> PackedLayout | None:
    """Four weights a byte, unless they are packed when they are loaded."""
    return TERNARY if entry.get("quantization_mode", "offline") == "offline" else None


# A new method: its reader and its row here.
READERS: Final[dict[str, Reader]] = {
    "aqlm": _aqlm,
    "auto-round": _auto_round,
    "awq": _awq,
    "bitnet": _bitnet,
    "compressed-tensors": _compressed_tensors,
    "eetq": lambda entry: INT8_ROWS,
    "fbgemm_fp8": lambda entry: FP8_ROWS,
    "finegrained_fp8": _fp8,
    "fp8": _fp8,
    "gptq": _gptq,
    "hqq": _hqq,
    "modelopt": _modelopt,
    "mxfp4": lambda entry: MXFP4,
    "mxfp8": lambda entry: MXFP8,
    "quanto": _quanto,
    "quark": _quark,
    "torchao": _torchao,
}


# -- values ---------------------------------------------------------------------------------------


def _count(value: object) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31
    return value if is_count and isinstance(value, int) else None


def _group(value: object) -> int | None:
    """Columns that share a scale: -1 and null stand for a whole row, which is 0 here."""
    return 0 if value is None or value == -1 else _count(value)


def _pair(value: object) -> tuple[int, int] | None:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    rows, columns = map(_count, value)
    return (rows, columns) if rows and columns else None
