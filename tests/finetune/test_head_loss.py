"""The loss that a model gives instead of its logits is its own, or it keeps its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qtool.finetune.head_loss import find_rule, use_chunked_loss
from qtool.finetune.loss import LogitRule
from qtool.finetune.records import DataOptions, FinetuneRequest, LoraOptions, TrainingOptions
from qtool.finetune.run import prepare, train
from qtool.runtime.host_head import multiply_head_on_host

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
RULES = {
    "llama": ({}, LogitRule()),
    "qwen3": ({"tie_word_embeddings": True}, LogitRule()),
    "phi3": ({}, LogitRule()),
    "gemma2": ({"final_logit_softcapping": 5.0}, LogitRule(softcap=5.0)),
    "granite": ({"logits_scaling": 8.0}, LogitRule(1 / 8)),
    "cohere": ({"logit_scale": 0.0625}, LogitRule(0.0625)),
    "stablelm": ({}, LogitRule()),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, LogitRule()),
    "phi": ({}, LogitRule()),  # its head has a bias
}


def build(model_type: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, **{**SIZES, **more})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", RULES)
def test_a_model_s_loss_stays_what_it_was(model_type: str, dtype: torch.dtype) -> None:
    more, rule = RULES[model_type]
    model = build(model_type, dtype, **more)
    ids = torch.randint(1, 101, (2, 9), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :4] = -100
    given = {"input_ids": ids, "labels": labels, "use_cache": False}
    before = [model(**given).loss, model(**given, num_items_in_batch=torch.tensor(5)).loss]
    logits = model(input_ids=ids).logits
    before[0].backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    assert find_rule(model) == rule
    assert use_chunked_loss(model)
    answer = model(**given)
    answer.loss.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert answer.logits is None
    assert answer.loss.item() == pytest.approx(before[0].item(), rel=tolerance)
    scaled = model(**given, num_items_in_batch=torch.tensor(5)).loss
    assert scaled.item() == pytest.approx(before[1].item(), rel=tolerance)
    for parameter, expected in zip(model.parameters(), gradients, strict=True):
        if expected is not None and dtype == torch.float32:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(input_ids=ids).logits, logits)


def test_a_head_in_host_memory_is_as_plain() -> None:
    model = build("llama", torch.bfloat16)
    multiply_head_on_host(model)
    assert type(model.get_output_embeddings()) is not nn.Linear
    assert find_rule(model) == LogitRule()


def test_nothing_to_learn_is_no_loss() -> None:
    model = build("llama")
    assert use_chunked_loss(model)
    ids = torch.ones(1, 4, dtype=torch.long)
    assert model(input_ids=ids, labels=torch.full_like(ids, -100)).loss == 0


def test_through_adapters() -> None:
    model = get_peft_model(build("llama"), LoraConfig(target_modules="all-linear"))
    ids = torch.ones(1, 4, dtype=torch.long)
    before = model(input_ids=ids, labels=ids).loss
    assert use_chunked_loss(model)
    answer = model(input_ids=ids, labels=ids)
    assert answer.logits is None
    assert answer.loss.item() == pytest.approx(before.item(), rel=1e-5)


class _Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def unknown_head(model: Any) -> Any:
    head = _Doubled(32, 101, bias=False)
    model.set_output_embeddings(head)
    return model


def unknown_logits(model: Any) -> Any:
    plain = model.forward

    def forward(**given: Any) -> Any:
        answer = plain(**given)
        answer.logits = answer.logits.abs()
        return answer

    model.forward = forward
    return model


def unknown_loss(model: Any) -> Any:
    plain = model.loss_function
    model.loss_function = lambda **given: plain(**given) * 1.1
    return model


def adapted_head(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(target_modules=["lm_head"]))


def trained_head(model: Any) -> Any:
    return get_peft_model(
        model, LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"])
    )


@pytest.mark.parametrize(
    "change", [unknown_head, unknown_logits, unknown_loss, adapted_head, trained_head]
)
def test_what_is_not_known_keeps_its_own(change: Any) -> None:
    model = change(build("llama"))
    assert not use_chunked_loss(model)
    ids = torch.ones(1, 4, dtype=torch.long)
    assert model(input_ids=ids, labels=ids).logits is not None


def test_a_loss_of_routers_is_left_alone() -> None:
    more = {"num_local_experts": 2, "num_experts_per_tok": 1}
    assert find_rule(build("mixtral", **more)) is None
    assert find_rule(build("mixtral", **more, router_aux_loss_coef=0.0)) == LogitRule()


@pytest.fixture
def request_(test_data: Path, tmp_path: Path) -> FinetuneRequest:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            f'{{"prompt": "{"Once upon " * (n % 4 + 1)}", "completion": " a time {n} it sat."}}\n'
            for n in range(24)
        )
    )
    return FinetuneRequest(
        model=str(test_data / "models/stories260K-hf"),
        output=tmp_path / "out",
        device="cpu",
        data=DataOptions(source=str(rows), max_length=64, eval_split="0.2"),
        lora=LoraOptions(r=4, dropout=0.0),
        training=TrainingOptions(
            lr=5e-3, max_steps=4, batch=3, grad_accum=2, save_steps=2, compute_dtype="float32"
        ),
    )


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_training_gives_the_losses_of_the_model_s_own(
    request_: FinetuneRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    """Rows of unequal length, prompts that are not learned, accumulation, evaluation."""

    def run(output: str) -> Any:
        request = replace(request_, method=method, output=tmp_path / output)
        warnings: list[Any] = []
        prepared = prepare(request, warn=lambda words: None)
        result = train(prepared, warn=warnings.append, on_progress=lambda progress: None)
        return result, warnings

    found, silent = run("chunked")
    monkeypatch.setattr("qtool.finetune.head_loss.find_rule", lambda network: None)
    expected, said = run("own")
    assert [step.loss for step in found.history] == pytest.approx(
        [step.loss for step in expected.history], rel=1e-4
    )
    assert [loss for _, loss in found.eval_history] == pytest.approx(
        [loss for _, loss in expected.eval_history], rel=1e-4
    )
    assert found.tokens == expected.tokens
    assert not any("by itself" in str(words) for words in silent)
    assert any("computes its loss by itself" in str(words) for words in said)
