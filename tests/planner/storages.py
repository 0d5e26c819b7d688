"""The storages of any device that a PyTorch program holds at once: the training oracle's counter.

`qtool.exact` counts on the meta device; this one shares no code with it. What operators take within
a call neither sees; the profiler does, of the processor's memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ALLOCATION_BYTES = 512  # PyTorch's allocator on CUDA rounds every request up to this


class LiveStorages(TorchDispatchMode):
    """Adds up the storages that operators create; `peak_bytes` is the most alive at once."""

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._existing = {_key(tensor) for tensor in existing}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        for tensor in tree_iter(result):
            if (
                isinstance(tensor, Tensor)
                and _key(tensor) not in self._existing | self._live.keys()
            ):
                storage = tensor.untyped_storage()
                num_bytes = -(-storage.nbytes() // ALLOCATION_BYTES) * ALLOCATION_BYTES
                self._live[_key(tensor)] = (StorageWeakRef(storage), num_bytes)
        total_bytes = sum(num_bytes for _, num_bytes in self._live.values())
        self.peak_bytes = max(self.peak_bytes, total_bytes)
        return result


def allocated_peak_bytes(run: Callable[[], object], folder: Path) -> int:
    """The most that PyTorch's allocator has handed out at once on the processor while `run` ran.

    Args:
        folder: for the profiler's trace.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    trace = folder / "trace.json"
    seen.export_chrome_trace(str(trace))
    events = [it for it in json.loads(trace.read_text())["traceEvents"] if it["name"] == "[memory]"]
    held_bytes = peak_bytes = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held_bytes += event["args"]["Bytes"]
        peak_bytes = max(peak_bytes, held_bytes)
    return peak_bytes


def _key(tensor: Tensor) -> int:
    return StorageWeakRef(tensor.untyped_storage()).cdata
