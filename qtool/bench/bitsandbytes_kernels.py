"""bitsandbytes' kernels on the same weights, where it is installed: the rival to measure against.

It allocates its results, as it does for its users.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np

from qtool.bench.contenders import Contender
from qtool.bench.operations import BLOCKSIZE, Operation
from qtool.bench.weights import Array, Weight
from qtool.formats.tensors import SourceDtype
from qtool.runtime.bitsandbytes_logging import quiet_bitsandbytes

INT8_BACK: Final = Operation("dequantize", "int8")  # it does so to float32 only


class NoRivalError(Exception):
    """Why bitsandbytes cannot take part."""


class Bitsandbytes:
    """bitsandbytes.functional; loaded once.

    Raises:
        NoRivalError: it or torch is not installed, or does not see the GPU.
    """

    def __init__(self, *, on_gpu: bool, num_threads: int) -> None:
        try:
            import torch

            with quiet_bitsandbytes():
                from bitsandbytes import functional
        except ImportError as error:
            raise NoRivalError(f"bitsandbytes is not measured: {error}") from error
        if on_gpu and not torch.cuda.is_available():
            raise NoRivalError("bitsandbytes is not measured: torch sees no GPU")
        torch.set_num_threads(num_threads)
        self._functional = functional

    def contenders(
        self, operations: Sequence[Operation], weights: Sequence[Weight]
    ) -> list[Contender]:
        """Its version of each of `operations`, as far as it has one."""
        tensors = [as_torch(w.source, w.dtype).reshape(w.shape) for w in weights]
        found = []
        for operation in operations:
            if operation != INT8_BACK:
                runs = [self._bind(operation, tensor) for tensor in tensors]
                moved = operation.moved(weights[0].shape, weights[0].dtype)
                run = partial(_run_in_turn, runs)
                found.append(Contender(operation.name, "bitsandbytes", moved, run))
        return found

    def release(self) -> None:
        """Give back device memory that torch keeps for later."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _bind(self, operation: Operation, tensor: Any) -> Callable[[], object]:
        if operation.precision == "int8":
            # It takes float16 alone; a bfloat16 weight has to be converted first.
            return lambda: self._functional.int8_vectorwise_quant(tensor.half())
        quantize = partial(
            self._functional.quantize_4bit,
            tensor,
            blocksize=BLOCKSIZE,
            quant_type=operation.format.quant_type,
            compress_statistics=operation.format.double_quant,
        )
        if operation.direction == "quantize":
            return quantize
        packed, state = quantize()
        return partial(self._functional.dequantize_4bit, packed, state)


def as_torch(array: Array, dtype: SourceDtype) -> Any:
    """The same memory as a torch tensor of `dtype`; for NumPy and CuPy arrays."""
    import torch
    from torch.utils.dlpack import from_dlpack

    if dtype == "BF16":
        return from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return from_dlpack(array)


def _run_in_turn(runs: Sequence[Callable[[], object]], i: int) -> object:
    return runs[i % len(runs)]()
