"""How our layers get into a model that transformers builds: a quantizer of transformers' own kind.

transformers builds the model on the meta device and calls `_process_model_before_weight_loading`,
which swaps the linear layers that the checkpoint holds packed. Their tensors then load like any
others: by name, into the dtype and shape that the layer declares.

`pre_quantized` stays False for transformers: then it converts every tensor to its parameter's dtype
and no other rule of its own applies.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NoReturn

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qtool.errors import QtoolError
from qtool.runtime.linear import PackedLayer, build_linear

METHOD: Final = "qtool"
NOT_SAVED: Final = (
    "packed layers are not saved by save_pretrained: copy the folder that was loaded, or write one "
    "with `qtool quantize`; adapters are saved as usual"
)


@register_quantization_config(METHOD)
class PackedLayersConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Which layers are packed, for the quantizer.

    Args:
        layers: by the module names that the checkpoint uses.
        compute_dtype: what products are computed in; None follows the activations.
    """

    def __init__(
        self, layers: Mapping[str, PackedLayer], compute_dtype: torch.dtype | None = None
    ) -> None:
        self.quant_method = METHOD
        self.layers = dict(layers)
        self.compute_dtype = compute_dtype

    def to_dict(self) -> dict[str, Any]:
        """What appears when transformers prints or serializes the model's config."""
        return {"quant_method": METHOD}


@register_quantizer(METHOD)
class PackedLayersQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps linear layers for packed ones while the model is on the meta device."""

    quantization_config: PackedLayersConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        swap_layers(model, config.layers, config.compute_dtype)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # With a quantizer, transformers 5.17 lets other shapes pass.
        for name, tensor in model.state_dict().items():
            if tensor.shape != self._shapes[name]:
                raise wrong_shape(name, self._shapes[name], tensor.shape)
        return model

    def is_serializable(self) -> bool:
        """Asked by `save_pretrained`, which then refuses and points at the log."""
        logging.getLogger(__name__).warning(NOT_SAVED)
        return False

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> NoReturn:
        """Asked by `model.dequantize()`."""
        raise QtoolError(
            "a model with packed layers is not dequantized as a whole",
            kind="unsupported",
            hint="load the full-precision model that it was made from; "
            "layer.dequantize() gives the weight of one layer",
        )

    @property
    def is_trainable(self) -> bool:
        """Adapters may be trained over packed layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`generate(cache_implementation="static")` may compile the model."""
        return True


def swap_layers(
    model: nn.Module, layers: Mapping[str, PackedLayer], compute_dtype: torch.dtype | None
) -> dict[str, str]:
    """Put packed layers in place of the linear layers of a model on the meta device.

    Returns:
        The name of each in the model, by its name in the checkpoint.

    Raises:
        QtoolError: one that the model lacks, or has in another shape.
    """
    modules = find_modules(model, layers)
    for stored_name, layer in layers.items():
        name = modules[stored_name]
        old: Any = model.get_submodule(name)
        _check_shape(name, old, layer)
        with torch.device("meta"):
            new = build_linear(layer, bias=old.bias, compute_dtype=compute_dtype)
        # Else transformers draws random weights for layers that stay on the meta device because
        # they are offloaded to disk.
        new._is_hf_initialized = True  # type: ignore[assignment]
        model.set_submodule(name, new)
    return modules


def find_modules(model: Any, stored_names: Iterable[str]) -> dict[str, str]:
    """Where in the model each packed layer of the checkpoint goes: stored name -> module name.

    Names are changed as transformers will change them when it loads the tensors.

    Raises:
        QtoolError: unsupported, if the model has no linear layer for one.
    """
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    parameters = model.state_dict()
    found: dict[str, str] = {}
    for stored in stored_names:
        parameter = f"{stored}.weight"
        if parameter not in parameters:
            parameter, _ = rename_source_key(
                parameter, renamings, [], model.base_model_prefix, parameters
            )
        found[stored] = parameter.removesuffix(".weight")
        if found[stored] not in linear:
            raise QtoolError(
                f"{stored} is packed, but {type(model).__name__} has no linear layer of that name",
                kind="unsupported",
                hint="mixtures of experts with packed experts do not run yet; "
                "else config.json belongs to another model",
            )
    return found


def wrong_shape(name: str, expected: Sequence[int], found: Sequence[int]) -> QtoolError:
    """The error for a tensor whose shape contradicts config.json."""
    return QtoolError(
        f"{name}: config.json implies shape {list(expected)}, found {list(found)}",
        kind="bad_file",
        hint="config.json and the weights do not belong together; fetch both again",
    )


def _check_shape(name: str, module: Any, layer: PackedLayer) -> None:
    expected = tuple(module.weight.shape)
    if isinstance(module, Conv1D):
        expected = expected[::-1]  # kept as [in, out], packed as [out, in]
    found = (layer.out_features, layer.in_features)
    if found != expected:
        raise wrong_shape(f"{name}.weight", expected, found)
