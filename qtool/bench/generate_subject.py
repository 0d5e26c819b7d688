"""The model that is measured: a checkpoint, or a shape with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Self, cast

from qtool.bench.generate_records import Size
from qtool.bench.model_shapes import FULL_LAYERS, read_model_shape
from qtool.bench.step_bytes import StepBytes
from qtool.errors import Option, QtoolError
from qtool.events import Note, OnEvent
from qtool.formats.precisions import (
    DEFAULT_PRECISION,
    QUANTIZED_PRECISIONS,
    Precision,
    QuantizedPrecision,
)
from qtool.planner.model import PlannedModel, open_model
from qtool.runtime.loading import LoadedModel, LoadOptions, load_model
from qtool.runtime.random_model import build_random_model
from qtool.runtime.requirements import as_packed, packed_mixture

LAYERS: Final = "num_hidden_layers"  # of a config.json
COMPUTE_DTYPES: Final[Mapping[str, str]] = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
}


@dataclass(frozen=True, slots=True)
class Subject:
    """What is loaded, and what a step of decoding has to read of it.

    `model` is a checkpoint; None stands for random weights of the config that `step` knows. `quant`
    names the precision that it runs in; `packs` is what it is packed in while it is loaded, None
    where it is packed already or stays as it is. `full_layers` is set for a shape that has few of
    its model's layers.
    """

    label: str
    quant: str
    step: StepBytes
    device: str
    model: str | None = None
    packs: QuantizedPrecision | None = None
    full_layers: int | None = None

    def load(self, on_event: OnEvent) -> LoadedModel:
        """The model on its device."""
        if self.model is None:
            on_event(Note(f"making random weights of {self.label} on the device"))
            return build_random_model(
                self.step.model.config,
                cast(Precision, self.quant),
                device=self.device,
                head_precision=self.step.head_precision,
                model_id=self.label,
            )
        on_event(Note(f"loading {self.label}"))
        options = LoadOptions(
            quant=self.packs,
            compute_dtype=COMPUTE_DTYPES.get(self.quant),
            device=self.device,
            head_quant=self._packed_head,
        )
        return load_model(self.model, options, on_event=on_event)

    @property
    def _packed_head(self) -> QuantizedPrecision | None:
        wanted = self.step.head_precision
        return wanted if wanted in QUANTIZED_PRECISIONS else None

    def step_bytes(self, size: Size) -> int:
        """What a step reads halfway through the new tokens."""
        context = size.prompt_tokens + size.new_tokens // 2
        return self.step.count(batch=size.batch, context=context)

    @property
    def num_layers(self) -> int:
        """Of the model as it is measured."""
        return int(self.step.model.config[LAYERS])

    @property
    def num_fewer_layers(self) -> int:
        """Half of them, to tell the layers' time from the rest."""
        return self.num_layers // 2

    def with_layers(self, num_layers: int) -> Self:
        """The same shape with another number of layers."""
        config = {**self.step.model.config, LAYERS: num_layers}
        step = StepBytes.of_config(config, self.step.precision, self.step.head_precision)
        return replace(self, label=f"{self.label}, {num_layers} layers", step=step)

    def with_fewer_layers(self) -> Self | None:
        """With `num_fewer_layers`; None for a whole model."""
        return self.with_layers(self.num_fewer_layers) if self.full_layers is not None else None


def choose_subject(
    *,
    model: str | None,
    shape: str,
    precision: Precision | None,
    head_precision: Precision | None,
    device: str,
) -> Subject:
    """The checkpoint `model`, or without it the shape `shape`.

    Raises:
        QtoolError: neither is known, or it does not run in `precision`.
    """
    known = (*COMPUTE_DTYPES, *QUANTIZED_PRECISIONS)
    for option, word in (("quant", precision), ("head_quant", head_precision)):
        if word is not None and word not in known:
            raise QtoolError(
                (Option(option, word), ": qtool runs no such layers"),
                kind="usage",
                hint=f"one of {', '.join(known)}",
            )
    if model is not None:
        return _checkpoint_subject(model, precision, head_precision, device)
    label, config = read_model_shape(shape, option="shape")
    chosen = precision or DEFAULT_PRECISION
    return Subject(
        label=label,
        quant=chosen,
        step=StepBytes.of_config(config, chosen, head_precision),
        device=device,
        full_layers=FULL_LAYERS.get(label),
    )


def _checkpoint_subject(
    model: str, precision: Precision | None, head_precision: Precision | None, device: str
) -> Subject:
    planned = open_model(model)
    quant = precision or planned.stored_precision or DEFAULT_PRECISION
    _refuse_other_than_stored(planned, quant)
    planned.check_precision(quant)
    packs = quant in QUANTIZED_PRECISIONS and not planned.packed
    if packs and planned.stored_precision is None:
        _refuse_mixture(planned, is_asked_for=precision is not None)
    return Subject(
        label=planned.id,
        quant=quant,
        step=StepBytes(planned, quant, head_precision),
        device=device,
        model=model,
        packs=cast(QuantizedPrecision, quant) if packs else None,
    )


def _refuse_other_than_stored(planned: PlannedModel, quant: str) -> None:
    """What is packed runs as it is; the planner would say that it cannot plan."""
    stored = planned.stored_precision
    if stored is not None and planned.stored_format is None and quant != stored:
        raise QtoolError(
            (
                f"{planned.id} is quantized already ({stored}), so it does not run with ",
                Option("quant", quant),
            ),
            kind="unsupported",
            hint=as_packed(quant),
        )


def _refuse_mixture(planned: PlannedModel, *, is_asked_for: bool) -> None:
    """Of those that are to be packed; `is_asked_for` where the user said so."""
    if planned.architecture is None or planned.architecture.experts is None:
        return
    default = "" if is_asked_for else f"; without it layers are packed in {DEFAULT_PRECISION}"
    hint = (Option("quant", "bf16"), f" measures it unpacked{default}")
    raise packed_mixture(planned.id, planned.architecture, hint)
