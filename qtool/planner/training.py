"""The memory of a training step beside the weights: adapters, gradients, optimizer, activations.

    training_peak(architecture, TrainingOptions(mode="qlora", batch=1, context=2048)).total_bytes

Follows transformers' Trainer with `bf16=True`: forward under bf16 autocast, backward outside,
gradients freed after each optimizer step, no padding in the batch, attention as the model chooses
it (fused where it can be). Runtime "transformers" computes the loss by ForCausalLMLoss, "qtool" as
`qtool finetune` does, without whole logits (`training_loss`). Modes:

- "full": parameters and optimizer states in the dtype the model was loaded in, bf16 by default;
  `master_dtype="fp32"` holds parameters, gradients and states in float32, and bf16 copies of the
  weights while a step runs.
- "lora": a frozen 16-bit base; adapters in float32, PEFT's default, or bf16.
- "qlora": a frozen packed base. With runtime "transformers" bitsandbytes' layers after PEFT's
  prepare_model_for_kbit_training, which makes float32 of all that is not packed; with runtime
  "qtool" its packed layers, each with its adapter one step of autograd.

The peak is the largest of a few moments; a component counts what is alive at that moment.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Final, Literal

from qtool.architecture import Architecture
from qtool.planner.lora import ALL_LINEAR, Targets, features, target_layers
from qtool.planner.optimizers import find_optimizer
from qtool.planner.training_layers import (
    BF16,
    FLOAT32_SCALES,
    FP32,
    NORM_BACKWARD_COPIES,
    Alive,
    Layer,
    LayerKinds,
    LayerRun,
    Precision,
    layer_kinds,
    training_layers,
)
from qtool.planner.training_loss import PiecewiseLoss
from qtool.planner.units import GIB

TrainingMode = Literal["qlora", "lora", "full"]
FloatName = Literal["fp32", "bf16"]
FLOAT_BYTES: Final[dict[FloatName, int]] = {"fp32": FP32, "bf16": BF16}

# ForCausalLMLoss per logit (transformers/loss/loss_utils.py): bf16, float32, log-softmax when the
# loss is computed; log-softmax, its gradient, that of the float32 logits in the backward pass.
LOSS_FORWARD_BYTES: Final = 10
LOSS_BACKWARD_BYTES: Final = 12
# The tanh of a final soft cap, kept in bf16.
SOFT_CAPPED: Final = frozenset({"gemma2"})

POSITION_BYTES: Final = 24  # token id, label and position, int64 each
NESTED_ABSMAX_BYTES: Final = 8  # double quantization: float32 absmax, and before its offset
BLOCK_ELEMENTS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """How a model is trained. `context` is tokens per sequence, `batch` sequences per pass.

    `accumulates_gradients`: more than one pass per optimizer step, so gradients never go away.
    `master_dtype` matters to "full" alone, `quant` to "qlora" alone. `base_bytes`: per element of
    what is not packed, as it is loaded. `int8_outliers`: the share of the columns of an MLP's last
    layer that hold one, where LLM.int8() multiplies; else None. `packed`: names of the weights that
    "qlora" packs; None: those of the default rule.
    """

    mode: TrainingMode
    batch: int
    context: int
    runtime: str = "transformers"
    quant: str = "nf4-dq"
    lora_r: int = 16
    lora_targets: Targets = ALL_LINEAR
    lora_dropout: float = 0.05
    adapter_dtype: FloatName = "fp32"
    optimizer: str = "adamw"
    gradient_checkpointing: bool = True
    accumulates_gradients: bool = False
    master_dtype: FloatName = "bf16"
    base_bytes: int = BF16
    int8_outliers: float | None = None
    packed: frozenset[str] | None = None

    @property
    def is_prepared(self) -> bool:
        """Whether prepare_model_for_kbit_training has been here."""
        return self.mode == "qlora" and self.runtime == "transformers"

    @property
    def stream_bytes(self) -> int:
        """Per element of the residual stream, and of weights that are not packed."""
        if self.mode == "full":
            return FLOAT_BYTES[self.master_dtype]
        is_float32 = self.is_prepared or (self.mode == "lora" and self.base_bytes == FP32)
        return FP32 if is_float32 else BF16

    @property
    def is_own(self) -> bool:
        """Whether `qtool finetune` trains."""
        return self.runtime == "qtool"


@dataclass(frozen=True, slots=True)
class TrainingPeak:
    """Bytes alive at the peak of a training step, beside the weights at their own precision.

    `upcast_bytes` is what weights take beyond that precision because preparing the model makes them
    float32, `weight_copies_bytes` the bf16 copies that autocast makes of float32 ones. Of
    `optimizer_bytes` `paged_bytes` may lie outside the GPU. `notes` are lines for the reader.
    """

    moment: str
    adapters_bytes: int
    upcast_bytes: int
    optimizer_bytes: int
    paged_bytes: int
    gradients_bytes: int
    weight_copies_bytes: int
    activations_bytes: int
    logits_bytes: int
    dequant_buffer_bytes: int
    num_trainable: int
    basis: Literal["formula", "heuristic"]
    notes: tuple[str, ...] = ()

    @property
    def resident_bytes(self) -> int:
        """What stays between steps: adapters, upcasts, optimizer states."""
        return self.adapters_bytes + self.upcast_bytes + self.optimizer_bytes

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return (
            self.resident_bytes
            + self.gradients_bytes
            + self.weight_copies_bytes
            + self.activations_bytes
            + self.logits_bytes
            + self.dequant_buffer_bytes
        )


def training_peak(
    architecture: Architecture, options: TrainingOptions, *, buffer_bytes: int | None = None
) -> TrainingPeak:
    """The peak of a training step in its steady state, optimizer states allocated.

    Args:
        buffer_bytes: the most that multiplying by a packed weight takes, of one that is multiplied
            in pieces; None: what bitsandbytes does, which makes a 16-bit copy of the whole weight.

    Raises:
        QtoolError: "usage" for an unknown optimizer, or a LoRA target that matches nothing.
    """
    run = _Run.of(architecture, options, buffer_bytes)
    name, alive = max(run.moments(), key=lambda moment: moment[1].total)
    optimizer_bytes, paged_bytes = run.optimizer_bytes()
    return TrainingPeak(
        moment=name,
        adapters_bytes=run.adapters_bytes,
        upcast_bytes=run.upcast_bytes,
        optimizer_bytes=optimizer_bytes,
        paged_bytes=paged_bytes,
        gradients_bytes=alive.gradients,
        weight_copies_bytes=alive.weight_copies,
        activations_bytes=alive.activations,
        logits_bytes=alive.logits,
        dequant_buffer_bytes=alive.buffer,
        num_trainable=run.num_trainable,
        basis="formula" if run.is_known else "heuristic",
        notes=tuple(run.notes()),
    )


def _buffer_rule(quant: str, buffer_bytes: int | None) -> Callable[[int], int]:
    """Elements of a packed weight -> what it takes in floating point during one product."""
    if buffer_bytes is not None:
        return lambda num_elements: min(buffer_bytes, BF16 * num_elements)
    nested = NESTED_ABSMAX_BYTES if quant.endswith("-dq") else 0
    return lambda num_elements: BF16 * num_elements + nested * -(-num_elements // BLOCK_ELEMENTS)


@dataclass(frozen=True, slots=True)
class _Trained:
    """What a mode trains of a model, whatever the workload.

    `shapes` of what is trained in full, and whether each is an embedding's weight; `adapted` are
    (inputs, outputs) of the layers with adapters. Both with how often they occur.
    """

    packed: frozenset[str]
    adapted: frozenset[str]
    layers: LayerKinds
    num_unpacked: int
    shapes: Mapping[tuple[tuple[int, ...], bool], int]
    widths: Mapping[tuple[int, int], int]

    def tensors(self, lora_r: int) -> Iterable[tuple[tuple[int, ...], bool, int]]:
        """Shape of what is trained, whether it is an embedding's weight, and how many there are."""
        for (shape, is_embedding), count in self.shapes.items():
            yield shape, is_embedding, count
        for (inputs, outputs), count in self.widths.items():
            yield (lora_r, inputs), False, count
            yield (outputs, lora_r), False, count


@lru_cache(maxsize=4)  # limits are found by asking a hundred times about one model
def _find_trained(
    architecture: Architecture,
    mode: TrainingMode,
    lora_targets: Targets,
    packed: frozenset[str] | None,
) -> _Trained:
    is_full = mode == "full"
    targets = () if is_full else target_layers(architecture, lora_targets)
    adapted = frozenset(target.name for target in targets)
    if packed is None:
        packed = frozenset(architecture.quantizable())
    stored = [tensor for tensor in architecture.tensors.values() if tensor.tied_to is None]
    return _Trained(
        packed=packed,
        adapted=adapted,
        layers=layer_kinds(architecture, adapted),
        num_unpacked=sum(math.prod(t.shape) for t in stored if t.name not in packed),
        shapes=Counter((t.shape, t.kind == "embedding") for t in stored if is_full),
        widths=Counter(features(target) for target in targets),
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """A model and how it is trained; the sizes that the moments are made of."""

    architecture: Architecture
    options: TrainingOptions
    trained: _Trained
    num_trainable: int
    layers: tuple[LayerRun, ...]
    stream: int
    trained_bytes: int  # per element of what is trained, and of its gradient

    @classmethod
    def of(
        cls, architecture: Architecture, options: TrainingOptions, buffer_bytes: int | None
    ) -> _Run:
        is_full = options.mode == "full"
        named = options.lora_targets
        targets = named if isinstance(named, str) else tuple(named)
        packed = options.packed if options.mode == "qlora" else frozenset()
        trained = _find_trained(architecture, options.mode, targets, packed)
        precision = Precision(
            stream=options.stream_bytes,
            is_full=is_full,
            is_bitsandbytes=options.is_prepared,
            is_own=options.is_own,
            trained=FLOAT_BYTES[options.master_dtype if is_full else options.adapter_dtype],
            dropout=options.lora_dropout > 0,
            lora_r=options.lora_r,
            packed=trained.packed,
            adapted=trained.adapted,
            buffer_bytes=_buffer_rule(options.quant, buffer_bytes),
            int8_outliers=options.int8_outliers,
        )
        sizes = trained.tensors(options.lora_r)
        return cls(
            architecture=architecture,
            options=options,
            trained=trained,
            num_trainable=sum(count * math.prod(shape) for shape, _, count in sizes),
            layers=training_layers(
                architecture,
                trained.layers,
                precision,
                batch=options.batch,
                context=options.context,
            ),
            stream=precision.stream,
            trained_bytes=precision.trained,
        )

    # -- resident ---------------------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        return self.options.mode == "full"

    @property
    def is_known(self) -> bool:
        known = self.layers and all(run.layer.is_known for run in self.layers)
        return bool(known) and not self.architecture.unmodelled

    @property
    def _has_layer_norm(self) -> bool:
        """Whether norms have a bias: those put out float32 under autocast."""
        tensors = self.architecture.tensors.values()
        norms = {tensor.module_name for tensor in tensors if tensor.kind == "norm"}
        return any(tensor.kind == "bias" and tensor.module_name in norms for tensor in tensors)

    @property
    def _has_experts(self) -> bool:
        return any(tensor.experts_per_token for tensor in self.architecture.tensors.values())

    @property
    def adapters_bytes(self) -> int:
        return 0 if self.is_full else self.num_trainable * self.trained_bytes

    @property
    def upcast_bytes(self) -> int:
        """What preparing adds to each unpacked parameter, nothing where it is float32 already."""
        added = self.stream - self.options.base_bytes if self.options.is_prepared else 0
        return added * self.trained.num_unpacked

    def optimizer_bytes(self) -> tuple[int, int]:
        """All states, and those of them that may be paged out."""
        optimizer = find_optimizer(self.options.optimizer)
        total = paged = 0
        for shape, is_embedding, count in self.trained.tensors(self.options.lora_r):
            state = optimizer.state_bytes(shape, self.trained_bytes, is_embedding=is_embedding)
            total += count * state
            paged += count * state if optimizer.is_paged_out(shape) else 0
        return total, paged

    # -- moments ----------------------------------------------------------------------------------

    def moments(self) -> Iterable[tuple[str, Alive]]:
        """Where the peak may lie, in the order of a step."""
        yield from self._own_loss() if self.options.is_own else self._loss_of_logits()
        yield "backward of the final norm", self._final_norm()
        yield from self._layers()
        yield "end of the backward pass", self._end()

    @property
    def tokens(self) -> int:
        return self.options.batch * self.options.context

    @property
    def _outside_layers(self) -> Alive:
        """Alive all through a step: integer inputs, rotary cosines and sines, and the embeddings,
        which are made to require gradients where only adapters are trained."""
        rotary = 2 * self.stream * self.architecture.head_dim * self.options.context
        is_leaf = not self.is_full and self.stream == BF16  # in float32 the first norm keeps them
        leaf = self.stream * self.architecture.hidden_size if is_leaf else 0
        if self.options.gradient_checkpointing:
            leaf = 0  # the first checkpoint
        return Alive(self.tokens * (POSITION_BYTES + leaf) + rotary)

    def _keeps(self, layer: Layer) -> Alive:
        """What a layer of the forward pass leaves for the backward pass."""
        is_recomputed = self.options.gradient_checkpointing
        return Alive(layer.checkpoint) if is_recomputed else layer.keeps

    def _kept(self) -> list[Alive]:
        """What is kept before each run of layers, and at last by all of them."""
        kept = (self._keeps(run.layer) * run.num_layers for run in self.layers)
        return list(accumulate(kept, initial=self._outside_layers))

    @property
    def _all_gradients(self) -> int:
        return self.num_trainable * self.trained_bytes

    def _made(self, gradients: int) -> Alive:
        """The gradients that exist when the pass at hand has made `gradients` of them."""
        accumulated = self.options.accumulates_gradients
        return Alive(gradients=self._all_gradients if accumulated else gradients)

    @property
    def _head_elements(self) -> int:
        return self.architecture.hidden_size * self.architecture.vocab_size

    @property
    def _cached_copies(self) -> int:
        """Copies of trained weights that only autocast's cache holds, until the loss is there."""
        if not self.options.gradient_checkpointing:
            return 0
        return sum(run.num_layers * run.layer.cached_copies for run in self.layers)

    def _loss_of_logits(self) -> Iterable[tuple[str, Alive]]:
        yield "loss", self._loss(LOSS_FORWARD_BYTES) + Alive(weight_copies=self._cached_copies)
        yield "backward of the loss", self._loss(LOSS_BACKWARD_BYTES)

    def _own_loss(self) -> Iterable[tuple[str, Alive]]:
        architecture = self.architecture
        loss = PiecewiseLoss(
            tokens=self.tokens,
            hidden=architecture.hidden_size,
            vocabulary=architecture.vocab_size,
            state=FP32 if self._has_layer_norm else self.stream,
            weight=self.stream,
            is_trained=self.is_full,
            is_capped=architecture.model_type in SOFT_CAPPED,
            is_tiled=self._has_experts,
        )
        scaled = FP32 if architecture.model_type in FLOAT32_SCALES else self.stream
        normed = FP32 + (scaled if self.is_full else 0)
        kept = self._kept()[-1] + Alive(self.tokens * normed * architecture.hidden_size)
        for name, alive in loss.moments():
            cached = self._cached_copies if name == "loss" else 0
            yield name, kept + alive + Alive(weight_copies=cached) + self._made(0)

    def _loss(self, bytes_per_logit: int) -> Alive:
        hidden = self.architecture.hidden_size
        trained = (self.stream + BF16) * hidden if self.is_full else 0
        if self.architecture.model_type in SOFT_CAPPED:
            bytes_per_logit += BF16
        last = Alive(
            activations=self.tokens * (FP32 * hidden + trained),  # the final norm's
            weight_copies=BF16 * self._head_elements if self.stream == FP32 else 0,
            logits=self.tokens * bytes_per_logit * self.architecture.vocab_size,
        )
        return self._kept()[-1] + last + self._made(0)

    def _final_norm(self) -> Alive:
        norm = (NORM_BACKWARD_COPIES + 1) * FP32 * self.architecture.hidden_size * self.tokens
        head = self._head_elements * self.trained_bytes if self.is_full else 0
        return self._kept()[-1] + Alive(norm) + self._made(head)

    def _layers(self) -> Iterable[tuple[str, Alive]]:
        """Each layer's passes; with checkpoints it runs forward again beside its own.

        Along a run of layers that are alike memory rises or falls evenly, so its ends tell.
        """
        kept = self._kept()
        made = self._all_gradients - sum(
            run.num_layers * run.layer.gradients for run in self.layers
        )
        if self.is_full and not self.architecture.tied_embeddings:
            made -= self._embedding_gradients
        end = sum(run.num_layers for run in self.layers)
        for before, (layer, count) in zip(reversed(kept[:-1]), reversed(self.layers), strict=True):
            is_recomputed = self.options.gradient_checkpointing
            peak = layer.recomputed_peak if is_recomputed else layer.peak
            if self.options.accumulates_gradients:
                peak = replace(peak, gradients=0)
            for index in sorted({0, count - 1}, reverse=True):
                kept_layers = index + 1 if is_recomputed else index
                made_here = made + (count - 1 - index) * layer.gradients
                alive = before + self._keeps(layer) * kept_layers + peak + self._made(made_here)
                yield f"backward of layer {end - count + index}", alive
            made += count * layer.gradients
            end -= count

    @property
    def _embedding_gradients(self) -> int:
        """Of embeddings, which the backward pass reaches last."""
        shapes = self.trained.shapes.items()
        elements = sum(math.prod(shape) * n for (shape, embeds), n in shapes if embeds)
        return elements * self.trained_bytes

    def _end(self) -> Alive:
        """All gradients; a tied head's and the embedding's own are summed last."""
        is_tied = self.is_full and self.architecture.tied_embeddings
        second = self._head_elements * self.trained_bytes if is_tied else 0
        return Alive(gradients=self._all_gradients + second)

    # -- lines for the reader ---------------------------------------------------------------------

    def notes(self) -> Iterable[str]:
        """What a reader would not expect."""
        has_experts = self._has_experts
        if self.options.is_prepared and self.upcast_bytes:
            extra = self.upcast_bytes / GIB
            yield (
                "prepare_model_for_kbit_training holds embeddings, head, norms and whatever else "
                f"is not packed in fp32: +{extra:.2f} GiB"
            )
            if has_experts:
                yield "bitsandbytes leaves the fused experts unpacked, so they are in fp32 too"
        if has_experts and self.options.is_own:
            yield "routers have a loss of their own, so TRL computes all of it, in tiles"
        if has_experts and not self.is_full:
            yield "PEFT does not adapt fused experts: LoRA trains the other linear layers alone"
        if find_optimizer(self.options.optimizer).is_paged:
            yield "paged optimizer states are counted as if all of them were on the GPU"
        if not self.is_known:
            yield (
                "activations of experts, state-space and other mixers, vision: from the layers' "
                "widths alone"
            )


__all__ = ["TrainingMode", "TrainingOptions", "TrainingPeak", "training_peak"]
