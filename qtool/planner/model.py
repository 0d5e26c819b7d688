"""The model to plan: from file headers where there are weights, else from config.json alone.

    model = open_model("org/model", on_event)
    model.weights("nf4-dq").checkpoint_bytes

Headers beat the config: a model of an unknown type still has a size, though nothing else is known.
A model in a format of others (FP8, MXFP4, GPTQ, ...) is planned as it is stored, and from its
config at the precisions that qtool makes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast, get_args

from qtool.architecture import Architecture, ModelTensor, build_architecture
from qtool.architecture.stored_weights import check_weights
from qtool.checkpoint import Checkpoint, open_checkpoint
from qtool.errors import Option, QtoolError
from qtool.events import OnEvent, ignore_events
from qtool.formats.bitsandbytes import QuantizedWeight, find_quantized
from qtool.formats.precisions import QUANTIZED_PRECISIONS, Precision, QuantizedPrecision
from qtool.formats.tensors import DTYPE_BITS, SourceDtype, TensorLayout
from qtool.planner.inventory import Inventory, take_inventory
from qtool.planner.kv_cache import Runtime
from qtool.planner.records import Basis, ModelFacts, ModelSourceKind, Workload
from qtool.planner.stored_formats import FP8, StoredFormat, find_format
from qtool.planner.stored_methods import FP8_TENSOR
from qtool.planner.units import HALF_BYTES
from qtool.planner.weights import (
    CAST_DTYPES,
    COMPUTE_BYTES,
    Weights,
    cast_weights,
    files_as_they_are,
    formatted_weights,
    packed_weights,
    quantized_weights,
    with_packed_head,
)

OUTPUT_HEAD: Final = "lm_head"  # the last part of its module's name
FP8_SCALES: Final = ("_scale", "_scale_inv")  # of tensor names
LEAST_WORTH_MENTIONING: Final = 1_000_000  # parameters

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
    model is quantized already. In bitsandbytes' layout (`packed`) it can only be planned as it is;
    in a format of others (`stored_format`) also at other precisions, from its config.
    """

    id: str
    revision: str | None
    config: Mapping[str, Any]
    source: ModelSourceKind
    layouts: Mapping[str, TensorLayout]
    architecture: Architecture | None
    why_unknown: QtoolError | None = None
    packed: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    stored_format: StoredFormat | None = None
    stored_precision: str | None = None
    warnings: tuple[str, ...] = ()
    # Counted and checked once, for all precisions; a copy of the model starts anew.
    _inventory: list[Inventory] = field(default_factory=list, init=False, compare=False)
    _is_checked: list[bool] = field(default_factory=list, init=False, compare=False)

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
            active_parameters=architecture.num_active_parameters if architecture else None,
            checkpoint_parameters=stored,
            max_context=architecture.max_context if architecture else None,
            stored_precision=self.stored_precision,
        )

    @property
    def element_bytes(self) -> int:
        """Bytes of an activation when the model runs as it is stored."""
        return DTYPE_BITS[_model_dtype(self.config, self.layouts)] // 8

    def unpacked_bytes(self, workload: Workload) -> int:
        """The same of what a quantized precision leaves unpacked: `qtool finetune` loads that in
        16 bit, others as the model has it."""
        is_own_training = workload.mode != "generate" and workload.runtime == "qtool"
        return HALF_BYTES if is_own_training else self.element_bytes

    def weights_basis(self, precision: str) -> Basis:
        """How the bytes of the weights at `precision` are known."""
        if self.stored_format is None or precision == self.stored_precision:
            if self.source == "headers":
                return "header"
            if self.stored_format is not None:
                return "heuristic" if self.stored_format.layout is None else "formula"
        return "exact"

    def check_precision(self, precision: str) -> None:
        """Raise QtoolError if the model cannot be planned at `precision`."""
        is_stored = precision == self.stored_precision
        if self.stored_precision is not None and self.stored_format is None and not is_stored:
            raise QtoolError(
                (
                    f"{self.id} is quantized already ({self.stored_precision}), so ",
                    Option("quant", precision),
                    " cannot be planned from it",
                ),
                kind="unsupported",
                hint=("give the full-precision model, or leave out ", Option("quant")),
            )
        if precision not in get_args(Precision) and not is_stored:
            raise QtoolError(
                (
                    Option("quant", precision),
                    f": {self.id} is not stored in {precision}, and qtool does not make it",
                ),
                kind="usage",
                hint=f"one of {', '.join(get_args(Precision))}",
            )
        if self.architecture is None and precision not in CAST_DTYPES and not is_stored:
            assert self.why_unknown is not None
            raise QtoolError(
                f"{self.id} cannot be planned at {precision}, because which of its tensors are "
                f"linear layers is not known: {self.why_unknown.message}",
                kind="unsupported",
                hint=(Option("quant"), f" {' or '.join(CAST_DTYPES)} needs only the file headers"),
            )

    def weights(
        self,
        precision: str,
        runtime: Runtime = "qtool",
        head_quant: QuantizedPrecision | None = None,
        *,
        element_bytes: int | None = None,
    ) -> Weights:
        """The weights at `precision`; with `head_quant` the output head is packed in memory too.

        Args:
            element_bytes: what a quantized model computes in and keeps unpacked weights in; None
                for the dtype of the model.

        Raises:
            QtoolError: `check_precision` objects, or there is no output head to pack.
        """
        weights = self._weights(precision, runtime, element_bytes or self.element_bytes)
        if head_quant is None:
            return weights
        return with_packed_head(weights, self._output_head(head_quant), head_quant)

    def _output_head(self, head_quant: QuantizedPrecision) -> ModelTensor:
        """The head that the runtime would pack; QtoolError where it would refuse."""
        tensors = self.architecture.tensors.values() if self.architecture else ()
        heads = [tensor for tensor in tensors if tensor.module_name.split(".")[-1] == OUTPUT_HEAD]
        weight = next((head for head in heads if head.is_linear), None)
        if weight is not None and weight.name not in self.packed:
            return weight
        found = "none that is known" if weight is None else "one that is packed in the files"
        raise QtoolError(
            (
                Option("head_quant", head_quant),
                f": expected an output head that is not packed, found {found} in {self.id}",
            ),
            kind="unsupported",
            hint=("leave out ", Option("head_quant")),
        )

    def _weights(self, precision: str, runtime: Runtime, element_bytes: int) -> Weights:
        self.check_precision(precision)
        if self.packed:
            assert self.architecture is not None
            return packed_weights(
                self.layouts,
                self.packed,
                self.architecture,
                element_bytes,
                self._compute_bytes(element_bytes),
                runtime,
            )
        if self.stored_format is not None and precision == self.stored_precision:
            return self._weights_as_stored(self.stored_format)
        if precision in CAST_DTYPES:
            return cast_weights(self._take_inventory(), precision)
        assert self.architecture is not None
        if precision == FP8:
            fmt = StoredFormat(FP8, FP8_TENSOR, self._is_packed)
            return formatted_weights(self._take_inventory(), fmt, element_bytes)
        self._check_once(self.architecture)
        return quantized_weights(
            self._take_inventory(),
            cast(QuantizedPrecision, precision),
            element_bytes=element_bytes,
            runtime=runtime,
        )

    def _take_inventory(self) -> Inventory:
        """The tensors in 16 or 32 bit, with those marked that quantized precisions pack."""
        if not self._inventory:
            is_packed = self._is_packed if self.architecture else lambda parameter: False
            layouts = self._full_precision()
            self._inventory.append(take_inventory(layouts, self.architecture, is_packed))
        return self._inventory[0]

    def _check_once(self, architecture: Architecture) -> None:
        if not self._is_checked:
            check_weights(self._full_precision(), architecture, self.packable())
            self._is_checked.append(True)

    def _weights_as_stored(self, fmt: StoredFormat) -> Weights:
        if self.source == "headers":
            inventory = take_inventory(self.layouts.values(), self.architecture)
            return files_as_they_are(inventory, self.element_bytes)
        assert self.architecture is not None
        inventory = take_inventory(self.layouts.values(), self.architecture, fmt.packs)
        return formatted_weights(inventory, fmt, self.element_bytes)

    def _full_precision(self) -> Sequence[TensorLayout]:
        """The tensors in 16 or 32 bit: as stored, or as the config implies."""
        if self.stored_format is None or self.architecture is None:
            return tuple(self.layouts.values())
        return tuple(implied_layouts(self.architecture, self.config).values())

    @property
    def _is_packed(self) -> Callable[[ModelTensor], bool]:
        """Which parameters a quantized precision packs: linear layers and routed experts."""
        assert self.architecture is not None
        linear = self.packable()
        return lambda parameter: parameter.name in linear or parameter.is_expert

    def packable(self) -> Mapping[str, ModelTensor]:
        """The linear layers that a quantized precision packs, by the names of their weights: those
        of the default rule, unless config.json has a list of its own of what stays as it is."""
        if self.architecture is None:
            return {}
        skip = self._quantization.get("llm_int8_skip_modules")
        if not isinstance(skip, list):
            return self.architecture.quantizable()
        return self.architecture.replaced([name for name in skip if isinstance(name, str)])

    @property
    def _quantization(self) -> Mapping[str, Any]:
        entry = self.config.get("quantization_config")
        return entry if isinstance(entry, Mapping) else {}

    def _compute_bytes(self, element_bytes: int) -> int:
        said = str(self._quantization.get("bnb_4bit_compute_dtype")).removeprefix("torch.")
        if self.stored_precision == "int8":
            return element_bytes
        return COMPUTE_BYTES.get(said, element_bytes)

    def _stored_parameters(self) -> int | None:
        """Elements in the files, packed weights counted as the weights they stand for; None for
        formats of others that pack several weights into an element."""
        if self.stored_format is not None and self.stored_format.method != FP8:
            return None
        statistics = {
            part.name for group in self.packed.values() for part in group.statistics.values()
        }
        return sum(
            math.prod(self._logical_shape(tensor))
            for name, tensor in self.layouts.items()
            if name not in statistics and not name.endswith(FP8_SCALES)
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
    warnings: list[str] = []
    why_unknown: QtoolError | None = None
    architecture: Architecture | None = None
    try:
        architecture = build_architecture(checkpoint.config)
    except QtoolError as error:
        if error.kind != "unsupported" or not layouts or packed:
            raise error.of(checkpoint.id) from error
        why_unknown = error
        warnings.append(
            f"{error.message}; only its size is known, so cache, activations and what else it "
            "needs to run are not counted"
        )
    stored_format = None
    if not packed:
        stored_format = find_format(checkpoint.config, layouts.values(), architecture)
        warnings += _format_warnings(checkpoint, stored_format)
    entry = checkpoint.config.get("quantization_config")
    if isinstance(entry, Mapping) and entry.get("llm_int8_has_fp16_weight"):
        warnings.append(
            "config.json says llm_int8_has_fp16_weight: nothing is packed in it, so it is planned "
            "as the 16-bit model that it stores; quantize and generate refuse it"
        )
    if architecture is not None and not layouts:
        layouts = implied_layouts(architecture, checkpoint.config)
        if not _config_dtype(checkpoint.config):
            warnings.append("config.json names no dtype; what stays unpacked is taken as bf16")
    if architecture is not None and checkpoint.tensors:
        warnings += _left_out(layouts.values(), architecture)
    return PlannedModel(
        id=checkpoint.id,
        revision=checkpoint.revision,
        config=checkpoint.config,
        source="headers" if checkpoint.tensors else "config",
        layouts=layouts,
        architecture=architecture,
        why_unknown=why_unknown,
        packed=packed,
        stored_format=stored_format,
        stored_precision=stored_format.method
        if stored_format
        else _stored_precision(checkpoint, packed),
        warnings=tuple(warnings),
    )


def implied_layouts(
    architecture: Architecture, config: Mapping[str, Any]
) -> dict[str, TensorLayout]:
    """The tensors that the config implies, in the dtype it names (bf16 where it names none)."""
    dtype = _config_dtype(config) or "BF16"
    return {
        name: TensorLayout(name, dtype, tensor.shape)
        for name, tensor in architecture.tensors.items()
        if tensor.tied_to is None
    }


def _format_warnings(checkpoint: Checkpoint, fmt: StoredFormat | None) -> list[str]:
    """What a reader of plans for a format of others must know, in words."""
    if fmt is not None and not fmt.is_declared:
        return [
            f"the files hold {fmt.method} weights, of which config.json says nothing: as they are "
            f"stored they are planned from the headers, at other precisions from config.json; "
            "quantize wants the 16-bit model"
        ]
    if fmt is not None and fmt.layout is None and not checkpoint.tensors:
        return [
            f"how quant_method {fmt.method!r} of config.json stores weights is not known: its row "
            "is for weights that are not packed, the most that they can take; with the headers of "
            "the files their size is exact"
        ]
    return []


def _left_out(layouts: Iterable[TensorLayout], architecture: Architecture) -> list[str]:
    """What the files hold and the model does not load, in words, with its parameters."""
    left_out: Counter[str] = Counter()
    for tensor in layouts:
        if architecture.find(tensor.name) is None:
            what = architecture.stored_names.why_ignored(tensor.name)
            if what is not None and tensor.num_elements > 1:
                left_out[what] += tensor.num_elements
    return [
        f"the files hold {num_elements / 1e9:.2f} billion parameters more, which "
        f"{architecture.class_name} does not load: {what}"
        for what, num_elements in left_out.items()
        if num_elements >= LEAST_WORTH_MENTIONING
    ]


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
