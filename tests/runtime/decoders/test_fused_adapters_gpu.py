"""On an NVIDIA GPU: the fused path with LoRA adapters makes what PEFT's operations make."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qtool.runtime.decoders.choose import choose_decoder
from qtool.runtime.decoders.protocol import Sampling
from qtool.runtime.loading import LoadOptions, load_model
from tests.runtime.decoders.test_fused_gpu import NEW_TOKENS, PROMPT_TOKENS, load, make, prompt

pytest.importorskip("peft")

from tests.runtime.decoders.adapted import adapt

pytestmark = pytest.mark.gpu

SETTINGS: dict[str, dict[str, Any]] = {
    "all": {},
    "some": {"r": 64, "target_modules": ["q_proj", "up_proj", "o_proj"], "use_rslora": True},
    "large": {"r": 256, "lora_alpha": 64},
}
TOLERANCE = 0.03  # of the largest logit


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("quant", ["nf4-dq", "int8", "bf16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gemma2", "gemma3_text"])
@torch.inference_mode()
def test_logits_are_those_of_the_model(name, quant, settings):
    if name == "phi3" and settings == "some":
        pytest.skip("its layers have other names")
    loaded = load(name, quant)
    plain = make(loaded, "eager")
    plain.prefill(prompt(1), 0)
    without = plain._logits.float()
    adapt(loaded.model, **SETTINGS[settings])
    fused, eager = make(loaded, "fused"), make(loaded, "eager")
    assert fused.path == "fused"
    for start, num_tokens in ((0, PROMPT_TOKENS), (PROMPT_TOKENS, 1), (PROMPT_TOKENS + 1, 40)):
        ids = prompt(1, num_tokens)
        fused.prefill(ids, start)
        eager.prefill(ids, start)
        expected = eager._logits.float()
        difference = (fused._logits.float() - expected).abs().max()
        assert difference <= TOLERANCE * expected.abs().max(), (start, num_tokens)
        if start == 0:
            effect = (expected - without).abs().max()
            assert effect > 2 * TOLERANCE * expected.abs().max(), "tests nothing"


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("quant", ["nf4-dq", "int8"])
def test_a_greedy_text_differs_only_where_two_tokens_are_close(quant, batch):
    loaded = load("llama", quant)
    adapt(loaded.model)
    ids = prompt(batch)
    made = {}
    for path in ("fused", "eager"):
        decoder = make(loaded, path, batch)
        decoder.prefill(ids, 0)
        made[path] = torch.tensor(list(decoder.decode(Sampling(), NEW_TOKENS)))
    for sequence in range(batch):
        fused, eager = made["fused"][:, sequence], made["eager"][:, sequence]
        different = (fused != eager).nonzero()
        if not len(different):
            continue
        at = int(different[0])
        with torch.inference_mode():
            text = torch.cat([ids[sequence], eager[:at]])[None].cuda()
            logits = loaded.model(text).logits[0, -1].float()
        gap = logits.max() - logits[int(fused[at])]
        assert gap <= TOLERANCE * logits.abs().max(), (sequence, at)


@pytest.mark.parametrize("name", ["tinylm-19m", "TinyStories-656K-hf"])
@torch.inference_mode()
def test_texts_of_trained_models_part_only_where_two_tokens_are_close(test_data, name):
    """Beside the same model with PEFT's own operations."""
    options = LoadOptions(quant="nf4-dq", compute_dtype="bfloat16", device="cuda")
    loaded = load_model(str(test_data / "models" / name), options)
    adapt(loaded.model, std=0.03)
    ids = loaded.tokenizer("Once upon a time there was", return_tensors="pt").input_ids
    decoder = choose_decoder(loaded, ids.shape[1] + 72)
    assert decoder.path == "fused"
    decoder.prefill(ids, 0)
    made = [token for (token,) in decoder.decode(Sampling(), 64)]
    text = torch.cat([ids[0], torch.tensor(made)])[None].cuda()
    logits = loaded.model(text).logits[0, ids.shape[1] - 1 : -1].float()
    for at, token in enumerate(made):
        gap = logits[at].max() - logits[at, token]
        assert gap <= TOLERANCE * logits[at].abs().max(), at


def test_other_adapters_take_another_path_and_say_why():
    loaded = load("llama", "nf4-dq")
    adapt(loaded.model, use_dora=True)
    decoder = make(loaded, "auto")
    assert decoder.path == "graph"
    assert "Dora" in decoder.path_reason
