"""Managed memory: device memory that the driver moves to the host where there is too little."""

from __future__ import annotations

from typing import Any


class ManagedMemory:
    """`num_bytes` of it, freed with the object, for `torch.as_tensor(..., device="cuda")`.

    Its contents are not defined. It belongs to the current device.
    """

    def __init__(self, num_bytes: int) -> None:
        import cupy

        self._memory = cupy.cuda.malloc_managed(num_bytes)
        self._device = cupy.cuda.Device()
        self.num_bytes = num_bytes

    @property
    def address(self) -> int:
        """Where it begins, on the device and the host."""
        return int(self._memory.ptr)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """uint8 (num_bytes,)."""
        return {
            "shape": (self.num_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
        }


def prefetch(address: int, num_bytes: int, stream: int) -> None:
    """Queue moving managed memory to the current device on `stream`, if it is elsewhere.

    GPUs that cannot move pages on demand (on Windows, say) have all of it at all times.
    """
    import cupy

    device = cupy.cuda.Device()
    if device.attributes["ConcurrentManagedAccess"]:
        cupy.cuda.runtime.memPrefetchAsync(address, num_bytes, device.id, stream)
