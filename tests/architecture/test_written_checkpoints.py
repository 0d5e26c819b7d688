"""Every tensor of a checkpoint that transformers writes leads to its parameter: transformers takes
merged experts apart again and gives everything the names under which models are published."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from safetensors import safe_open

from qtool.architecture import build_architecture
from qtool.architecture.stored_weights import missing_parameters
from tests.architecture import oracle
from tests.architecture.families import TINY

# Parameters of the tiny model that the checkpoint holds as parts of another tensor.
TAKEN_APART = {"kimi_k25": 2 * 3 * 2}  # weights and biases of q, k and v in two layers


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_every_written_tensor_is_found_and_the_parameters_are_complete(model_type, tmp_path):
    config = {"model_type": model_type, **TINY[model_type]}
    ours = build_architecture(config)
    oracle.build_model(config, ours.class_name, device="cpu").save_pretrained(tmp_path)
    stored: Counter[str] = Counter()
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        for name in file.keys():  # noqa: SIM118  no mapping
            found, shape = ours.find(name), file.get_slice(name).get_shape()
            if found is None:
                assert ours.stored_names.why_ignored(name) is not None, name
            else:
                stored[found.name] += math.prod(shape)
                assert found.kind.startswith("experts") or found.shape == tuple(shape)
    whole = {name: math.prod(ours.tensors[name].shape) for name in stored}
    assert dict(stored) == whole
    missing = [name for name, tensor in ours.tensors.items() if tensor.tied_to is None]
    missing = [name for name in missing if name not in stored]
    assert len(missing) == TAKEN_APART.get(model_type, 0), missing
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        names = list(file.keys())
    assert missing_parameters(names, ours) == []  # nothing that loads would be refused
    parameters = Counter(found.name for name in names if (found := ours.find(name)) is not None)
    is_sure = parameters.total() == len(names)  # no other tensors, which may stand for parameters
    for dropped in names:
        parameter = ours.find(dropped)
        found = missing_parameters([name for name in names if name != dropped], ours)
        if parameter is not None and is_sure and parameters[parameter.name] == 1:
            assert found == [parameter.tied_to or parameter.name]
        else:
            assert found in ([], [parameter and parameter.name])


@pytest.mark.parametrize(
    ("model_type", "stored", "name"),
    [
        (
            "deepseek_v3",
            "model.layers.2.mlp.experts.7.up_proj.weight",
            "model.layers.2.mlp.experts.gate_up_proj",
        ),
        ("deepseek_v4", "layers.3.ffn.experts.0.w2.weight", "model.layers.3.mlp.experts.down_proj"),
        ("deepseek_v4", "head.weight", "lm_head.weight"),
        ("deepseek_v4", "layers.0.hc_ffn_base", "model.layers.0.ffn_hc.base"),
        (
            "deepseek_v4",
            "layers.1.attn.indexer.compressor.norm.weight",
            "model.layers.1.self_attn.compressor.indexer.kv_norm.weight",
        ),
        (
            "kimi_k25",
            "language_model.model.layers.1.mlp.experts.3.down_proj.weight",
            "model.language_model.layers.1.mlp.experts.down_proj",
        ),
        (
            "kimi_k25",
            "vision_tower.encoder.blocks.1.norm1.bias",
            "model.vision_tower.layers.1.norm2.bias",
        ),
        (
            "nemotron_h",
            "backbone.layers.1.mixer.experts.2.up_proj.weight",
            "model.layers.1.mixer.experts.up_proj",
        ),
        ("nemotron_h", "backbone.embeddings.weight", "model.embeddings.weight"),
    ],
)
def test_published_names_lead_to_the_merged_parameter(model_type, stored, name):
    found = build_architecture({"model_type": model_type, **TINY[model_type]}).find(stored)
    assert found is not None and found.name == name


@pytest.mark.parametrize(
    ("model_type", "stored", "reason"),
    [
        ("deepseek_v3", "model.layers.3.eh_proj.weight", "multi-token prediction"),
        ("deepseek_v3", "model.layers.0.self_attn.o_proj.weight_scale_inv", "block scales"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias", "router's correction"),
        ("deepseek_v3", "model.layers.2.self_attn.rotary_emb.inv_freq", "rotary frequencies"),
        ("deepseek_v4", "mtp.0.attn.wq_a.weight", "multi-token prediction"),
        ("deepseek_v4", "layers.0.ffn.gate.tid2eid", "table of the hash router"),
        ("kimi_k2", "model.layers.1.mlp.experts.3.up_proj.weight_packed", "packed format"),
        ("kimi_k25", "vision_tower.encoder.blocks.0.wqkv.weight", "takes apart"),
        ("nemotron_h", "mtp.layers.0.norm.weight", "multi-token prediction"),
    ],
)
def test_what_published_checkpoints_hold_beside_parameters_gets_a_reason(
    model_type, stored, reason
):
    ours = build_architecture({"model_type": model_type, **TINY[model_type]})
    assert ours.find(stored) is None
    assert reason in (ours.why_kept(stored) or "")
