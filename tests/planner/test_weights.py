"""Sizes at each precision against published files, and what of them lies on the device."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qtool.checkpoint import Checkpoint
from qtool.errors import QtoolError
from qtool.formats.precisions import QUANTIZED_PRECISIONS, QuantFormat
from qtool.planner.activations import NO_BUFFER
from qtool.planner.model import describe_model, open_model
from qtool.planner.reference_models import reference_models
from tests.architecture import oracle
from tests.planner.plans import plan_of
from tests.tiny_models import llama_config, llama_shapes, write_llama

MIB = 1 << 20
GB = 10**9


@pytest.fixture
def llama(tmp_path):
    """A small Llama on disk: (config, opened model)."""
    config = write_llama(tmp_path / "model", hidden=128, mlp=256, vocab=96)
    return config, open_model(str(tmp_path / "model"))


# Published NF4 double-quant files less their headers and JSON, which the last column leaves out.
PUBLISHED_NF4_DQ = [
    ("meta-llama--Meta-Llama-3.1-8B", 5_702_746_390),
    ("mlc--mistral_7b_v03", 4_138_270_821),
    ("mlc--qwen2_7b", 5_547_254_637),
    ("mlc--gemma2_2b", 2_224_765_107),
]


@pytest.mark.parametrize(("name", "file_bytes"), PUBLISHED_NF4_DQ)
def test_published_nf4_dq_files_within_a_hundredth_of_a_percent(test_data, name, file_bytes):
    model = open_model(str(test_data / "configs" / name / "config.json"))
    found = model.weights("nf4-dq").checkpoint_bytes
    assert found == pytest.approx(file_bytes, rel=1e-4)
    assert found < file_bytes  # which has headers too


def test_published_nf4_dq_file_of_phi_3_5_written_as_a_llama():
    config = {
        **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"},
        **{"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192},
        **{"num_hidden_layers": 32, "num_attention_heads": 32, "tie_word_embeddings": False},
    }
    model = describe_model(Checkpoint.of_config("bare", config))
    assert model.facts.parameters == 3_821_079_552
    found = model.weights("nf4-dq").checkpoint_bytes
    assert found == pytest.approx(2_264_298_476, rel=1e-4) and found < 2_264_298_476


@pytest.mark.parametrize(("quant", "gigabytes"), [("bf16", 13.52), ("nf4", 4.57), ("nf4-dq", 4.26)])
def test_published_memory_of_llama_2_7b(test_data, quant, gigabytes):
    """litgpt's figures for inference include some cache and activations."""
    model = open_model(str(test_data / "configs" / "mlc--llama2_7b" / "config.json"))
    assert model.weights(quant).device_bytes / GB == pytest.approx(gigabytes - 0.4, abs=0.4)


@pytest.mark.parametrize(
    ("quant", "tolerance"), [("bf16", 1e-4), ("int8", 1e-3), ("nf4", 6e-3), ("nf4-dq", 1e-3)]
)
def test_device_bytes_are_what_loading_allocates_on_a_gpu(test_data, quant, tolerance):
    """transformers + bitsandbytes; PyTorch's allocator hands out up to 1 MiB more than asked for,
    which adds 32 MiB to the 224 absmax tensors of the 8B in nf4."""
    folders = {"llama-3.2-3b": "mlc--llama3_2_3b", "llama-3.1-8b": "meta-llama--Meta-Llama-3.1-8B"}
    lines = (test_data / "measured" / "h200_transformers_bitsandbytes.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    rows = [row for row in rows if row["kind"] == "load" and row["quant"] == quant]
    assert len(rows) == 2
    for row in rows:
        model = open_model(str(test_data / "configs" / folders[row["model"]] / "config.json"))
        found_mib = model.weights(quant).device_bytes / MIB
        assert found_mib == pytest.approx(row["alloc"], rel=tolerance), row


# -- by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant", "element_bytes"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
def test_a_cast_is_elements_times_their_size(llama, quant, element_bytes):
    config, model = llama
    elements = model.facts.parameters
    weights = model.weights(quant)
    assert weights.checkpoint_bytes == weights.device_bytes == elements * element_bytes
    embedding = config["vocab_size"] * config["hidden_size"] * element_bytes
    assert weights.read_per_token_bytes == weights.device_bytes - embedding
    assert weights.buffer == NO_BUFFER


def linear_elements(config):
    shapes = llama_shapes(config)
    return [a * b for name, (a, *rest) in shapes.items() if "proj" in name for b in rest]


def test_int8_is_a_byte_per_weight_and_four_per_row(llama):
    config, model = llama
    weights = model.weights("int8")
    rows = sum(shape[0] for name, shape in llama_shapes(config).items() if "proj" in name)
    packed = sum(linear_elements(config))
    others = 2 * (model.facts.parameters - packed)
    num_layers = len(linear_elements(config))
    assert weights.device_bytes == packed + 4 * rows + others
    assert weights.checkpoint_bytes == weights.device_bytes + num_layers  # weight_format


def test_nf4_dq_is_half_a_byte_per_weight_and_nested_statistics(llama):
    config, model = llama
    weights = model.weights("nf4-dq")
    on_device = 2 * (model.facts.parameters - sum(linear_elements(config)))
    for elements in linear_elements(config):
        blocks = elements // 64
        on_device += elements // 2 + blocks + 4 * -(-blocks // 256) + 4 * 256
    assert weights.device_bytes == on_device
    only_on_disk = weights.checkpoint_bytes - weights.device_bytes
    assert only_on_disk % len(linear_elements(config)) == 0  # 64 bytes of table, then the JSON
    assert 64 + 100 < only_on_disk // len(linear_elements(config)) < 64 + 300


@pytest.mark.parametrize(
    ("dtype", "quant", "bytes_per_weight"),
    [
        ("BF16", "int8", 2 + 4),  # the weight, and in training a chunk of it in float32
        ("BF16", "nf4", 2),
        ("F32", "int8", 4 + 4),
        ("F32", "nf4", 4 + 2),  # decoded to float32, and a bfloat16 copy
    ],
)
def test_the_largest_layer_decides_the_buffer(tmp_path, dtype, quant, bytes_per_weight):
    config = write_llama(tmp_path, dtype=dtype, hidden=128, mlp=256)
    largest = max(linear_elements(config))
    weights = open_model(str(tmp_path)).weights(quant)
    assert weights.buffer.dequantizing_bytes == largest * bytes_per_weight


def test_precisions_take_less_the_fewer_bits_they_have():
    model = reference_models()[0].describe()
    sizes = [
        model.weights(quant).checkpoint_bytes for quant in ("fp32", "bf16", "int8", "nf4", "nf4-dq")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert model.weights("fp4").checkpoint_bytes == model.weights("nf4").checkpoint_bytes


def test_tied_is_untied_without_the_head(tmp_path):
    sizes = {}
    for tied in (True, False):
        config = {**llama_config(tied=tied), "dtype": "bfloat16"}
        (tmp_path / str(tied)).mkdir()
        (tmp_path / str(tied) / "config.json").write_text(json.dumps(config))
        sizes[tied] = open_model(str(tmp_path / str(tied))).weights("nf4").device_bytes
    assert sizes[False] - sizes[True] == 2 * config["vocab_size"] * config["hidden_size"]


def test_both_ends_of_tied_weights_in_a_file_are_one_on_the_device(tmp_path):
    config = write_llama(tmp_path, tied=False)
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = open_model(str(tmp_path))
    head = config["vocab_size"] * config["hidden_size"]
    assert model.facts.checkpoint_parameters - model.facts.parameters == head
    for quant in ("bf16", "int8"):
        weights = model.weights(quant)
        assert weights.device_bytes <= weights.checkpoint_bytes - 2 * head
        assert weights.read_per_token_bytes == weights.device_bytes


def test_tied_weights_stored_under_the_head_alone_are_not_lost(test_data):
    model = open_model(str(test_data / "models" / "TinyStories-656K-hf"))
    weights = model.weights("fp32")
    assert "model.embed_tokens.weight" not in model.layouts
    assert weights.device_bytes == weights.checkpoint_bytes == 4 * model.facts.parameters


def test_a_packed_weight_without_an_absmax_is_a_damaged_file(tmp_path):
    from tests.inspection.folders import quantized_llama

    parts, _ = quantized_llama(QuantFormat("nf4"))
    folder = parts.write(tmp_path / "m")
    model = open_model(str(folder))
    name = next(name for name in model.layouts if name.endswith(".absmax"))
    weight = model.packed[name.removesuffix(".absmax")]
    empty = replace(weight.statistics["absmax"], shape=(0,))
    damaged = replace(weight, statistics={**weight.statistics, "absmax": empty})
    with pytest.raises(QtoolError, match=f"{name}: expected a number per block") as raised:
        replace(model, packed={weight.name: damaged}).weights("nf4")
    assert raised.value.kind == "bad_file"


# -- quantized already ----------------------------------------------------------------------------


@pytest.mark.parametrize("quant", QUANTIZED_PRECISIONS)
def test_a_quantized_folder_is_planned_as_what_it_is(tmp_path, quant):
    from tests.cli.running import run

    write_llama(tmp_path / "model", hidden=128, mlp=256)
    run("quantize", tmp_path / "model", "--quant", quant, "-o", tmp_path / "out")
    source, out = open_model(str(tmp_path / "model")), open_model(str(tmp_path / "out"))
    assert out.stored_precision == quant
    assert out.facts.parameters == source.facts.parameters
    assert out.facts.checkpoint_parameters == source.facts.checkpoint_parameters
    stored, planned = out.weights(quant), source.weights(quant)
    assert stored.checkpoint_bytes == planned.checkpoint_bytes
    assert stored.device_bytes == planned.device_bytes
    assert stored.read_per_token_bytes == planned.read_per_token_bytes
    with pytest.raises(QtoolError, match="quantized already") as raised:
        out.weights("bf16")
    assert raised.value.kind == "unsupported"


@pytest.mark.parametrize(
    ("entry", "precision"),
    [
        ({"load_in_8bit": True}, "int8"),
        ({"load_in_4bit": True}, "fp4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        (
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
            },
            "nf4-dq",
        ),
    ],
)
def test_a_bare_config_says_how_its_weights_are_quantized(tmp_path, entry, precision):
    config = {**llama_config(), "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = open_model(str(tmp_path)).weights(precision)
    quantized = {**config, "quantization_config": {"quant_method": "bitsandbytes", **entry}}
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    model = open_model(str(tmp_path))
    assert model.stored_precision == precision
    assert model.weights(precision) == expected


@pytest.mark.parametrize("skip", [["model.layers.0"], ["lm_head", "down_proj"], [], None])
@pytest.mark.parametrize("tied", [False, True])
def test_a_list_of_skipped_modules_stands_in_for_the_default_rule(skip, tied):
    config = {**llama_config(tied=tied), "dtype": "bfloat16"}
    network = oracle.build_model(config, "LlamaForCausalLM")
    expected = oracle.replaced(network) if skip is None else oracle.would_replace(network, skip)
    entry = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": skip}
    model = describe_model(Checkpoint.of_config("m", {**config, "quantization_config": entry}))
    assert set(model.packable()) == expected


def test_an_output_head_that_is_not_skipped_is_planned_as_packed():
    """With the list of config.json, and so when transformers loads it."""
    config = {**llama_config(), "dtype": "bfloat16"}
    entry = {"quant_method": "bitsandbytes", "load_in_8bit": True}

    def weights_bytes(skip, runtime):
        quantized = {**config, "quantization_config": {**entry, "llm_int8_skip_modules": skip}}
        model = describe_model(Checkpoint.of_config("m", quantized))
        return plan_of(model, "int8", context=16, runtime=runtime).components["weights"].bytes

    head = config["vocab_size"] * config["hidden_size"]
    for runtime in ("qtool", "transformers"):
        saved = weights_bytes(["lm_head"], runtime) - weights_bytes(["nothing"], runtime)
        assert saved == pytest.approx(head, rel=0.1)  # 1 of 2 bytes each; a scale per row


def test_what_a_list_skips_is_made_float32_for_training():
    config = {**llama_config(), "dtype": "bfloat16"}
    entry = {"quant_method": "bitsandbytes", "load_in_8bit": True}

    def weights_bytes(*skip):
        quantized = {**config, "quantization_config": {**entry, "llm_int8_skip_modules": skip}}
        model = describe_model(Checkpoint.of_config("m", json.loads(json.dumps(quantized))))
        plan = plan_of(model, "int8", context=16, mode="qlora", runtime="transformers")
        return plan.components["weights"].bytes

    added = weights_bytes("lm_head", "down_proj") - weights_bytes("lm_head")
    down = config["num_hidden_layers"] * config["hidden_size"] * config["intermediate_size"]
    assert added == pytest.approx(down * (4 - 1), rel=0.1)  # a scale per row


@pytest.mark.parametrize(
    ("method", "settings"),
    [("fp8", {}), ("gptq", {"bits": 4}), ("awq", {}), ("eetq", {})],
)
def test_formats_of_others_are_planned_as_stored_and_at_our_precisions(tmp_path, method, settings):
    config = {**llama_config(), "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = open_model(str(tmp_path))
    config["quantization_config"] = {"quant_method": method, **settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = open_model(str(tmp_path))
    assert model.stored_precision == method
    assert model.weights("nf4") == plain.weights("nf4")
    assert model.weights("bf16") == plain.weights("bf16")
    stored_bytes = model.weights(method).device_bytes
    assert stored_bytes < plain.weights("bf16").device_bytes


def test_reference_models_have_the_parameters_that_their_makers_publish():
    found = {model.name: model.describe().facts.parameters for model in reference_models()}
    assert found == {
        "Llama 3.2 1B": 1_235_814_400,
        "Llama 3.2 3B": 3_212_749_824,
        "Llama 3.1 8B": 8_030_261_248,
        "Qwen3 14B": 14_768_307_200,
        "Mistral Small 24B": 23_572_403_200,
        "Qwen3 32B": 32_762_123_264,
        "Llama 3.1 70B": 70_553_706_496,
    }
