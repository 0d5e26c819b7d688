"""Which capture of a CUDA graph a stream is part of."""

from __future__ import annotations

import ctypes
from functools import cache


def capture_id(stream: int) -> int:
    """A number that no other capture of the process has; 0 where nothing is captured.

    Raises:
        RuntimeError: the driver refuses, as for the default stream while another one captures.
    """
    status, number = ctypes.c_int(), ctypes.c_uint64()
    error = _driver().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    if error:
        raise RuntimeError(f"cuStreamGetCaptureInfo: CUDA error {error}")
    return number.value if status.value else 0


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
