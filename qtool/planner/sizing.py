"""`sizing`: which models run on which GPUs, at which precision, with how much context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from qtool.events import OnEvent, ignore_events
from qtool.planner.estimate import (
    DEFAULT_CONTEXT,
    choose_context,
    choose_quants,
    default_quants,
    quantization_warnings,
    unmodelled_warnings,
)
from qtool.planner.fit import longest_context, usable_bytes, verdict
from qtool.planner.gpus import Gpu, read_catalogue, resolve_gpus, vram_class
from qtool.planner.memory import MemoryBudget
from qtool.planner.model import PlannedModel, open_model
from qtool.planner.records import MemoryPlan, Sizing, SizingRow, Workload
from qtool.planner.reference_models import reference_models
from qtool.planner.runtimes import kernel_notes

VRAM_CLASSES_GIB: Final = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)
GUIDE_QUANTS: Final = ("nf4-dq", "int8")
MODEL_QUANTS: Final = ("bf16", "int8", "nf4-dq")


@dataclass(frozen=True, slots=True)
class SizingRequest:
    """What the user asked for. No `models`: the guide of reference models.

    No `gpus` and no `vram_gib`: classes of memory size for the guide, common GPUs for models.
    """

    models: tuple[str, ...] = ()
    quants: tuple[str, ...] = ()
    context: int | None = None
    workload: Workload = field(default_factory=lambda: Workload(context=DEFAULT_CONTEXT))
    gpus: tuple[str, ...] = ()
    vram_gib: tuple[float, ...] = ()
    headroom_percent: float = 0


@dataclass(frozen=True, slots=True)
class _Device:
    """What a row is about: a GPU, or any GPU with `vram_gib` GiB."""

    gpu: Gpu
    vram_gib: float | None


def size_models(request: SizingRequest, on_event: OnEvent = ignore_events) -> Sizing:
    """Every model at every precision on every GPU, models first, then GPUs by usable memory.

    Raises:
        QtoolError: an unknown GPU; a model that is not there, damaged, or cannot be planned at a
            precision that was asked for.
    """
    devices = _choose_devices(request)
    references = () if request.models else reference_models()
    models = [reference.describe() for reference in references]
    models += [open_model(model, on_event) for model in request.models]
    warnings: list[str] = []
    rows: list[SizingRow] = []
    for model in models:
        rows += _model_rows(model, devices, request, warnings)
    return Sizing(
        rows=tuple(rows),
        context=request.context,
        workload=request.workload,
        reference_models={reference.size: reference.name for reference in references},
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _choose_devices(request: SizingRequest) -> list[_Device]:
    devices = [_Device(gpu, None) for gpu in resolve_gpus(request.gpus)]
    devices += [_Device(vram_class(gib), gib) for gib in request.vram_gib]
    if not devices and request.models:
        devices = [_Device(gpu, None) for gpu in read_catalogue() if gpu.common]
    elif not devices:
        devices = [_Device(vram_class(gib), gib) for gib in VRAM_CLASSES_GIB]
    return sorted(devices, key=lambda device: device.gpu.usable_bytes)


def _model_rows(
    model: PlannedModel, devices: Sequence[_Device], request: SizingRequest, warnings: list[str]
) -> list[SizingRow]:
    found = [*model.warnings, *unmodelled_warnings(model)]
    quants = choose_quants(model, request.quants, _default_quants(request), found)
    context = choose_context(model, request.context, found)
    workload = replace(request.workload, context=context)
    budgets = [MemoryBudget.of(model, quant, workload) for quant in quants]
    warnings += [f"{model.id}: {warning}" for warning in found]
    warnings += quantization_warnings(model, budgets)
    rows = []
    for budget in budgets:
        plan = budget.plan(workload)
        rows += [_row(model, budget, plan, device, request) for device in devices]
    return rows


def _default_quants(request: SizingRequest) -> tuple[str, ...]:
    if request.workload.mode != "generate":
        return default_quants(request.workload)
    return MODEL_QUANTS if request.models else GUIDE_QUANTS


def _row(
    model: PlannedModel,
    budget: MemoryBudget,
    plan: MemoryPlan,
    device: _Device,
    request: SizingRequest,
) -> SizingRow:
    available_bytes = usable_bytes(device.gpu, request.headroom_percent, plan.workload)
    return SizingRow(
        gpu=device.gpu,
        vram_gib=device.vram_gib,
        model=model.id,
        quant=plan.quant,
        verdict=verdict(plan.peak_bytes, available_bytes),
        peak_bytes=plan.peak_bytes,
        usable_bytes=available_bytes,
        max_context=longest_context(budget, plan.workload, available_bytes),
        decode_tok_s_ceiling=_decode_ceiling(budget, plan, device.gpu),
        gpus=plan.workload.gpus,
        notes=kernel_notes(plan.workload, device.gpu),
    )


def _decode_ceiling(budget: MemoryBudget, plan: MemoryPlan, gpu: Gpu) -> float | None:
    """Tokens per second, all sequences together, if reading memory were all there is to do.

    A mixture's sequences may all choose the same experts, so no more than those are sure to be
    read. GPUs that share every layer read at the same time; those that pass it on take turns.
    """
    workload = plan.workload
    if gpu.bandwidth_gb_s is None or workload.mode != "generate":
        return None
    step_bytes = budget.weights.read_per_token_bytes + budget.kv_cache_bytes(workload)
    at_once = workload.gpus if workload.split == "tensor" else 1
    return workload.batch * at_once * gpu.bandwidth_gb_s * 1e9 / step_bytes
