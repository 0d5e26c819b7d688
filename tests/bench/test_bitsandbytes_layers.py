"""The rival computes the same with the same memory, and qtool's model stays as it was."""

from __future__ import annotations

import pytest
import torch

from qtool.bench.bitsandbytes_layers import share_layer, share_network
from qtool.formats.precisions import QuantFormat
from qtool.runtime.random_model import build_random_model, packed_layer, random_linear
from tests.bench.tiny_shape import CONFIG

bnb_nn = pytest.importorskip("bitsandbytes.nn")

PRECISIONS = ["int8", "fp4", "fp4-dq", "nf4", "nf4-dq"]
TYPES = {"int8": "Linear8bitLt"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_network_shares_every_tensor_and_says_the_same(precision):
    network = build_random_model(CONFIG, precision, device="cpu").model
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    rival = share_network(network)
    ids = torch.randint(96, (2, 7), generator=torch.Generator().manual_seed(0))
    own, other = network.model.layers[0].mlp.up_proj, rival.model.layers[0].mlp.up_proj
    assert type(other).__name__ == TYPES.get(precision, "Linear4bit")
    assert other.weight.data_ptr() == own.weight.data_ptr()
    assert rival.lm_head.weight is network.lm_head.weight
    with torch.inference_mode():
        difference = rival(ids).logits - network(ids).logits
        assert difference.norm() / network(ids).logits.norm() < 0.05
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bitsandbytes_reads_the_weights_that_ours_dequantizes_to(precision):
    layer = packed_layer(128, 192, QuantFormat(precision), torch.bfloat16)
    module = random_linear(layer, device=torch.device("cpu"), seed=0)
    shared = share_layer(module, int8_threshold=0.0)
    if precision == "int8":
        values = shared.weight.CB.float() * shared.weight.SCB[:, None] * (1 / 127)
        assert torch.allclose(values, module.dequantize(), rtol=1e-6, atol=0)
    else:
        dequantize = pytest.importorskip("bitsandbytes.functional").dequantize_4bit
        found = dequantize(shared.weight.data, shared.weight.quant_state)
        assert torch.equal(found, module.dequantize())


def test_a_bias_comes_along():
    layer = packed_layer(64, 128, QuantFormat("nf4"), torch.bfloat16)
    module = random_linear(layer, device=torch.device("cpu"), seed=0)
    module.bias = torch.nn.Parameter(torch.full((64,), 5.0, dtype=torch.bfloat16))
    shared = share_layer(module, int8_threshold=0.0)
    with torch.inference_mode():
        result = shared(torch.zeros(1, 128, dtype=torch.bfloat16))
    assert torch.equal(result, torch.full((1, 64), 5.0, dtype=torch.bfloat16))
