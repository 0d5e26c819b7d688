"""Packed sequences that see each other are refused, by asking the model itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from qtool.errors import QtoolError, name_flag
from qtool.finetune.packing import require_apart
from qtool.finetune.records import DataOptions, FinetuneRequest, FinetuneResult, TrainingOptions
from qtool.finetune.run import prepare, train

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
APART: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 8},
    "gpt2": GPT,
    "mixtral": EXPERTS,
}
# Masks made without positions, and states that go on.
TOGETHER: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt_oss": {**EXPERTS, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16, "head_dim": 8},
    "mamba": {"state_size": 4},
}
# Their layers say so, where the kernels that can are not installed.
UNABLE: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def make(model_type: str, more: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, **{**SIZES, **more})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    return model.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", APART)
def test_models_that_keep_sequences_apart_pass(model_type: str, dtype: torch.dtype) -> None:
    require_apart(make(model_type, APART[model_type], dtype), CPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", TOGETHER)
def test_models_that_do_not_are_refused(model_type: str, dtype: torch.dtype) -> None:
    model = make(model_type, TOGETHER[model_type], dtype)
    with pytest.raises(QtoolError, match="does not keep packed sequences apart") as caught:
        require_apart(model, CPU, dtype)
    assert caught.value.kind == "unsupported"
    assert caught.value.message.startswith(type(model).__name__)
    assert "packing" in caught.value.hint


@pytest.mark.parametrize("model_type", UNABLE)
def test_what_a_layer_says_of_packed_sequences_is_the_reason(model_type: str) -> None:
    if find_spec("causal_conv1d"):
        pytest.skip("the kernel that keeps them apart is installed")
    with pytest.raises(QtoolError, match=r"cannot train on packed sequences: .*apart") as caught:
        require_apart(make(model_type, UNABLE[model_type]), CPU, torch.float32)
    assert caught.value.kind == "unsupported"


class LeakyLogits(nn.Module):
    """A model in which each token's logits have `share` of the mean of all before, and noise."""

    def __init__(self, share: float, noise: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = AutoConfig.for_model("llama", **SIZES)
        self.embed = nn.Embedding(512, 512)
        self.share, self.noise = share, noise
        self.num_calls = 0

    def forward(self, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> Any:
        self.num_calls += 1
        own = self.embed(input_ids)
        counts = torch.arange(1, own.shape[1] + 1).view(1, -1, 1)
        generator = torch.Generator().manual_seed(self.num_calls)
        noise = torch.randn(own.shape, generator=generator)

        class Answer:
            logits = own + self.share * own.cumsum(1) / counts + self.noise * noise

        return Answer()


@pytest.mark.parametrize(
    ("share", "noise", "leaks"),
    [(0.0, 0.0, False), (0.0, 0.05, False), (0.05, 0.0, True), (0.5, 0.005, True)],
)
def test_rounding_is_told_from_a_leak(share: float, noise: float, leaks: bool) -> None:
    """What moves as much where nothing can be seen is rounding."""
    model = LeakyLogits(share, noise)
    if not leaks:
        require_apart(model, CPU, torch.float32)
        return
    with pytest.raises(QtoolError, match="does not keep"):
        require_apart(model, CPU, torch.float32)


def test_asking_leaves_all_as_it_was() -> None:
    """The modes of the modules, the random numbers; and dropout is no leak."""
    model = make("gpt2", {**GPT, "resid_pdrop": 0.5, "embd_pdrop": 0.5})
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    require_apart(model, CPU, torch.float32)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture
def opt(tmp_path: Path, test_data: Path) -> Path:
    """A model that would see all of a packed row, with a tokenizer."""
    folder = tmp_path / "opt"
    make("opt", TOGETHER["opt"]).save_pretrained(folder)
    for file in (test_data / "models/stories260K-hf").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_a_run_is_refused_before_its_first_step(opt: Path, tmp_path: Path, method: Any) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps({'text': 'The cat sat.'})}\n" for _ in range(8)))
    request = FinetuneRequest(
        model=str(opt),
        output=tmp_path / "out",
        method=method,
        device="cpu",
        data=DataOptions(source=str(rows), max_length=32, packing=True),
        training=TrainingOptions(max_steps=1),
    )
    with pytest.raises(QtoolError, match="OPTForCausalLM does not keep") as caught:
        run(request)
    assert "leave out --packing" in caught.value.told(name_flag)[1]
    assert not request.output.exists()
    one_by_one = replace(request, data=replace(request.data, packing=False))
    result = run(one_by_one)
    # Nor does it cost the run that was to be replaced.
    with pytest.raises(QtoolError, match="OPTForCausalLM does not keep"):
        run(replace(request, restart=True))
    kept = prepare(replace(one_by_one, resume=True), warn=lambda words: None)
    assert kept.finished == result


def run(request: FinetuneRequest) -> FinetuneResult:
    prepared = prepare(request, warn=lambda words: None)  # a dry run ends here
    return train(prepared, warn=lambda words: None, on_progress=lambda progress: None)
