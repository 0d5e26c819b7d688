"""How much device memory a model takes, on what it fits, and how far: without torch, from headers.

    estimate = estimate_model(EstimateRequest("org/model", quants=("bf16", "nf4-dq")))
    rows = size_models(SizingRequest(models=("org/model",), gpus=("RTX 4090",)))

Weights come from the quantizer's own plan and are exact; caches and activations from closed forms
over the architecture; what the driver and the allocator take is measured elsewhere and banded.
Bytes are ints, contexts are tokens.
"""

from __future__ import annotations

from qtool.planner.estimate import EstimateRequest, estimate_model
from qtool.planner.records import Component, Estimate, Fit, MemoryPlan, SizingRow, Suggestion
from qtool.planner.sizing import SizingRequest, size_models

__all__ = [
    "Component",
    "Estimate",
    "EstimateRequest",
    "Fit",
    "MemoryPlan",
    "SizingRequest",
    "SizingRow",
    "Suggestion",
    "estimate_model",
    "size_models",
]
