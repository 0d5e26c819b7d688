"""Peak memory against context: what a picture of an estimate is drawn from.

curves = context_curves(model, estimate)
curves.precisions[0].points[-1].peak_bytes
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from qtool.planner.fit import longest_context
from qtool.planner.memory import MemoryBudget
from qtool.planner.model import PlannedModel
from qtool.planner.records import Estimate, ModelFacts, Workload

NUM_POINTS: Final = 61
SHORTEST_CONTEXT: Final = 256
LEAST_SPAN: Final = 16  # from the first context to the last, for models of short contexts
# A context that needs more than this many times what was asked about is of no interest.
REACH: Final = 3
UNLIMITED_CONTEXT: Final = 1 << 17  # shown where neither model nor memory sets an end


@dataclass(frozen=True, slots=True)
class ContextPoint:
    """The peak of one process with `context` tokens per sequence, and what bounds it."""

    context: int
    peak_bytes: int
    low_bytes: int
    high_bytes: int


@dataclass(frozen=True, slots=True)
class PrecisionCurve:
    """One precision; every curve of a picture has the same contexts, in rising order.

    `longest` holds for each limit the longest context that fits, as `Fit.max_context` does.
    """

    quant: str
    points: tuple[ContextPoint, ...]
    longest: tuple[int | None, ...] = ()


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """What one GPU lets a process have; `is_recalled` where nobody looked the number up."""

    name: str
    usable_bytes: int
    is_recalled: bool = False


@dataclass(frozen=True, slots=True)
class ContextCurves:
    """Peak memory of a model against its context, on the fullest of the workload's GPUs.

    `workload.context` is the context that was asked about, and one of the points.
    """

    model: ModelFacts
    workload: Workload
    precisions: tuple[PrecisionCurve, ...]
    limits: tuple[MemoryLimit, ...] = ()

    @property
    def contexts(self) -> tuple[int, ...]:
        """Of all curves, in tokens."""
        return tuple(point.context for point in self.precisions[0].points)


def context_curves(model: PlannedModel, estimate: Estimate) -> ContextCurves:
    """One curve per plan of the estimate, and the limits of the GPUs it was asked about; pure."""
    first = estimate.plans[0]
    budgets = [MemoryBudget.of(model, plan.quant, first.workload) for plan in estimate.plans]
    limits = tuple(
        MemoryLimit(fit.gpu.short_name, fit.usable_bytes, fit.gpu.memory_is_recalled)
        for fit in first.fits
    )
    contexts = _contexts(first.workload.context, _last_context(budgets, first.workload, limits))
    return ContextCurves(
        model=estimate.model,
        workload=first.workload,
        precisions=tuple(
            PrecisionCurve(
                quant=plan.quant,
                points=tuple(_point(budget, context) for context in contexts),
                longest=tuple(fit.max_context for fit in plan.fits),
            )
            for plan, budget in zip(estimate.plans, budgets, strict=True)
        ),
        limits=limits,
    )


def _point(budget: MemoryBudget, context: int) -> ContextPoint:
    plan = budget.plan(replace(budget.workload, context=context))
    return ContextPoint(context, plan.peak_bytes, plan.peak_low_bytes, plan.peak_high_bytes)


def _last_context(
    budgets: Sequence[MemoryBudget], workload: Workload, limits: Iterable[MemoryLimit]
) -> int:
    """The longest context worth showing: the model's own, or where memory gets out of reach."""
    asked_bytes = [budget.peak_bytes(workload) for budget in budgets]
    room_bytes = REACH * max(*asked_bytes, *(limit.usable_bytes for limit in limits), 1)
    longest = [longest_context(budget, workload, room_bytes) for budget in budgets]
    reached = max(UNLIMITED_CONTEXT if context is None else context for context in longest)
    return max(reached, workload.context)


def _contexts(asked: int, last: int) -> tuple[int, ...]:
    """Evenly spread over the octaves up to `last`, and the one that was asked about."""
    start = max(min(SHORTEST_CONTEXT, asked, last // LEAST_SPAN), 1)
    step = (last / start) ** (1 / (NUM_POINTS - 1))
    spread = {round(start * step**number) for number in range(NUM_POINTS)}
    return tuple(sorted({*spread, asked, last}))
