"""The common decoder block as the processor's step takes it, found in a transformers model.

As in `blocks`, whose records these are; but weights may be float32, layers need fit no GPU, and a
layer's `kind.dtype` is what its weights are rounded to, whatever activations are.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from cupy_kernels.linear_few import LinearKind, LinearWeight
from qtool.runtime.decoders.blocks import (
    BlockReader,
    FusableNetwork,
    NotFusable,
    PackedRows,
    check_compute_dtype,
    four_bit_rows,
    int8_rows,
    refuse_type,
)
from qtool.runtime.dequantize_host import SOURCE_DTYPES
from qtool.runtime.host_head import HostLinear
from qtool.runtime.linear import Linear4bit, LinearInt8

DTYPES: Final = (torch.float32, torch.bfloat16)
GROUP: Final = 64  # columns are multiples, and blocks too


def describe_host_network(model: Any) -> FusableNetwork:
    """What the step needs to know of `model`.

    Raises:
        NotFusable: what it does not do.
    """
    refuse_type(model, "fused step")
    dtype = model.get_input_embeddings().weight.dtype
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise NotFusable(f"the fused step computes in float32 or bfloat16, not {name}")
    return _HostReader.of(model, torch.device("cpu")).network(model)


class _HostReader(BlockReader):
    """Takes layers as the step has them."""

    def own_rows(self, module: nn.Linear, start: int, stop: int) -> PackedRows:
        """Rows [start, stop) of a linear layer, without its adapter."""
        if hasattr(module, "_hf_hook") or module.weight.device != self.device:
            raise NotFusable("a layer is not in memory")
        if module.in_features % GROUP:
            raise NotFusable(f"a layer of {module.in_features} columns does not fit the step")
        bias = module.bias
        if bias is not None and bias.dtype != self.dtype:
            raise NotFusable("a bias of another dtype")
        own_bias = None if bias is None else bias[start:stop]
        if isinstance(module, Linear4bit | LinearInt8):
            check_compute_dtype(module, self.dtype)
            if isinstance(module, LinearInt8):
                return PackedRows(*int8_rows(module, "F32", start, stop, 0), own_bias)
            if module.layer.blocksize % GROUP:
                raise NotFusable(f"blocks of {module.layer.blocksize} weights do not fit the step")
            dtype = SOURCE_DTYPES[module.layer.dtype]
            return PackedRows(*four_bit_rows(module, dtype, start, stop, 0), own_bias)
        plain = module.weight.detach()[start:stop]
        if type(module) not in (nn.Linear, HostLinear) or plain.dtype != self.dtype:
            raise NotFusable(f"{type(module).__name__} layers have no fused step")
        if not plain.is_contiguous():
            raise NotFusable("a layer's weight is not contiguous")
        kind = LinearKind("plain", module.in_features, SOURCE_DTYPES[self.dtype])
        return PackedRows(kind, LinearWeight(stop - start, plain.data_ptr()), own_bias, plain)
