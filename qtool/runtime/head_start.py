"""What running a model needs and Python does not, begun while modules are still being imported.

The context of a GPU takes some tenths of a second, page-locked buffers too; neither holds Python's
lock. Imports only what is light, so that it can begin before all else.
"""

from __future__ import annotations

import threading
from contextlib import suppress


def begin(device: str) -> None:
    """Make what is needed on `device` (auto, cpu, cuda or cuda:N) in the background.

    Failures are left to where the device is used, which says what is wrong.
    """
    if device != "cpu":
        threading.Thread(target=_prepare, args=(device,), name="qtool-head-start").start()


def _prepare(device: str) -> None:
    with suppress(Exception):
        import torch

        if not torch.cuda.is_available():
            return
        torch.empty(1, device="cuda:0" if device == "auto" else device)
        from qtool.runtime.read_ahead import pin_buffers

        pin_buffers()
        import cupy  # noqa: F401  (what the kernels are loaded with)
