"""What begins before modules are imported."""

from __future__ import annotations

import threading

import pytest
import torch

from qtool.checkpoint.records import Checkpoint
from qtool.runtime import head_start


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_fails_is_left_to_where_the_device_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def make_context(index: int) -> None:
        asked.append(index)
        raise OSError("no such device")

    monkeypatch.setattr(head_start, "_pytorch_has_cuda", lambda: True)
    monkeypatch.setattr(head_start, "_make_context", make_context)
    for thread in begun("cuda:99"):
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert asked == [99]


def test_the_cpu_needs_nothing() -> None:
    assert begun("cpu") == []


def begun(device: str) -> list[threading.Thread]:
    before = set(threading.enumerate())
    head_start.begin(device, Checkpoint.of_config("x", {}))
    return [thread for thread in threading.enumerate() if thread not in before]


def test_the_kernels_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its dtype and as wide as its heads; without a width there are none."""
    called: list[tuple[object, ...]] = []
    pinned: list[bool] = []
    asked: list[bool] = []
    monkeypatch.setattr(head_start, "_pytorch_has_cuda", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.empty", lambda *sizes, device: None)
    monkeypatch.setattr("qtool.runtime.read_ahead.pin_buffers", lambda: pinned.append(True))
    monkeypatch.setattr("qtool.runtime.first_calls.call_operations", lambda *it: called.append(it))
    monkeypatch.setattr("cupy_kernels.launch.num_multiprocessors", lambda: asked.append(True))
    said = {"dtype": "float16", "hidden_size": 512, "num_attention_heads": 8}
    head_start._prepare("auto", "float16", said)
    head_start._prepare("cuda:1", "bfloat16", {"text_config": {"head_dim": 96}})
    head_start._prepare("cuda:1", "float32", {"text_config": None, "head_dim": 80})
    head_start._prepare("cuda:1", "bfloat16", {})
    assert called == [
        (torch.device("cuda:0"), torch.float16, 64),
        (torch.device("cuda:1"), torch.bfloat16, 96),
        (torch.device("cuda:1"), torch.float32, 80),
    ]
    assert len(pinned) == len(asked) == 4
