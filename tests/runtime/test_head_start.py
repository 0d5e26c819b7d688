"""What begins before modules are imported."""

from __future__ import annotations

import threading

import pytest

from qtool.runtime import head_start


def test_a_device_that_is_not_there_is_left_to_others(
    capfd: pytest.CaptureFixture[str],
) -> None:
    head_start.begin("cuda:99")
    for thread in threading.enumerate():
        if thread.name == "qtool-head-start":
            thread.join(timeout=60)
    assert capfd.readouterr().err == ""
    before = threading.active_count()
    head_start.begin("cpu")
    assert threading.active_count() == before
