"""Recordings of several threads, over a stand-in for CUDA graphs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qtool.runtime.decoders import capture
from qtool.runtime.decoders.capture import NUM_WARM_UPS, GraphCapture

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def cuda_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose graphs record nothing: steps run at once."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(register_generator_state=lambda generator: None, replay=lambda: None)
    replaced: dict[str, Any] = {
        "graph_pool_handle": lambda: (0, 1),
        "current_stream": lambda device: stream,
        "stream": nullcontext,
        "graph": lambda graph, **how: nullcontext(),
        "CUDAGraph": lambda: graph,
        "default_generators": [torch.Generator()],
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(capture, "_recording_stream", lambda device: stream)


def record(step: Callable[[], Any], warm_up: Callable[[], Any]) -> Callable[[], None]:
    return GraphCapture(DEVICE)(step, warm_up=warm_up, generator=torch.Generator())


def test_threads_take_turns() -> None:
    """What one queues on the stream that all share would go into the graph of another."""
    num_threads, ran = 3, list[int]()
    begin = threading.Barrier(num_threads)

    def work() -> None:
        time.sleep(0.02)  # the others may come between
        ran.append(threading.get_ident())

    def record_work(_: int) -> None:
        begin.wait()
        record(work, work)

    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(record_work, range(num_threads)))
    each = NUM_WARM_UPS + 1
    assert ran == [thread for thread in ran[::each] for _ in range(each)]
    assert len(set(ran)) == num_threads


def test_a_recording_within_another_does_not_wait_for_it() -> None:
    def again() -> None:
        record(lambda: None, lambda: None)

    thread = threading.Thread(target=record, args=(again, lambda: None), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
