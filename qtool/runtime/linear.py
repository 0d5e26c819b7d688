"""Linear layers that hold packed weights, multiplied by our operators.

Subclasses of nn.Linear, so that PEFT wraps them and transformers' isinstance checks hold; their
`weight` is the packed one. Statistics are buffers that no `.to(dtype)` changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtool.formats.precisions import NESTED_BLOCKSIZE, QuantType
from qtool.runtime.dequantize import dequantize_4bit, dequantize_int8
from qtool.runtime.products import linear_4bit, linear_int8
from qtool.runtime.products_host import NestedAbsmax


@dataclass(frozen=True, slots=True)
class FourBitLayer:
    """What makes a 4-bit linear layer, known before its bytes.

    `dtype` is what dequantizing rounds to (the weight's dtype before it was quantized).
    """

    out_features: int
    in_features: int
    quant_type: QuantType
    blocksize: int
    dtype: torch.dtype
    double_quant: bool


@dataclass(frozen=True, slots=True)
class Int8Layer:
    """What makes an LLM.int8() linear layer."""

    out_features: int
    in_features: int


PackedLayer = FourBitLayer | Int8Layer
RowDecoder = Callable[[int, int], Tensor]


class _PackedLinear(nn.Linear):
    """What both kinds share: the product, and statistics that keep their dtype."""

    def __init__(
        self, layer: PackedLayer, *, bias: Tensor | None, compute_dtype: torch.dtype | None
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a floating-point weight
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.compute_dtype = compute_dtype
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def row_decoder(self, dtype: torch.dtype) -> RowDecoder:
        """A function that makes rows [start, stop) of the weight: `dtype` (stop - start, in)."""
        raise NotImplementedError

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out) in the dtype of `x` and `bias`."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """The whole weight [out, in] as bitsandbytes dequantizes it."""
        raise NotImplementedError

    @property
    def W_q(self) -> Tensor:
        """The packed weight, by the name that makes PEFT's DoRA call `dequantize()`.

        Without it DoRA takes the packed codes for numbers, silently for INT8.
        """
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out), computed in `compute_dtype`, returned in the input's dtype."""
        dtype = self.compute_dtype or input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return self.multiply(input.to(dtype), bias).to(input.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # model.to(bfloat16) would round absmax: move the statistics, never convert them.
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class Linear4bit(_PackedLinear):
    """A linear layer over NF4 or FP4 weights in the bitsandbytes layout.

    Parameters and buffers (n = out * in, m = ceil(n / blocksize)):
        weight: uint8 (ceil(n/2), 1)
        absmax: float32 (m,); with double quantization uint8 (m,) beside
        nested_absmax: float32 (ceil(m/256),), nested_quant_map: float32 (256,),
        nested_offset: float32 ()
        bias: (out,) or None
    """

    absmax: Tensor
    nested_absmax: Tensor
    nested_quant_map: Tensor
    nested_offset: Tensor

    def __init__(
        self,
        layer: FourBitLayer,
        *,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(layer, bias=bias, compute_dtype=compute_dtype)
        self.layer = layer
        num_elements = layer.out_features * layer.in_features
        num_blocks = -(-num_elements // layer.blocksize)
        packed = torch.empty((num_elements + 1) // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        if not layer.double_quant:
            self.register_buffer("absmax", torch.empty(num_blocks, dtype=torch.float32))
            return
        self.register_buffer("absmax", torch.empty(num_blocks, dtype=torch.uint8))
        nested_shapes = {
            "nested_absmax": (-(-num_blocks // NESTED_BLOCKSIZE),),
            "nested_quant_map": (256,),
            "nested_offset": (),
        }
        for name, shape in nested_shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=torch.float32))

    def row_decoder(self, dtype: torch.dtype) -> RowDecoder:
        """Makes rows rounded to the recorded dtype, then to `dtype`."""
        absmax = self._float_absmax()  # once for all rows

        def decode(start: int, stop: int) -> Tensor:
            values = dequantize_4bit(
                self.weight,
                absmax,
                quant_type=self.layer.quant_type,
                blocksize=self.layer.blocksize,
                start=start * self.in_features,
                stop=stop * self.in_features,
                dtype=self.layer.dtype,
            )
            return values.view(stop - start, self.in_features).to(dtype)

        return decode

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `qtool.runtime.products`."""
        return linear_4bit(
            x,
            self.weight,
            self.nested or self.absmax,
            quant_type=self.layer.quant_type,
            blocksize=self.layer.blocksize,
            out_features=self.out_features,
            weight_dtype=self.layer.dtype,
            bias=bias,
        )

    @property
    def nested(self) -> NestedAbsmax | None:
        """absmax where it is quantized itself."""
        if not self.layer.double_quant:
            return None
        return NestedAbsmax(
            self.absmax, self.nested_absmax, self.nested_quant_map, self.nested_offset
        )

    def dequantize(self) -> Tensor:
        """The whole weight [out, in] in its recorded dtype, bit-equal to bitsandbytes'."""
        return self.row_decoder(self.layer.dtype)(0, self.out_features)

    def _float_absmax(self) -> Tensor:
        nested = self.nested
        return nested.dequantize() if nested else self.absmax

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        kind = f"{self.layer.quant_type}{'-dq' if self.layer.double_quant else ''}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {kind}, blocksize={self.layer.blocksize}"
        )


class LinearInt8(_PackedLinear):
    """A linear layer over LLM.int8() weights; the activations stay in 16 or 32 bit.

    Parameters and buffers: weight int8 (out, in), SCB float32 (out,) = absmax of each row,
    bias (out,) or None.
    """

    SCB: Tensor

    def __init__(
        self,
        layer: Int8Layer,
        *,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(layer, bias=bias, compute_dtype=compute_dtype)
        codes = torch.empty(layer.out_features, layer.in_features, dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("SCB", torch.empty(layer.out_features, dtype=torch.float32))

    def row_decoder(self, dtype: torch.dtype) -> RowDecoder:
        """Makes rows computed in float32 and rounded to `dtype`."""
        return lambda start, stop: dequantize_int8(
            self.weight[start:stop], self.SCB[start:stop], dtype
        )

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `qtool.runtime.products`."""
        return linear_int8(x, self.weight, self.SCB, bias)

    def dequantize(self) -> Tensor:
        """The whole weight [out, in] in float32, bit-equal to bitsandbytes'."""
        return self.row_decoder(torch.float32)(0, self.out_features)


def build_linear(
    layer: PackedLayer, *, bias: Tensor | None, compute_dtype: torch.dtype | None
) -> Linear4bit | LinearInt8:
    """The module for `layer`, with uninitialized weights on the current default device."""
    if isinstance(layer, Int8Layer):
        return LinearInt8(layer, bias=bias, compute_dtype=compute_dtype)
    return Linear4bit(layer, bias=bias, compute_dtype=compute_dtype)
