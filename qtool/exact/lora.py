"""LoRA over a model on the meta device, by PEFT; over qtool's packed layers by qtool's class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qtool.exact.bitsandbytes_layers import FourBitLinear, Int8Linear
from qtool.exact.models import FLOAT_DTYPES
from qtool.exact.records import LoraAdapters
from qtool.finetune.lora_layers import register_packed_layers
from qtool.planner.lora import is_refused


class BitsandbytesLora(LoraLinear):  # type: ignore[misc]
    """PEFT's layer over bitsandbytes': copies the product, and leaves casting to autocast."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out), in the dtype of the base layer's output."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if isinstance(self.base_layer, FourBitLinear):
            result = result.clone()
        for name in self.active_adapters:
            update = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x)))
            result = result + update * self.scaling[name]
        return result


def prepare_packed_model(model: Any) -> None:
    """What recipes for packed models begin with: all that is not packed becomes float32."""
    peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def add_adapters(model: Any, lora: LoraAdapters) -> Any:
    """`model` with adapters, which alone are trainable."""
    config = peft.LoraConfig(
        r=lora.r,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) or _all_linear(model),
    )
    stand_ins = {FourBitLinear: BitsandbytesLora, Int8Linear: BitsandbytesLora}
    config._register_custom_module(stand_ins)
    register_packed_layers(config)
    with torch.device("meta"):
        model = peft.get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(FLOAT_DTYPES[lora.dtype])
    return model


def put_into_layers(model: Any, adapter_config: Mapping[str, Any]) -> None:
    """The adapter of this adapter_config.json, as `qtool.runtime.adapters` puts it there."""
    with torch.device("meta"):
        peft.get_peft_model(model, peft.PeftConfig.from_peft_type(**adapter_config))
    model.eval()


def _all_linear(model: Any) -> list[str]:
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and not is_refused(model.config.model_type, name)
    ]
