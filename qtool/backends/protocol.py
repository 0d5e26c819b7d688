"""The kernels of one device, as everything else calls them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qtool.formats.precisions import QuantType
from qtool.formats.tensors import SourceDtype

# Source values as they lie in the file: uint16 bits for BF16, float16 for F16, float32 for F32.
SourceArray = NDArray[np.uint16] | NDArray[np.float16] | NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a backend could claim for a run: never more than asked, less where memory is short."""

    num_workers: int
    tile_bytes: int
    notes: tuple[str, ...] = ()  # what the user should know: less than asked, slower copies


class Backend(Protocol):
    """The kernels of one device.

    Arrays are C-contiguous host arrays and belong to the caller, outputs too. Every method may be
    called from several threads at once with disjoint outputs, and returns when the outputs are
    filled.
    """

    name: str

    @property
    def peak_device_bytes(self) -> int:
        """The most device memory held so far, beyond the context of the driver; 0 on the CPU."""
        ...

    @property
    def page_locked_bytes(self) -> int:
        """Page-locked host memory held now; it is in no count of anonymous memory."""
        ...

    def reserve(self, num_workers: int | None, tile_bytes: int | None) -> Reservation:
        """Claim what that many callers at once need for tiles of `tile_bytes` of source values.

        None means what suits the device. Calls outside of a reservation are possible, and slower.

        Raises:
            QtoolError: memory, if even the smallest tile does not fit.
        """
        ...

    def release(self) -> None:
        """Give back what `reserve` claimed and every `host_buffer`, none of which is in use."""
        ...

    def host_buffer(self, num_bytes: int) -> NDArray[np.uint8]:
        """Uninitialised host memory from which and to which the device copies fastest."""
        ...

    def quantize_4bit(
        self,
        values: SourceArray,
        dtype: SourceDtype,
        quant_type: QuantType,
        blocksize: int,
        packed: NDArray[np.uint8],
        absmax: NDArray[np.float32],
    ) -> int:
        """Quantize `values` (n,) by the rules of `qtool.formats.four_bit`.

        Fills `packed` uint8 (ceil(n/2),) and `absmax` float32 (ceil(n/blocksize),). Returns the
        number of values that are NaN or infinite.
        """
        ...

    def dequantize_4bit(
        self,
        packed: NDArray[np.uint8],
        absmax: NDArray[np.float32],
        quant_type: QuantType,
        blocksize: int,
        dtype: SourceDtype,
        values: SourceArray,
    ) -> None:
        """The inverse: fill `values` (n,) of `dtype` from `packed` and `absmax`."""
        ...

    def quantize_absmax(
        self,
        absmax: NDArray[np.float32],
        codes: NDArray[np.uint8],
        nested_absmax: NDArray[np.float32],
    ) -> np.float32:
        """Double quantization of one whole tensor's `absmax` (m,).

        Fills `codes` (m,) and `nested_absmax` (ceil(m/256),). Returns the offset, the mean of
        absmax summed in float64 in the fixed order of `qtool.formats.double_quant`.
        """
        ...

    def dequantize_absmax(
        self,
        codes: NDArray[np.uint8],
        nested_absmax: NDArray[np.float32],
        offset: np.float32,
        absmax: NDArray[np.float32],
    ) -> None:
        """The inverse: fill `absmax` (m,)."""
        ...

    def quantize_int8(
        self,
        rows: SourceArray,
        dtype: SourceDtype,
        codes: NDArray[np.int8],
        scb: NDArray[np.float32],
    ) -> int:
        """LLM.int8() rows: `rows` (r, c) -> `codes` int8 (r, c), `scb` float32 (r,) = row absmax.

        Returns the number of values that are NaN or infinite after the cast to float16 that the
        format prescribes.
        """
        ...

    def dequantize_int8(
        self,
        codes: NDArray[np.int8],
        scb: NDArray[np.float32],
        dtype: SourceDtype,
        rows: SourceArray,
    ) -> None:
        """The inverse: fill `rows` (r, c) of `dtype`."""
        ...

    def count_nonfinite(self, values: SourceArray, dtype: SourceDtype) -> int:
        """How many of `values` (n,) are NaN or infinite."""
        ...
