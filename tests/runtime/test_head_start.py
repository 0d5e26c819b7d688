"""What begins before modules are imported."""

from __future__ import annotations

import threading

import pytest

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
    head_start.begin(device)
    return [thread for thread in threading.enumerate() if thread not in before]
