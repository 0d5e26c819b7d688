"""A training step: LoRA by PEFT or all weights, the loss over labels, the optimizer.

It is the second one, so that the optimizer's states are there. Trainable float32 weights run under
bf16 autocast, as trainers do; all-16-bit training without. With runtime "qtool" it is the step of
`qtool finetune`: its own layers and its own loss, always under autocast.
"""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch

from qtool.errors import Option, QtoolError
from qtool.exact.gpu_functions import GpuFunctions
from qtool.exact.models import tensors
from qtool.exact.moments import Moments
from qtool.exact.optimizers import build_optimizer
from qtool.exact.records import ExactRequest
from qtool.exact.storages import LiveStorages
from qtool.formats.precisions import QUANTIZED_PRECISIONS

AUTOCAST_DTYPE: Final = torch.bfloat16


def run_training(
    model: Any, storages: LiveStorages, moments: Moments, request: ExactRequest
) -> int:
    """Train for a step; returns the bytes of the model's weights as training holds them.

    Raises:
        QtoolError: PEFT is missing, or all weights are to be trained and some are packed.
    """
    model = _prepared(model, request)
    moments.name_modules(model)
    functions = GpuFunctions(_autocast_dtype(model, request))
    if request.gradient_checkpointing:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={
                "use_reentrant": False,
                # Random states, which it would ask the device for, are host memory.
                "preserve_rng_state": False,
                # Layers run anew as they ran before, under autocast.
                "context_fn": lambda: (nullcontext(), functions.running()),
            }
        )
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if request.mode != "full":
        storages.add(trainable, "adapters")
    weights_bytes = storages.add(tensors(model), "weights")
    optimizer = _optimizer(model, trainable, request)
    with storages, moments.followed(), _layers_of(request):
        for parameter in trainable:  # the states exist from the first step's end on
            parameter.grad = torch.empty_like(parameter)
        _update(optimizer, trainable, storages, moments)
        _forward_and_backward(model, functions, moments, request)
        _update(optimizer, trainable, storages, moments)
    return weights_bytes


def _optimizer(
    model: Any, trainable: list[torch.nn.Parameter], request: ExactRequest
) -> torch.optim.Optimizer:
    if request.runtime != "qtool":
        return build_optimizer(request.optimizer, trainable)
    from qtool.exact.own_training import OwnOptimizer

    return OwnOptimizer(trainable, model, is_8bit=request.optimizer == "adamw_8bit")


def _update(
    optimizer: torch.optim.Optimizer,
    trainable: list[torch.nn.Parameter],
    storages: LiveStorages,
    moments: Moments,
) -> None:
    storages.mark([p.grad for p in trainable if p.grad is not None], "gradients")
    moments.phase = "optimizer"
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _prepared(model: Any, request: ExactRequest) -> Any:
    is_packed = request.quant in QUANTIZED_PRECISIONS
    if request.runtime == "qtool":
        from qtool.exact.own_training import prepare_loss

        prepare_loss(model)
    if request.mode == "full":
        if is_packed:
            raise QtoolError(
                f"mode full trains all weights, and {request.quant} ones cannot be trained",
                kind="usage",
                hint=("use ", Option("mode", "qlora"), ", or ", Option("quant", "bf16")),
            )
    else:
        if importlib.util.find_spec("peft") is None:
            raise QtoolError(
                f"mode {request.mode} is counted with peft, not installed here",
                kind="unsupported",
                hint="pip install peft",
            )
        from qtool.exact.lora import add_adapters, prepare_packed_model

        if is_packed and request.runtime == "transformers":
            prepare_packed_model(model)
        model = add_adapters(model, request.lora)
    return model


def _layers_of(request: ExactRequest) -> AbstractContextManager[None]:
    """While packed layers are those of the runtime that was asked for."""
    if request.runtime != "qtool":
        return nullcontext()
    from qtool.exact.own_training import training_of_a_gpu

    return training_of_a_gpu(AUTOCAST_DTYPE)


def _autocast_dtype(model: Any, request: ExactRequest) -> torch.dtype | None:
    if request.runtime == "qtool":
        return AUTOCAST_DTYPE
    is_mixed = any(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    return AUTOCAST_DTYPE if is_mixed else None


def _forward_and_backward(
    model: Any, functions: GpuFunctions, moments: Moments, request: ExactRequest
) -> None:
    moments.phase = "forward"
    ids = torch.zeros(request.batch, request.context, dtype=torch.long, device="meta")
    with functions.running():
        loss = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False
        ).loss
    moments.phase = "backward"
    loss.backward()
