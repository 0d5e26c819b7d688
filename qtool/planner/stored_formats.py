"""Formats that others quantize checkpoints to, read off `quantization_config`: sizes only.

qtool neither writes nor runs them. Where file headers are at hand they say the bytes; the layouts
of `stored_methods` serve a config.json alone, and `--quant fp8`.

    find_format(config).matrix_bytes((4096, 14336))
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from qtool.architecture import Architecture, ModelTensor
from qtool.formats.tensors import TensorLayout
from qtool.planner.stored_methods import FP8_TENSOR, MXFP8, NVFP4, PackedLayout, packed_layout

MatrixBytes = Callable[[tuple[int, ...]], int]

FP8: Final = "fp8"
FP8_DTYPES: Final = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
# Methods that people call by another name than config.json does.
CALLED: Final = {"fbgemm_fp8": FP8, "finegrained_fp8": FP8}
CALLED_BY_LAYOUT: Final = {MXFP8: "mxfp8", NVFP4: "nvfp4"}
EXPERTS_ONLY: Final = frozenset({"mxfp4"})  # gpt-oss
# Where entries list the layers that stay as they are.
EXCLUDING_KEYS: Final = (
    "modules_to_not_convert",
    "ignore",
    "ignored_layers",
    "exclude",
    "exclude_modules",
    "skip_modules",
    "linear_weights_not_to_quantize",
)


class StoredFormat(NamedTuple):
    """`method` as people call it; `packs` says which linear layers and experts it packs.

    `layout` is None where it is not known how; then nothing counts as packed, which is the most
    that it can take. `is_declared` by config.json, which may be silent about FP8.
    """

    method: str
    layout: PackedLayout | None
    packs: Callable[[ModelTensor], bool]
    is_declared: bool = True

    def matrix_bytes(self, shape: tuple[int, ...]) -> int:
        """Of one packed [out, in]."""
        assert self.layout is not None
        return self.layout.num_bytes(shape)


def find_format(
    config: Mapping[str, Any],
    layouts: Iterable[TensorLayout] = (),
    architecture: Architecture | None = None,
) -> StoredFormat | None:
    """The format of a checkpoint that is quantized, but not in bitsandbytes' way; None if it is
    none. Of the stored `layouts` only the architecture knows which are linear layers."""
    return _declared(config) or _undeclared(layouts, architecture)


def _declared(config: Mapping[str, Any]) -> StoredFormat | None:
    entry = config.get("quantization_config") or config.get("compression_config")
    text = config.get("text_config")
    if entry is None and isinstance(text, Mapping):
        entry = text.get("quantization_config")
    if not isinstance(entry, Mapping):
        return None
    method = entry.get("quant_method", "bitsandbytes")
    if not isinstance(method, str) or method == "bitsandbytes":
        return None
    layout = packed_layout(method, entry)
    packs = _unless_excluded(_excluded(entry))
    if layout is None:
        packs = _nothing
    elif method in EXPERTS_ONLY:
        packs = _experts
    return StoredFormat(_called(method, layout), layout, packs)


def _undeclared(
    layouts: Iterable[TensorLayout], architecture: Architecture | None
) -> StoredFormat | None:
    """FP8 weights of which config.json says nothing; None if no linear layer has any."""
    if architecture is None:
        return None
    for tensor in layouts:
        parameter = architecture.find(tensor.name) if tensor.dtype in FP8_DTYPES else None
        if parameter is not None and (parameter.is_linear or parameter.is_expert):
            return StoredFormat(FP8, FP8_TENSOR, _unless_excluded(()), is_declared=False)
    return None


def _called(method: str, layout: PackedLayout | None) -> str:
    if layout in CALLED_BY_LAYOUT:
        return CALLED_BY_LAYOUT[layout]
    if method == "modelopt" and layout is not None and layout.bits == FP8_TENSOR.bits:
        return FP8
    return CALLED.get(method, method)


# -- which layers ---------------------------------------------------------------------------------


def _nothing(parameter: ModelTensor) -> bool:
    return False


def _experts(parameter: ModelTensor) -> bool:
    return parameter.is_expert


def _unless_excluded(patterns: Sequence[str]) -> Callable[[ModelTensor], bool]:
    def packs(parameter: ModelTensor) -> bool:
        if not (parameter.is_linear or parameter.is_expert) or parameter.tied_to is not None:
            return False
        name = parameter.name.removesuffix(".weight")
        return name != "lm_head" and not any(_matches(pattern, name) for pattern in patterns)

    return packs


def _excluded(entry: Mapping[str, Any]) -> list[str]:
    for key in EXCLUDING_KEYS:
        found = entry.get(key)
        if isinstance(found, list):
            return [name.removesuffix(".weight") for name in found if isinstance(name, str)]
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
