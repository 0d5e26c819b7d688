"""What running a model needs and Python does not, begun while modules are still being imported.

The context of a GPU takes some tenths of a second, page-locked buffers and PyTorch's first kernels
too. Python's lock is free meanwhile: the driver does not know it, and PyTorch lets go of it in each
operation. Imports only what is light, so that it can begin before all else.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qtool.checkpoint.records import Checkpoint
from qtool.formats.precisions import ComputeDtype
from qtool.runtime.compute_dtype import name_dtype
from qtool.runtime.driver_memory import used_before_context


def begin(device: str, checkpoint: Checkpoint, compute_dtype: ComputeDtype | None = None) -> None:
    """Make what `checkpoint` needs on `device` (auto, cpu, cuda or cuda:N) in the background.

    Failures are left to where the device is used, which says what is wrong.
    """
    if device != "cpu":
        dtype = name_dtype(checkpoint, compute_dtype)
        arguments = (device, dtype, checkpoint.config)
        threading.Thread(target=_prepare, args=arguments, name="qtool-head-start").start()


def _prepare(device: str, dtype: ComputeDtype, config: Mapping[str, Any]) -> None:
    with suppress(Exception):
        if _pytorch_has_cuda():
            index = int(device.partition(":")[2] or 0)
            used_before_context(index)  # which is to be known, and is not any more then
            _make_context(index)
        import torch

        if not torch.cuda.is_available():
            return
        place = torch.device("cuda:0" if device == "auto" else device)
        torch.empty(1, device=place)
        from qtool.runtime.first_calls import call_operations
        from qtool.runtime.read_ahead import pin_buffers

        pin_buffers()
        with suppress(Exception):
            call_operations(place, getattr(torch, dtype), _head_dim(config))
        from cupy_kernels.launch import num_multiprocessors

        num_multiprocessors()  # CuPy is there then


def _head_dim(config: Mapping[str, Any]) -> int:
    text = config.get("text_config") or config
    return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])


def _pytorch_has_cuda() -> bool:
    """Whether the PyTorch that will be imported can use a GPU: else it is left alone."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return (Path(spec.origin).parent / "lib" / "libtorch_cuda.so").exists()


def _make_context(index: int) -> None:
    """The context that PyTorch and CuPy will find on the device; for what fails, they will tell."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index):
        return
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
