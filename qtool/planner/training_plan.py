"""A training step as a demand: the formulas of `training` in the components of a plan."""

from __future__ import annotations

import math
from dataclasses import replace

from qtool.planner.demand import Demand, Parts
from qtool.planner.lora import ALL_LINEAR
from qtool.planner.model import PlannedModel
from qtool.planner.records import Basis, Component, Workload
from qtool.planner.training import TrainingOptions, TrainingPeak, training_peak


def workload_peak(
    model: PlannedModel,
    quant: str,
    workload: Workload,
    *,
    base_bytes: int,
    buffer_bytes: int | None,
    int8_outliers: float | None,
) -> TrainingPeak:
    """The peak of one training step of the whole model, whose architecture is known.

    Args:
        base_bytes: per element of what is not packed when the model is loaded.
        buffer_bytes: what multiplying by a packed weight takes; None: bitsandbytes' whole weight.
        int8_outliers: see `TrainingOptions`.
    """
    assert model.architecture is not None
    options = training_options(model, quant, workload, base_bytes)
    options = replace(options, int8_outliers=int8_outliers)
    return training_peak(model.architecture, options, buffer_bytes=buffer_bytes)


def training_demand(peak: TrainingPeak, *, weights: Component, part: float) -> Demand:
    """The demand of one training step; a GPU of several does its layers' part of it.

    Args:
        weights: those that lie on the GPU, at their own precision.
        part: of the layers, that the GPU holds.
    """

    def share(num_bytes: int, basis: Basis = peak.basis) -> Component:
        return Component(math.ceil(num_bytes * part), basis)

    weights_bytes = weights.bytes + share(peak.upcast_bytes).bytes
    copies_bytes = peak.weight_copies_bytes + peak.dequant_buffer_bytes
    parts: Parts = {
        "weights": Component(weights_bytes, weights.basis),
        "activations": share(peak.activations_bytes),
        "logits": Component(peak.logits_bytes, "formula"),
        "adapters": share(peak.adapters_bytes, "exact"),
        "gradients": share(peak.gradients_bytes),
        "optimizer": share(peak.optimizer_bytes, "exact"),
        "dequant_buffer": Component(copies_bytes, peak.basis),
    }
    steady_bytes = sum(parts[name].bytes for name in ("weights", "adapters", "optimizer"))
    return Demand(parts, steady_bytes, steady_bytes, share(peak.paged_bytes).bytes)


def training_notes(
    model: PlannedModel, quant: str, workload: Workload, base_bytes: int
) -> tuple[str, ...]:
    """What preparing the model for training does that one may not expect."""
    assert model.architecture is not None
    options = training_options(model, quant, workload, base_bytes)
    return training_peak(model.architecture, options).notes


def training_options(
    model: PlannedModel, quant: str, workload: Workload, base_bytes: int
) -> TrainingOptions:
    """The workload in the words of the training formulas."""
    assert workload.mode != "generate"
    tuning = workload.tuning
    return TrainingOptions(
        mode=workload.mode,
        batch=workload.batch,
        context=workload.context,
        runtime=workload.runtime,
        quant=quant,
        lora_r=tuning.lora_r,
        lora_targets=tuning.lora_targets or ALL_LINEAR,
        lora_dropout=tuning.lora_dropout,
        adapter_dtype=tuning.adapter_dtype,
        optimizer=tuning.optimizer,
        gradient_checkpointing=tuning.gradient_checkpointing,
        master_dtype="fp32" if quant == "fp32" else "bf16",
        base_bytes=base_bytes,
        packed=frozenset(model.packable()),
    )
