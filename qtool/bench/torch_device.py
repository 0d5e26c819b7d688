"""What is timed through torch: products of layers, and the copy that they are measured against.

On a GPU every sample replays a CUDA graph of many launches, because a launch from Python takes
longer than a small kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from qtool.bench.contenders import Clock, Contender, Run, Sample, measure
from qtool.bench.cpu_device import CpuClock
from qtool.bench.records import Limit, Moved, make_limit, make_row
from qtool.events import OnEvent
from qtool.runtime.memory import out_of_memory_as_error

COPY: Final = "copy"
COPY_BYTES: Final = 512 << 20  # far more than caches hold
COPY_REPEATS: Final = 20
COPIES_PER_GRAPH: Final = 8
_NUM_PAIRS: Final = 2  # so that no copy finds the end of the one before in a cache


class GraphClock:
    """Times CUDA graphs of `runs_per_sample` runs; a graph is captured when first asked for."""

    def __init__(self, runs_per_sample: int) -> None:
        self.runs_per_sample = runs_per_sample
        self._graphs: dict[Run, Any] = {}

    def time(self, run: Run, first: int) -> Sample:
        """See `Clock.time`; a graph always begins with buffer set 0."""
        repeat = self._repeat(run)
        new_event: Any = torch.cuda.Event  # torch leaves it untyped
        start, end = new_event(enable_timing=True), new_event(enable_timing=True)
        repeat()  # runs while the timed one is queued: the device is never idle
        start.record()
        repeat()
        end.record()
        end.synchronize()
        return Sample(start.elapsed_time(end) * 1e-3 / self.runs_per_sample)

    def _repeat(self, run: Run) -> Callable[[], None]:
        """What does all runs of a sample."""
        if isinstance(run, CopyRun):
            # As part of a graph a copy is not done by a kernel, and takes half as long again.
            return partial(_run_all, run, self.runs_per_sample)
        if run not in self._graphs:
            self._graphs[run] = self._capture(run)
        replay: Callable[[], None] = self._graphs[run].replay
        return replay

    def _capture(self, run: Run) -> Any:
        """All that happens once, such as compiling, must be over: hence a first round without."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            _run_all(run, self.runs_per_sample)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _run_all(run, self.runs_per_sample)
        return graph


def _run_all(run: Run, count: int) -> None:
    for i in range(count):
        run(i)


@dataclass(frozen=True, slots=True, eq=False)  # as a run it is known by what it is
class CopyRun:
    """Copies from device memory to device memory, (n,) bytes in turns between pairs."""

    sources: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]

    def __call__(self, i: int) -> Tensor:
        """Copy the next pair."""
        pair = i % len(self.sources)
        return self.targets[pair].copy_(self.sources[pair])


def copy_contender(device: torch.device) -> Contender:
    """A copy of COPY_BYTES random bytes on `device`, the limit of all that is bound by memory."""
    generator = torch.Generator(device).manual_seed(0)
    sources = tuple(
        torch.empty(COPY_BYTES // 8, dtype=torch.int64, device=device).random_(generator=generator)
        for _ in range(_NUM_PAIRS)
    )
    run = CopyRun(sources, tuple(torch.zeros_like(source) for source in sources))
    return Contender(COPY, "limit", Moved(COPY_BYTES, COPY_BYTES), run)


def measure_copy(device: torch.device, on_event: OnEvent) -> Limit:
    """The bytes that `device` copies per second, read and written ones added up."""
    with out_of_memory_as_error("measuring a copy"):
        contender = copy_contender(device)
        clock = make_clock(device, COPIES_PER_GRAPH)
        (copied,) = measure([contender], clock, COPY_REPEATS, "measure the limit", on_event)
    row = make_row(COPY, "", "", "limit", copied.seconds, copied.moved, limit_seconds=0)
    return make_limit(row)


def make_clock(device: torch.device, runs_per_graph: int) -> Clock:
    """The device's own clock."""
    return GraphClock(runs_per_graph) if device.type == "cuda" else CpuClock()
