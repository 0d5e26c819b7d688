"""Which storages are alive, and what for, while operators run on the meta device.

Every operator reports the shapes of its outputs; a storage counts from then until the last tensor
over it is gone. A question about values, which nobody has here, is answered with yes: asked are
"is no token padding?" and "is this one sequence?".
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qtool.exact.records import Origin
from qtool.exact.shape_cache import ShapeCache
from qtool.planner.allocator import ROUNDING_BYTES

# (operator, its output) -> what the new storage is for.
Classify = Callable[[Any, Tensor], Origin]


@dataclass(slots=True, eq=False)
class _Storage:
    """`born` and `died` count changes of the total, so that a moment can be looked at later."""

    num_bytes: int
    origin: Origin
    born: int
    died: int | None = None


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage on the meta device that exists beforehand or that an operator makes.

    Args:
        classify: tells what a new storage is for.
        place: names the present moment; asked whenever the total reaches a new peak.
    """

    def __init__(
        self,
        classify: Classify = lambda operator, tensor: "activations",
        place: Callable[[], str] = lambda: "",
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self.peak_place = ""
        self._classify = classify
        self._place = place
        self._total_bytes = 0
        self._ticks = 0
        self._peak_tick = 0
        self._alive: dict[int, _Storage] = {}
        self._all: list[_Storage] = []
        self._shapes = ShapeCache()
        self._watches: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True
        result = self._shapes.call(func, args, kwargs or {})
        for tensor in (result,) if isinstance(result, Tensor) else tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._follow(tensor, partial(self._classify, func, tensor))
        if func is torch.ops.aten._safe_softmax.default:
            # One operator here alone: on a GPU it asks of each score whether it is masked.
            with self:
                torch.isneginf(args[0])
        if self._total_bytes > self.peak_bytes:
            self._note_peak(f"{self._place()} {func.__name__.partition('.')[0]}")
        return result

    def add(self, tensors: Iterable[Tensor], origin: Origin) -> int:
        """Follow tensors that exist; the bytes of those not yet followed."""
        before_bytes = self._total_bytes
        for tensor in tensors:
            self._follow(tensor, lambda: origin)
        self.peak_bytes = max(self.peak_bytes, self._total_bytes)
        self._peak_tick = self._ticks
        return self._total_bytes - before_bytes

    def mark(self, tensors: Iterable[Tensor], origin: Origin) -> None:
        """Say what storages are for, once it is known."""
        for tensor in tensors:
            storage = self._alive.get(tensor.untyped_storage()._cdata)
            if storage is not None:
                storage.origin = origin

    def at_peak(self) -> dict[Origin, int]:
        """Bytes alive at the peak by what they are for, largest first."""
        found: Counter[Origin] = Counter()
        for storage in self._all:
            if storage.born <= self._peak_tick and (
                storage.died is None or storage.died > self._peak_tick
            ):
                found[storage.origin] += storage.num_bytes
        return dict(found.most_common())

    def _follow(self, tensor: Tensor, origin: Callable[[], Origin]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        num_bytes = -(-storage.nbytes() // ROUNDING_BYTES) * ROUNDING_BYTES
        self._ticks += 1
        entry = _Storage(num_bytes, origin(), self._ticks)
        self._alive[key] = entry
        self._all.append(entry)
        self._total_bytes += num_bytes
        # Fires when the C++ storage goes, not this Python view of it.
        self._watches[key] = weakref.ref(storage, partial(self._forget, key))

    def _forget(self, key: int, _: object) -> None:
        entry = self._alive.pop(key)
        del self._watches[key]
        self._ticks += 1
        entry.died = self._ticks
        self._total_bytes -= entry.num_bytes

    def _note_peak(self, place: str) -> None:
        self.peak_bytes, self.peak_place = self._total_bytes, place
        self._peak_tick = self._ticks
