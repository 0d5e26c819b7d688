"""bitsandbytes' linear layers, and whole models of them, over the very tensors that ours hold.

Nothing is copied, so both sides compute with the same bytes, and there is room for both.
"""

from __future__ import annotations

import copy
from typing import Any, Final

import torch
from torch import nn

from qtool.formats.codebooks import CODES
from qtool.formats.precisions import NESTED_BLOCKSIZE
from qtool.runtime.linear import FourBitLayer, Linear4bit, LinearInt8

USERS_INT8_THRESHOLD: Final = 6.0  # transformers' default


def share_network(network: Any) -> Any:
    """A model like `network` that multiplies with bitsandbytes where ours has packed layers.

    Args:
        network: a transformers model on one device; it is left as it is.

    Raises:
        ImportError: bitsandbytes is not installed, and there is a packed layer.
    """
    tensors = [*network.parameters(), *network.buffers()]
    rival = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    for name, module in list(rival.named_modules()):
        if isinstance(module, Linear4bit | LinearInt8):
            rival.set_submodule(name, share_layer(module, int8_threshold=USERS_INT8_THRESHOLD))
    # What transformers knows of our quantizer holds for our layers alone.
    rival.hf_quantizer = None
    return rival.eval()


def share_layer(module: Linear4bit | LinearInt8, *, int8_threshold: float) -> nn.Module:
    """bitsandbytes' module over the tensors of `module`, set up as transformers does it.

    Args:
        int8_threshold: activations beyond it are outliers, multiplied in 16 bit; 0 for none.
    """
    with torch.device("meta"):
        shared = (
            _int8_module(module, int8_threshold)
            if isinstance(module, LinearInt8)
            else _four_bit_module(module)
        )
    shared.register_parameter("bias", module.bias)
    return shared.eval()


def _four_bit_module(module: Linear4bit) -> nn.Module:
    bnb_nn, layer = _modules(), module.layer
    shared: nn.Module = bnb_nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=module.compute_dtype,
        compress_statistics=layer.double_quant,
        quant_type=layer.quant_type,
    )
    shared.weight = bnb_nn.Params4bit(
        module.weight.data,
        requires_grad=False,
        quant_state=_quant_state(module, layer),
        blocksize=layer.blocksize,
        compress_statistics=layer.double_quant,
        quant_type=layer.quant_type,
        bnb_quantized=True,
        module=shared,
    )
    return shared


def _quant_state(module: Linear4bit, layer: FourBitLayer) -> Any:
    from bitsandbytes import functional

    new_state: Any = functional.QuantState
    nested = None
    if layer.double_quant:
        nested = new_state(
            absmax=module.nested_absmax,
            blocksize=NESTED_BLOCKSIZE,
            code=module.nested_quant_map,
            dtype=torch.float32,
        )
    code = torch.tensor(CODES[layer.quant_type].tolist(), device=module.weight.device)
    return new_state(
        absmax=module.absmax,
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=code,
        blocksize=layer.blocksize,
        quant_type=layer.quant_type,
        dtype=layer.dtype,
        offset=module.nested_offset if layer.double_quant else None,
        state2=nested,
    )


def _int8_module(module: LinearInt8, threshold: float) -> nn.Module:
    bnb_nn = _modules()
    shared: nn.Module = bnb_nn.Linear8bitLt(
        module.in_features,
        module.out_features,
        bias=False,
        has_fp16_weights=False,
        threshold=threshold,
    )
    codes = module.weight.data
    shared.weight = bnb_nn.Int8Params(
        codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=module.SCB
    )
    return shared


def _modules() -> Any:
    from bitsandbytes import nn as bnb_nn

    return bnb_nn
