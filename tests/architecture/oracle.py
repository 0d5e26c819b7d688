"""The model that transformers builds from a config, on the meta device: no memory, true shapes."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

transformers.logging.set_verbosity_error()

Model = Any  # transformers.PreTrainedModel

# Types of published configs that transformers reads under another name.
READ_AS = {"kimi_k2": "deepseek_v3"}


def published_configs() -> list[Path]:
    """The counted configs of the test data; [] where the data is not there."""
    root = Path(os.environ.get("QTOOL_TEST_DATA", "/nonexistent")) / "configs"
    if not root.is_dir():
        return []
    counts = json.loads((root / "COUNTS.json").read_text())
    return [root / name for name, entry in counts.items() if "cls" in entry["counts"]]


def build_model(config: Mapping[str, Any], class_name: str, device: str = "meta") -> Model:
    """`class_name` built by transformers from the config.json `config`."""
    values = copy.deepcopy(dict(config))
    values.pop("quantization_config", None)  # the model as it is before any quantization
    model_type = values.pop("model_type")
    parsed = AutoConfig.for_model(READ_AS.get(model_type, model_type), **values)
    with torch.device(device):
        return getattr(transformers, class_name)._from_config(parsed)


def parameters(model: Model) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the model's order, both ends of tied weights."""
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def expert_parameters(model: Model) -> int:
    """Elements of all routed experts: what the modules called `experts` own, biases too."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0].endswith(".experts")
    )


def tied(model: Model) -> dict[str, str]:
    """Tied parameter -> the one that holds the storage."""
    return dict(model.all_tied_weights_keys)


def default_skips(model: Model) -> set[str]:
    """The module names that transformers keeps only without a list from the user; those that the
    class keeps in any case are `would_replace`'s to know."""
    return set(HfQuantizer.get_modules_to_not_convert(model))


def replaced(model: Model) -> set[str]:
    """The weights that bitsandbytes holds after transformers' default replacement, in place."""
    import bitsandbytes

    skip = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    replace_with_bnb_linear(model, skip, BitsAndBytesConfig(load_in_4bit=True))
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }


def would_replace(model: Model, skip_modules: Sequence[str]) -> set[str]:
    """The same for a given `llm_int8_skip_modules`, by transformers' own test."""
    skip = HfQuantizer.get_modules_to_not_convert(
        model, list(skip_modules), model._keep_in_fp32_modules
    )
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D))
        and should_convert_module(name, skip)
    }


def cache_windows(model: Model) -> list[int | None]:
    """The window of every attention layer's cache, None for the whole context."""
    kinds, arguments = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    return [
        argument.get("sliding_window", getattr(argument.get("config"), "sliding_window", None))
        for kind, argument in zip(kinds, arguments, strict=True)
        if kind not in ("linear_attention", "dummy")
    ]
