"""Does a plan fit a GPU, how far does it go there, and what would make it fit.

Memory grows with context and with batch, so limits are found by bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from qtool.planner.gpus import Gpu
from qtool.planner.memory import MemoryBudget
from qtool.planner.records import Fit, MemoryPlan, Suggestion, Verdict

TIGHT_SHARE: Final = 0.05  # of usable memory, less than which left over is "tight"
MAX_BATCH: Final = 1 << 20
MAX_CONTEXT: Final = 1 << 24
SHORTEST_CONTEXT: Final = 256  # a shorter one is not worth suggesting
CONTEXT_STEP: Final = 256


def usable_bytes(gpu: Gpu, headroom_percent: float) -> int:
    """What the GPU offers, less the share that is to stay free."""
    return int(gpu.usable_bytes * (1 - headroom_percent / 100))


def verdict(peak_bytes: int, available_bytes: int) -> Verdict:
    """ "yes", "tight" with under 5 % left, or "no"."""
    if peak_bytes > available_bytes:
        return "no"
    return "tight" if available_bytes - peak_bytes < TIGHT_SHARE * available_bytes else "yes"


def fit(budget: MemoryBudget, plan: MemoryPlan, gpu: Gpu, headroom_percent: float = 0) -> Fit:
    """The GPU's answer to the plan."""
    available_bytes = usable_bytes(gpu, headroom_percent)
    return Fit(
        gpu=gpu,
        usable_bytes=available_bytes,
        verdict=verdict(plan.peak_bytes, available_bytes),
        max_context=longest_context(budget, plan.batch, available_bytes),
        max_batch=largest_batch(budget, plan.context, available_bytes),
    )


def longest_context(budget: MemoryBudget, batch: int, available_bytes: int) -> int | None:
    """Tokens per sequence that fit, at most what the model was made for; None if nothing limits."""
    made_for = budget.max_context
    longest = _largest(
        lambda context: budget.peak_bytes(context=context, batch=batch) <= available_bytes,
        made_for or MAX_CONTEXT,
    )
    return None if made_for is None and longest == MAX_CONTEXT else longest


def largest_batch(budget: MemoryBudget, context: int, available_bytes: int) -> int | None:
    """Sequences of `context` tokens that fit at once; None if nothing limits them."""
    largest = _largest(
        lambda batch: budget.peak_bytes(context=context, batch=batch) <= available_bytes, MAX_BATCH
    )
    return None if largest == MAX_BATCH else largest


def is_unfit(fits: Sequence[Fit]) -> bool:
    """Whether GPUs were asked about and none holds the plan."""
    return bool(fits) and all(answer.verdict == "no" for answer in fits)


def suggest(
    budget: MemoryBudget, plan: MemoryPlan, fits: Sequence[Fit], others: Sequence[MemoryPlan]
) -> tuple[Suggestion, ...]:
    """Changes that lower the plan's peak, those that cost least quality first.

    Where GPUs were asked about: only if none holds the plan, and only changes after which the
    roomiest does. Else the precisions that take less.

    Args:
        others: plans at other precisions with the same context and batch.
    """
    if fits and not is_unfit(fits):
        return ()
    room_bytes = max((answer.usable_bytes for answer in fits), default=plan.peak_bytes - 1)
    precisions = [
        Suggestion(f"--quant {other.quant}", plan.peak_bytes - other.peak_bytes)
        for other in sorted(others, key=lambda other: -other.peak_bytes)
        if other.peak_bytes < plan.peak_bytes and other.peak_bytes <= room_bytes
    ]
    if not fits:
        return tuple(precisions)
    return (*precisions, *_shorter(budget, plan, room_bytes), *_fewer(budget, plan, room_bytes))


def _shorter(budget: MemoryBudget, plan: MemoryPlan, room_bytes: int) -> list[Suggestion]:
    context = longest_context(budget, plan.batch, room_bytes) or 0
    context -= context % CONTEXT_STEP
    if context < SHORTEST_CONTEXT or context >= plan.context:
        return []
    saves_bytes = plan.peak_bytes - budget.peak_bytes(context=context, batch=plan.batch)
    return [Suggestion(f"--context {context}", saves_bytes)]


def _fewer(budget: MemoryBudget, plan: MemoryPlan, room_bytes: int) -> list[Suggestion]:
    batch = largest_batch(budget, plan.context, room_bytes) or 0
    if not 0 < batch < plan.batch:
        return []
    saves_bytes = plan.peak_bytes - budget.peak_bytes(context=plan.context, batch=batch)
    return [Suggestion(f"--batch {batch}", saves_bytes)]


def _largest(holds: Callable[[int], bool], limit: int) -> int:
    """The largest number from 0 to `limit` for which `holds`, which turns false once for all."""
    low, high = 0, limit + 1  # holds at low (0 needs nothing), does not at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
