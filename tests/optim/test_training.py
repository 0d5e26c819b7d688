"""Training: the same losses as with 32-bit states, by itself and in transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qtool.optim import AdamW8bit, Lion8bit, keep_embeddings_32bit
from tests.tiny_models import llama_config

transformers = pytest.importorskip("transformers")

CONTEXT, BATCH = 64, 16


def small_model(vocab: int = 128) -> Any:
    torch.manual_seed(0)
    options = llama_config(hidden=64, layers=2, mlp=192, vocab=vocab)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))


def final_loss(optimizer_kind: Any, tokens: torch.Tensor, steps: int) -> float:
    """The mean of the last 50 losses of a training on the same batches."""
    model = small_model()
    keep_embeddings_32bit(model)
    optimizer = optimizer_kind(model.parameters(), lr=3e-3, weight_decay=0.1)
    random = torch.Generator().manual_seed(1)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - step / (steps + 1))
        starts = torch.randint(0, len(tokens) - CONTEXT, (BATCH,), generator=random)
        batch = torch.stack([tokens[start : start + CONTEXT] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-50:]) / 50


@pytest.mark.slow
def test_500_steps_of_a_language_model_end_within_a_percent_of_32_bit(test_data: Path) -> None:
    text = (test_data / "text" / "tinyshakespeare.txt").read_bytes()
    tokens = torch.tensor(list(text[:200_000])).clamp(max=127)
    exact = final_loss(torch.optim.AdamW, tokens, 500)
    found = final_loss(AdamW8bit, tokens, 500)
    assert exact < 2.6  # it learns: 4.85 at the start
    assert abs(found - exact) < 0.01 * exact


def test_fifty_steps_stay_close_to_float32_states() -> None:
    """Noise as gradients, where nothing averages out."""
    torch.manual_seed(0)
    first, second = (nn.Parameter(torch.ones(256, 256)) for _ in range(2))
    with torch.no_grad():
        first.normal_()
        second.copy_(first)
    ours, theirs = AdamW8bit([first], lr=1e-3), torch.optim.AdamW([second], lr=1e-3)
    for _ in range(50):
        first.grad = torch.randn(256, 256) * 0.01
        second.grad = first.grad.clone()
        ours.step()
        theirs.step()
    assert (first - second).abs().mean() < 2e-4
    assert (first - second).abs().max() < 3e-3


# -- Trainer --------------------------------------------------------------------------------------


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.arange(index, index + 32) % 96
        return {"input_ids": tokens, "labels": tokens}


def arguments(folder: Path, **options: Any) -> Any:
    return transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-3,
        weight_decay=0.1,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )


def test_trainer_makes_it_saves_it_and_resumes(tmp_path: Path) -> None:
    def trained(**resume: Any) -> Any:
        trainer = transformers.Trainer(
            small_model(vocab=96),
            arguments(tmp_path),
            train_dataset=Tokens(),
            optimizer_cls_and_kwargs=(AdamW8bit, {"betas": (0.9, 0.95)}),
        )
        trainer.train(**resume)
        return trainer

    whole = trained()
    optimizer = whole.optimizer.optimizer
    assert isinstance(optimizer, AdamW8bit)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    resumed = trained(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_trainer_takes_one_that_is_made(tmp_path: Path) -> None:
    model = small_model(vocab=96)
    before = model.lm_head.weight.detach().clone()
    trainer = transformers.Trainer(
        model,
        arguments(tmp_path, save_strategy="no"),
        train_dataset=Tokens(),
        optimizers=(Lion8bit(model.parameters(), lr=1e-4), None),
    )
    trainer.train()
    assert not torch.equal(model.lm_head.weight, before)
