"""Rules for quantized weights: their statistics, code tables, sizes and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from qtool.checkpoint.records import TensorInfo
from qtool.errors import QtoolError
from qtool.formats.bitsandbytes import (
    QUANT_STATE_PREFIX,
    ROW_MAJOR,
    QuantizedWeight,
    layout_problems,
    stray_statistics,
)
from qtool.formats.codebooks import CODES, PADDING_CODES, dynamic_map
from qtool.formats.tensors import TensorLayout
from qtool.inspection.rules.rule import Finding
from qtool.inspection.stored_folder import StoredFolder


def stray_statistic(folder: StoredFolder) -> Iterator[Finding]:
    """All statistics belong to a quantized weight."""
    for name in stray_statistics(folder.tensors):
        expected = "a packed weight with its quant_state, or an int8 weight with its SCB"
        yield Finding(folder.tensors[name].shard, name, expected, "statistics that belong to none")


def bare_packed_weight(folder: StoredFolder) -> Iterator[Finding]:
    """All packed weights have their statistics."""
    if (folder.quantization or {}).get("quant_method", "bitsandbytes") != "bitsandbytes":
        return
    for tensor in folder.tensors.values():
        if (
            tensor.name.endswith(".weight")
            and tensor.dtype in ("I8", "U8")
            and tensor.name not in folder.quantized
        ):
            wanted = "SCB" if tensor.dtype == "I8" else "a quant_state"
            yield Finding(tensor.shard, tensor.name, f"{wanted} beside packed values", "none")


def quant_state(folder: StoredFolder) -> Iterator[Finding]:
    """quant_state is JSON with exactly the known keys and values."""
    for name, state in folder.states.items():
        if isinstance(state, QtoolError):
            blob = cast(TensorInfo, folder.quantized[name].quant_state)
            expected = "a JSON object with exactly the known keys and values"
            yield Finding(blob.shard, blob.name, expected, str(state.__cause__ or state))


def quant_type(folder: StoredFolder) -> Iterator[Finding]:
    """quant_state and its key name the same code table."""
    for name, state in folder.states.items():
        if not isinstance(state, QtoolError):
            blob = cast(TensorInfo, folder.quantized[name].quant_state)
            in_key = blob.name.rpartition(QUANT_STATE_PREFIX)[2]
            if state.quant_type != in_key:
                yield Finding(blob.shard, blob.name, f"quant_type {in_key}", state.quant_type)


def layout(folder: StoredFolder) -> Iterator[Finding]:
    """Statistics are complete, of the right dtypes and sizes."""
    for weight in folder.quantized.values():
        state = folder.states.get(weight.name)
        for problem in layout_problems(weight, None if isinstance(state, QtoolError) else state):
            is_dtype = problem.rule == "statistics"
            expected = f"dtype {problem.expected}" if is_dtype else problem.expected
            yield Finding(_shard(weight.weight), problem.tensor, expected, problem.found)


def packed_shape(folder: StoredFolder) -> Iterator[Finding]:
    """Packed weights are a column."""
    for weight in folder.quantized.values():
        shape = weight.weight.shape
        if weight.precision != "int8" and (len(shape) != 2 or shape[1] != 1):
            # readers take [1, n] for the transpose of an older format
            yield Finding(_shard(weight.weight), weight.name, "shape [n, 1]", f"{list(shape)}")


def quant_map(folder: StoredFolder) -> Iterator[Finding]:
    """quant_map is the code table, bit for bit."""
    for weight, state in folder.sound_four_bit:
        table = CODES[state.quant_type]
        yield from _compare_table(folder, weight, "quant_map", table)


def nested_quant_map(folder: StoredFolder) -> Iterator[Finding]:
    """nested_quant_map is the dynamic map, bit for bit."""
    for weight, state in folder.sound_four_bit:
        if state.nested_offset is not None:
            yield from _compare_table(folder, weight, "nested_quant_map", dynamic_map())


def absmax(folder: StoredFolder) -> Iterator[Finding]:
    """absmax is finite and not negative."""
    for weight, state in folder.sound_four_bit:
        if state.nested_offset is None:
            yield from _check_magnitudes(folder, weight.statistics["absmax"])


def nested_absmax(folder: StoredFolder) -> Iterator[Finding]:
    """nested_absmax is finite and not negative."""
    for weight, state in folder.sound_four_bit:
        if state.nested_offset is not None:
            yield from _check_magnitudes(folder, weight.statistics["nested_absmax"])


def nested_offset(folder: StoredFolder) -> Iterator[Finding]:
    """nested_offset is finite and not negative."""
    for weight, state in folder.sound_four_bit:
        offset = state.nested_offset
        if offset is not None and not 0 <= offset < np.inf:
            blob = cast(TensorInfo, weight.quant_state)
            yield Finding(blob.shard, blob.name, "a finite nested_offset >= 0", repr(offset))


def padding(folder: StoredFolder) -> Iterator[Finding]:
    """An odd last value is padded with the code of zero."""
    for weight, state in folder.sound_four_bit:
        if state.num_elements % 2 == 0:
            continue
        size = weight.weight.num_bytes
        last = int(folder.reader.read_bytes(weight.weight, size - 1, size)[0])
        code = PADDING_CODES[state.quant_type]
        # 0x00: padded in a block of zeros, where GPUs give every value code 0
        if last & 15 != code and last != 0:
            found = f"code {last & 15}"
            yield Finding(_shard(weight.weight), weight.name, f"padding with code {code}", found)


def scb(folder: StoredFolder) -> Iterator[Finding]:
    """SCB is finite and not negative."""
    for weight, state in folder.sound_weights:
        if state is None:
            yield from _check_magnitudes(folder, weight.statistics["SCB"])


def weight_format(folder: StoredFolder) -> Iterator[Finding]:
    """weight_format is 0, row major."""
    for weight in folder.quantized.values():
        stored = weight.statistics.get("weight_format")
        if stored is None:
            continue
        expected = f"U8 scalar {ROW_MAJOR} (row major)"
        if stored.dtype != "U8" or stored.num_elements != 1:
            found = f"{stored.dtype} {list(stored.shape)}"
            yield Finding(_shard(stored), stored.name, expected, found)
        elif (value := int(folder.reader.read_bytes(stored)[0])) != ROW_MAJOR:
            yield Finding(_shard(stored), stored.name, expected, str(value))


def _compare_table(
    folder: StoredFolder, weight: QuantizedWeight, suffix: str, table: NDArray[np.float32]
) -> Iterator[Finding]:
    stored = weight.statistics[suffix]
    values = folder.reader.read_values(stored)
    different = np.flatnonzero(values.view(np.uint32) != table.view(np.uint32))
    if different.size:
        first = int(different[0])
        expected = f"the format's code table, entry {first} = {table[first]!s}"
        found = f"{values[first]!s} ({different.size} of {table.size} entries differ)"
        yield Finding(_shard(stored), stored.name, expected, found)


def _check_magnitudes(folder: StoredFolder, stored: TensorLayout) -> Iterator[Finding]:
    values = folder.reader.read_values(stored)
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if bad.size:
        first = int(bad[0])
        found = f"{values[first]} at {first} ({bad.size} of {values.size} values)"
        yield Finding(_shard(stored), stored.name, "finite values >= 0", found)


def _shard(tensor: TensorLayout) -> str:
    return cast(TensorInfo, tensor).shard


LAYER_RULES: Final = (
    stray_statistic,
    bare_packed_weight,
    quant_state,
    quant_type,
    layout,
    packed_shape,
    quant_map,
    nested_quant_map,
    absmax,
    nested_absmax,
    nested_offset,
    padding,
    scb,
    weight_format,
)
