"""CUDA graphs: a function's device work recorded once, then launched as a whole."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch

from qtool.errors import Option, QtoolError

NUM_WARM_UPS = 2  # kernels are loaded, workspaces and autotuned choices made, before the recording

# Recordings take turns: they share a stream, and PyTorch begins each with waiting for the device,
# which would break another thread's. One within another fails, where a plain lock would hang.
_turn = threading.RLock()


class CaptureFailed(QtoolError):
    """The work cannot be recorded; the text says why. Whoever can runs it without a graph."""

    def __init__(self, why: str) -> None:
        hint = (Option("path", "eager"), " runs without CUDA graphs")
        super().__init__(why, kind="unsupported", hint=hint)


class Capture(Protocol):
    """Makes a function that repeats a step's device work."""

    def __call__(
        self, step: Callable[[], Any], *, warm_up: Callable[[], Any], generator: torch.Generator
    ) -> Callable[[], None]:
        """`step` is recorded, not run; both may draw numbers from `generator`."""
        ...


class GraphCapture:
    """Records steps that are never run at the same time, so that all share their memory.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, step: Callable[[], Any], *, warm_up: Callable[[], Any], generator: torch.Generator
    ) -> Callable[[], None]:
        """Run `warm_up` a few times, then record `step`, while no other thread does.

        Args:
            warm_up: runs whatever kernels of the step have not run yet.

        Raises:
            CaptureFailed: the step waits for the device, or does what else no graph can hold.
        """
        with _turn:
            stream = _recording_stream(self._device)
            self._run(warm_up, stream)
            return self._record(step, stream, generator)

    def _run(self, warm_up: Callable[[], Any], stream: torch.cuda.Stream) -> None:
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(NUM_WARM_UPS):
                warm_up()
        torch.cuda.current_stream(self._device).wait_stream(stream)

    def _record(
        self, step: Callable[[], Any], stream: torch.cuda.Stream, generator: torch.Generator
    ) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        default = torch.cuda.default_generators[self._device.index or 0]
        default_state = default.get_state()
        try:
            # The outer stream context puts the stream back where the inner one fails to.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(
                    graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
                ),
            ):
                step()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            _leave_recording(default, default_state)
            raise CaptureFailed(first_line(error)) from error
        return graph.replay


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace of 32 MiB for every stream it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _leave_recording(default: torch.Generator, state: torch.Tensor) -> None:
    """After a recording that failed PyTorch's default generator still thinks that it is recorded,
    and refuses to draw numbers; one of a fresh state does not."""
    fresh = torch.Generator(default.device)
    fresh.set_state(state)
    default.graphsafe_set_state(fresh.graphsafe_get_state())
    torch.cuda.synchronize(default.device)


def first_line(error: BaseException) -> str:
    """What went wrong first: ending a broken recording raises once more."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().partition("\n")[0] or type(error).__name__
