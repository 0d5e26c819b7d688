"""The tables and constants of `qtool.formats` as a CUDA header: written down once."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np

from cupy_kernels.decision_bins import (
    SLOT_SHIFT,
    DecisionBins,
    DynamicSlots,
    dynamic_slots,
    fp4_bins,
    nf4_bins,
)
from qtool.formats.codebooks import FP4_CODE, NF4_CODE
from qtool.formats.double_quant import SUM_GROUP
from qtool.formats.int8 import INVERSE_127
from qtool.formats.precisions import NESTED_BLOCKSIZE
from qtool.formats.reciprocal import CORRECTIONS, SIGNIFICAND_BITS


@cache
def code_tables_header() -> str:
    """The text of code_tables.cuh: floats as hexadecimal literals, which are exact."""
    return "\n".join(
        [
            "#pragma once",
            "struct __align__(8) DecisionBin { float threshold; unsigned int code; };",
            *_four_bit("nf4", nf4_bins()),
            *_four_bit("fp4", fp4_bins()),
            _floats("nf4_code", NF4_CODE),
            _floats("fp4_code", FP4_CODE),
            _choice("nf4_value", NF4_CODE),
            _choice("fp4_value", FP4_CODE),
            *_dynamic(dynamic_slots()),
            _bytes("reciprocal_corrections", CORRECTIONS),
            f"constexpr unsigned int NUM_CORRECTIONS = {CORRECTIONS.size};",
            f"constexpr int CORRECTION_SHIFT = {23 - SIGNIFICAND_BITS};",
            f"constexpr int NESTED_BLOCKSIZE = {NESTED_BLOCKSIZE};",
            f"constexpr int SUM_GROUP = {SUM_GROUP};",
            f"constexpr float INVERSE_127 = {_literal(float(INVERSE_127))};",
            "",
        ]
    )


def _four_bit(name: str, bins: DecisionBins) -> list[str]:
    return [
        _bins(name, bins.thresholds, bins.codes),
        f"constexpr float {name.upper()}_BIN_SCALE = {bins.scale}.0f;",
        f"constexpr int {name.upper()}_ZERO_BIN = {bins.zero_bin};",
    ]


def _dynamic(slots: DynamicSlots) -> list[str]:
    return [
        _bins("dynamic", slots.thresholds, slots.codes),
        f"constexpr int DYNAMIC_SLOTS = {len(slots.codes) // 2};",
        f"constexpr int DYNAMIC_FIRST_SLOT = {slots.first_slot};",
        f"constexpr int DYNAMIC_SLOT_SHIFT = {SLOT_SHIFT};",
    ]


def _bins(name: str, thresholds: Iterable[float], codes: Iterable[int]) -> str:
    entries = ", ".join(
        f"{{{_literal(threshold)}, {code}u}}"
        for threshold, code in zip(thresholds, codes, strict=True)
    )
    return f"__device__ const DecisionBin {name}_bins[] = {{{entries}}};"


def _bytes(name: str, values: Iterable[int]) -> str:
    # In constant memory, whose cache the streams of weights do not touch.
    return f"__constant__ signed char {name}[] = {{{', '.join(str(int(v)) for v in values)}}};"


def _floats(name: str, values: Iterable[float]) -> str:
    literals = ", ".join(_literal(float(value)) for value in values)
    return f"__device__ const float {name}[] = {{{literals}}};"


def _choice(name: str, values: Iterable[float]) -> str:
    # Of immediates: what is loaded as a kernel begins waits behind the copies of weights.
    first, *others = (_literal(float(value)) for value in values)
    choices = " ".join(f"if (code == {i}) value = {v};" for i, v in enumerate(others, 1))
    body = f"float value = {first}; {choices} return value;"
    return f"__device__ inline float {name}(int code) {{ {body} }}"


def _literal(value: float) -> str:
    return f"{float(np.float32(value)).hex()}f"
