"""`estimate`: one model at several precisions, on the GPUs that were asked about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from qtool.events import OnEvent, ignore_events
from qtool.formats.precisions import QUANTIZED_PRECISIONS
from qtool.planner.fit import fit, is_unfit
from qtool.planner.gpus import Gpu, resolve_gpus
from qtool.planner.memory import MemoryBudget
from qtool.planner.model import PlannedModel, open_model
from qtool.planner.records import Estimate, MemoryPlan, Workload
from qtool.planner.suggestions import suggest
from qtool.planner.weights import CAST_DTYPES

DEFAULT_QUANTS: Final = ("bf16", "int8", "nf4", "nf4-dq")
DEFAULT_CONTEXT: Final = 4096


@dataclass(frozen=True, slots=True)
class EstimateRequest:
    """What the user asked for.

    No `quants`: the default ones. No `context`: 4096, or the model's if that is shorter; it stands
    in for the workload's.
    """

    model: str
    quants: tuple[str, ...] = ()
    context: int | None = None
    workload: Workload = field(default_factory=lambda: Workload(context=DEFAULT_CONTEXT))
    gpus: tuple[str, ...] = ()
    headroom_percent: float = 0


def estimate_model(request: EstimateRequest, on_event: OnEvent = ignore_events) -> Estimate:
    """Plan the model from its headers and config.

    Raises:
        QtoolError: an unknown GPU, a model that is not there or damaged, a precision that it
            cannot be planned at.
    """
    gpus = resolve_gpus(request.gpus)
    return estimate_opened(open_model(request.model, on_event), gpus, request)


def estimate_opened(
    model: PlannedModel, gpus: tuple[Gpu, ...], request: EstimateRequest
) -> Estimate:
    """The same for a model that is open already; pure."""
    warnings = [*model.warnings, *unmodelled_warnings(model)]
    quants = choose_quants(model, request.quants, default_quants(request.workload), warnings)
    context = choose_context(model, request.context, warnings)
    workload = replace(request.workload, context=context)
    budgets = {quant: MemoryBudget.of(model, quant, workload) for quant in quants}
    warnings += quantization_warnings(model, budgets.values())
    plans = [budget.plan(workload) for budget in budgets.values()]
    plans = [
        replace(
            plan,
            fits=tuple(
                fit(budgets[plan.quant], plan, gpu, request.headroom_percent) for gpu in gpus
            ),
        )
        for plan in plans
    ]
    others = _alternatives(model, budgets, plans, workload)
    return Estimate(
        model=model.facts,
        plans=tuple(
            replace(plan, suggestions=suggest(budgets[plan.quant], plan, plan.fits, others))
            for plan in plans
        ),
        gpus=gpus,
        warnings=tuple(warnings),
    )


def _alternatives(
    model: PlannedModel,
    budgets: dict[str, MemoryBudget],
    plans: list[MemoryPlan],
    workload: Workload,
) -> list[MemoryPlan]:
    """Plans at the precisions asked for and, where one fits nowhere, at the default ones."""
    if not any(is_unfit(plan.fits) for plan in plans):
        return plans
    more = choose_quants(model, (), default_quants(workload), [])
    return plans + [
        MemoryBudget.of(model, quant, workload).plan(workload)
        for quant in more
        if quant not in budgets
    ]


def default_quants(workload: Workload) -> tuple[str, ...]:
    """The precisions that a mode makes sense at: training in full needs floating point.

    `qtool finetune` trains in full in float32 unless it is asked for bfloat16.
    """
    if workload.mode == "qlora":
        return ("nf4", "nf4-dq")
    if workload.mode == "full" and workload.runtime == "qtool":
        return ("fp32", "bf16")
    return DEFAULT_QUANTS if workload.mode == "generate" else ("bf16",)


def choose_quants(
    model: PlannedModel, asked: tuple[str, ...], default: tuple[str, ...], warnings: list[str]
) -> tuple[str, ...]:
    """The precisions to plan: those asked for, else the default ones that the model allows."""
    if asked:
        for quant in asked:
            model.check_precision(quant)
        return tuple(dict.fromkeys(asked))
    if model.stored_precision is not None:
        more = default if model.stored_format is not None and model.architecture else ()
        trains_packed = bool(more) and set(more) <= set(QUANTIZED_PRECISIONS)  # and nothing else
        return more if trains_packed else (model.stored_precision, *more)
    if model.architecture is None:
        left_out = [quant for quant in default if quant not in CAST_DTYPES]
        warnings.append(
            f"{', '.join(left_out)} left out: which tensors are linear layers is not known"
        )
        return tuple(quant for quant in default if quant in CAST_DTYPES)
    return default


def choose_context(model: PlannedModel, asked: int | None, warnings: list[str]) -> int:
    """The context to plan: as asked, else 4096 or what the model was made for if that is less."""
    made_for = model.architecture.max_context if model.architecture else None
    if asked is None:
        return min(DEFAULT_CONTEXT, made_for or DEFAULT_CONTEXT)
    if made_for is not None and asked > made_for:
        warnings.append(
            f"context {asked} is longer than {model.id} was made for "
            f"(max_position_embeddings {made_for})"
        )
    return asked


def quantization_warnings(model: PlannedModel, budgets: Iterable[MemoryBudget]) -> list[str]:
    """Where quantizing the model does less than its name promises, in words."""
    quantized = [budget for budget in budgets if budget.quant in QUANTIZED_PRECISIONS]
    warnings = []
    generating = [budget for budget in quantized if budget.workload.mode == "generate"]
    if any(budget.weights.are_float32 for budget in generating):
        warnings.append(
            f"{model.id} computes in float32, so cache and activations take twice what they would "
            "in bfloat16 (generate --compute-dtype bfloat16)"
        )
    architecture = model.architecture
    if quantized and architecture and not architecture.quantizable() and not model.packed:
        warnings.append(
            f"no linear layer of {model.id} is one that bitsandbytes replaces, so quantizing it "
            "changes nothing"
        )
    return warnings


def unmodelled_warnings(model: PlannedModel) -> list[str]:
    """What the plan leaves out, in words."""
    architecture = model.architecture
    if architecture is None:
        return []
    parts = list(architecture.unmodelled)
    if not architecture.cache_layers:
        parts.append("cache and activations of a model whose layers are not known to keep anything")
    return ["not counted: " + "; ".join(parts)] if parts else []
