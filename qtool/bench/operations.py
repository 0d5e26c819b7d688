"""What `qtool bench kernels` measures: operations, products, and the bytes that each must move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, cast

from qtool.bench.records import Moved
from qtool.errors import Option, QtoolError
from qtool.formats.precisions import (
    DEFAULT_BLOCKSIZE,
    NESTED_BLOCKSIZE,
    QuantFormat,
    QuantizedPrecision,
)
from qtool.formats.tensors import DTYPE_BITS, SourceDtype

Shape = tuple[int, int]  # rows, columns

BLOCKSIZE: Final = DEFAULT_BLOCKSIZE
MIN_ROUNDED_TOKENS: Final = 65  # see `qtool.runtime.products.rounds_activations`
# The contract's words for the dtypes of sources.
DTYPE_WORDS: Final[dict[SourceDtype, str]] = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


@dataclass(frozen=True, slots=True)
class Operation:
    """Quantizing to `precision`, or the way back."""

    direction: Literal["quantize", "dequantize"]
    precision: QuantizedPrecision

    @property
    def name(self) -> str:
        """Such as "quantize nf4-dq"."""
        return f"{self.direction} {self.precision}"

    @property
    def format(self) -> QuantFormat:
        """The precision with the block size that is measured."""
        return QuantFormat(self.precision, BLOCKSIZE)

    def moved(self, shape: Shape, dtype: SourceDtype) -> Moved:
        """The values of `dtype`, and what is stored for them."""
        values, stored = value_bytes(shape, dtype), stored_bytes(shape, self.precision)
        return Moved(values, stored) if self.direction == "quantize" else Moved(stored, values)


OPERATIONS: Final = (
    Operation("quantize", "nf4"),
    Operation("quantize", "nf4-dq"),
    Operation("quantize", "fp4"),
    Operation("quantize", "int8"),
    Operation("dequantize", "nf4"),
    Operation("dequantize", "nf4-dq"),
    Operation("dequantize", "int8"),
)


@dataclass(frozen=True, slots=True)
class Product:
    """Activations times a weight that is packed in `precision`.

    With a `threshold` the activations are rounded to INT8, but for columns with a value of at least
    so much; 0 rounds all. That takes more than `min_tokens`.
    """

    precision: QuantizedPrecision
    threshold: float | None = None

    @property
    def name(self) -> str:
        """Such as "linear nf4-dq"."""
        if self.threshold is None:
            return f"linear {self.precision}"
        return f"linear {self.precision} {'outliers' if self.threshold else 'rounded'}"

    @property
    def min_tokens(self) -> int:
        """With fewer it is the product without a threshold."""
        return 1 if self.threshold is None else MIN_ROUNDED_TOKENS

    @property
    def format(self) -> QuantFormat:
        """The precision with the block size that is measured."""
        return QuantFormat(self.precision, BLOCKSIZE)

    def moved(self, shape: Shape, dtype: SourceDtype, tokens: int) -> Moved:
        """What is stored for the weight [out, in], `tokens` rows of activations, their results."""
        out_features, in_features = shape
        return Moved(
            stored_bytes(shape, self.precision) + value_bytes((tokens, in_features), dtype),
            value_bytes((tokens, out_features), dtype),
        )


PRODUCTS: Final = (
    Product("nf4"),
    Product("nf4-dq"),
    Product("fp4"),
    Product("int8"),
    Product("int8", threshold=0.0),
    Product("int8", threshold=6.0),
)


def choose_operations(
    words: Sequence[str],
) -> tuple[tuple[Operation, ...], tuple[Product, ...]]:
    """The operations and products whose names hold all words of one of `words`; all for none.

    "nf4" stands for both directions and the product, "quantize nf4" for one direction.

    Raises:
        QtoolError: usage, if one of `words` fits none.
    """
    names = [known.name for known in (*OPERATIONS, *PRODUCTS)]
    for word in words:
        if not any(_fits(word, name) for name in names):
            raise QtoolError(
                (Option("op", word), ": there is no such operation"),
                kind="usage",
                hint=f"known: {', '.join(names)}",
            )
    chosen = {name for name in names if not words or any(_fits(word, name) for word in words)}
    return (
        tuple(operation for operation in OPERATIONS if operation.name in chosen),
        tuple(product for product in PRODUCTS if product.name in chosen),
    )


def _fits(words: str, name: str) -> bool:
    return set(words.split()) <= set(name.split())


def parse_shape(text: str) -> Shape:
    """ "28672x8192" -> (28672, 8192).

    Raises:
        QtoolError: usage, for anything else.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise QtoolError(
            (Option("shape", text), ": expected ROWSxCOLUMNS"),
            kind="usage",
            hint=("such as ", Option("shape", "28672x8192")),
        )
    return cast(Shape, tuple(map(int, parts)))


def shape_text(shape: Shape) -> str:
    """The inverse of `parse_shape`."""
    return "x".join(map(str, shape))


def value_bytes(shape: Shape, dtype: SourceDtype) -> int:
    """Bytes of a weight of `shape` before it is quantized."""
    return shape[0] * shape[1] * DTYPE_BITS[dtype] // 8


def stored_bytes(shape: Shape, precision: QuantizedPrecision) -> int:
    """Bytes of codes and scales; code tables, which are the same for every weight, do not count."""
    num_values = shape[0] * shape[1]
    if precision == "int8":
        return num_values + 4 * shape[0]
    packed_bytes, num_blocks = -(-num_values // 2), num_absmax(shape)
    if not precision.endswith("-dq"):
        return packed_bytes + 4 * num_blocks
    offset_bytes = 4
    return packed_bytes + num_blocks + 4 * -(-num_blocks // NESTED_BLOCKSIZE) + offset_bytes


def num_absmax(shape: Shape) -> int:
    """How many 4-bit blocks a weight of `shape` has."""
    return -(-shape[0] * shape[1] // BLOCKSIZE)


def parse_dtype(word: str) -> SourceDtype:
    """The dtype that one of the contract's words stands for.

    Raises:
        QtoolError: usage, for another word.
    """
    for dtype, known in DTYPE_WORDS.items():
        if word == known:
            return dtype
    raise QtoolError(
        (Option("dtype", word), ": there is no such dtype"),
        kind="usage",
        hint=f"one of {', '.join(DTYPE_WORDS.values())}",
    )
