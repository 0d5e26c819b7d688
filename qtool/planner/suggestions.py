"""What would make a plan smaller, or make it fit: one change each, those that cost least first.

A change is worth naming if it lowers the peak; where GPUs were asked about, if the roomiest of them
then holds the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from qtool.planner.fit import is_unfit, largest_batch, largest_lora_r, longest_context, with_lora_r
from qtool.planner.memory import MemoryBudget
from qtool.planner.records import Fit, MemoryPlan, Suggestion, Workload

SHORTEST_CONTEXT: Final = 256  # a shorter one is not worth suggesting
CONTEXT_STEP: Final = 256
LEAST_LORA_R: Final = 4
EIGHT_BIT_OPTIMIZERS: Final = {"adamw": "adamw-8bit", "lion": "lion-8bit"}
GPU_COUNTS: Final = (2, 4, 8, 16)


def suggest(
    budget: MemoryBudget, plan: MemoryPlan, fits: Sequence[Fit], others: Sequence[MemoryPlan]
) -> tuple[Suggestion, ...]:
    """Changes that lower the plan's peak.

    Where GPUs were asked about: only if none holds the plan, and only changes after which the
    roomiest does. Else the precisions that take less.

    Args:
        others: plans at other precisions under the same workload.
    """
    if fits and not is_unfit(fits):
        return ()
    room_bytes = max((answer.usable_bytes for answer in fits), default=plan.peak_bytes - 1)
    changes = list(_settings(budget, plan)) + _precisions(plan, others)
    if fits:
        changes += _limits(budget, plan, room_bytes)
        changes += _devices(budget, plan, room_bytes)
    least_bytes = plan.peak_bytes - room_bytes
    return tuple(change for change in changes if change.saves_bytes >= max(least_bytes, 1))


def _precisions(plan: MemoryPlan, others: Sequence[MemoryPlan]) -> list[Suggestion]:
    return [
        Suggestion(other.quant, plan.peak_bytes - other.peak_bytes)
        for other in sorted(others, key=lambda other: -other.peak_bytes)
        if other.peak_bytes < plan.peak_bytes
    ]


def _settings(budget: MemoryBudget, plan: MemoryPlan) -> Iterator[Suggestion]:
    """Changes of how it is trained, which the result hardly feels."""
    workload = plan.workload
    if workload.mode == "generate":
        return
    tuning = workload.tuning
    changed = []
    if not tuning.gradient_checkpointing:
        changed.append(("gradient checkpointing", replace(tuning, gradient_checkpointing=True)))
    if tuning.optimizer in EIGHT_BIT_OPTIMIZERS:
        optimizer = EIGHT_BIT_OPTIMIZERS[tuning.optimizer]
        changed.append((optimizer, replace(tuning, optimizer=optimizer)))
    if workload.mode != "full" and tuning.adapter_dtype == "fp32":
        changed.append(("bf16 adapters", replace(tuning, adapter_dtype="bf16")))
    for change, less in changed:
        smaller = replace(workload, tuning=less)
        yield _saving(change, budget.on(smaller), smaller, plan)


def _limits(budget: MemoryBudget, plan: MemoryPlan, room_bytes: int) -> list[Suggestion]:
    """A shorter context, a smaller batch, a lower rank: as much as fits."""
    workload, found = plan.workload, []
    context = longest_context(budget, workload, room_bytes) or 0
    context -= context % CONTEXT_STEP
    if SHORTEST_CONTEXT <= context < workload.context:
        smaller = replace(workload, context=context)
        found.append((f"context {workload.context} -> {context}", smaller))
    batch = largest_batch(budget, workload, room_bytes) or 0
    if 0 < batch < workload.batch:
        found.append((f"batch {workload.batch} -> {batch}", replace(workload, batch=batch)))
    if workload.mode in ("qlora", "lora"):
        r = largest_lora_r(budget, workload, room_bytes) or 0
        if LEAST_LORA_R <= r < workload.tuning.lora_r:
            found.append((f"LoRA r {workload.tuning.lora_r} -> {r}", with_lora_r(workload, r)))
    return [_saving(change, budget, smaller, plan) for change, smaller in found]


def _devices(budget: MemoryBudget, plan: MemoryPlan, room_bytes: int) -> list[Suggestion]:
    """More GPUs of the same kind, or layers that stay in the CPU's memory."""
    workload, found = plan.workload, []
    # `finetune` has all of the model on each GPU.
    spreads = workload.mode == "generate" or workload.runtime != "qtool"
    for gpus in GPU_COUNTS if spreads else ():
        if gpus > workload.gpus:
            more = replace(workload, gpus=gpus)
            saving = _saving(f"{gpus} GPUs", budget.on(more), more, plan)
            if plan.peak_bytes - saving.saves_bytes <= room_bytes:
                found.append(saving)
                break
    return found + _offload(budget, plan, room_bytes)


def _offload(budget: MemoryBudget, plan: MemoryPlan, room_bytes: int) -> list[Suggestion]:
    """Layers whose weights stay in host memory and come to the GPU one by one as they run."""
    architecture, workload = budget.model.architecture, plan.workload
    if architecture is None or workload.mode != "generate" or workload.gpus > 1:
        return []
    layer_bytes = [budget.weights.place_bytes.get(i, 0) for i in range(architecture.num_layers)]
    passing_bytes, saved_bytes = max(layer_bytes, default=0), 0
    for count, num_bytes in enumerate(reversed(layer_bytes), start=1):
        saved_bytes += num_bytes
        if plan.peak_bytes - saved_bytes + passing_bytes <= room_bytes:
            change = f"{count} of {len(layer_bytes)} layers in CPU memory (slow)"
            return [Suggestion(change, saved_bytes - passing_bytes)]
    return []


def _saving(change: str, budget: MemoryBudget, smaller: Workload, plan: MemoryPlan) -> Suggestion:
    return Suggestion(change, plan.peak_bytes - budget.peak_bytes(smaller))
