"""The transformers model of a config.json on the meta device, its linear layers packed as asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from qtool.errors import Option, QtoolError
from qtool.exact.bitsandbytes_layers import BitsandbytesOptions, replace_linear
from qtool.exact.records import ExactRequest
from qtool.formats.precisions import QUANTIZED_PRECISIONS, QuantFormat
from qtool.runtime.linear import FourBitLayer, Int8Layer, PackedLayer, build_linear
from qtool.runtime.model_config import find_model_class, parse_config

FLOAT_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(config: Mapping[str, Any], request: ExactRequest, model_id: str) -> Any:
    """A transformers model in eval mode; its weights have shapes and no bytes.

    Raises:
        QtoolError: an architecture or a precision that cannot run.
    """
    is_packed = request.quant in QUANTIZED_PRECISIONS
    if not is_packed and request.quant not in FLOAT_DTYPES:
        raise QtoolError(
            f"{request.quant} does not run in transformers, so it cannot be counted exactly",
            kind="unsupported",
            hint=("leave out ", Option("exact"), ", or choose bf16, int8, nf4 or nf4-dq"),
        )
    dtype = FLOAT_DTYPES[request.compute_dtype if is_packed else request.quant]
    parsed = parse_config(config, model_id)
    model_class = find_model_class(parsed)
    try:
        with torch.device("meta"):
            model = model_class._from_config(parsed, dtype=dtype)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise QtoolError(
            f"{model_id}: transformers cannot build the {model_class.__name__} of this config: "
            f"{error}",
            kind="bad_file",
            hint="fetch config.json again; QTOOL_DEBUG=1 shows where it fails",
        ) from error
    if is_packed:
        with torch.device("meta"):
            _pack_linear_layers(model, request, dtype)
    if request.head_quant is not None:
        head = model.get_output_embeddings()
        with torch.device("meta"):
            layer = _qtool_layer(head, request.head_quant, dtype)
            packed = build_linear(layer, bias=head.bias, compute_dtype=None)
        model.set_output_embeddings(packed)
    return model.eval()


def tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    yield from module.parameters()
    yield from module.buffers()


def linear_layers(model: Any) -> dict[str, Any]:
    """The layers that transformers quantizes by default, by name."""
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and should_convert_module(name, kept)
    }


def _pack_linear_layers(model: Any, request: ExactRequest, dtype: torch.dtype) -> None:
    for name, module in linear_layers(model).items():
        if request.runtime == "qtool":
            layer = _qtool_layer(module, request.quant, dtype)
            packed: nn.Module = build_linear(layer, bias=module.bias, compute_dtype=None)
        else:
            outliers = request.int8_outliers.get(name.rpartition(".")[2], 0.0)
            packed = replace_linear(module, BitsandbytesOptions(request.quant, dtype, outliers))
        model.set_submodule(name, packed)


def _qtool_layer(module: Any, quant: Any, dtype: torch.dtype) -> PackedLayer:
    shape = module.weight.shape
    out_features, in_features = shape[::-1] if isinstance(module, Conv1D) else shape
    if quant == "int8":
        return Int8Layer(out_features, in_features)
    form = QuantFormat(quant)
    return FourBitLayer(
        out_features=out_features,
        in_features=in_features,
        quant_type=form.quant_type,
        blocksize=form.blocksize,
        dtype=dtype,
        double_quant=form.double_quant,
    )
