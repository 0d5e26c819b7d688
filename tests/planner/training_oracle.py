"""What a training step of transformers + PEFT allocates, storage by storage.

The real modules run forward and backward on fake tensors under bf16 autocast. Two kernels are
replaced by what they allocate and save on a GPU: fused attention and dropout, whose CPU versions
save other things. A frozen 4-bit layer is replaced by what bitsandbytes' MatMul4Bit allocates.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.architecture.oracle import build_model
from tests.planner.storages import LiveStorages


class StepStorages(LiveStorages):
    """Also tells what is alive at a moment."""

    def live_bytes(self) -> int:
        """Bytes that operators created and something still holds."""
        return sum(num_bytes for storage, num_bytes in self._live.values() if not storage.expired())


class FusedAttention(torch.autograd.Function):
    """A flash kernel: 16-bit inputs, output and one float32 per query are kept for backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, tokens, _ = query.shape
        row_sums = torch.empty(batch, heads, tokens, dtype=torch.float32)
        output = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, row_sums)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    return FusedAttention.apply(*(x.to(torch.bfloat16) for x in (query, key, value)))


def fused_dropout(
    inputs: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return torch.native_dropout(inputs, p, True)[0] if training and p > 0 else inputs


class PackedProduct(torch.autograd.Function):
    """bitsandbytes' MatMul4Bit with a frozen weight: dequantizes both ways, saves no input."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, out_features: int) -> Tensor:
        ctx.shape = (out_features, inputs.shape[-1])
        return inputs @ inputs.new_empty(ctx.shape).t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ gradient.new_empty(ctx.shape), None


def pack(model: nn.Module, *, bitsandbytes: bool) -> None:
    """Empties the targeted base layers and computes as packed ones do."""
    from peft.tuners.lora import Linear
    from peft.tuners.lora.bnb import Linear4bit

    for module in model.modules():
        if not isinstance(module, Linear):
            continue
        base = module.base_layer
        base.weight = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)

        def product(base: Any, inputs: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                result = PackedProduct.apply(inputs.to(torch.bfloat16), base.out_features)
            return result.to(inputs.dtype)

        base.forward = types.MethodType(product, base)
        if bitsandbytes:
            module.forward = types.MethodType(Linear4bit.forward, module)


@dataclass(frozen=True)
class Recipe:
    """How the oracle's model is trained; field names as in `TrainingOptions`."""

    mode: str
    runtime: str = "transformers"
    batch: int = 1
    context: int = 512
    lora_r: int = 16
    lora_targets: Any = "all-linear"
    lora_dropout: float = 0.05
    adapter_dtype: str = "fp32"
    gradient_checkpointing: bool = True
    master_dtype: str = "bf16"


def build(config: Mapping[str, Any], class_name: str, recipe: Recipe) -> Any:
    """The model as the recipe prepares it."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    full_precision = recipe.mode == "full" and recipe.master_dtype == "fp32"
    dtype = "float32" if full_precision else "bfloat16"
    model = build_model({**config, "dtype": dtype, "use_cache": False}, class_name, device="cpu")
    checkpointing = {"use_reentrant": False}
    if recipe.mode == "full":
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        return model.train()
    bitsandbytes = recipe.mode == "qlora" and recipe.runtime == "transformers"
    if bitsandbytes:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.enable_input_require_grads()
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    lora = LoraConfig(
        r=recipe.lora_r,
        lora_dropout=recipe.lora_dropout,
        target_modules=recipe.lora_targets,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora, autocast_adapter_dtype=recipe.adapter_dtype == "fp32")
    if recipe.adapter_dtype == "bf16":
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    else:
        for name, parameter in model.named_parameters():
            assert "lora_" not in name or parameter.dtype is torch.float32
    if recipe.mode == "qlora":
        pack(model, bitsandbytes=bitsandbytes)
    return model.train()


def make_fake(model: nn.Module, fake: FakeTensorMode) -> None:
    """Replaces parameters and buffers by ones that compute shapes only; tied ones stay tied."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = fake.from_tensor(parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake.from_tensor(buffer)


@contextmanager
def gpu_kernels() -> Iterator[None]:
    functional = torch.nn.functional
    with (
        mock.patch.object(functional, "scaled_dot_product_attention", fused_attention),
        mock.patch.object(functional, "dropout", fused_dropout),
        # Fake tensors would pass for traced ones, for which a mask is always made.
        mock.patch("transformers.masking_utils.is_tracing", lambda *tensors: False),
        mock.patch(
            "transformers.masking_utils.find_packed_sequence_indices", lambda positions: None
        ),
    ):
        yield


@dataclass(frozen=True)
class Step:
    """Bytes beside the parameters: kept by the forward pass, and at the step's peak."""

    kept_bytes: int
    peak_bytes: int
    trainable: int


def training_step(config: Mapping[str, Any], class_name: str, recipe: Recipe) -> Step:
    """One forward and backward pass; the loss alone outlives the forward pass."""
    model = build(config, class_name, recipe)
    with FakeTensorMode() as fake, gpu_kernels():
        make_fake(model, fake)
        ids = torch.zeros(recipe.batch, recipe.context, dtype=torch.long)
        tensors = [*model.parameters(), *model.buffers(), ids]
        with StepStorages(tensors) as storages:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            kept_bytes = storages.live_bytes()
            loss.backward()
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Step(kept_bytes, storages.peak_bytes, trainable)
