"""Adapters that are planned: from a config alone, or as PEFT would save what is in a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qtool.architecture import Architecture
from qtool.checkpoint.adapter_files import AdapterFiles
from qtool.checkpoint.records import Shard, TensorInfo
from qtool.planner.adapters import PREFIX, PlannedAdapter
from qtool.planner.lora import features, target_layers

Shapes = Mapping[str, tuple[int, ...]]


def adapter_of(architecture: Architecture, **settings: Any) -> PlannedAdapter:
    """LoRA of rank 16 on all linear layers, or as `settings` of adapter_config.json say."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 16,
        "target_modules": "all-linear",
        **settings,
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in target_layers(architecture, config["target_modules"]):
        inputs, outputs = features(tensor)
        name = PREFIX + tensor.module_name
        shapes[f"{name}.lora_A.weight"] = (config["r"], inputs)
        shapes[f"{name}.lora_B.weight"] = (outputs, config["r"])
        if config.get("use_dora"):
            shapes[f"{name}.lora_magnitude_vector"] = (outputs,)
    return planned(config, shapes)


def planned(config: Mapping[str, Any], shapes: Shapes, dtype: str = "F32") -> PlannedAdapter:
    """What is known of an adapter with such tensors."""
    tensors = (TensorInfo(name, dtype, shape, "", 0) for name, shape in shapes.items())
    return PlannedAdapter.of("adapter", AdapterFiles(config, "", Shard("", 0), tuple(tensors)))


def adapter_in(model: Any) -> PlannedAdapter:
    """The one that PEFT has put into the layers of `model`."""
    from peft import get_peft_model_state_dict

    config = model.peft_config["default"]
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {PREFIX + name: tuple(tensor.shape) for name, tensor in saved.items()}
    fields = {key: _plain(value) for key, value in config.to_dict().items()}
    return planned(fields, shapes)


def allocated_bytes(tensors: Iterable[Any]) -> int:
    """As PyTorch's allocator hands out storages, each once."""
    sizes = {
        storage._cdata: -(-storage.nbytes() // 512) * 512
        for storage in (tensor.untyped_storage() for tensor in tensors)
    }
    return sum(sizes.values())


def _plain(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    return value.value if hasattr(value, "value") else value
