"""Whether the weights in files are those that the architecture implies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

from qtool.architecture.records import Architecture, ModelTensor
from qtool.errors import QtoolError
from qtool.formats.tensors import SourceDtype, TensorLayout

QUANTIZABLE_DTYPES = get_args(SourceDtype)


def check_linear_layers(
    tensors: Iterable[TensorLayout], architecture: Architecture, skip: Sequence[str] = ()
) -> None:
    """`check_weights` for what is quantized by default, and without `skip`."""
    check_weights(tensors, architecture, architecture.quantizable(skip))


def check_weights(
    tensors: Iterable[TensorLayout],
    architecture: Architecture,
    wanted: Mapping[str, ModelTensor],
) -> None:
    """Raise QtoolError unless every weight to quantize is there, in a dtype that can be quantized,
    and every parameter but experts' in the shape that config.json says.

    Args:
        wanted: those weights, by their names in the model.
    """
    missing = dict(wanted)
    for tensor in tensors:
        parameter = architecture.find(tensor.name)
        if parameter is None or parameter.is_expert:  # experts may be stored one by one
            continue
        _check_shape(tensor, parameter)
        if missing.pop(parameter.name, None) is not None:
            _check_dtype(tensor)
    if missing:
        _raise_missing(sorted(missing), architecture)


def missing_parameters(names: Iterable[str], architecture: Architecture) -> list[str]:
    """Parameters that no stored tensor of these `names` is loaded into, sorted.

    Only those for which that is sure: none where a tensor is stored that the architecture does not
    know, and beside tensors that are no parameters (some are taken apart into parameters) only
    those whose like in another layer is stored.
    """
    found: set[str] = set()
    others = False
    for name in names:
        parameter = architecture.find(name)
        if parameter is not None:
            # Of two that are tied, transformers takes the one that is stored for both.
            found |= {parameter.name, parameter.tied_to or parameter.name}
        elif architecture.stored_names.why_ignored(name) is not None:
            others = True
        else:
            return []
    missing = {t.name for t in architecture.tensors.values() if t.tied_to is None} - found
    if others:
        alike = {_without_numbers(name) for name in found}
        missing = {name for name in missing if _without_numbers(name) in alike}
    return sorted(missing)


def _without_numbers(name: str) -> str:
    """The same for a parameter of each layer."""
    return re.sub(r"\.\d+(?=\.)", ".N", name)


def _check_shape(tensor: TensorLayout, parameter: ModelTensor) -> None:
    if tensor.shape != parameter.shape:
        raise QtoolError(
            f"{place_of(tensor)}: config.json implies shape {list(parameter.shape)}, "
            f"found {list(tensor.shape)}",
            kind="bad_file",
            hint="config.json and the weights do not belong together; fetch both again",
        )


def _check_dtype(tensor: TensorLayout) -> None:
    if tensor.dtype not in QUANTIZABLE_DTYPES:
        raise QtoolError(
            f"{place_of(tensor)}: dtype {tensor.dtype} cannot be quantized, "
            f"expected one of {', '.join(QUANTIZABLE_DTYPES)}",
            kind="unsupported",
            hint="convert the checkpoint to bfloat16 first",
        )


def _raise_missing(names: Sequence[str], architecture: Architecture) -> None:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    raise QtoolError(
        f"config.json ({architecture.class_name}) implies {names[0]}{more}, found in no shard",
        kind="bad_file",
        hint="the checkpoint is incomplete, or its config.json belongs to another model",
    )


def place_of(tensor: TensorLayout) -> str:
    """How messages name the tensor: with its file, where that is known."""
    shard = getattr(tensor, "shard", None)
    return f"{shard}: {tensor.name}" if shard else tensor.name
