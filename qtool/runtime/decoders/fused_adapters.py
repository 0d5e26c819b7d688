"""LoRA adapters as the fused kernels take them: y += scale * B (A x).

Layers that share x have their matrices A in one, so that a single small launch makes the inner
values A x of all of them; the product behind multiplies those by B while it stores its own sums.
Matrices are copies in the dtype of activations, whatever PEFT keeps them in; ranks are filled up
with zeros. In a step inner values and sums are float32, in a prompt PyTorch rounds the inner values
to that dtype as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from cupy_kernels.adapter_inner import AdapterInner, InnerKind
from cupy_kernels.linear_few import (
    RANK_MULTIPLE,
    AdapterWeight,
    LinearKind,
    NormWeight,
    Tokens,
)
from qtool.runtime.adapters import LowRank
from qtool.runtime.decoders.blocks import Block, FusableNetwork, PackedRows


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """The adapter of one layer: b (rows, rank), and where its inner values begin."""

    b: Tensor
    first: int
    scale: float

    @property
    def inner(self) -> slice:
        """Its inner values among those of the group."""
        return slice(self.first, self.first + self.b.shape[1])


@dataclass(frozen=True, slots=True)
class AdapterGroup:
    """Adapters of layers that share x.

    Args:
        a: (rows, columns), one under the other.
        scales: float32 (rows,).
        parts: one for each layer; None for a layer without an adapter.
    """

    a: Tensor
    scales: Tensor
    parts: tuple[AdapterPart | None, ...]

    @property
    def weights(self) -> tuple[AdapterWeight, ...]:
        """What products are told, layer by layer."""
        return tuple(
            AdapterWeight(part.b.data_ptr(), part.b.shape[1], part.first)
            if part is not None
            else AdapterWeight()
            for part in self.parts
        )

    def add(self, x: Tensor, outs: Sequence[Tensor]) -> None:
        """Add what the adapters make of x (n, columns) to `outs`, (n, rows) for each layer."""
        inner = x.mm(self.a.t())
        for part, out in zip(self.parts, outs, strict=True):
            if part is not None:
                out.addmm_(inner[:, part.inner], part.b.t(), alpha=part.scale)


@dataclass(frozen=True, slots=True)
class BlockAdapters:
    """The groups of a block, by their layers; None where no layer has an adapter."""

    query_key_value: AdapterGroup | None
    output: AdapterGroup | None
    gate_up: AdapterGroup | None
    down: AdapterGroup | None

    @property
    def groups(self) -> tuple[AdapterGroup, ...]:
        """Those that are there."""
        groups = (self.query_key_value, self.output, self.gate_up, self.down)
        return tuple(group for group in groups if group is not None)


def adapters_of(network: FusableNetwork) -> list[BlockAdapters]:
    """Copies of the adapters of all blocks, on the network's device and in its dtype."""
    return [_adapters_of(block, network.embedding) for block in network.blocks]


def _adapters_of(block: Block, like: Tensor) -> BlockAdapters:
    return BlockAdapters(
        query_key_value=_group(block.query_key_value, like),
        output=_group([block.output], like),
        gate_up=_group(block.gate_up, like),
        down=_group([block.down], like),
    )


def _group(layers: Sequence[PackedRows], like: Tensor) -> AdapterGroup | None:
    # Two halves of one layer have the same A.
    distinct: dict[int, LowRank] = {}
    for layer in layers:
        if layer.adapter is not None:
            distinct.setdefault(_place_of(layer.adapter.a), layer.adapter)
    if not distinct:
        return None
    ranks = [-(-it.a.shape[0] // RANK_MULTIPLE) * RANK_MULTIPLE for it in distinct.values()]
    starts = dict(zip(distinct, [sum(ranks[:i]) for i in range(len(ranks))], strict=True))
    rows, columns = sum(ranks), layers[0].kind.columns
    a = like.new_zeros(rows, columns)
    scales = torch.zeros(rows, dtype=torch.float32, device=like.device)
    for place, adapter in distinct.items():
        own = slice(starts[place], starts[place] + adapter.a.shape[0])
        a[own].copy_(adapter.a)
        scales[own] = adapter.scale
    parts = (
        None
        if layer.adapter is None
        else AdapterPart(
            _filled_up(layer.adapter.b, like),
            starts[_place_of(layer.adapter.a)],
            layer.adapter.scale,
        )
        for layer in layers
    )
    return AdapterGroup(a, scales, tuple(parts))


def _place_of(a: Tensor) -> int:
    """What tells tensors apart: the storage, since those without memory have no address."""
    place: int = a.untyped_storage()._cdata
    return place


def _filled_up(b: Tensor, like: Tensor) -> Tensor:
    """B with a rank that kernels take."""
    missing = -b.shape[1] % RANK_MULTIPLE
    return functional.pad(b.to(like.device, like.dtype), (0, missing)).contiguous()


class AdapterLaunches:
    """Makes the launches of inner values in a step."""

    def __init__(self, adapters: Sequence[BlockAdapters], batch: int, device: torch.device) -> None:
        rows = [group.a.shape[0] for block in adapters for group in block.groups]
        self._inner = torch.empty(batch * max(rows, default=0), dtype=torch.float32, device=device)
        # What each launch tells the product behind it, see `AdapterInner`.
        self._x_is_there = torch.zeros(len(rows), dtype=torch.int32, device=device)
        self._num_made = 0

    def begin(self) -> None:
        """Queue what comes before all launches of a step."""
        if len(self._x_is_there):
            self._x_is_there.zero_()

    def launch(
        self, group: AdapterGroup, kind: LinearKind, tokens: Tokens, norm: NormWeight | None
    ) -> tuple[Callable[[int], None], Tokens]:
        """A launch before a product of `kind`; and what the product is given, which is `tokens`
        with the inner values."""
        rows, columns = group.a.shape
        x_is_there = self._x_is_there[self._num_made].data_ptr()
        self._num_made += 1
        tokens = replace(
            tokens, inner=self._inner.data_ptr(), inner_stride=rows, x_is_there=x_is_there
        )
        inner = AdapterInner(
            InnerKind(columns, rows, kind.dtype, kind.norm),
            a=group.a.data_ptr(),
            scales=group.scales.data_ptr(),
            max_tokens=tokens.count,
            norm=norm,
            x_is_there=x_is_there,
        )
        return lambda stream: inner.queue(tokens, stream), tokens
