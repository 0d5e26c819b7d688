"""What inspection finds, as plain records. Sizes are bytes, shapes are those of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class InspectedTensor:
    """A stored tensor.

    `quant` is the precision of the weight it holds; None for statistics, whose weight is
    `belongs_to`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    quant: str | None
    shard: str
    belongs_to: str | None = None


@dataclass(frozen=True, slots=True)
class Total:
    """A sum over tensors. For precisions the bytes of a layer's statistics are included."""

    num_tensors: int
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a folder is.

    `parameters` counts packed weights by their real shapes and tied ones once. `dtypes` sums the
    tensors as stored (`num_parameters` are elements), `precisions` the weights. `notes` are
    sentences about what could not be known exactly.
    """

    path: str
    quant_method: str | None
    quant: str | None  # a precision, "mixed", or None where no word fits
    compute_dtype: str | None
    parameters: int
    weights_bytes: int
    dtypes: Mapping[str, Total]
    precisions: Mapping[str, Total]
    tensors: tuple[InspectedTensor, ...]
    notes: tuple[str, ...] = ()

    @property
    def bits_per_parameter(self) -> float | None:
        """Stored bits per parameter, everything included; None for an empty checkpoint."""
        return 8 * self.weights_bytes / self.parameters if self.parameters else None


@dataclass(frozen=True, slots=True)
class LayerError:
    """How far a dequantized weight is from the original.

    `relative_error` = ||dequantized - original|| / ||original|| (Frobenius). `sqnr_db` is the ratio
    of the powers of original and error. Values may be infinite (no error at all) or NaN.
    """

    name: str
    kind: str  # what the layer is, its number left out: "self_attn.q_proj"
    precision: str
    num_parameters: int
    mse: float
    relative_error: float
    max_abs_error: float
    sqnr_db: float


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor that should be the original's, byte for byte, and is not.

    `error` says how far its values are, where both sides hold floats of one dtype and shape.
    """

    name: str
    reason: str
    error: LayerError | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A quantized checkpoint beside its original. `num_equal` tensors were copied faithfully."""

    errors: tuple[LayerError, ...]
    num_equal: int
    differences: tuple[Difference, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """A rule that the folder breaks, and where. `rule` is the rule's name in `RULES`."""

    file: str | None
    tensor: str | None
    rule: str
    expected: str
    found: str


@dataclass(frozen=True, slots=True)
class Verification:
    """The verdict on a folder: which rules were applied and what they found."""

    num_rules: int
    num_layers: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """No rule is broken."""
        return not self.problems
