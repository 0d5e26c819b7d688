"""What all launchers share: addresses and streams as integers, and how a launch is checked.

Launchers take device addresses, so that a CuPy array (`.data.ptr`) and a torch tensor
(`.data_ptr()`) serve alike, and a `stream` (`.ptr`, `.cuda_stream`; 0 is the default stream) on
which the kernel is only queued. They allocate nothing and wait for nothing.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from cupy_kernels.loader import kernels_wait

if TYPE_CHECKING:
    from collections.abc import Callable

    import cupy

ALIGNMENT_BYTES: Final = 16
THREADS: Final = 256
OCTET: Final = 8  # values that a thread handles at a time
DTYPES: Final = {"BF16": "Bf16", "F16": "F16", "F32": "F32"}  # safetensors' names, the sources'


class _Stream:
    """All that CuPy looks at."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


def launch(
    kernel: cupy.RawKernel,
    grid: tuple[int, ...],
    threads: int,
    arguments: tuple[Any, ...],
    stream: int,
) -> None:
    """Queue `kernel`. Python integers arrive as 8 bytes: addresses and int64 sizes."""
    kernel(grid, (threads,), arguments, stream=_Stream(stream))


def check_aligned(**addresses: int) -> None:
    """Raise ValueError unless every address is a multiple of 16, as wide accesses need."""
    for name, address in addresses.items():
        if address % ALIGNMENT_BYTES:
            raise ValueError(f"{name}: address {address:#x} is not a multiple of {ALIGNMENT_BYTES}")


def cuda_dtype(dtype: str) -> str:
    """The name of `dtype` (BF16, F16, F32) in the .cu files; ValueError for others."""
    try:
        return DTYPES[dtype]
    except KeyError:
        raise ValueError(f"dtype {dtype} is none of {', '.join(DTYPES)}") from None


def ceil_div(a: int, b: int) -> int:
    """The least integer >= a / b."""
    return -(-a // b)


# -- launches through the driver: what CuPy's own cannot ask for ----------------------------------

_CLUSTER_DIMENSION: Final = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_PROGRAMMATIC_SERIALIZATION: Final = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_MAX_DYNAMIC_SHARED_BYTES: Final = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_INVALID_CONTEXT: Final = 201  # CUDA_ERROR_INVALID_CONTEXT


class _LaunchAttribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


def num_multiprocessors() -> int:
    """Of the current device."""
    import cupy

    return _num_multiprocessors(cupy.cuda.Device().id)


@cache
def _num_multiprocessors(device_id: int) -> int:
    import cupy

    count: int = cupy.cuda.Device(device_id).attributes["MultiProcessorCount"]
    return count


class Launch:
    """A kernel with its grid and one structure of arguments, ready to be queued again and again.

    Args:
        arguments: the kernel's only parameter, passed by value; change its fields between launches.
        overlap: the kernel may begin while the launch before still runs, and waits itself for what
            that one writes (programmatic dependent launch); not where kernels cannot wait.
    """

    def __init__(
        self,
        kernel: cupy.RawKernel,
        grid: tuple[int, ...],
        threads: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
        *,
        overlap: bool,
    ) -> None:
        self.arguments = arguments
        self._kernel = kernel  # keeps the module loaded
        self._function = ctypes.c_void_p(kernel.kernel.ptr)
        if shared_bytes:
            _allow_shared_bytes(self._function, shared_bytes)
        self._attribute = _LaunchAttribute(_PROGRAMMATIC_SERIALIZATION, 0, (1,))
        self._config = _LaunchConfig(
            (*grid, 1, 1)[:3],
            (threads, 1, 1),
            shared_bytes,
            None,
            ctypes.pointer(self._attribute),
            int(overlap and kernels_wait()),
        )
        self._parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        self._launch = _driver().cuLaunchKernelEx

    def set_grid(self, *grid: int) -> None:
        """Take another number of thread blocks."""
        self._config.grid[:] = (*grid, 1, 1)[:3]

    def count_clusters(self, size: int) -> int:
        """How many clusters of `size` thread blocks the current device runs at once."""
        attribute = _LaunchAttribute(_CLUSTER_DIMENSION, 0, (size, 1, 1))
        config = _LaunchConfig.from_buffer_copy(self._config)
        config.grid[:] = (size, 1, 1)
        config.attributes, config.num_attributes = ctypes.pointer(attribute), 1
        count = ctypes.c_int()
        status = _in_context(
            _driver().cuOccupancyMaxActiveClusters,
            ctypes.byref(count),
            self._function,
            ctypes.byref(config),
        )
        if status:
            raise RuntimeError(f"cuOccupancyMaxActiveClusters: CUDA error {status}")
        return count.value

    def __call__(self, stream: int) -> None:
        """Queue it on `stream`.

        Raises:
            RuntimeError: the driver refuses, or reports an earlier failure.
        """
        self._config.stream = stream
        arguments = ctypes.byref(self._config), self._function, self._parameters, None
        status = _in_context(self._launch, *arguments)
        if status:
            raise RuntimeError(f"cuLaunchKernelEx: CUDA error {status}")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _in_context(function: Callable[..., int], *arguments: Any) -> int:
    """The status of `function`, called again where the thread had no context of the device.

    The runtime gives a thread its context at the thread's first call of the runtime; the driver
    never does. Threads that have called neither exist: PyTorch runs backward passes on threads of
    its own, and finds their memory in its cache. Asked for only once it is missing, since launches
    are queued hundreds at a time.
    """
    status = function(*arguments)
    if status != _INVALID_CONTEXT:
        return status
    from cupy.cuda import runtime

    runtime.setDevice(runtime.getDevice())
    return function(*arguments)


def _allow_shared_bytes(function: ctypes.c_void_p, shared_bytes: int) -> None:
    status = _in_context(
        _driver().cuFuncSetAttribute, function, _MAX_DYNAMIC_SHARED_BYTES, shared_bytes
    )
    if status:
        raise RuntimeError(
            f"cuFuncSetAttribute: CUDA error {status} for {shared_bytes} bytes of shared memory"
        )
