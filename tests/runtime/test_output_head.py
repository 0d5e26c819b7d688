"""The output head packed in memory: the bytes of `qtool quantize`, tied embeddings untouched."""

from __future__ import annotations

import pytest
import torch
import transformers

from qtool.errors import QtoolError
from qtool.formats.precisions import QUANTIZED_PRECISIONS, QuantFormat
from qtool.resources import demo_model_path
from qtool.runtime.linear import Linear4bit, LinearInt8
from qtool.runtime.loading import LoadOptions, load_model
from qtool.runtime.output_head import pack_linear, quantize_head
from tests.runtime.packed_layers import relative_error

PROMPT = torch.arange(5, 25)[None]


def load(**options):
    return load_model(str(demo_model_path()), LoadOptions(device="cpu", **options))


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_the_head_multiplies_with_its_packed_weight(precision):
    with (
        load(compute_dtype="float32", head_quant=precision) as packed,
        load(compute_dtype="float32") as plain,
    ):
        head = packed.model.get_output_embeddings()
        assert isinstance(head, Linear4bit | LinearInt8)
        plain.model.get_output_embeddings().weight.data = head.dequantize().float()
        with torch.inference_mode():
            found = packed.model(PROMPT).logits
            expected = plain.model(PROMPT).logits
    assert relative_error(found, expected) < 1e-5


def test_a_layer_gets_the_bytes_that_quantize_writes():
    layer = torch.nn.Linear(128, 64, bias=True, dtype=torch.bfloat16)
    packed = pack_linear(layer.weight, QuantFormat("nf4"), bias=layer.bias)
    blocks = layer.weight.detach().float().reshape(-1, 64)
    assert torch.equal(packed.absmax, blocks.abs().amax(dim=1))
    assert torch.equal(packed.bias, layer.bias)
    assert relative_error(packed.dequantize(), layer.weight.detach()) < 0.12


@pytest.mark.parametrize("precision", ["nf4-dq", "int8"])
def test_values_that_are_not_finite_are_refused(precision):
    weight = torch.ones(64, 128, dtype=torch.bfloat16)
    weight[3, 5] = torch.nan
    with pytest.raises(QtoolError, match="1 values that are NaN"):
        pack_linear(weight, QuantFormat(precision), bias=None)


def test_a_tied_embedding_stays_as_it_is():
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=96,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    before = model.get_input_embeddings().weight.clone()
    quantize_head(model, "nf4")
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert isinstance(model.lm_head, Linear4bit)


def test_a_head_that_is_packed_already_is_refused():
    refusal = pytest.raises(QtoolError, match="expected a linear layer that is not packed")
    with load(head_quant="nf4") as loaded, refusal:
        quantize_head(loaded.model, "int8")
