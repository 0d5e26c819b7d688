"""What begins before modules are imported."""

from __future__ import annotations

import importlib.util
import sys
import threading

import pytest

from qtool.runtime import head_start


def test_modules_imported_meanwhile_find_no_sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    with head_start.without_sklearn():
        assert importlib.util.find_spec("sklearn") is None
        with pytest.raises(ImportError):
            import sklearn  # noqa: F401
    assert "sklearn" not in sys.modules


def test_sklearn_that_is_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    there = object()
    monkeypatch.setitem(sys.modules, "sklearn", there)  # type: ignore[arg-type]
    with head_start.without_sklearn():
        assert sys.modules["sklearn"] is there
    assert sys.modules["sklearn"] is there


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
