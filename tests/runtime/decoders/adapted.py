"""LoRA adapters in models that are there, with random weights in both matrices."""

from __future__ import annotations

from typing import Any

import peft
import torch

ALL_LINEAR = "all-linear"
# More than plain LoRA on linear layers, in settings of `adapt`, and what is said of it.
OTHER_ADAPTERS: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "its adapter is Dora, not plain LoRA"),
    ({"lora_bias": True}, "its adapter has biases"),
    ({"modules_to_save": ["lm_head"]}, "an adapter changes the output head"),
    ({"modules_to_save": ["norm"]}, "an adapter changes a norm"),
    ({"target_modules": ["q_proj", "lm_head"]}, "an adapter changes the output head"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "an adapter changes the embedding"),
]


def adapt(model: Any, *, std: float = 0.05, **settings: Any) -> Any:
    """Put an adapter into the layers of `model`, which is returned.

    Args:
        std: of the weights in both matrices.
        settings: of `peft.LoraConfig`; rank 5 on all linear layers without any.
    """
    chosen = {"r": 5, "lora_alpha": 10, "target_modules": ALL_LINEAR} | settings
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **chosen))
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            drawn = torch.randn(parameter.shape, generator=generator) * std
            parameter.data.copy_(drawn)
    return model.eval()
