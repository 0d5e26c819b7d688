"""Short ways to a budget and its plans."""

from __future__ import annotations

from typing import Any

from qtool.planner.memory import MemoryBudget
from qtool.planner.model import PlannedModel
from qtool.planner.records import MemoryPlan, Workload


def budget_of(model: PlannedModel, quant: str, **workload: Any) -> MemoryBudget:
    """The budget for a workload of 4096 tokens, or as given."""
    return MemoryBudget.of(model, quant, Workload(**{"context": 4096, **workload}))


def plan_of(model: PlannedModel, quant: str, **workload: Any) -> MemoryPlan:
    """That budget's plan."""
    budget = budget_of(model, quant, **workload)
    return budget.plan(budget.workload)
