"""Packed layers inside transformers' own `from_pretrained`, for bitsandbytes checkpoints.

    register()
    model = AutoModelForCausalLM.from_pretrained("org/model-bnb-4bit", device_map="auto")
    unregister()

transformers finds the files, reads the tensors and spreads them over devices; what is packed, and
whether it is sound, is read from the headers beforehand as for `qtool generate`. A full-precision
model with a BitsAndBytesConfig is left to bitsandbytes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.records import Checkpoint
from qtool.errors import QtoolError
from qtool.runtime.hf_quantizer import NOT_SAVED, swap_layers, wrong_shape
from qtool.runtime.model_config import check_quantization, layer_compute_dtype
from qtool.runtime.weights import DAMAGED_HINT, TORCH_DTYPES, open_stored_weights

METHODS: Final = ("bitsandbytes_4bit", "bitsandbytes_8bit")
# What follows a module's name in the file. transformers takes the first that matches, so what
# another one begins with comes last.
STORED_PARTS: Final = (
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
    "weight.nested_quant_map",
    "weight.nested_absmax",
    "weight.quant_map",
    "weight.absmax",
    "weight_format",
    "SCB",
    "weight",
)
# Buffers of our layers that are stored under another name or as they are.
BUFFERS: Final = {
    "weight.absmax": "absmax",
    "weight.nested_absmax": "nested_absmax",
    "weight.nested_quant_map": "nested_quant_map",
    "SCB": "SCB",
}


def register() -> None:
    """Let `from_pretrained` fill our layers from bitsandbytes checkpoints; twice is once."""
    for method in METHODS:
        current = AUTO_QUANTIZER_MAPPING[method]
        if not isinstance(current, _InPlaceOf):
            AUTO_QUANTIZER_MAPPING[method] = _InPlaceOf(current)


def unregister() -> None:
    """Take `register` back; models that are loaded stay as they are."""
    for method in METHODS:
        current = AUTO_QUANTIZER_MAPPING[method]
        if isinstance(current, _InPlaceOf):
            AUTO_QUANTIZER_MAPPING[method] = current.quantizer


@dataclass(frozen=True, slots=True)
class _InPlaceOf:
    """Makes our quantizer for checkpoints that are packed, and the one it replaced for others."""

    quantizer: Any

    def __call__(self, config: Any, *, pre_quantized: bool = True, **kwargs: Any) -> Any:
        make = BitsAndBytesQuantizer if pre_quantized else self.quantizer
        return make(config, pre_quantized=pre_quantized, **kwargs)


class BitsAndBytesQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps linear layers for packed ones and fills them from the stored parts."""

    def update_device_map(self, device_map: Any) -> Any:
        """Without a word from the caller the current GPU, as bitsandbytes has it."""
        if device_map is not None:
            return device_map
        return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}

    def _process_model_before_weight_loading(
        self,
        model: Any,
        *,
        checkpoint_files: Sequence[str] | None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        checkpoint = _open_files(checkpoint_files)
        with open_stored_weights(checkpoint) as source:
            check_quantization(checkpoint, source.layers)
            modules = swap_layers(model, source.layers, layer_compute_dtype(checkpoint, None))
            self._offsets = {
                module: source.tensors[f"{stored}.nested_offset"][...]
                for stored, module in modules.items()
                if f"{stored}.nested_offset" in source.tensors
            }
        self._packed = frozenset(modules.values())
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._kept_in_float32 = [
            re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype)
        ]
        for stored, module in modules.items():
            tensor = checkpoint.tensors[f"{stored}.weight"]
            _declare_as_stored(
                model.get_submodule(module), TORCH_DTYPES[tensor.dtype], tensor.shape
            )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, tensor in model.state_dict().items():
            if tensor.shape != self._shapes[name]:
                raise wrong_shape(name, self._shapes[name], tensor.shape)
        for name in self._packed:
            for key, values in model.get_submodule(name).named_buffers():
                if values.is_floating_point() and not (values.is_meta or values.isfinite().all()):
                    raise QtoolError(
                        f"{name}.{key} holds NaN or infinity, so the layer has no values",
                        kind="bad_file",
                        hint="quantize the model again from finite weights",
                    )
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether transformers leaves the shape to us: it differs with the stored dtype."""
        return param_name.removesuffix(".weight") in self._packed

    def get_weight_conversions(self) -> list[WeightConverter]:
        """How stored parts become the tensors of a layer."""
        return [WeightConverter(list(STORED_PARTS), "weight", [_TakeParts(self)])]

    def take_parts(self, name: str, parts: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
        """What is to be put into the model for the stored parts of the weight `name`."""
        module = name.removesuffix(".weight")
        weight = parts["weight"]
        if module not in self._packed:
            return {name: weight.to(self._dtype_of(name, model))}
        if weight.dtype != torch.int8:
            weight = weight.view(torch.uint8).reshape(-1, 1)
        found = {BUFFERS[part]: values for part, values in parts.items() if part in BUFFERS}
        if module in self._offsets:
            found["nested_offset"] = self._offsets[module].to(weight.device)
        return {name: weight} | {f"{module}.{key}": values for key, values in found.items()}

    def _dtype_of(self, name: str, model: Any) -> torch.dtype:
        if any(pattern.search(name) for pattern in self._kept_in_float32):
            return torch.float32
        dtype: torch.dtype = model.get_parameter_or_buffer(name).dtype
        return dtype

    def is_serializable(self) -> bool:
        """Asked by `save_pretrained`, which then refuses and points at the log."""
        logging.getLogger(__name__).warning(NOT_SAVED)
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters may be trained over packed layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`generate(cache_implementation="static")` may compile the model."""
        return True


class _TakeParts(ConversionOps):  # type: ignore[misc]
    """Hands the parts of one weight to the quantizer.

    The attribute's name tells transformers to leave the stored dtypes alone.
    """

    def __init__(self, hf_quantizer: BitsAndBytesQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # transformers copies it for every weight

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str,
        model: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """From stored parts, one tensor or a list of one each, to tensors by their full names."""
        parts = {
            part: values[0] if isinstance(values, list) else values
            for part, values in input_dict.items()
        }
        return self.hf_quantizer.take_parts(full_layer_name, parts, model)


def _open_files(files: Sequence[str] | None) -> Checkpoint:
    """The checkpoint that transformers is about to read."""
    if not files:
        raise QtoolError(
            "packed layers are filled from files, but from_pretrained was given a state_dict",
            kind="unsupported",
            hint="give it the model's folder or Hub id, or call qtool.unregister() before",
        )
    first = Path(files[0])
    checkpoint = open_checkpoint(str(first if len(files) == 1 else first.parent), need="files")
    found = {shard.file_name for shard in checkpoint.shards}
    if unknown := {Path(file).name for file in files} - found:
        raise QtoolError(
            f"{first.parent}: transformers reads {min(unknown)}, which the index does not name",
            kind="bad_file",
            hint=DAMAGED_HINT,
        )
    return checkpoint


def _declare_as_stored(layer: nn.Module, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Let transformers 5.17 load a weight of another storage dtype without converting it."""
    if layer.weight.dtype != dtype:
        stored = torch.empty(shape, dtype=dtype, device="meta")
        layer.weight = nn.Parameter(stored, requires_grad=False)
