"""LoRA on state-space models, some of whose layers are never called."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qtool.errors import QtoolError, name_flag
from qtool.exact.lora import add_adapters
from qtool.exact.records import LoraAdapters
from qtool.finetune.lora_targets import choose_layers
from qtool.finetune.records import DataOptions, FinetuneRequest, LoraOptions, TrainingOptions
from qtool.finetune.run import prepare, train
from qtool.planner.lora import BYPASSED, is_refused

SIZES = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
H1 = {
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
}
JAMBA = {
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 1,
    "mamba_d_state": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}
STATE_SPACE: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 8, "time_step_limit": (0.0, 1e9), **HEADS},
    "falcon_mamba": {"state_size": 4},
    "falcon_h1": H1,
}


def make(model_type: str) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        model_type, **SIZES, **{**STATE_SPACE, "jamba": JAMBA}[model_type]
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("name", ["out_proj", "conv1d", "in_proj", "mixer.out_proj"])
@pytest.mark.parametrize("model_type", ["llama", "jamba", "nemotron_h", *STATE_SPACE])
def test_what_peft_refuses_is_known(model_type: str, name: str) -> None:
    config = peft.LoraConfig(target_modules=[name])
    model = nn.Module()
    model.config = AutoConfig.for_model(model_type)
    tuner = LoraModel.__new__(LoraModel)
    last = name.rpartition(".")[2]
    if is_refused(model_type, name):
        with pytest.raises(ValueError, match="is incompatible"):
            LoraModel._check_target_module_compatiblity(tuner, config, model, last)
    else:
        LoraModel._check_target_module_compatiblity(tuner, config, model, last)


@pytest.mark.parametrize("model_type", [*STATE_SPACE, "jamba"])
def test_what_is_trained_is_what_gets_a_gradient(model_type: str) -> None:
    """PEFT wraps layers that the model never calls."""
    model = make(model_type)
    names = {
        name.rpartition(".")[2] for name, it in model.named_modules() if isinstance(it, nn.Linear)
    }
    chosen = set(choose_layers(model, None))
    taken = sorted(names - {"lm_head", "out_proj"} | chosen)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=taken))
    ids = torch.arange(24).view(2, 12)
    wrapped(ids, labels=ids).loss.backward()
    trained = {
        name.partition(".lora_B")[0].rpartition(".")[2]
        for name, parameter in wrapped.named_parameters()
        if ".lora_B" in name and parameter.grad is not None
    }
    assert trained == chosen
    assert ("dt_proj" in names) == ("dt_proj" in set(taken) - chosen)


def request_for(model: Path, folder: Path, **changes: Any) -> FinetuneRequest:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps({'text': 'The cat sat.'})}\n" for _ in range(4)))
    return FinetuneRequest(
        model=str(model),
        output=folder / "out",
        method="lora",
        device="cpu",
        data=DataOptions(source=str(rows), max_length=16),
        training=TrainingOptions(max_steps=1, batch=1, grad_accum=1),
        **changes,
    )


@pytest.mark.parametrize("model_type", STATE_SPACE)
def test_all_linear_leaves_out_what_is_passed_by(
    model_type: str, tmp_path: Path, test_data: Path
) -> None:
    model = tmp_path / "model"
    make(model_type).save_pretrained(model)
    for file in (test_data / "models/stories260K-hf").glob("tokenizer*"):
        shutil.copy(file, model)
    request = request_for(model, tmp_path, lora=LoraOptions(r=2))
    prepared = prepare(request, warn=lambda words: None)
    result = train(prepared, warn=lambda words: None, on_progress=lambda progress: None)
    targets = json.loads((request.output / "adapter_config.json").read_text())["target_modules"]
    assert "in_proj" in targets and not {"out_proj", "dt_proj", "lm_head"} & set(targets)
    if prepared.planned.is_known:
        planned = prepared.planned.plan.components["adapters"].bytes
        assert planned == 4 * result.trainable_parameters
    bypassed = min(BYPASSED[model_type] - {"conv1d"})
    named = replace(request, lora=LoraOptions(targets=("in_proj", bypassed)), restart=True)
    with pytest.raises(QtoolError, match=rf"{bypassed}: {model_type} models read its") as caught:
        train(prepare(named, warn=lambda words: None), warn=print, on_progress=print)
    assert caught.value.kind == "usage"
    assert caught.value.told(name_flag)[1] == "--lora-targets all-linear leaves it out"


def test_the_exact_count_adapts_the_same_layers() -> None:
    with torch.device("meta"):
        model = make("mamba2")
    chosen = choose_layers(model, None)
    assert isinstance(chosen, list)
    adapted = add_adapters(model, LoraAdapters(r=2))
    found = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert {name.rpartition(".")[2] for name in found} == set(chosen)


def test_what_else_peft_refuses_is_said(
    tmp_path: Path, test_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules of its own that are not known here are no bug of ours."""

    def refuse(*arguments: object, **options: object) -> None:
        raise ValueError("Module 'q_proj' is incompatible with this.\nMore of it.")

    monkeypatch.setattr(LoraModel, "_check_target_module_compatiblity", refuse)
    lora = LoraOptions(targets=("q_proj",))
    request = request_for(test_data / "models/stories260K-hf", tmp_path, lora=lora)
    prepared = prepare(request, warn=lambda words: None)
    with pytest.raises(
        QtoolError, match=r"PEFT refuses LoRA on layers of .*: Module 'q_proj'"
    ) as it:
        train(prepared, warn=lambda words: None, on_progress=lambda progress: None)
    assert (it.value.kind, it.value.told(name_flag)[1]) == (
        "unsupported",
        "name other layers with --lora-targets",
    )
