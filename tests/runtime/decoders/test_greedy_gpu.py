"""On an NVIDIA GPU: greedy texts of trained models beside the dequantized model in float32.

A text in 16 bit may part from that in float32 only where it must: where the two likeliest tokens
are closer than twice the largest error of the logits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qtool.runtime.decoders.choose import choose_decoder
from qtool.runtime.decoders.protocol import Sampling
from qtool.runtime.linear import Linear4bit, LinearInt8
from qtool.runtime.loading import LoadOptions, load_model

pytestmark = pytest.mark.gpu

MODELS = ("tinylm-19m", "stories260K-hf", "TinyStories-656K-hf", "slm4096-gpt2-hf")
NEW_TOKENS = 64


def dequantized(folder: str, quant: str) -> Any:
    """The model with its packed layers as plain ones, in float32."""
    options = LoadOptions(quant=quant, compute_dtype="float32", device="cuda")  # type: ignore[arg-type]
    model = load_model(folder, options).model
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit | LinearInt8):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight.data = module.dequantize().float()
            if module.bias is not None:
                plain.bias.data = module.bias.data.float()
            model.set_submodule(name, plain.cuda())
    return model


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq", "fp4", "int8"])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_text_parts_only_where_two_tokens_are_close(test_data, record_property, name, quant):
    folder = str(test_data / "models" / name)
    options = LoadOptions(quant=quant, compute_dtype="bfloat16", device="cuda")  # type: ignore[arg-type]
    loaded = load_model(folder, options)
    reference = dequantized(folder, quant)
    prompt = loaded.tokenizer("Once upon a time there was", return_tensors="pt").input_ids.cuda()
    decoder = choose_decoder(loaded, prompt.shape[1] + NEW_TOKENS + 8)
    record_property("path", decoder.path)
    decoder.prefill(prompt, 0)
    made = [tokens[0] for tokens in decoder.decode(Sampling(), NEW_TOKENS)]
    text = torch.cat([prompt[0], torch.tensor(made, device="cuda")])[None]
    logits = reference(text).logits[0, prompt.shape[1] - 1 : -1].float()
    expected = logits.argmax(dim=-1)
    different = (expected.cpu() != torch.tensor(made)).nonzero()
    print(f"{name} {quant} {decoder.path}: {int(different[0]) if len(different) else 'equal'}")
    for at in different[:, 0].tolist():  # after each token of its own text
        decoder.prefill(text[:, : prompt.shape[1] + at], 0)
        found = decoder._logits[0].float()
        error = (found - logits[at]).abs().max()
        best = logits[at].topk(2).values
        assert best[0] - best[1] < 2 * error, at
