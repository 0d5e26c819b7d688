"""The bytes of a step against the tensors of the very model."""

from __future__ import annotations

import pytest
import torch

from qtool.bench.step_bytes import StepBytes
from qtool.runtime.random_model import build_random_model
from tests.tiny_models import llama_config

BATCH, CONTEXT = 3, 40


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", [None, "nf4", "int8"])
@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4", "nf4-dq"])
def test_a_step_reads_every_tensor_once_but_of_the_embedding_some_rows(precision, head, tied):
    config = llama_config(tied=tied)
    model = build_random_model(config, precision, device="cpu", head_precision=head).model
    embedding = model.model.embed_tokens.weight
    tensors = model.state_dict()
    # The offset of double quantization, 4 bytes for a layer, does not count.
    expected = bytes_of(tensors[name] for name in tensors if not name.endswith("offset"))
    if tied and head is None:
        # state_dict has both ends, as two tensors over the same bytes
        expected -= bytes_of([embedding])
    else:
        expected += BATCH * bytes_of([embedding[0]]) - bytes_of([embedding])
    num_kv_values = 2 * config["num_hidden_layers"] * config["hidden_size"] // 2
    expected += BATCH * CONTEXT * num_kv_values * torch.bfloat16.itemsize
    found = StepBytes.of_config(config, precision, head).count(batch=BATCH, context=CONTEXT)
    assert found == expected
