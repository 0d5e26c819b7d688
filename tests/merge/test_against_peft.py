"""PEFT's own merge in float32 and its unmerged models are the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qtool.merge.command import MergeRequest, plan_merge, run_merge
from qtool.merge.logits import compare_logits
from tests.merge.adapters import PREFIX, float_values, read_folder, round_once
from tests.merge.test_merge import dequantized
from tests.runtime.folders import PackedFolders

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("enough_memory")

LLAMA, GPT2 = "TinyStories-656K-hf", "slm4096-gpt2-hf"


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def train(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter that PEFT saved, with random weights where training would have put some."""
    torch.manual_seed(5)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **settings)
    wrapped = peft.get_peft_model(load(base), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_embedding" in name or "lora_A" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif "magnitude" in name or "modules_to_save" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
    wrapped.save_pretrained(folder)
    return folder


def in_float32(source: Path, folder: Path) -> Path:
    """The same model stored in float32, so that nothing but the last bits can differ."""
    load(source).save_pretrained(folder)
    for path in source.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(3, 19)[None]).logits


VARIANTS = [
    (LLAMA, {"target_modules": "all-linear"}),
    (LLAMA, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "lora_alpha": 3}),
    (
        LLAMA,
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"up_proj": 2, r"layers\.0\.self_attn\.q_proj": 6},
            "alpha_pattern": {"q_proj": 32, "proj": 5},
        },
    ),
    (LLAMA, {"target_modules": ["up_proj", "o_proj"], "use_dora": True}),
    (LLAMA, {"target_modules": ["v_proj"], "modules_to_save": ["norm"]}),
    (GPT2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    (GPT2, {"target_modules": ["c_fc"], "fan_in_fan_out": True, "lora_bias": True}),
    (GPT2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
]
NAMES = ["all-linear", "rslora", "patterns", "dora", "norm", "conv1d", "lora-bias", "conv1d-dora"]


@pytest.mark.parametrize(("model", "settings"), VARIANTS, ids=NAMES)
def test_equals_merge_and_unload(
    test_data: Path, tmp_path: Path, model: str, settings: dict[str, Any]
) -> None:
    base = in_float32(test_data / "models" / model, tmp_path / "base")
    adapter = train(base, tmp_path / "adapter", **settings)
    run_merge(plan_merge(MergeRequest(adapter, tmp_path / "out")))
    expected = peft.PeftModel.from_pretrained(load(base), adapter).merge_and_unload().state_dict()
    before = load_file(base / "model.safetensors")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == before.keys()
    by_name = dict(load(tmp_path / "out").state_dict())
    assert by_name.keys() == expected.keys()
    for name, values in by_name.items():
        assert torch.allclose(values, expected[name], rtol=1e-5, atol=1e-6), name
    changed = [name for name in before if not torch.equal(before[name], found[name])]
    assert changed


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ],
    ids=["embedding", "saved-embedding", "head", "saved-head", "tied"],
)
@pytest.mark.parametrize("model", ["stories260K-hf", LLAMA])
def test_the_merged_model_answers_as_the_unmerged_one(
    test_data: Path, tmp_path: Path, model: str, settings: dict[str, Any]
) -> None:
    """Embedding and head, tied or not, of which PEFT's own merge loses one."""
    base = in_float32(test_data / "models" / model, tmp_path / "base")
    adapter = train(base, tmp_path / "adapter", **settings)
    run_merge(plan_merge(MergeRequest(adapter, tmp_path / "out")))
    expected = logits(peft.PeftModel.from_pretrained(load(base), adapter).eval())
    spread = expected.std()
    assert (logits(load(tmp_path / "out")) - expected).abs().max() < 1e-4 * spread
    assert (logits(load(base)) - expected).abs().max() > 0.01 * spread, "no effect"


def test_the_change_of_logits_is_measured(test_data: Path, tmp_path: Path) -> None:
    base = test_data / "models" / LLAMA
    adapter = train(base, tmp_path / "adapter", target_modules="all-linear")
    run_merge(plan_merge(MergeRequest(adapter, tmp_path / "out")))
    change = compare_logits(tmp_path / "out", str(base), adapter, "Once upon a time")
    model = load(base)
    tokens = torch.tensor([_token_ids(base, "Once upon a time")])
    with torch.inference_mode():
        without = model(tokens).logits
        unmerged = peft.PeftModel.from_pretrained(model, adapter).eval()(tokens).logits
        merged = load(tmp_path / "out")(tokens).logits
    assert change.num_tokens == tokens.shape[1]
    assert change.dtype == "float32" and change.device == "cpu"
    assert change.merging == pytest.approx(float((merged - unmerged).abs().max()), abs=1e-4)
    assert change.adapter == pytest.approx(float((unmerged - without).abs().max()), rel=1e-3)
    assert change.merging < change.adapter


@pytest.mark.parametrize("precision", ["nf4", "nf4-dq", "int8"])
def test_a_base_that_bitsandbytes_wrote(test_data: Path, tmp_path: Path, precision: str) -> None:
    folders = PackedFolders(test_data / "models", tmp_path)
    packed = folders.by_bitsandbytes(LLAMA, precision)
    adapter = train(test_data / "models" / LLAMA, tmp_path / "a", target_modules=["q_proj"])
    run_merge(plan_merge(MergeRequest(adapter, tmp_path / "out", base=str(packed))))
    tensors, stored = read_folder(adapter), read_folder(packed)
    found = read_folder(tmp_path / "out")
    for name, values in dequantized(packed).items():
        dtype, merged = found[name]
        expected = values.reshape(merged.shape)
        if name.endswith("q_proj.weight"):
            a, b = (
                tensors[f"{PREFIX}{name.removesuffix('weight')}lora_{part}.weight"][1].astype("f8")
                for part in "AB"
            )
            expected = expected + 2.0 * (b @ a)
        assert np.array_equal(float_values(merged, dtype), round_once(expected, dtype)), name
        del stored[name]
    assert {name for name in stored if name in found} == found.keys() - dequantized(packed).keys()
    report = compare_logits(tmp_path / "out", str(packed), adapter, "Once upon a time")
    assert report.merging < 0.05 * report.adapter


def _token_ids(folder: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    return ids
