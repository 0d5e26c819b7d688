"""Fixtures that every package's tests share."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

SKIP_REASON = "QTOOL_TEST_DATA is not set"


def share_processors() -> None:
    """Processes that run tests side by side share the processors: PyTorch's threads, which wait
    for each other busily, would else make tests of tiny models ten times as long.

    Holds for the processes that tests start, too. To be called before PyTorch is loaded, which
    the conftest.py of other folders do.
    """
    num_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if num_processes > 1:
        num_threads = max((os.cpu_count() or 1) // num_processes, 1)
        os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))


share_processors()

# A shell without job control starts what runs in the background with Ctrl-C ignored, and so all
# that the tests start, which are to be interrupted.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture
def enough_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process finds 16 GiB of the host's memory free, whatever else is running.

    Those that a test starts read what there is; it gives them --force, where they have it.
    """
    from qtool.doctor import machine
    from qtool.finetune import plan

    folder, read_host = tmp_path_factory.mktemp("proc"), plan._host
    (folder / "meminfo").write_text(f"MemTotal: {32 << 20} kB\nMemAvailable: {16 << 20} kB\n")
    sizes = {"memory_mib": 32 << 10, "visible_mib": 32 << 10, "free_mib": 16 << 10}
    # Of its own: tests undo what they have changed with theirs.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "MEMINFO", folder / "meminfo")
        patch.setattr(machine, "CGROUP", folder)
        patch.setattr(plan, "_host", lambda: (host := read_host()) and replace(host, **sizes))
        yield


@pytest.fixture(autouse=True)
def _leave_the_gpu_empty(request: pytest.FixtureRequest) -> Iterator[None]:
    """GPU tests share the card with those of other processes, and some measure what is on it."""
    yield
    if not request.node.get_closest_marker("gpu") or "torch" not in sys.modules:
        return
    import torch

    if torch.cuda.memory_reserved() >= _WORTH_GIVING_BACK_BYTES:
        gc.collect()  # modules hold each other
        torch.cuda.empty_cache()


_WORTH_GIVING_BACK_BYTES = 128 << 20


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
