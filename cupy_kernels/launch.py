"""What all launchers share: addresses and streams as integers, and how a launch is checked.

Launchers take device addresses, so that a CuPy array (`.data.ptr`) and a torch tensor
(`.data_ptr()`) serve alike, and a `stream` (`.ptr`, `.cuda_stream`; 0 is the default stream) on
which the kernel is only queued. They allocate nothing and wait for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
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
