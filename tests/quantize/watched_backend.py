"""The CPU backend, with a look at every call: what it reserves, lends and is given back."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from qtool.backends.cpu import CpuBackend
from qtool.backends.protocol import Reservation

ARRAYS_OF = {  # by kernel: which arguments are arrays
    "quantize_4bit": (0, 4, 5),
    "quantize_absmax": (0, 1, 2),
    "quantize_int8": (0, 2, 3),
    "count_nonfinite": (0,),
}


class WatchedBackend(CpuBackend):
    """Looks at its arguments and counts.

    Args:
        before_kernel: called with the kernel's number, in the worker's thread, before each kernel
            after the warm-up.
        granted: what `reserve` grants, whatever is asked for.
    """

    peak_device_bytes = 12_345

    def __init__(
        self,
        before_kernel: Callable[[int], None] = lambda number: None,
        *,
        granted: Reservation | None = None,
    ) -> None:
        self.asked: list[tuple[int | None, int | None]] = []
        self.num_releases = 0
        self.num_kernels = 0
        self.most_at_once = 0
        self.largest_source_bytes = 0
        self.foreign: list[str] = []  # arguments that lie in no buffer of ours
        self.buffers: list[NDArray[np.uint8]] = []
        self._before_kernel = before_kernel
        self._granted = granted
        self._at_once = 0
        self._lock = threading.Lock()
        for name in ARRAYS_OF:
            setattr(self, name, self._watched(name))

    @property
    def lent_bytes(self) -> int:
        return sum(buffer.size for buffer in self.buffers)

    def reserve(self, num_workers: int | None, tile_bytes: int | None) -> Reservation:
        self.asked.append((num_workers, tile_bytes))
        return self._granted or super().reserve(num_workers, tile_bytes)

    def release(self) -> None:
        self.num_releases += 1

    def host_buffer(self, num_bytes: int) -> NDArray[np.uint8]:
        buffer = super().host_buffer(num_bytes)
        with self._lock:
            self.buffers.append(buffer)
        return buffer

    def count(self) -> int:
        """Called for each kernel; returns its number, from 1."""
        self.num_kernels += 1
        return self.num_kernels

    def _watched(self, name: str):
        kernel = getattr(super(), name)

        def call(*arguments):
            assert self.num_releases == 0, f"{name} after release"
            arrays = [arguments[index] for index in ARRAYS_OF[name]]
            with self._lock:
                number = self.count()
                self.foreign += [name for array in arrays if not self._is_lent(array)]
                self._at_once += 1
                self.most_at_once = max(self.most_at_once, self._at_once)
                if name != "quantize_absmax":
                    self.largest_source_bytes = max(self.largest_source_bytes, arrays[0].nbytes)
            try:
                if threading.current_thread() is not threading.main_thread():
                    self._before_kernel(number)
                return kernel(*arguments)
            finally:
                with self._lock:
                    self._at_once -= 1

        return call

    def _is_lent(self, array: NDArray) -> bool:
        return array.size == 0 or any(np.shares_memory(array, held) for held in self.buffers)
