"""What running a model needs and Python does not, begun while modules are still being imported.

The context of a GPU takes some tenths of a second, page-locked buffers too; neither holds Python's
lock. Imports only what is light, so that it can begin before all else.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def begin(device: str) -> None:
    """Make what is needed on `device` (auto, cpu, cuda or cuda:N) in the background.

    Failures are left to where the device is used, which says what is wrong.
    """
    if device != "cpu":
        threading.Thread(target=_prepare, args=(device,), name="qtool-head-start").start()


@contextmanager
def without_sklearn() -> Iterator[None]:
    """Modules that are imported meanwhile find no scikit-learn.

    transformers (5.17 did, 5.23 does not) imports it for assisted decoding, and with it SciPy and
    pandas: 0.9 s for what no command of ours asks for.
    """
    if "sklearn" in sys.modules:
        yield
        return
    sys.modules["sklearn"] = None  # type: ignore[assignment]  # how Python marks what is not there
    try:
        yield
    finally:
        del sys.modules["sklearn"]


def _prepare(device: str) -> None:
    with suppress(Exception):
        import torch

        if not torch.cuda.is_available():
            return
        torch.empty(1, device="cuda:0" if device == "auto" else device)
        from qtool.runtime.read_ahead import pin_buffers

        pin_buffers()
        from cupy_kernels.launch import current_gpu

        current_gpu()  # CuPy is there then
