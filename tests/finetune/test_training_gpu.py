"""Training on a GPU: it learns, takes about what was planned, and goes on to the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtool.errors import QtoolError
from qtool.finetune.records import DataOptions, FinetuneRequest, FinetuneResult, TrainingOptions
from qtool.finetune.run import prepare, train
from qtool.finetune.trainer import Watch

pytestmark = pytest.mark.gpu

STORY = "Once upon a time there was a little girl named Lily. She had a red ball.\n"


@pytest.fixture
def request_(test_data: Path, tmp_path: Path) -> FinetuneRequest:
    story = tmp_path / "story.txt"
    story.write_text("".join(f"{number} {STORY}" for number in range(400)))
    return FinetuneRequest(
        model=str(test_data / "models/tinylm-19m"),
        output=tmp_path / "out",
        data=DataOptions(source=str(story), max_length=256, eval_split="0.1"),
        training=TrainingOptions(lr=1e-3, max_steps=12, batch=4, grad_accum=2, save_steps=5),
    )


def run(request: FinetuneRequest) -> FinetuneResult:
    prepared = prepare(request, warn=lambda words: None)
    return train(prepared, warn=lambda words: None, on_progress=lambda progress: None)


@pytest.mark.parametrize("quant", ["nf4-dq", "fp4", "int8"])
def test_it_learns_as_on_the_cpu(request_: FinetuneRequest, tmp_path: Path, quant: Any) -> None:
    request = replace(request_, quant=quant)
    found = run(request)
    on_cpu = run(replace(request, device="cpu", output=tmp_path / "cpu"))
    assert found.device == "cuda:0"
    # Dropout draws other masks there.
    assert found.first_loss == pytest.approx(on_cpu.first_loss, rel=0.02)
    assert found.eval_loss == pytest.approx(on_cpu.eval_loss, rel=0.1)
    assert found.final_loss < found.first_loss - 0.5
    assert found.allocated_peak_bytes


@pytest.mark.parametrize("optimizer", ["adamw", "paged-adamw-8bit", "lion", "paged-adamw"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    request_: FinetuneRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    training = replace(request_.training, optimizer=optimizer, lr=3e-4)
    request = replace(request_, training=training)
    expected = run(request)
    stopped = replace(request, output=tmp_path / "stopped")
    original = Watch.on_step_end

    def stopping(self: Watch, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            self.stop_signal = 2
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(Watch, "on_step_end", stopping)
    with pytest.raises(QtoolError, match="interrupted after step 7"):
        run(stopped)
    monkeypatch.undo()
    resumed = run(replace(stopped, resume=True))
    assert resumed.history == expected.history
    assert resumed.eval_history == expected.eval_history
    adapters = [
        load_file(out / "adapter_model.safetensors") for out in (request.output, stopped.output)
    ]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_padded_rows_go_on_to_the_same_bits_too(request_: FinetuneRequest, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{"word " * (n % 50 + 1)}"}}\n' for n in range(200)))
    data = DataOptions(source=str(rows), max_length=256)
    request = replace(request_, data=data)
    first, second = run(request), run(replace(request, output=tmp_path / "again"))
    assert first.history == second.history


@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_methods_learn(request_: FinetuneRequest, method: Any) -> None:
    training = replace(request_.training, lr=3e-4, optimizer="adamw-8bit")
    result = run(replace(request_, method=method, training=training))
    assert result.final_loss < result.first_loss


def test_float16_learns(request_: FinetuneRequest) -> None:
    training = replace(request_.training, compute_dtype="float16")
    result = run(replace(request_, training=training))
    assert result.final_loss < result.first_loss
