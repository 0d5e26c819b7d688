"""The contract's precision words and the choices that make a quantized format.

`Precision` is what users write after `--quant`; `QuantFormat` is the same choice with its
parameters, as plan, kernels and writer need it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

Precision = Literal["fp32", "bf16", "fp16", "fp8", "int8", "fp4", "fp4-dq", "nf4", "nf4-dq"]
QuantizedPrecision = Literal["int8", "fp4", "fp4-dq", "nf4", "nf4-dq"]
QuantType = Literal["nf4", "fp4"]
QuantStorage = Literal["uint8", "bfloat16"]
ComputeDtype = Literal["bfloat16", "float16", "float32"]

QUANTIZED_PRECISIONS: Final[tuple[QuantizedPrecision, ...]] = get_args(QuantizedPrecision)
BLOCKSIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DEFAULT_PRECISION: Final[QuantizedPrecision] = "nf4-dq"
DEFAULT_BLOCKSIZE: Final = 64
NESTED_BLOCKSIZE: Final = 256  # bitsandbytes' 4-bit products accept no other


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """How linear layers are stored.

    `blocksize` (weights per absmax) and `quant_storage` (the dtype that the packed bytes are
    labelled with) matter only for the 4-bit formats.
    """

    precision: QuantizedPrecision = DEFAULT_PRECISION
    blocksize: int = DEFAULT_BLOCKSIZE
    quant_storage: QuantStorage = "uint8"

    @property
    def is_int8(self) -> bool:
        """LLM.int8() rows instead of 4-bit blocks."""
        return self.precision == "int8"

    @property
    def quant_type(self) -> QuantType:
        """The 4-bit code table; only for the 4-bit formats."""
        if self.is_int8:
            raise ValueError("int8 has no 4-bit code table")
        return "nf4" if self.precision.startswith("nf4") else "fp4"

    @property
    def double_quant(self) -> bool:
        """Whether absmax itself is quantized to 8 bit."""
        return self.precision.endswith("-dq")
