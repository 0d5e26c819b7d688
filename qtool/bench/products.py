"""Products with packed weights, beside a copy of as many bytes and a product in 16 bit.

All engines get the same activations and, where they read packed weights, the same bytes. The
weights take turns, and are more than the caches hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from qtool.bench.bitsandbytes_layers import share_layer
from qtool.bench.contenders import Contender, Measured, measure
from qtool.bench.operations import (
    DTYPE_WORDS,
    Product,
    Shape,
    shape_text,
    stored_bytes,
    value_bytes,
)
from qtool.bench.records import Engine, Moved
from qtool.bench.torch_device import copy_contender, make_clock
from qtool.errors import QtoolError
from qtool.events import Note, OnEvent
from qtool.formats.tensors import SourceDtype
from qtool.runtime.bitsandbytes_logging import quiet_bitsandbytes
from qtool.runtime.linear import Linear4bit, LinearInt8, build_linear
from qtool.runtime.memory import out_of_memory_as_error
from qtool.runtime.products import linear_4bit, linear_int8
from qtool.runtime.products_host import NestedAbsmax
from qtool.runtime.random_model import STANDARD_DEVIATION, packed_layer, random_linear
from qtool.runtime.weights import TORCH_DTYPES

ROTATION_BYTES: Final = 192 << 20  # several times the second-level cache of a large GPU
MIN_WEIGHTS: Final = 3
MAX_WEIGHTS: Final = 512
LAUNCHES: Final = 64  # at least, in one CUDA graph of short products
# Beyond so many tokens a product computes for longer than its weight is read. A GPU at its limit of
# power takes a while to find the clock at which it can go on: samples have so many operations for
# each multiprocessor, about 60 ms of an H200, in no more than so many launches.
SHORT_TOKENS: Final = 128
FLOPS_PER_MULTIPROCESSOR: Final = 3e11
MAX_LAUNCHES: Final = 256
# A product beyond is wrong, not inexact: about ten times what rounding leaves.
LARGEST_ERROR: Final[dict[SourceDtype, float]] = {"BF16": 3e-2, "F16": 1e-2, "F32": 1e-4}
LARGEST_ROUNDED_ERROR: Final = 3e-2  # where activations are rounded to INT8
# How outliers are made: columns of normal activations times this, far beyond a threshold of 6.
OUTLIER_STRIDE: Final = 1024
OUTLIER_FACTOR: Final = 32.0
EXACT_ROWS: Final = 2048  # of a weight that are in float64 at a time

Layer = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class Compared:
    """What the results of first products showed.

    Attributes:
        errors: how far off they are, by operation and engine.
        warnings: a sentence for each rival that failed.
    """

    errors: dict[tuple[str, Engine], float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ProductGroup:
    """What is measured in turns: `products` of `tokens` rows with weights of one shape."""

    device: torch.device
    shape: Shape
    dtype: SourceDtype
    tokens: int
    products: Sequence[Product]
    with_rival: bool

    @property
    def label(self) -> str:
        """For people."""
        tokens = f"{self.tokens} {'token' if self.tokens == 1 else 'tokens'}"
        return f"{DTYPE_WORDS[self.dtype]} {shape_text(self.shape)}, {tokens}"

    def measure(self, repeats: int, on_event: OnEvent) -> tuple[list[Measured], Compared]:
        """The limit, everybody's samples, and how the results compare.

        Raises:
            QtoolError: qtool's product is wrong, or there is too little memory.
        """
        on_event(Note(f"{self.label}: making weights and comparing results"))
        with torch.inference_mode(), quiet_bitsandbytes(), out_of_memory_as_error(self.label):
            x = self._activations()
            compared = Compared()
            contenders = [copy_contender(self.device), self._unpacked(x)]
            for product in self.products:
                contenders += self._packed(product, x, compared)
            clock = make_clock(self.device, self.launches(_num_multiprocessors(self.device)))
            measured = measure(contenders, clock, repeats, f"measure {self.label}", on_event)
        copied, unpacked, *packed = measured
        # Every product is compared with the one in 16 bit.
        return [copied, *packed, *(replace(unpacked, op=p.name) for p in self.products)], compared

    def _activations(self) -> Tensor:
        """Gaussians (tokens, in_features)."""
        generator = torch.Generator(self.device).manual_seed(1)
        x = torch.empty(self.tokens, self.shape[1], dtype=self._torch_dtype, device=self.device)
        return x.normal_(generator=generator)

    def _unpacked(self, x: Tensor) -> Contender:
        """torch's own product with weights of `dtype`: cuBLAS on a GPU."""
        weight_bytes = value_bytes(self.shape, self.dtype)
        generator = torch.Generator(self.device).manual_seed(2)
        layers: list[Layer] = []
        for _ in range(_num_weights(weight_bytes)):
            weight = torch.empty(self.shape, dtype=self._torch_dtype, device=self.device)
            weight.normal_(0, STANDARD_DEVIATION, generator=generator)
            layers.append(partial(functional.linear, weight=weight))
        moved = Moved(
            weight_bytes + value_bytes((self.tokens, self.shape[1]), self.dtype),
            value_bytes((self.tokens, self.shape[0]), self.dtype),
        )
        return Contender("linear", "torch", moved, partial(_multiply_in_turn, layers, x))

    def _packed(self, product: Product, x: Tensor, compared: Compared) -> list[Contender]:
        """qtool and its rival; adds to `compared`."""
        layer = packed_layer(*self.shape, product.format, self._torch_dtype)
        count = _num_weights(stored_bytes(self.shape, product.precision))
        own = [random_linear(layer, device=self.device, seed=seed) for seed in range(count)]
        for module in own:
            if product.threshold is not None:
                module.threshold = product.threshold
        if product.threshold:
            x = _with_outliers(x)
        exact = exact_product(own[0], x)
        error = relative_error(multiply(own[0], x), exact)
        if not error <= self._largest_error(product):
            raise _is_wrong(product, self.label, error)
        compared.errors[product.name, "qtool"] = error
        contenders = [self._contender(product, "qtool", own, x)]
        # Not with outliers: to find them, it would wait for the device at every product.
        if self.with_rival and not product.threshold:
            try:
                rivals = [share_layer(module, int8_threshold=0.0) for module in own]
                error = relative_error(multiply(rivals[0], x), exact)
            except Exception as raised:  # not all shapes do there, and each raises what it likes
                compared.warnings.append(_has_failed(product, self.label, raised))
                return contenders
            compared.errors[product.name, "bitsandbytes"] = error
            contenders.append(self._contender(product, "bitsandbytes", rivals, x))
        return contenders

    def _contender(
        self, product: Product, engine: Engine, layers: Sequence[Layer], x: Tensor
    ) -> Contender:
        moved = product.moved(self.shape, self.dtype, self.tokens)
        return Contender(product.name, engine, moved, partial(_multiply_in_turn, layers, x))

    def _largest_error(self, product: Product) -> float:
        rounds = product.threshold is not None
        return LARGEST_ROUNDED_ERROR if rounds else LARGEST_ERROR[self.dtype]

    def launches(self, num_multiprocessors: int) -> int:
        """In one graph; each weight has a turn at least, unless products are long."""
        if self.tokens > SHORT_TOKENS:
            flops = 2 * self.tokens * math.prod(self.shape)
            return min(
                math.ceil(FLOPS_PER_MULTIPROCESSOR * num_multiprocessors / flops), MAX_LAUNCHES
            )
        sizes = [stored_bytes(self.shape, product.precision) for product in self.products]
        return max(LAUNCHES, *map(_num_weights, sizes))

    @property
    def _torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]


def multiply(layer: Layer, x: Tensor) -> Tensor:
    """(tokens, in) -> (tokens, out); packed layers by the operators that models call."""
    if isinstance(layer, Linear4bit):
        return linear_4bit(
            x,
            layer.weight,
            _absmax_of(layer),
            quant_type=layer.layer.quant_type,
            blocksize=layer.layer.blocksize,
            out_features=layer.out_features,
            weight_dtype=layer.layer.dtype,
        )
    if isinstance(layer, LinearInt8):
        return linear_int8(x, layer.weight, layer.SCB, threshold=layer.threshold)
    return layer(x)


def _num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; on the CPU, where products are not sampled in graphs, one."""
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _absmax_of(layer: Linear4bit) -> Tensor | NestedAbsmax:
    if not layer.layer.double_quant:
        return layer.absmax
    return NestedAbsmax(
        layer.absmax, layer.nested_absmax, layer.nested_quant_map, layer.nested_offset
    )


def exact_product(module: Linear4bit | LinearInt8, x: Tensor) -> Tensor:
    """float64 (tokens, out): codes times statistics in float32, everything else in float64."""
    twin: Any = module
    if isinstance(module, Linear4bit):  # the weight's own dtype would round its values
        layer = replace(module.layer, dtype=torch.float32)
        with torch.device("meta"):
            twin = build_linear(layer, bias=None, compute_dtype=None)
        twin.load_state_dict(module.state_dict(), assign=True)
    rows = twin.row_decoder(torch.float32)
    edges = range(0, twin.out_features, EXACT_ROWS)
    wide = x.double()
    pieces = [wide @ rows(a, min(a + EXACT_ROWS, twin.out_features)).double().T for a in edges]
    return torch.cat(pieces, dim=-1)


def relative_error(result: Tensor, exact: Tensor) -> float:
    """The Frobenius norm of the difference over that of `exact`."""
    difference = torch.linalg.vector_norm(result.double() - exact)
    return float(difference / torch.linalg.vector_norm(exact))


def _with_outliers(x: Tensor) -> Tensor:
    """x with some columns so large that they hold outliers."""
    made = x.clone()
    made[:, ::OUTLIER_STRIDE] *= OUTLIER_FACTOR
    return made


def _multiply_in_turn(layers: Sequence[Layer], x: Tensor, i: int) -> Tensor:
    return multiply(layers[i % len(layers)], x)


def _num_weights(weight_bytes: int) -> int:
    return min(max(-(-ROTATION_BYTES // weight_bytes), MIN_WEIGHTS), MAX_WEIGHTS)


def _is_wrong(product: Product, label: str, error: float) -> QtoolError:
    return QtoolError(
        f"{product.name} {label}: the result is off by {error:.1e} of its norm",
        kind="internal",
        hint="this is a bug in a kernel, so nothing was measured; please report it",
    )


def _has_failed(product: Product, label: str, error: Exception) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"bitsandbytes is not measured at {product.name} {label}: {first_line}"
