"""The output head packed after loading: a quarter or half of its bytes, which every token reads.

Checkpoints keep the head in 16 bit, as bitsandbytes does; here it is packed in memory alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtool.backends import choose_backend
from qtool.errors import Option, QtoolError
from qtool.formats.codebooks import dynamic_map
from qtool.formats.precisions import NESTED_BLOCKSIZE, QuantFormat, QuantizedPrecision
from qtool.runtime.dequantize_host import SOURCE_DTYPES, as_numpy
from qtool.runtime.linear import FourBitLayer, Int8Layer, Linear4bit, LinearInt8


def quantize_head(
    model: Any, precision: QuantizedPrecision, compute_dtype: torch.dtype | None = None
) -> None:
    """Pack the output head of a transformers model in place; a tied embedding stays as it is.

    Raises:
        QtoolError: unsupported, if the head is no plain linear layer; bad_file, if it holds NaN or
            infinity.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or isinstance(head, Linear4bit | LinearInt8):
        raise QtoolError(
            (
                Option("head_quant", precision),
                f": the output head of {type(model).__name__} is {type(head).__name__}, "
                "expected a linear layer that is not packed",
            ),
            kind="unsupported",
            hint=("leave out ", Option("head_quant")),
        )
    packed = pack_linear(head.weight, QuantFormat(precision), bias=head.bias)
    packed.compute_dtype = compute_dtype
    device = head.weight.device
    head.register_parameter("weight", None)  # its memory first: both may not fit
    model.set_output_embeddings(packed.to(device))


def pack_linear(
    weight: Tensor, fmt: QuantFormat, *, bias: Tensor | None
) -> Linear4bit | LinearInt8:
    """A packed layer with the bytes that `qtool quantize` writes for `weight` [out, in].

    Args:
        weight: bfloat16, float16 or float32, on any device.

    Returns:
        The layer, on the CPU.

    Raises:
        QtoolError: bad_file, if `weight` holds NaN or infinity.
    """
    values = weight.detach().cpu().contiguous()
    layer = _pack_int8(values, bias) if fmt.is_int8 else _pack_4bit(values, fmt, bias)
    return layer.eval()


def _pack_4bit(values: Tensor, fmt: QuantFormat, bias: Tensor | None) -> Linear4bit:
    out_features, in_features = values.shape
    made = FourBitLayer(
        out_features,
        in_features,
        fmt.quant_type,
        fmt.blocksize,
        values.dtype,
        fmt.double_quant,
    )
    layer = Linear4bit(made, bias=_on_cpu(bias))
    backend = choose_backend().backend
    absmax = np.empty(-(-values.numel() // fmt.blocksize), np.float32)
    _refuse_nonfinite(
        backend.quantize_4bit(
            as_numpy(values).reshape(-1),
            SOURCE_DTYPES[values.dtype],
            fmt.quant_type,
            fmt.blocksize,
            layer.weight.numpy().reshape(-1),
            absmax,
        )
    )
    if not fmt.double_quant:
        layer.absmax.copy_(torch.from_numpy(absmax))
        return layer
    nested = np.empty(-(-absmax.size // NESTED_BLOCKSIZE), np.float32)
    offset = backend.quantize_absmax(absmax, layer.absmax.numpy(), nested)
    layer.nested_absmax.copy_(torch.from_numpy(nested))
    layer.nested_quant_map.copy_(torch.from_numpy(dynamic_map().copy()))
    layer.nested_offset.fill_(float(offset))
    return layer


def _pack_int8(values: Tensor, bias: Tensor | None) -> LinearInt8:
    layer = LinearInt8(Int8Layer(*values.shape), bias=_on_cpu(bias))
    _refuse_nonfinite(
        choose_backend().backend.quantize_int8(
            as_numpy(values), SOURCE_DTYPES[values.dtype], layer.weight.numpy(), layer.SCB.numpy()
        )
    )
    return layer


def _on_cpu(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().cpu()


def _refuse_nonfinite(count: int) -> None:
    if count:
        raise QtoolError(
            f"the output head holds {count} values that are NaN or infinite",
            kind="bad_file",
            hint=("leave out ", Option("head_quant"), ", or fetch the model again"),
        )
