"""Formats that others quantize checkpoints to, read off `quantization_config`: sizes only.

qtool neither writes nor runs them. Where file headers are at hand they say the bytes; these
formulas serve a config.json alone, and `--quant fp8`.

    find_format(config).matrix_bytes((4096, 14336))
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from qtool.architecture import ModelTensor

FP8_BLOCK: Final = (128, 128)
DEFAULT_BITS: Final = 4
DEFAULT_GROUP: Final = 128
MXFP4_GROUP: Final = 32
NVFP4_GROUP: Final = 16
SCALE_BYTES: Final = 4  # float32

MatrixBytes = Callable[[tuple[int, ...]], int]


class StoredFormat(NamedTuple):
    """`method` as people call it; `matrix_bytes` of one packed [out, in]; `packs` says which
    linear layers and experts it packs."""

    method: str
    matrix_bytes: MatrixBytes
    packs: Callable[[ModelTensor], bool]


def find_format(config: Mapping[str, Any]) -> StoredFormat | None:
    """The format that config.json names, other than bitsandbytes'; None if there is none."""
    entry = config.get("quantization_config") or config.get("compression_config")
    text = config.get("text_config")
    if entry is None and isinstance(text, Mapping):
        entry = text.get("quantization_config")
    if not isinstance(entry, Mapping):
        return None
    method = entry.get("quant_method", "bitsandbytes")
    if not isinstance(method, str) or method == "bitsandbytes":
        return None
    label, matrix_bytes = _sizes(method, entry)
    if label == "mxfp4":  # gpt-oss: the experts only
        return StoredFormat(label, matrix_bytes, lambda parameter: parameter.is_expert)
    return StoredFormat(label, matrix_bytes, _unless_excluded(_excluded(entry)))


def fp8_per_tensor(shape: tuple[int, ...]) -> int:
    """A byte per weight and one scale: what `--quant fp8` plans."""
    return math.prod(shape) + SCALE_BYTES


def fp8_in_blocks(shape: tuple[int, ...], block: Sequence[int] = FP8_BLOCK) -> int:
    """A byte per weight and a float32 scale per block (DeepSeek-V3's layout)."""
    rows, columns = -(-shape[-2] // block[0]), -(-shape[-1] // block[1])
    return math.prod(shape) + SCALE_BYTES * rows * columns


def _sizes(method: str, entry: Mapping[str, Any]) -> tuple[str, MatrixBytes]:
    """What people call the format, and the bytes of one packed matrix."""
    if method in ("fp8", "fbgemm_fp8"):
        block = _pair(entry.get("weight_block_size"))
        if block is None:
            return "fp8", fp8_per_tensor
        return "fp8", lambda shape: fp8_in_blocks(shape, block)
    if method == "mxfp4":
        return "mxfp4", lambda shape: math.prod(shape) // 2 + math.prod(shape) // MXFP4_GROUP
    if method == "modelopt" or "nvfp4" in str(entry.get("format", "")).lower():
        return "nvfp4", _nvfp4
    bits, group, zero_points = _grouped_integers(method, entry)
    return method, lambda shape: _grouped(shape, bits, group, zero_points)


def _nvfp4(shape: tuple[int, ...]) -> int:
    """Two weights a byte, an FP8 scale per 16, one float32 scale."""
    return math.prod(shape) // 2 + math.prod(shape) // NVFP4_GROUP + SCALE_BYTES


def _grouped(shape: tuple[int, ...], bits: int, group: int, zero_points: bool) -> int:
    """Integers of `bits` with a 16-bit scale, and perhaps a zero point, per group of a row."""
    columns = shape[-1] if group <= 0 else group
    groups = math.prod(shape[:-1]) * -(-shape[-1] // columns)
    zero_bytes = groups * bits // 8 if zero_points else 0
    return math.prod(shape) * bits // 8 + 2 * groups + zero_bytes


def _grouped_integers(method: str, entry: Mapping[str, Any]) -> tuple[int, int, bool]:
    """(bits, group size, zero points) of GPTQ, AWQ, compressed-tensors and their like."""
    if method == "compressed-tensors":
        groups = entry.get("config_groups")
        first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
        weights = first.get("weights") if isinstance(first, Mapping) else None
        entry = weights if isinstance(weights, Mapping) else {}
        zero_points = entry.get("symmetric") is False
    else:
        zero_points = True
    bits = _count(entry.get("bits")) or _count(entry.get("num_bits")) or DEFAULT_BITS
    group = -1 if entry.get("group_size") == -1 else _count(entry.get("group_size"))
    return min(bits, 32), group or DEFAULT_GROUP, zero_points


# -- which layers ---------------------------------------------------------------------------------


def _unless_excluded(patterns: Sequence[str]) -> Callable[[ModelTensor], bool]:
    def packs(parameter: ModelTensor) -> bool:
        if not (parameter.is_linear or parameter.is_expert) or parameter.tied_to is not None:
            return False
        name = parameter.name.removesuffix(".weight")
        return name != "lm_head" and not any(_matches(pattern, name) for pattern in patterns)

    return packs


def _excluded(entry: Mapping[str, Any]) -> list[str]:
    for key in ("modules_to_not_convert", "ignore", "ignored_layers"):
        found = entry.get(key)
        if isinstance(found, list):
            return [name for name in found if isinstance(name, str)]
    return []


def _matches(pattern: str, name: str) -> bool:
    """compressed-tensors writes "re:...", others module names, parts of them or wildcards."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error:
            return False
    if "*" in pattern:
        return fnmatch.fnmatch(name, f"{pattern}*")
    return f".{pattern}." in f".{name}."


def _count(value: object) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31
    return value if is_count and isinstance(value, int) else None


def _pair(value: object) -> tuple[int, int] | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    rows, columns = map(_count, value)
    return (rows, columns) if rows and columns else None
