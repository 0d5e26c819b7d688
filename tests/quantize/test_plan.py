"""The plan: what happens to each tensor, and sizes that are exact before a byte is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qtool.checkpoint import open_checkpoint
from qtool.errors import QtoolError
from qtool.formats.precisions import QUANTIZED_PRECISIONS, QuantFormat
from qtool.quantize.plan import Recipe, build_plan
from tests.tiny_models import llama_config, llama_shapes, random_values, save_tensors, write_llama


def plan_of(folder: Path, **recipe: object):
    return build_plan(open_checkpoint(str(folder), need="headers"), Recipe(**recipe))


def by_name(plan):
    return {tensor.source.name: tensor for tensor in plan.tensors}


def test_linear_layers_are_quantized_and_everything_else_is_copied_with_a_reason(tmp_path):
    write_llama(tmp_path)
    tensors = by_name(plan_of(tmp_path))
    quantized = {name for name, tensor in tensors.items() if tensor.action == "quantize"}
    assert quantized == {name for name in tensors if "_proj" in name}
    assert tensors["lm_head.weight"].reason == "output head, kept by default"
    assert tensors["model.norm.weight"].reason == "norm"
    assert all(tensor.reason for tensor in tensors.values())


def test_every_name_kept_is_written_to_the_config(tmp_path):
    write_llama(tmp_path)
    entry = plan_of(tmp_path, skip=("model.layers.0.mlp",)).config_entry
    kept = {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert set(entry["llm_int8_skip_modules"]) == {"lm_head"} | kept


def test_skipping_everything_is_refused(tmp_path):
    write_llama(tmp_path)
    with pytest.raises(QtoolError, match="none of the 21 tensors"):
        plan_of(tmp_path, skip=("model",))


def test_skip_keeps_modules_at_a_boundary_only(tmp_path):
    write_llama(tmp_path, layers=11, hidden=32, mlp=32)
    tensors = by_name(plan_of(tmp_path, skip=("model.layers.1",)))
    kept = {n for n, t in tensors.items() if "_proj" in n and t.action == "copy"}
    assert kept
    assert all(name.startswith("model.layers.1.") for name in kept)


def test_tied_models_keep_the_embedding_and_name_it(tmp_path):
    write_llama(tmp_path, tied=True)
    plan = plan_of(tmp_path)
    assert by_name(plan)["model.embed_tokens.weight"].action == "copy"
    assert "lm_head" in plan.config_entry["llm_int8_skip_modules"]


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_planned_bytes_follow_the_closed_form(tmp_path, precision, blocksize):
    config = write_llama(tmp_path)
    plan = plan_of(tmp_path, format=QuantFormat(precision, blocksize))
    expected = 0
    for name, shape in llama_shapes(config).items():
        num = int(np.prod(shape))
        if "_proj" not in name:
            expected += 2 * num
        elif precision == "int8":
            expected += num + 4 * shape[0] + 1
        else:
            blocks = -(-num // blocksize)
            absmax = (
                blocks + 4 * -(-blocks // 256) + 1024 if precision.endswith("-dq") else 4 * blocks
            )
            blob = by_name(plan)[name].outputs[-1].num_bytes
            assert blob % 16 == 0 and 64 <= blob <= 256
            expected += num // 2 + absmax + 64 + blob
    assert plan.weights_bytes == expected


def test_large_tensors_start_at_multiples_of_16_bytes(tmp_path):
    from qtool.checkpoint.safetensors_header import encode_header

    write_llama(tmp_path)
    (shard,) = plan_of(tmp_path).shards
    layouts = shard.outputs()
    offsets = encode_header(layouts).offsets
    unaligned = [t for t, offset in zip(layouts, offsets, strict=True) if offset % 16]
    assert all(tensor.num_bytes < 1024 for tensor in unaligned)
    sizes = [t.num_bytes for t in layouts if t.num_bytes % 16 == 0]
    assert sizes == sorted(sizes, reverse=True)


def test_one_output_shard_per_source_shard_unless_a_size_is_given(tmp_path):
    write_llama(tmp_path, num_shards=3)
    assert [shard.file_name for shard in plan_of(tmp_path).shards] == [
        f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)
    ]
    limited = plan_of(tmp_path, max_shard_bytes=20_000)
    assert len(limited.shards) > 3
    for shard in limited.shards:
        assert shard.weights_bytes <= 20_000 or len(shard.tensors) == 1
    assert limited.weights_bytes == plan_of(tmp_path).weights_bytes


def test_a_weight_of_another_shape_than_the_config_says_is_refused(tmp_path):
    config = write_llama(tmp_path)
    config["intermediate_size"] = 200
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(QtoolError) as caught:
        plan_of(tmp_path)
    assert caught.value.kind == "bad_file"
    assert "mlp.gate_proj.weight" in caught.value.message
    assert "[200, 64]" in caught.value.message and "[160, 64]" in caught.value.message


def test_a_copied_tensor_of_another_shape_is_refused_too(tmp_path):
    config = write_llama(tmp_path)
    config["vocab_size"] *= 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(QtoolError, match=r"(embed_tokens|lm_head)\.weight: .* implies shape"):
        plan_of(tmp_path)


def test_a_missing_weight_is_named(tmp_path):
    config = llama_config()
    rng = np.random.default_rng(0)
    shapes = llama_shapes(config)
    del shapes["model.layers.1.mlp.up_proj.weight"]
    save_tensors(
        tmp_path / "model.safetensors",
        {name: ("BF16", random_values(shape, "BF16", rng)) for name, shape in shapes.items()},
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(QtoolError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        plan_of(tmp_path)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized already"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight"),
    ],
)
def test_quantized_sources_are_refused_with_the_reason(tmp_path, entry, words):
    config = write_llama(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
    with pytest.raises(QtoolError, match=words) as caught:
        plan_of(tmp_path)
    assert caught.value.kind == "unsupported"


def test_mixtures_of_experts_are_refused_with_what_qtool_can_do(test_data):
    with pytest.raises(QtoolError, match="Qwen3MoeForCausalLM is a mixture of 8 experts") as caught:
        plan_of(test_data / "models" / "tinymoe-6m")
    assert caught.value.kind == "unsupported"
    assert "qtool estimate" in caught.value.hint


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(llama_config()))
    with pytest.raises(QtoolError, match="no safetensors weights"):
        plan_of(tmp_path)


def test_packed_bytes_that_do_not_fill_the_storage_dtype_are_refused(tmp_path):
    write_llama(tmp_path, hidden=6, heads=2, mlp=33)  # k_proj is 3 x 6: 9 bytes
    assert plan_of(tmp_path, format=QuantFormat("nf4", 64)).weights_bytes > 0
    with pytest.raises(QtoolError, match="9 bytes") as caught:
        plan_of(tmp_path, format=QuantFormat("nf4", 64, "bfloat16"))
    assert "self_attn.k_proj.weight" in caught.value.message
    assert "--skip model.layers.0.self_attn.k_proj" in caught.value.hint
