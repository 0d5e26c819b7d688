"""Linear layers that allocate what bitsandbytes 0.50's do on a GPU; nothing is computed.

4 bit, n weights: beyond 4 tokens the whole weight is made in the dtype of the activations, and
with double quantization absmax in float32 first, twice. INT8, T tokens: activations become float16
and int8, the product is int32 (T, out), then float16, then the dtype of the activations; input
columns with outliers are multiplied apart, by float copies of their weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from qtool.formats.precisions import NESTED_BLOCKSIZE

BLOCKSIZE: Final = 64
# Up to so many tokens a kernel reads the codes themselves; beyond, that depends on the GPU.
MOST_TOKENS_FROM_CODES: Final = 4


@dataclass(frozen=True, slots=True)
class BitsandbytesOptions:
    """How transformers loads the layers; `outliers` is the share of INT8's outlier columns."""

    precision: str
    compute_dtype: torch.dtype
    outliers: float = 0.0

    @property
    def double_quant(self) -> bool:
        """Whether absmax is quantized too."""
        return self.precision.endswith("-dq")


def replace_linear(layer: Any, options: BitsandbytesOptions) -> nn.Module:
    """The stand-in for an nn.Linear or Conv1D on the meta device."""
    # Conv1D keeps [in, out].
    shape = tuple(layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1])
    kind = Int8Linear if options.precision == "int8" else FourBitLinear
    return kind(shape, layer.bias, options)


class _PackedLinear(nn.Linear):
    """A subclass of nn.Linear, so that PEFT wraps it."""

    def __init__(
        self, shape: tuple[int, ...], bias: nn.Parameter | None, options: BitsandbytesOptions
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a floating-point weight
        self.out_features, self.in_features = shape
        self.options = options
        self.register_parameter("bias", bias)


class FourBitLinear(_PackedLinear):
    """NF4 or FP4."""

    absmax: Tensor

    def __init__(
        self, shape: tuple[int, ...], bias: nn.Parameter | None, options: BitsandbytesOptions
    ) -> None:
        super().__init__(shape, bias, options)
        num_elements = self.out_features * self.in_features
        self.num_blocks = -(-num_elements // BLOCKSIZE)
        codes = torch.empty((num_elements + 1) // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("code", torch.empty(16))
        if not options.double_quant:
            self.register_buffer("absmax", torch.empty(self.num_blocks))
            return
        self.register_buffer("absmax", torch.empty(self.num_blocks, dtype=torch.uint8))
        self.register_buffer("nested_absmax", torch.empty(-(-self.num_blocks // NESTED_BLOCKSIZE)))
        self.register_buffer("nested_code", torch.empty(256))
        self.register_buffer("offset", torch.empty(()))

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the input's dtype."""
        x = input.to(self.options.compute_dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product: Tensor = _FourBitProduct.apply(x, self, bias)  # type: ignore[no-untyped-call]
        return product.to(input.dtype)

    def float_absmax(self) -> Tensor | None:
        """absmax (num_blocks,) made from its 8-bit codes; None where it is stored in float32."""
        if not self.options.double_quant:
            return None
        return torch.empty(self.num_blocks, dtype=torch.float32, device=self.weight.device)

    def float_weight(self, dtype: torch.dtype) -> Tensor:
        """`dtype` (out, in)."""
        shape = (self.out_features, self.in_features)
        return torch.empty(shape, dtype=dtype, device=self.weight.device)


class _FourBitProduct(torch.autograd.Function):
    """Saves nothing but the codes: the weight is dequantized again for the input's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FourBitLinear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        shape = (*x.shape[:-1], layer.out_features)
        if x.numel() // x.shape[-1] <= MOST_TOKENS_FROM_CODES:
            return torch.empty(shape, dtype=x.dtype, device=x.device)
        codes_absmax = layer.float_absmax()
        absmax = None if codes_absmax is None else codes_absmax + 0  # the offset, not in place
        product = functional.linear(x, layer.float_weight(x.dtype), bias)
        del absmax
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        layer: FourBitLinear = ctx.layer
        absmax = layer.float_absmax()
        weight = layer.float_weight(layer.options.compute_dtype)
        del absmax
        return torch.matmul(gradients[0], weight.to(gradients[0].dtype)), None, None


class Int8Linear(_PackedLinear):
    """LLM.int8()."""

    SCB: Tensor

    def __init__(
        self, shape: tuple[int, ...], bias: nn.Parameter | None, options: BitsandbytesOptions
    ) -> None:
        super().__init__(shape, bias, options)
        codes = torch.empty(self.out_features, self.in_features, dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("SCB", torch.empty(self.out_features))

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the input's dtype."""
        product: Tensor = _Int8Product.apply(input, self)  # type: ignore[no-untyped-call]
        return product


class _Int8Product(torch.autograd.Function):
    """Keeps the input for backward, which then makes the whole weight in the input's dtype."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: Int8Linear) -> Tensor:
        ctx.layer, ctx.shape = layer, input.shape
        x = input.reshape(-1, input.shape[-1])
        num_outliers = round(layer.options.outliers * layer.in_features)
        codes, row_stats = _int8_rows(x.to(torch.float16))
        inputs = x.new_empty(x.shape[0], num_outliers)
        weights = _outlier_weights(layer, num_outliers, x.dtype)
        product = _int8_product(codes, layer, x.dtype)
        if num_outliers:
            product = product.addmm(inputs, weights.t())
        del row_stats
        ctx.inputs = (inputs, x) if ctx.needs_input_grad[0] else None
        return product.reshape(*input.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        layer: Int8Linear = ctx.layer
        gradient = gradients[0].reshape(-1, layer.out_features)
        dtype = ctx.inputs[1].dtype
        weight = layer.weight.to(dtype).mul_(layer.SCB[:, None].to(dtype))
        return torch.matmul(gradient.to(dtype), weight).view(ctx.shape), None


def _int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 (T, in) and absmax float32 (T,) of float16 (T, in), looking for outliers."""
    row_stats = x.new_empty(x.shape[0], dtype=torch.float32)
    codes = torch.empty_like(x, dtype=torch.int8)
    outliers = x.abs() >= 6.0
    del outliers
    return codes, row_stats


def _outlier_weights(layer: Int8Linear, num_outliers: int, dtype: torch.dtype) -> Tensor:
    """`dtype` (out, num_outliers): the columns of the weight, dequantized by way of float32."""
    columns = layer.weight.new_empty(layer.out_features, num_outliers)
    return ((columns * layer.SCB[:, None]) * 1.0).to(dtype)


def _int8_product(codes: Tensor, layer: Int8Linear, dtype: torch.dtype) -> Tensor:
    """(T, out): int32 as the matrix product leaves it, then float16, then `dtype`."""
    product = codes.new_empty(codes.shape[0], layer.out_features, dtype=torch.int32)
    return torch.empty_like(product, dtype=torch.float16).to(dtype)
