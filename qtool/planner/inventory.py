"""What a model's weights are made of: tensors that are alike, counted together.

A mixture of experts stores tens of thousands of tensors of a dozen kinds; everything that the
planner asks of them depends on the kind alone.

    take_inventory(layouts.values(), architecture, is_packed)[group]     # how many
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Literal, NamedTuple

from qtool.architecture import Architecture, ModelTensor
from qtool.formats.tensors import TensorLayout

# "linear" and "experts": matrices that a quantized precision packs. "lookup": an embedding of which
# a token reads one row. "other": all else on the device. "file": in the files, not in the model.
Role = Literal["linear", "experts", "lookup", "other", "file"]

# Where in the model: the index of a layer, or in front of the first, or behind the last.
Place = int
BEFORE: Final[Place] = -1
AFTER: Final[Place] = 1 << 30

_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
_TOWER = re.compile(r"visual|vision|audio|multi_modal|projector")


class TensorGroup(NamedTuple):
    """What the tensors of a group have in common.

    `shape` is that of one matrix [out, in] for "linear" and "experts". Of routed experts a token
    uses `experts_per_token` in `num_experts`.
    """

    role: Role
    place: Place
    dtype: str
    shape: tuple[int, ...]
    experts_per_token: int = 1
    num_experts: int = 1

    @property
    def layout(self) -> TensorLayout:
        """One tensor of the group, under a name of no meaning."""
        return TensorLayout("weight", self.dtype, self.shape)


Inventory = Mapping[TensorGroup, int]


def take_inventory(
    layouts: Iterable[TensorLayout],
    architecture: Architecture | None,
    is_packed: Callable[[ModelTensor], bool] = lambda parameter: False,
) -> Inventory:
    """Count the tensors of a checkpoint, or those that a config implies, by group.

    Args:
        architecture: None where it is not known: then every tensor is taken for part of the model.
        is_packed: which linear layers and experts a quantized precision packs.
    """
    groups: Counter[TensorGroup] = Counter()
    tied = _tied(architecture) if architecture else frozenset()
    loaded: set[str] = set()
    read_rows = _looked_up(architecture) if architecture else frozenset()
    for tensor in layouts:
        if architecture is None:
            groups[TensorGroup("other", BEFORE, tensor.dtype, tensor.shape)] += 1
            continue
        parameter = architecture.find(tensor.name)
        storage = parameter and (parameter.tied_to or parameter.name)
        if parameter is None or storage in loaded:
            groups[TensorGroup("file", BEFORE, tensor.dtype, tensor.shape)] += 1
            continue
        if storage in tied:  # files may hold both ends, the model keeps one
            loaded.add(storage)
        group, count = _group(tensor, parameter, read_rows, is_packed(parameter))
        groups[group] += count
    return groups


def is_one_expert(tensor: TensorLayout, parameter: ModelTensor) -> bool:
    """Whether the stored tensor is one of many that together make up the parameter."""
    is_smaller = len(tensor.shape) < len(parameter.shape)
    return parameter.experts_per_token is not None and is_smaller


def _group(
    tensor: TensorLayout, parameter: ModelTensor, read_rows: frozenset[str], is_packed: bool
) -> tuple[TensorGroup, int]:
    place = place_of(parameter)
    role: Role = "lookup" if (parameter.tied_to or parameter.name) in read_rows else "other"
    if parameter.experts_per_token is None:
        shape, role = tensor.shape, "linear" if is_packed else role
        shape = shape[::-1] if parameter.kind == "conv1d" else shape
        return TensorGroup(role, place, tensor.dtype, shape), 1
    routing = (parameter.experts_per_token, parameter.shape[0])
    if is_one_expert(tensor, parameter):
        role = "experts" if is_packed and len(tensor.shape) == 2 else "other"
        return TensorGroup(role, place, tensor.dtype, tensor.shape, *routing), 1
    shape = tensor.shape[1:]
    role = "experts" if is_packed and len(shape) == 2 else "other"
    if role == "experts":  # stored either way round; the model's says which is [out, in]
        shape = (
            parameter.shape[:0:-1]
            if parameter.kind == "experts_transposed"
            else parameter.shape[1:]
        )
    return TensorGroup(role, place, tensor.dtype, shape, *routing), tensor.shape[0]


def place_of(parameter: ModelTensor) -> Place:
    """The layer that holds the parameter; towers and embeddings stand before the first."""
    name = parameter.tied_to or parameter.name
    if _TOWER.search(name):
        return BEFORE
    layer = _LAYER.search(name)
    if layer is not None:
        return int(layer[1])
    return BEFORE if parameter.kind == "embedding" or parameter.tied_to else AFTER


def _tied(architecture: Architecture) -> frozenset[str]:
    parameters = architecture.tensors.values()
    return frozenset(parameter.tied_to for parameter in parameters if parameter.tied_to)


def _looked_up(architecture: Architecture) -> frozenset[str]:
    """Embeddings of which a token reads one row; a tied one is multiplied by as the head."""
    tied = _tied(architecture)
    return frozenset(
        name
        for name, parameter in architecture.tensors.items()
        if parameter.kind == "embedding" and name not in tied
    )
