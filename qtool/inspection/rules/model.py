"""Rules that compare the tensors with the model that config.json describes, where it is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from qtool.architecture import ModelTensor
from qtool.checkpoint.config_json import CONFIG_NAME
from qtool.checkpoint.records import TensorInfo
from qtool.errors import QtoolError
from qtool.inspection.rules.rule import Finding
from qtool.inspection.stored_folder import StoredFolder


def missing_tensor(folder: StoredFolder) -> Iterator[Finding]:
    """Every parameter of the model is stored."""
    if folder.architecture is None:
        return
    stored = {_owner(parameter) for _, parameter in _parameters(folder)}
    for parameter in folder.architecture.tensors.values():
        if _owner(parameter) not in stored:
            yield Finding(
                CONFIG_NAME, parameter.name, f"shape {list(parameter.shape)}", "no tensor"
            )


def tensor_shape(folder: StoredFolder) -> Iterator[Finding]:
    """Every parameter has the shape that config.json implies."""
    for tensor, parameter in _parameters(folder):
        found = _real_shape(folder, tensor)
        packed = tensor.name in folder.quantized
        transposed = packed and parameter.kind == "conv1d"
        expected = parameter.shape[::-1] if transposed else parameter.shape
        if found is not None and found != expected:
            yield Finding(tensor.shard, tensor.name, f"shape {list(expected)}", f"{list(found)}")


def _parameters(folder: StoredFolder) -> Iterator[tuple[TensorInfo, ModelTensor]]:
    """The stored tensors that the model has parameters for."""
    if folder.architecture is not None:
        for tensor in folder.tensors.values():
            parameter = folder.architecture.find(tensor.name)
            if parameter is not None:
                yield tensor, parameter


def _owner(parameter: ModelTensor) -> str:
    """The name that the storage goes by: either of two tied parameters may be the stored one."""
    return parameter.tied_to or parameter.name


def _real_shape(folder: StoredFolder, tensor: TensorInfo) -> tuple[int, ...] | None:
    """None where the quant_state that knows it cannot be read."""
    state = folder.states.get(tensor.name)
    if isinstance(state, QtoolError):
        return None
    return tensor.shape if state is None else state.shape


MODEL_RULES: Final = (
    missing_tensor,
    tensor_shape,
)
