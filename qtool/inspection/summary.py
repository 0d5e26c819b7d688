"""What a checkpoint is: precision, parameters by their real shapes, bytes, dtypes.

Everything follows from headers, config.json and the quant_state blobs; no weight is read.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final

from qtool.architecture import Architecture, build_architecture
from qtool.checkpoint.records import Checkpoint, TensorInfo
from qtool.errors import QtoolError
from qtool.formats.bitsandbytes import QuantizedWeight, find_quantized, stray_statistics
from qtool.formats.tensors import TensorLayout
from qtool.inspection.records import InspectedTensor, Inspection, Total
from qtool.inspection.weights import TensorFiles, read_quant_state

# What the precision words say of unpacked tensors; integers and the rest have no word.
PRECISION_OF_DTYPE: Final = {
    "F32": "fp32",
    "BF16": "bf16",
    "F16": "fp16",
    "F8_E4M3": "fp8",
    "F8_E5M2": "fp8",
    "F8_E4M3FNUZ": "fp8",
    "F8_E5M2FNUZ": "fp8",
}


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Describe a checkpoint; with headers from the Hub only, packed shapes come from its config.

    Raises:
        QtoolError: a quant_state blob cannot be read.
    """
    quantized = find_quantized(checkpoint.tensors)
    architecture = known_architecture(checkpoint.config)
    shapes, notes = _real_shapes(checkpoint, quantized, architecture)
    statistics = _statistics_names(checkpoint.tensors, quantized)
    quant_of = {
        name: quantized[name].precision if name in quantized else PRECISION_OF_DTYPE.get(t.dtype)
        for name, t in checkpoint.tensors.items()
        if name not in statistics
    }
    counted = _counted_once(checkpoint, statistics, architecture)
    return Inspection(
        path=checkpoint.id,
        quant_method=_quant_method(checkpoint.config, quantized),
        quant=_overall_precision(checkpoint.tensors, quantized, quant_of),
        compute_dtype=_compute_dtype(checkpoint.config, quantized),
        parameters=sum(math.prod(shapes[name]) for name in counted),
        weights_bytes=checkpoint.weights_bytes,
        dtypes=_dtype_totals(checkpoint.tensors.values()),
        precisions=_precision_totals(checkpoint.tensors, quantized, quant_of, shapes),
        tensors=_describe_tensors(checkpoint.tensors, quantized, quant_of),
        notes=notes,
    )


def known_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """The model that config.json describes, or None where it describes none that is known, and for
    mixtures of experts: a stored expert is a part of a parameter, not one to compare with."""
    try:
        architecture = build_architecture(config)
    except QtoolError:
        return None
    return architecture if architecture.experts is None else None


def _real_shapes(
    checkpoint: Checkpoint,
    quantized: Mapping[str, QuantizedWeight],
    architecture: Architecture | None,
) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    """Shapes with packed weights unpacked, by tensor name, and notes on those not known."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    packed = [weight for weight in quantized.values() if weight.precision != "int8"]
    if checkpoint.folder is not None:
        with TensorFiles(checkpoint.folder) as files:
            shapes |= {weight.name: read_quant_state(weight, files).shape for weight in packed}
        return shapes, ()
    unknown = False
    for weight in packed:
        parameter = architecture.find(weight.name) if architecture else None
        unknown = unknown or parameter is None
        shapes[weight.name] = parameter.shape if parameter else (2 * weight.weight.num_bytes,)
    note = "shapes of packed weights were estimated from their bytes: only headers were fetched"
    return shapes, (note,) if unknown else ()


def _statistics_names(
    tensors: Mapping[str, TensorLayout], quantized: Mapping[str, QuantizedWeight]
) -> set[str]:
    grouped = (s.name for weight in quantized.values() for s in weight.statistics.values())
    return {*grouped, *stray_statistics(tensors)}


def _describe_tensors(
    tensors: Mapping[str, TensorInfo],
    quantized: Mapping[str, QuantizedWeight],
    quant_of: Mapping[str, str | None],
) -> tuple[InspectedTensor, ...]:
    owners = {
        s.name: name for name, weight in quantized.items() for s in weight.statistics.values()
    }
    return tuple(
        InspectedTensor(
            name=t.name,
            dtype=t.dtype,
            shape=t.shape,
            num_bytes=t.num_bytes,
            quant=quant_of.get(t.name),
            shard=t.shard,
            belongs_to=owners.get(t.name),
        )
        for t in tensors.values()
    )


def _counted_once(
    checkpoint: Checkpoint, statistics: set[str], architecture: Architecture | None
) -> list[str]:
    """The stored tensors that are parameters of the model, one of each tied pair."""
    if architecture is None:
        tied = bool(checkpoint.config.get("tie_word_embeddings"))
        head = checkpoint.tensors.get("lm_head.weight")
        shapes = [it.shape for name, it in checkpoint.tensors.items() if name not in statistics]
        is_twice = tied and head is not None and shapes.count(head.shape) > 1
        return [
            name
            for name in checkpoint.tensors
            if name not in statistics and not (is_twice and name == "lm_head.weight")
        ]
    counted: dict[str, str] = {}
    for name in checkpoint.tensors:
        if name in statistics or architecture.stored_names.why_ignored(name):
            continue
        parameter = architecture.find(name)
        owner = (parameter.tied_to or parameter.name) if parameter else name
        counted.setdefault(owner, name)
    return list(counted.values())


def _quant_method(
    config: Mapping[str, Any], quantized: Mapping[str, QuantizedWeight]
) -> str | None:
    entry = config.get("quantization_config")
    if isinstance(entry, Mapping) and isinstance(entry.get("quant_method"), str):
        return str(entry["quant_method"])
    return "bitsandbytes" if quantized else None


def _overall_precision(
    tensors: Mapping[str, TensorInfo],
    quantized: Mapping[str, QuantizedWeight],
    quant_of: Mapping[str, str | None],
) -> str | None:
    """The quantized layers' precision; without any, that of the matrices (or of all tensors)."""
    names: Iterable[str] = quantized
    if not quantized:
        matrices = [name for name in quant_of if len(tensors[name].shape) >= 2]
        names = matrices or list(quant_of)
    found = {quant_of[name] for name in names}
    return found.pop() if len(found) == 1 else ("mixed" if found else None)


def _compute_dtype(
    config: Mapping[str, Any], quantized: Mapping[str, QuantizedWeight]
) -> str | None:
    """torch's name of the dtype that products are computed in.

    4-bit layers: what the quantization entry says, transformers' float32 where it says nothing.
    Others: the model's own dtype.
    """
    if any(weight.precision != "int8" for weight in quantized.values()):
        entry = config.get("quantization_config")
        entry = entry if isinstance(entry, Mapping) else {}
        return str(entry.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
    dtype = config.get("dtype") or config.get("torch_dtype")
    return dtype.removeprefix("torch.") if isinstance(dtype, str) else None


def _dtype_totals(tensors: Iterable[TensorInfo]) -> dict[str, Total]:
    groups: dict[str, list[TensorInfo]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.dtype].append(tensor)
    totals = {
        dtype: Total(
            len(group), sum(t.num_elements for t in group), sum(t.num_bytes for t in group)
        )
        for dtype, group in groups.items()
    }
    return _largest_first(totals)


def _precision_totals(
    tensors: Mapping[str, TensorInfo],
    quantized: Mapping[str, QuantizedWeight],
    quant_of: Mapping[str, str | None],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Total]:
    groups: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, precision in quant_of.items():
        num_bytes = tensors[name].num_bytes
        if name in quantized:
            num_bytes += sum(s.num_bytes for s in quantized[name].statistics.values())
        key = precision or tensors[name].dtype
        groups[key].append((math.prod(shapes[name]), num_bytes))
    totals = {
        precision: Total(len(group), sum(n for n, _ in group), sum(b for _, b in group))
        for precision, group in groups.items()
    }
    return _largest_first(totals)


def _largest_first(totals: dict[str, Total]) -> dict[str, Total]:
    return dict(sorted(totals.items(), key=lambda item: -item[1].num_bytes))
