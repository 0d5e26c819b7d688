"""Does a plan fit a GPU, how far does it go there, and what would make it fit.

Memory grows with context, batch and LoRA rank, so limits are found by narrowing them down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from qtool.planner.gpus import Gpu
from qtool.planner.memory import MemoryBudget
from qtool.planner.records import Fit, MemoryPlan, Verdict, Workload
from qtool.planner.runtimes import fit_notes, usable_share

TIGHT_SHARE: Final = 0.05  # of usable memory, less than which left over is "tight"
MAX_BATCH: Final = 1 << 20
MAX_CONTEXT: Final = 1 << 24
MAX_LORA_R: Final = 1 << 14


def usable_bytes(gpu: Gpu, headroom_percent: float, workload: Workload | None = None) -> int:
    """What the GPU offers, less the share that is to stay free and what the runtime leaves."""
    share = usable_share(workload) if workload else 1.0
    return int(gpu.usable_bytes * share * (1 - headroom_percent / 100))


def verdict(peak_bytes: int, available_bytes: int) -> Verdict:
    """ "yes", "tight" with under 5 % left, or "no"."""
    if peak_bytes > available_bytes:
        return "no"
    return "tight" if available_bytes - peak_bytes < TIGHT_SHARE * available_bytes else "yes"


def fit(budget: MemoryBudget, plan: MemoryPlan, gpu: Gpu, headroom_percent: float = 0) -> Fit:
    """The answer of the GPU, or of as many as the plan is for, to the plan."""
    workload = plan.workload
    available_bytes = usable_bytes(gpu, headroom_percent, workload)
    has_adapters = workload.mode in ("qlora", "lora")
    return Fit(
        gpu=gpu,
        usable_bytes=available_bytes,
        verdict=verdict(budget.needed_bytes(workload), available_bytes),
        max_context=longest_context(budget, workload, available_bytes),
        max_batch=largest_batch(budget, workload, available_bytes),
        max_lora_r=largest_lora_r(budget, workload, available_bytes) if has_adapters else None,
        gpus=workload.gpus,
        notes=fit_notes(
            budget.model,
            plan.quant,
            workload,
            gpu,
            weights_bytes=budget.weights.device_bytes,
        ),
    )


def longest_context(budget: MemoryBudget, workload: Workload, available_bytes: int) -> int | None:
    """Tokens per sequence that fit, at most what the model was made for; None if nothing limits."""
    made_for = budget.max_context
    longest = _largest(
        lambda context: budget.needed_bytes(replace(workload, context=context)),
        available_bytes,
        made_for or MAX_CONTEXT,
    )
    return None if made_for is None and longest == MAX_CONTEXT else longest


def largest_batch(budget: MemoryBudget, workload: Workload, available_bytes: int) -> int | None:
    """Sequences of the context that fit at once; None if nothing limits them."""
    largest = _largest(
        lambda batch: budget.needed_bytes(replace(workload, batch=batch)),
        available_bytes,
        MAX_BATCH,
    )
    return None if largest == MAX_BATCH else largest


def largest_lora_r(budget: MemoryBudget, workload: Workload, available_bytes: int) -> int | None:
    """The LoRA rank that fits; None if nothing limits it."""
    largest = _largest(
        lambda r: budget.peak_bytes(with_lora_r(workload, r)), available_bytes, MAX_LORA_R
    )
    return None if largest == MAX_LORA_R else largest


def with_lora_r(workload: Workload, lora_r: int) -> Workload:
    """The same workload with adapters of another rank."""
    return replace(workload, tuning=replace(workload.tuning, lora_r=lora_r))


def is_unfit(fits: Sequence[Fit]) -> bool:
    """Whether GPUs were asked about and none holds the plan."""
    return bool(fits) and all(answer.verdict == "no" for answer in fits)


def _largest(size: Callable[[int], int], available_bytes: int, limit: int) -> int:
    """The largest number from 0 to `limit` whose size, which grows with it, is available.

    Memory is nearly proportional to what is asked for, so every other guess is where a straight
    line would end: a handful of guesses, where bisection alone takes twenty.
    """
    low, high = 1, limit
    low_bytes, high_bytes = size(low), size(high)
    if low_bytes > available_bytes:
        return 0
    if high_bytes <= available_bytes:
        return limit
    interpolates = True
    while high - low > 1:
        middle = (low + high) // 2
        if interpolates:
            share = (available_bytes - low_bytes) * (high - low) // (high_bytes - low_bytes)
            middle = min(low + max(share, 1), high - 1)
        num_bytes = size(middle)
        if num_bytes <= available_bytes:
            low, low_bytes = middle, num_bytes
        else:
            high, high_bytes = middle, num_bytes
        interpolates = not interpolates
    return low
