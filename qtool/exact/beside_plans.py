"""`estimate --exact`: run the model of each plan and set what it allocates beside the plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from qtool.errors import Option, QtoolError
from qtool.exact.records import ExactRequest, FloatDtype, LoraAdapters, Optimizer
from qtool.planner.llm_int8 import LAST_MLP_LAYERS, outlier_share
from qtool.planner.model import PlannedModel
from qtool.planner.records import Estimate, ExactRun, MemoryPlan, Workload
from qtool.runtime.requirements import require_peft, require_run_extra

OPTIMIZERS: Final[dict[str, Optimizer]] = {"adamw": "adamw", "adamw-8bit": "adamw_8bit"}
FLOAT_DTYPES: Final[dict[int, FloatDtype]] = {2: "bf16", 4: "fp32"}
RUNNING: Final = frozenset({"fp32", "bf16", "fp16", "int8", "fp4", "fp4-dq", "nf4", "nf4-dq"})


def run_plans(model: PlannedModel, estimate: Estimate) -> Estimate:
    """The estimate with an `ExactRun` in each plan.

    Raises:
        QtoolError: what is asked for cannot be run so, or a package is missing.
    """
    requests = [exact_request(model, plan) for plan in estimate.plans]  # all before any runs
    require_run_extra()
    if any(request.adapter is not None for request in requests):
        require_peft()
    runs = zip(estimate.plans, requests, strict=True)
    return replace(estimate, plans=tuple(_run(model, plan, request) for plan, request in runs))


def _run(model: PlannedModel, plan: MemoryPlan, request: ExactRequest) -> MemoryPlan:
    from qtool.exact.peak import exact_peak

    peak = exact_peak(model.config, request, model.id)
    workspace_bytes = plan.components["workspace"].bytes  # taken within kernels, out of sight
    exact = ExactRun(peak.allocated_peak_bytes + workspace_bytes, peak.seconds)
    return replace(plan, exact=exact)


def exact_request(model: PlannedModel, plan: MemoryPlan) -> ExactRequest:
    """The plan's workload in the words of the exact mode."""
    workload, tuning = plan.workload, plan.workload.tuning
    if workload.runtime == "vllm" or workload.gpus > 1:
        raise _refusal(
            "runs transformers' modules on one GPU", Option("runtime"), "qtool or transformers"
        )
    if plan.quant not in RUNNING:
        raise _refusal(f"cannot run {plan.quant}", Option("quant"), "bf16, int8 or nf4-dq")
    if workload.kv_dtype in ("fp8", "int8"):
        raise _refusal("runs with a cache of full width", Option("kv_dtype"), "auto")
    if workload.mode != "generate" and tuning.optimizer not in OPTIMIZERS:
        raise _refusal(f"has no {tuning.optimizer}", Option("optimizer"), " or ".join(OPTIMIZERS))
    is_llm_int8 = plan.quant == "int8" and workload.runtime == "transformers"
    dtype = FLOAT_DTYPES.get(model.unpacked_bytes(workload), "bf16")
    if is_llm_int8 and dtype == "bf16":
        dtype = "fp16"  # the plan is for the inputs that bitsandbytes does not convert
    return ExactRequest(
        quant=plan.quant,
        mode=workload.mode,
        runtime=workload.runtime,
        context=workload.context,
        batch=workload.batch,
        prefill_chunk=workload.prefill_chunk,
        head_quant=workload.head_quant if workload.is_own else None,
        compute_dtype=dtype,
        adapter=None if workload.adapter is None else workload.adapter.config,
        lora=LoraAdapters(
            r=tuning.lora_r,
            targets=tuning.lora_targets or (),
            dropout=tuning.lora_dropout,
            dtype=tuning.adapter_dtype,
        ),
        optimizer=OPTIMIZERS.get(tuning.optimizer, "adamw"),
        gradient_checkpointing=tuning.gradient_checkpointing,
        int8_outliers=_outliers(model, workload) if is_llm_int8 else {},
    )


def _outliers(model: PlannedModel, workload: Workload) -> dict[str, float]:
    if model.architecture is None:
        return {}
    num_tokens = workload.context * workload.batch
    share = outlier_share(model.architecture.hidden_size, num_tokens, model.config)
    return dict.fromkeys(LAST_MLP_LAYERS, share)


def _refusal(what: str, option: Option, instead: str) -> QtoolError:
    message = (Option("exact"), f" {what}")
    return QtoolError(message, kind="usage", hint=("ask with ", option, f" {instead}"))
