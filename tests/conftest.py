"""Fixtures that every package's tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SKIP_REASON = "QTOOL_TEST_DATA is not set"


def data_folder() -> Path | None:
    folder = os.environ.get("QTOOL_TEST_DATA")
    return Path(folder).resolve() if folder else None


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of models, golden bytes and configs; the test is skipped where it is not named."""
    folder = data_folder()
    if folder is None:
        pytest.skip(SKIP_REASON)
    if not folder.is_dir():
        pytest.fail(f"QTOOL_TEST_DATA={folder} is no folder")
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    without_data = sum(SKIP_REASON in str(report.longrepr) for report in skipped)
    if without_data:
        terminalreporter.write_line(f"{without_data} tests skipped: {SKIP_REASON}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests run only when asked for, and say so."""
    if "gpu" in (config.option.markexpr or ""):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU; run pytest -m gpu"))
