"""How many of the base's 4-bit codes merging has changed: none means that nothing was merged.

Only where a packed base was merged onto and packed in its own format again, so that both folders'
codes stand for the same steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.reading import ShardReader, open_shard
from qtool.checkpoint.records import Checkpoint, TensorInfo
from qtool.merge.base import same_codes
from qtool.merge.command import PlannedMerge
from qtool.merge.plan import PackedSource

MAX_BYTES: Final = 1 << 20  # of a weight, from its start: enough for a share


@dataclass(frozen=True, slots=True)
class ChangedCodes:
    """Of the codes that were compared, two in a byte, those that are others now."""

    changed: int
    compared: int


def count_changed_codes(planned: PlannedMerge) -> ChangedCodes | None:
    """Compare the codes of merged weights in the finished output with the base's.

    None where the two do not stand for the same steps.
    """
    pairs = list(_comparable(planned))
    if not pairs:
        return None
    changed = compared = 0
    output = open_checkpoint(str(planned.request.output), need="files")
    with ExitStack() as stack:
        bases, outputs = _Shards(planned.base.checkpoint, stack), _Shards(output, stack)
        for weight in pairs:
            before = bases.read(weight)
            differences = before ^ outputs.read(output.tensors[weight.name])
            high, low = differences & 0xF0, differences & 0x0F
            changed += int(np.count_nonzero(high)) + int(np.count_nonzero(low))
            compared += 2 * before.size
    return ChangedCodes(changed, compared)


def _comparable(planned: PlannedMerge) -> Iterator[TensorInfo]:
    """The base's packed tensors that an update was added to, and that are packed alike again."""
    plan = planned.quant_plan
    if plan is None:
        return
    fmt = plan.recipe.format
    quantized = {t.source.name for t in plan.tensors if t.action == "quantize"}
    for name, source in planned.sources.by_name.items():
        base = source.base
        if not isinstance(base, PackedSource) or base.state is None or source.update is None:
            continue
        alike = same_codes(fmt.precision, base.weight.precision)
        if alike and base.state.blocksize == fmt.blocksize and name in quantized:
            yield cast(TensorInfo, base.weight.weight)


class _Shards:
    """A checkpoint's files, opened once."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack) -> None:
        self._checkpoint, self._stack = checkpoint, stack
        self._readers: dict[str, ShardReader] = {}

    def read(self, tensor: TensorInfo) -> NDArray[np.uint8]:
        """The first bytes of a packed tensor."""
        if tensor.shard not in self._readers:
            reader = self._stack.enter_context(open_shard(self._checkpoint, tensor.shard))
            self._readers[tensor.shard] = reader
        packed = np.empty(min(MAX_BYTES, tensor.num_bytes), np.uint8)
        self._readers[tensor.shard].read_into(packed, tensor.offset)
        return packed
