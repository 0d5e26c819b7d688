"""How much device memory a model takes, on what it fits, and how far: without torch, from headers.

    from qtool.planner.estimate import EstimateRequest, estimate_model
    from qtool.planner.sizing import SizingRequest, size_models

    estimate = estimate_model(EstimateRequest("org/model", quants=("bf16", "nf4-dq")))
    rows = size_models(SizingRequest(models=("org/model",), gpus=("RTX 4090",)))

Weights come from the quantizer's own plan and are exact; caches and activations from closed forms
over the architecture; what the driver and the allocator take is measured elsewhere and banded.
Bytes are ints, contexts are tokens.
"""
