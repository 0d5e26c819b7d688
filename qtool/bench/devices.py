"""What the kernel measurement asks of a device: weights on it, qtool's kernels, a clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from qtool.bench.contenders import Clock
from qtool.bench.operations import Operation, Shape
from qtool.bench.weights import Array, Weight
from qtool.formats.tensors import SourceDtype


class Device(Protocol):
    """The GPU, or the host's cores."""

    @property
    def clock(self) -> Clock:
        """What times it."""
        ...

    def make_weights(
        self, shape: Shape, dtype: SourceDtype, operations: Sequence[Operation]
    ) -> list[Weight]:
        """New random weights, and room for `operations`; as many as it takes to pass the caches.

        Raises:
            QtoolError: memory, if the device has too little.
        """
        ...

    def bind_copy(self, weight: Weight) -> Callable[[], object]:
        """What copies `source` to `restored`, as fast as the device can."""
        ...

    def bind(self, operation: Operation, weight: Weight) -> Callable[[], object]:
        """What runs qtool's kernels for `operation`; to dequantize, `weight` must be quantized."""
        ...

    def to_host(self, array: Array) -> NDArray[Any]:
        """The array as NumPy's, when all that was queued before is done."""
        ...

    def release(self) -> None:
        """Give back the memory of weights that are no longer in use."""
        ...

    def close(self) -> None:
        """End its threads."""
        ...
