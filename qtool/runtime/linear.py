"""Linear layers that hold packed weights, multiplied by our operators.

Subclasses of nn.Linear, so that PEFT wraps them and transformers' isinstance checks hold; their
`weight` is the packed one. Statistics are buffers that no `.to(dtype)` changes. Gradients reach the
input and a bias, never the weight, of which no floating-point copy outlives a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtool.formats.precisions import NESTED_BLOCKSIZE, QuantType
from qtool.runtime.dequantize import dequantize_4bit, dequantize_int8
from qtool.runtime.products import (
    dequantize_rows_4bit,
    dequantize_rows_int8,
    linear_4bit,
    linear_int8,
    row_pieces,
)
from qtool.runtime.products_host import MAX_HOST_ELEMENTS, NestedAbsmax
from qtool.runtime.requantize import pack_4bit, pack_int8


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
        """A function that makes rows [start, stop) of the weight: `dtype` (stop - start, in).

        On a GPU by PyTorch's operators, so that it can check what our kernels make.
        """
        raise NotImplementedError

    def decode_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """The same rows as `row_decoder` makes, the fastest way: `dtype` (rows, in)."""
        return self.row_decoder(dtype)(rows.start, rows.stop)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out) in the dtype of `x` and `bias`."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """The whole weight [out, in] as bitsandbytes dequantizes it."""
        raise NotImplementedError

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """`weight` [out, in] in this layer's format, by the names of its parameter and buffers."""
        raise NotImplementedError

    def requantize(self, weight: Tensor) -> None:
        """Take `weight` instead, packed in the same format into the same memory.

        The codes are those that `qtool quantize` makes of it.

        Args:
            weight: floating point [out, in], on any device.

        Raises:
            QtoolError: bad_file, for NaN and infinity; the layer is as it was.
        """
        expected = (self.out_features, self.in_features)
        if tuple(weight.shape) != expected:
            raise ValueError(f"weight: expected shape {list(expected)}, found {list(weight.shape)}")
        self.set_packed(self.pack(weight.to(self.weight.device)))

    def packed_tensors(self) -> dict[str, Tensor]:
        """What holds the weight, by name: the packed one and its statistics."""
        return {"weight": self.weight.detach(), **dict(self.named_buffers(recurse=False))}

    def set_packed(self, parts: dict[str, Tensor]) -> None:
        """Copy `parts`, as `pack` or `packed_tensors` returns them, into this layer's tensors."""
        for name, tensor in self.packed_tensors().items():
            tensor.copy_(parts[name])

    def add_product(self, x: Tensor, out: Tensor) -> None:
        """out += x @ weight.T: `x` (tokens, in), `out` (tokens, out) of its dtype; no gradient.

        For many tokens: the weight is dequantized, piece by piece.
        """
        for rows, weight in self._float_pieces(x.dtype):
            out[:, rows].addmm_(x, weight.t())
            del weight  # before the next is made

    def add_input_gradient(self, gradient: Tensor, out: Tensor) -> None:
        """out += gradient @ weight: `gradient` (tokens, out), `out` (tokens, in) of its dtype."""
        for rows, weight in self._float_pieces(gradient.dtype):
            out.addmm_(gradient[:, rows], weight)
            del weight

    def _float_pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows and what they hold, so many at a time as products dequantize."""
        if self.weight.is_cuda:
            for rows in row_pieces(self.out_features, self.in_features):
                yield rows, self.decode_rows(rows, dtype)
            return
        decode = self.row_decoder(dtype)
        step = max(MAX_HOST_ELEMENTS // self.in_features, 1)
        for start in range(0, self.out_features, step):
            rows = slice(start, min(start + step, self.out_features))
            yield rows, decode(rows.start, rows.stop)

    @property
    def W_q(self) -> Tensor:
        """The packed weight, by the name that makes PEFT's DoRA call `dequantize()`.

        Without it DoRA takes the packed codes for numbers, silently for INT8.
        """
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out), computed in `compute_dtype`, returned in the input's dtype.

        Under autocast both are autocast's, as they are for any nn.Linear.
        """
        dtype, returned = self.product_dtypes(input)
        return self.multiply(input.to(dtype), self.bias_in(dtype)).to(returned)

    def bias_in(self, dtype: torch.dtype) -> Tensor | None:
        """The bias (out,), if there is one, as a product in `dtype` adds it."""
        return None if self.bias is None else self.bias.to(dtype)

    def product_dtypes(self, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """What a product with `x` is computed in, and what is returned."""
        device_type = x.device.type
        if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
            autocast = torch.get_autocast_dtype(device_type)
            return autocast, autocast
        return self.compute_dtype or x.dtype, x.dtype

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

    def decode_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """By our kernels where they run."""
        if not self.weight.is_cuda:
            return super().decode_rows(rows, dtype)
        nested, layer = self.nested, self.layer
        values = dequantize_rows_4bit(
            self.weight,
            (None, *nested.tensors) if nested else (self.absmax, None, None, None, None),
            rows,
            self.in_features,
            layer.quant_type,
            layer.blocksize,
            layer.dtype,
        )
        return values.to(dtype)

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
        return self.decode_rows(slice(0, self.out_features), self.layer.dtype)

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """See `qtool.runtime.requantize`."""
        layer = self.layer
        return pack_4bit(weight, layer.quant_type, layer.blocksize, double_quant=layer.double_quant)

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

    Attributes:
        threshold: if set, products of many tokens round the activations to INT8 too, but for
            columns with a value of at least so much; see `qtool.runtime.products.linear_int8`.
    """

    SCB: Tensor
    threshold: float | None = None

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

    def decode_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """By our kernel where it runs."""
        return dequantize_rows_int8(self.weight[rows], self.SCB[rows], dtype)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `qtool.runtime.products`."""
        return linear_int8(x, self.weight, self.SCB, bias, threshold=self.threshold)

    def dequantize(self) -> Tensor:
        """The whole weight [out, in] in float32, bit-equal to bitsandbytes'."""
        return self.decode_rows(slice(0, self.out_features), torch.float32)

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """See `qtool.runtime.requantize`."""
        return pack_int8(weight)


def build_linear(
    layer: PackedLayer, *, bias: Tensor | None, compute_dtype: torch.dtype | None
) -> Linear4bit | LinearInt8:
    """The module for `layer`, with uninitialized weights on the current default device."""
    if isinstance(layer, Int8Layer):
        return LinearInt8(layer, bias=bias, compute_dtype=compute_dtype)
    return Linear4bit(layer, bias=bias, compute_dtype=compute_dtype)
