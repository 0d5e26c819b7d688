"""The model to plan: from file headers where there are weights, else from config.json alone.

    model = open_model("org/model", on_event)
    model.weights("nf4-dq").checkpoint_bytes

Headers beat the config: a model of an unknown type still has a size, though nothing else is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast, get_args

from qtool.architecture import Architecture, build_architecture
from qtool.checkpoint import Checkpoint, open_checkpoint
from qtool.errors import QtoolError
from qtool.events import OnEvent, ignore_events
from qtool.formats.bitsandbytes import QuantizedWeight, find_quantized
from qtool.formats.precisions import QUANTIZED_PRECISIONS, QuantFormat, QuantizedPrecision
from qtool.formats.tensors import DTYPE_BITS, SourceDtype, TensorLayout
from qtool.planner.records import ModelFacts, ModelSourceKind
from qtool.planner.weights import (
    CAST_DTYPES,
    COMPUTE_BYTES,
    Weights,
    cast_weights,
    quantized_weights,
    stored_weights,
)
from qtool.quantize.plan import Recipe

CONFIG_DTYPES: Final[dict[str, SourceDtype]] = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
}


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model whose memory can be computed.

    `layouts` are its stored tensors, or those that config.json implies. `architecture` is None for
    a type that qtool does not know; then `why_unknown` says so. `stored_precision` is set where the
    model is quantized already: it can only be planned as it is.
    """

    id: str
    revision: str | None
    config: Mapping[str, Any]
    source: ModelSourceKind
    layouts: Mapping[str, TensorLayout]
    architecture: Architecture | None
    why_unknown: QtoolError | None = None
    packed: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    stored_precision: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def facts(self) -> ModelFacts:
        """What the answer says of the model itself."""
        architecture = self.architecture
        stored = None if self.source == "config" else self._stored_parameters()
        if architecture is None:
            num_parameters = stored or 0
        else:
            num_parameters = architecture.num_parameters
        return ModelFacts(
            id=self.id,
            revision=self.revision,
            architecture=architecture.class_name if architecture else None,
            source=self.source,
            parameters=num_parameters,
            active_parameters=num_parameters if architecture else None,
            checkpoint_parameters=stored,
            max_context=architecture.max_context if architecture else None,
        )

    @property
    def element_bytes(self) -> int:
        """Bytes of an activation when the model runs as it is stored."""
        return DTYPE_BITS[_model_dtype(self.config, self.layouts)] // 8

    def check_precision(self, precision: str) -> None:
        """Raise QtoolError if the model cannot be planned at `precision`."""
        if self.stored_precision is not None and precision != self.stored_precision:
            raise QtoolError(
                f"{self.id} is quantized already ({self.stored_precision}), so --quant {precision} "
                "cannot be planned from it",
                kind="unsupported",
                hint="give the full-precision model, or leave --quant out",
            )
        if self.architecture is None and precision not in CAST_DTYPES:
            assert self.why_unknown is not None
            raise QtoolError(
                f"{self.id} cannot be planned at {precision}, because which of its tensors are "
                f"linear layers is not known: {self.why_unknown.message}",
                kind="unsupported",
                hint=f"--quant {' or '.join(CAST_DTYPES)} needs only the file headers",
            )

    def weights(self, precision: str) -> Weights:
        """The weights at `precision`; QtoolError if `check_precision` objects."""
        self.check_precision(precision)
        if precision in CAST_DTYPES and self.stored_precision is None:
            return cast_weights(self.layouts.values(), self.architecture, precision)
        assert self.architecture is not None
        if self.packed:
            return stored_weights(
                self.layouts,
                self.packed,
                self.architecture,
                self.element_bytes,
                self._compute_bytes,
            )
        recipe = Recipe(
            format=QuantFormat(cast(QuantizedPrecision, precision)), skip=self._skip_modules
        )
        return quantized_weights(
            self.layouts.values(), self.architecture, recipe, self.element_bytes
        )

    @property
    def _quantization(self) -> Mapping[str, Any]:
        entry = self.config.get("quantization_config")
        return entry if isinstance(entry, Mapping) else {}

    @property
    def _compute_bytes(self) -> int:
        said = str(self._quantization.get("bnb_4bit_compute_dtype")).removeprefix("torch.")
        if self.stored_precision == "int8":
            return self.element_bytes
        return COMPUTE_BYTES.get(said, self.element_bytes)

    @property
    def _skip_modules(self) -> tuple[str, ...]:
        skip = self._quantization.get("llm_int8_skip_modules")
        names = skip if isinstance(skip, list) else ()
        return tuple(name for name in names if isinstance(name, str))

    def _stored_parameters(self) -> int:
        """Elements in the files, packed weights counted as the weights they stand for."""
        statistics = {
            part.name for group in self.packed.values() for part in group.statistics.values()
        }
        return sum(
            math.prod(self._logical_shape(tensor))
            for name, tensor in self.layouts.items()
            if name not in statistics
        )

    def _logical_shape(self, tensor: TensorLayout) -> tuple[int, ...]:
        parameter = self.architecture.find(tensor.name) if self.architecture else None
        return parameter.shape if parameter and tensor.name in self.packed else tensor.shape


def open_model(model: str, on_event: OnEvent = ignore_events) -> PlannedModel:
    """Read MODEL's headers and config; no weights are read.

    Raises:
        QtoolError: it is not there, its files are damaged, or nothing can be said about it.
    """
    checkpoint = open_checkpoint(model, need="headers", on_event=on_event)
    return describe_model(checkpoint)


def describe_model(checkpoint: Checkpoint) -> PlannedModel:
    """The model of a checkpoint whose headers and config were read; pure."""
    layouts: Mapping[str, TensorLayout] = checkpoint.tensors
    packed = find_quantized(layouts)
    _refuse_foreign_quantization(checkpoint, packed)
    warnings: list[str] = []
    why_unknown: QtoolError | None = None
    architecture: Architecture | None = None
    try:
        architecture = build_architecture(checkpoint.config)
    except QtoolError as error:
        if error.kind != "unsupported" or not layouts or packed:
            raise
        why_unknown = error
        warnings.append(
            f"{error.message}; only its size is known, so cache, activations and what else it "
            "needs to run are not counted"
        )
    entry = checkpoint.config.get("quantization_config")
    if isinstance(entry, Mapping) and entry.get("llm_int8_has_fp16_weight"):
        warnings.append(
            "config.json says llm_int8_has_fp16_weight: nothing is packed in it, so it is planned "
            "as the 16-bit model that it stores; quantize and generate refuse it"
        )
    if architecture is not None and not layouts:
        layouts = _implied_layouts(checkpoint, architecture, warnings)
    return PlannedModel(
        id=checkpoint.id,
        revision=checkpoint.revision,
        config=checkpoint.config,
        source="headers" if checkpoint.tensors else "config",
        layouts=layouts,
        architecture=architecture,
        why_unknown=why_unknown,
        packed=packed,
        stored_precision=_stored_precision(checkpoint, packed),
        warnings=tuple(warnings),
    )


def _implied_layouts(
    checkpoint: Checkpoint, architecture: Architecture, warnings: list[str]
) -> dict[str, TensorLayout]:
    if not _config_dtype(checkpoint.config):
        warnings.append("config.json names no dtype; tensors that stay unpacked are taken as bf16")
    dtype = _config_dtype(checkpoint.config) or "BF16"
    return {
        name: TensorLayout(name, dtype, tensor.shape)
        for name, tensor in architecture.tensors.items()
        if tensor.tied_to is None
    }


def _refuse_foreign_quantization(
    checkpoint: Checkpoint, packed: Mapping[str, QuantizedWeight]
) -> None:
    entry = checkpoint.config.get("quantization_config")
    method = entry.get("quant_method", "bitsandbytes") if isinstance(entry, Mapping) else None
    if packed or method in (None, "bitsandbytes"):
        return
    raise QtoolError(
        f"{checkpoint.id} is quantized already with {method}, which qtool does not run",
        kind="unsupported",
        hint="give the full-precision model; qtool plans, makes and runs bitsandbytes' formats",
    )


def _stored_precision(checkpoint: Checkpoint, packed: Mapping[str, QuantizedWeight]) -> str | None:
    """The precision of a model that is quantized already, "mixed" for several."""
    found = {weight.precision for weight in packed.values()}
    if found:
        return found.pop() if len(found) == 1 else "mixed"
    entry = checkpoint.config.get("quantization_config")
    if not isinstance(entry, Mapping) or entry.get("llm_int8_has_fp16_weight"):
        return None
    if entry.get("load_in_8bit"):
        return "int8"
    if not entry.get("load_in_4bit"):
        return None
    precision = str(entry.get("bnb_4bit_quant_type", "fp4"))
    precision += "-dq" * bool(entry.get("bnb_4bit_use_double_quant"))
    return precision if precision in QUANTIZED_PRECISIONS else None


def _model_dtype(config: Mapping[str, Any], layouts: Mapping[str, TensorLayout]) -> SourceDtype:
    """What the runtime computes in: config.json's dtype, else the narrowest that is stored."""
    stored = {tensor.dtype for tensor in layouts.values()}
    narrowest: Sequence[SourceDtype] = [d for d in get_args(SourceDtype) if d in stored]
    return _config_dtype(config) or (narrowest[0] if narrowest else "BF16")


def _config_dtype(config: Mapping[str, Any]) -> SourceDtype | None:
    text = config.get("text_config")
    for fields in (config, text if isinstance(text, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            said = fields.get(key)
            if isinstance(said, str) and said.removeprefix("torch.") in CONFIG_DTYPES:
                return CONFIG_DTYPES[said.removeprefix("torch.")]
    return None
