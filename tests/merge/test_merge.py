"""Merged folders equal the merge in float64, rounded once, whatever the adapter is made of."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest

from qtool.errors import QtoolError
from qtool.formats.precisions import QuantFormat
from qtool.merge.command import MergeRequest, plan_merge, run_merge
from qtool.quantize.command import QuantizeRequest, plan_request, run_request
from qtool.quantize.plan import Recipe
from tests.merge.adapters import (
    PREFIX,
    assert_equal,
    expected_merge,
    float_values,
    linear_layers,
    lora_tensors,
    read_folder,
    round_once,
    write_adapter,
)
from tests.tiny_models import random_values, save_tensors, write_llama

BF16 = "BF16"


def merge(adapter, output, **request):
    planned = plan_merge(MergeRequest(adapter, output, **request))
    return planned, run_merge(planned)


def quantize(source, output, recipe):
    run_request(plan_request(QuantizeRequest(str(source), output, recipe, "cpu")))
    return output


def file_bytes(folder):
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name != "qtool_manifest.json"
    }


@pytest.fixture
def model(tmp_path):
    config = write_llama(tmp_path / "model", num_shards=3)
    return tmp_path / "model", config


# ---- 16 bit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter_dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_weight_is_the_float64_sum_rounded_once(tmp_path, dtype, adapter_dtype):
    config = write_llama(tmp_path / "model", dtype=dtype, num_shards=3)
    tensors = lora_tensors(linear_layers(config), dtype=adapter_dtype)
    adapter = write_adapter(tmp_path / "adapter", tensors, tmp_path / "model")
    planned, result = merge(adapter, tmp_path / "out")
    expected = expected_merge(read_folder(tmp_path / "model"), tensors)
    assert_equal(tmp_path / "out", expected, dtype=dtype)
    assert planned.sources.count() == {"merged": 14, "copied": 7}
    assert result.weights_bytes == sum(v.nbytes for _, v in read_folder(tmp_path / "out").values())
    # the same shards, and the other files as they were
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *(p.name for p in (tmp_path / "model").iterdir()),
        "qtool_manifest.json",
    }
    assert json.loads((tmp_path / "out/config.json").read_text()) == config


@pytest.mark.parametrize(("tile_bytes", "num_workers"), [(4096, 1), (4096, 5), (12288, 2)])
def test_tiles_and_workers_change_no_byte(tmp_path, model, tile_bytes, num_workers):
    folder, config = model
    adapter = write_adapter(tmp_path / "a", lora_tensors(linear_layers(config)), folder)
    merge(adapter, tmp_path / "whole", num_workers=1)
    merge(adapter, tmp_path / "cut", tile_bytes=tile_bytes, num_workers=num_workers)
    assert file_bytes(tmp_path / "cut") == file_bytes(tmp_path / "whole")


def test_scales_follow_rank_alpha_and_their_patterns(tmp_path, model):
    folder, config = model
    layers = linear_layers(config)
    down = {name: size for name, size in layers.items() if name.endswith("down_proj")}
    others = {name: size for name, size in layers.items() if name not in down}
    tensors = lora_tensors(others) | lora_tensors(down, rank=2, seed=5)
    adapter = write_adapter(
        tmp_path / "a",
        tensors,
        folder,
        rank_pattern={"down_proj": 2},
        alpha_pattern={r"layers\.1\.self_attn\.q_proj": 3, "proj": 16, "q_proj": 99},
        use_rslora=True,
    )
    merge(adapter, tmp_path / "out")
    base = read_folder(folder)
    expected = expected_merge(base, tensors, scale=8 / math.sqrt(4))
    assert "model.layers.11" not in str(base.keys())
    for name in layers:
        weight, special = f"{name}.weight", name == "model.layers.1.self_attn.q_proj"
        alpha = 3 if special else 99 if name.endswith("q_proj") else 8
        scale = alpha / math.sqrt(2 if name in down else 4)
        one = {weight: base[weight]}
        expected |= expected_merge(one, tensors, scale=scale)
    assert_equal(tmp_path / "out", expected)


def test_an_adapter_of_some_layers_leaves_the_others_as_they_are(tmp_path, model):
    folder, config = model
    some = {n: s for n, s in linear_layers(config).items() if n.endswith("layers.1.mlp.up_proj")}
    tensors = lora_tensors(some)
    planned, _ = merge(write_adapter(tmp_path / "a", tensors, folder), tmp_path / "out")
    assert planned.sources.count() == {"merged": 1, "copied": 20}
    assert_equal(tmp_path / "out", expected_merge(read_folder(folder), tensors))


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_dora_scales_rows_to_its_magnitudes(tmp_path, dtype):
    folder = tmp_path / "model"
    layers = linear_layers(write_llama(folder, dtype=dtype))
    tensors = lora_tensors(layers)
    rng = np.random.default_rng(9)
    magnitudes = {
        n: rng.uniform(0.1, 0.3, out).astype(np.float32) for n, (out, _) in layers.items()
    }
    for number, (name, values) in enumerate(magnitudes.items()):
        suffix = ".weight" if number % 2 else ""  # PEFT has written both
        tensors[f"{PREFIX}{name}.lora_magnitude_vector{suffix}"] = ("F32", values)
    merge(write_adapter(tmp_path / "a", tensors, folder, use_dora=True), tmp_path / "out")
    base = read_folder(folder)
    expected = {name: float_values(values, dtype) for name, (dtype, values) in base.items()}
    for name, magnitude in magnitudes.items():
        a = tensors[f"{PREFIX}{name}.lora_A.weight"][1].astype(np.float64)
        b = tensors[f"{PREFIX}{name}.lora_B.weight"][1].astype(np.float64)
        merged = expected[f"{name}.weight"] + 2.0 * (b @ a)
        factor = magnitude.astype(np.float64) / np.linalg.norm(merged, axis=1)
        expected[f"{name}.weight"] = round_once(factor[:, None] * merged, dtype)
    assert_equal(tmp_path / "out", expected)


def test_replaced_tensors_take_the_place_of_the_base_s(tmp_path, model):
    folder, _ = model
    rng = np.random.default_rng(3)
    head = rng.normal(size=(96, 64)).astype(np.float32)
    norm = rng.normal(size=64).astype(np.float32)
    tensors = {
        f"{PREFIX}lm_head.weight": ("F32", head),
        f"{PREFIX}model.norm.weight": ("F32", norm),
    }
    adapter = write_adapter(tmp_path / "a", tensors, folder, modules_to_save=["lm_head", "norm"])
    planned, _ = merge(adapter, tmp_path / "out", tile_bytes=4096)
    assert planned.sources.count() == {"replaced": 2, "copied": 19}
    expected = expected_merge(read_folder(folder), tensors)
    expected["lm_head.weight"] = round_once(head.astype(np.float64), BF16)
    expected["model.norm.weight"] = round_once(norm.astype(np.float64), BF16)
    assert_equal(tmp_path / "out", expected)


def embedding_update(rows=96, width=64, rank=4):
    rng = np.random.default_rng(8)
    a = rng.normal(0, 0.1, (rank, rows)).astype(np.float32)
    b = rng.normal(0, 0.1, (width, rank)).astype(np.float32)
    name = f"{PREFIX}model.embed_tokens.lora_embedding_"
    return {f"{name}A": ("F32", a), f"{name}B": ("F32", b)}, (b.astype("f8") @ a.astype("f8")).T


def test_embeddings_take_the_transposed_product(tmp_path, model):
    folder, _ = model
    tensors, delta = embedding_update()
    # what PEFT saves beside it: the embedding as it was in training, here of another value
    stored = np.random.default_rng(2).normal(size=(96, 64)).astype(np.float32)
    saved = {f"{PREFIX}model.embed_tokens.base_layer.weight": ("F32", stored)}
    merge(write_adapter(tmp_path / "a", tensors, folder), tmp_path / "out")
    merge(write_adapter(tmp_path / "b", tensors | saved, folder), tmp_path / "out2")
    expected = expected_merge(read_folder(folder), {})
    before = expected["model.embed_tokens.weight"]
    expected["model.embed_tokens.weight"] = round_once(before + 2.0 * delta, BF16)
    assert_equal(tmp_path / "out", expected)
    expected["model.embed_tokens.weight"] = round_once(stored + 2.0 * delta, BF16)
    assert_equal(tmp_path / "out2", expected)


@pytest.mark.parametrize("changed", ["embedding", "head"])
def test_a_tied_weight_that_was_trained_alone_is_no_longer_tied(tmp_path, changed):
    folder = tmp_path / "model"
    config = write_llama(folder, tied=True, num_shards=2)
    if changed == "embedding":
        tensors, delta = embedding_update()
    else:
        tensors = lora_tensors({"lm_head": (96, 64)})
        a, b = (tensors[f"{PREFIX}lm_head.lora_{p}.weight"][1].astype("f8") for p in "AB")
        delta = b @ a
    planned, _ = merge(write_adapter(tmp_path / "a", tensors, folder), tmp_path / "out")
    assert planned.sources.untied == "lm_head.weight"
    expected = expected_merge(read_folder(folder), {})
    before = expected["model.embed_tokens.weight"]
    expected["lm_head.weight"] = before
    name = "model.embed_tokens.weight" if changed == "embedding" else "lm_head.weight"
    expected[name] = round_once(before + 2.0 * delta, BF16)
    assert_equal(tmp_path / "out", expected)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == config | {"tie_word_embeddings": False}


def test_weights_that_were_trained_tied_stay_tied(tmp_path):
    folder = tmp_path / "model"
    config = write_llama(folder, tied=True)
    tensors, delta = embedding_update()
    adapter = write_adapter(tmp_path / "a", tensors, folder, ensure_weight_tying=True)
    planned, _ = merge(adapter, tmp_path / "out")
    assert planned.sources.untied is None
    expected = expected_merge(read_folder(folder), {})
    before = expected["model.embed_tokens.weight"]
    expected["model.embed_tokens.weight"] = round_once(before + 2.0 * delta, BF16)
    assert_equal(tmp_path / "out", expected)
    assert json.loads((tmp_path / "out/config.json").read_text()) == config


def write_gpt2(folder, dtype="F32"):
    """A GPT-2 of one layer: Conv1D weights [in, out] with biases, names without a prefix."""
    rng = np.random.default_rng(0)
    hidden = 32
    shapes = {"wte.weight": (48, hidden), "wpe.weight": (16, hidden)}
    for name, out, size in (
        ("attn.c_attn", 3 * hidden, hidden),
        ("attn.c_proj", hidden, hidden),
        ("mlp.c_fc", 4 * hidden, hidden),
        ("mlp.c_proj", hidden, 4 * hidden),
    ):
        shapes |= {f"h.0.{name}.weight": (size, out), f"h.0.{name}.bias": (out,)}
    for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    folder.mkdir()
    tensors = {name: (dtype, random_values(shape, dtype, rng)) for name, shape in shapes.items()}
    save_tensors(folder / "model.safetensors", tensors)
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_head": 4,
        "n_layer": 1,
        "n_positions": 16,
        "vocab_size": 48,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return shapes


CONV1D = {
    "transformer.h.0.attn.c_attn": (96, 32),
    "transformer.h.0.attn.c_proj": (32, 32),  # square: only its kind tells which way it lies
    "transformer.h.0.mlp.c_proj": (32, 128),
}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_conv1d_weights_are_transposed_and_biases_added(tmp_path, dora):
    write_gpt2(tmp_path / "model", "F16")
    tensors = lora_tensors(CONV1D)
    rng = np.random.default_rng(5)
    for module, (out, _) in CONV1D.items():
        values = rng.uniform(0.1, 0.2, out).astype(np.float32)
        part = "lora_magnitude_vector" if dora else "lora_B.bias"
        tensors[f"{PREFIX}{module}.{part}"] = ("F32", values)
    adapter = write_adapter(
        tmp_path / "a", tensors, tmp_path / "model", use_dora=dora, lora_bias=not dora
    )
    merge(adapter, tmp_path / "out", tile_bytes=4096)
    expected = expected_merge(read_folder(tmp_path / "model"), {})
    for module in CONV1D:
        stored = module.removeprefix("transformer.")
        a, b = (tensors[f"{PREFIX}{module}.lora_{p}.weight"][1].astype("f8") for p in "AB")
        total = expected[f"{stored}.weight"] + 2.0 * (b @ a).T
        if dora:
            magnitude = tensors[f"{PREFIX}{module}.lora_magnitude_vector"][1].astype("f8")
            total = magnitude / np.linalg.norm(total, axis=0) * total
        else:
            bias = expected[f"{stored}.bias"]
            added = tensors[f"{PREFIX}{module}.lora_B.bias"][1].astype("f8")
            expected[f"{stored}.bias"] = round_once(bias + 2.0 * added, "F16")
        expected[f"{stored}.weight"] = round_once(total, "F16")
    assert_equal(tmp_path / "out", expected)


def test_a_model_that_qtool_does_not_know_is_merged_by_its_names(tmp_path, model):
    folder, config = model
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    tensors = lora_tensors(linear_layers(config))
    merge(write_adapter(tmp_path / "a", tensors, folder), tmp_path / "out")
    assert_equal(tmp_path / "out", expected_merge(read_folder(folder), tensors))


def test_the_adapter_s_tokenizer_takes_the_place_of_the_base_s(tmp_path, model):
    folder, config = model
    for name in ("tokenizer.json", "vocab.json", "README.md"):
        (folder / name).write_text("base")
    adapter = write_adapter(tmp_path / "a", lora_tensors(linear_layers(config)), folder)
    for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
        (adapter / name).write_text("adapter")
    merge(adapter, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_text() == "adapter"
    assert (tmp_path / "out/chat_template.jinja").read_text() == "adapter"
    assert (tmp_path / "out/README.md").read_text() == "base"
    assert not (tmp_path / "out/vocab.json").exists()


# ---- Packed bases -----------------------------------------------------------------------------


def dequantized(folder):
    """Every weight of a packed folder as `qtool inspect --against` sees it, float64."""
    from qtool.backends.cpu import CpuBackend
    from qtool.checkpoint import open_checkpoint
    from qtool.formats.bitsandbytes import find_quantized
    from qtool.inspection.weights import TensorFiles, dequantized_tiles

    checkpoint = open_checkpoint(str(folder), need="files")
    found = {}
    with TensorFiles(folder) as files:
        for name, weight in find_quantized(checkpoint.tensors).items():
            tiles = [values for _, values in dequantized_tiles(weight, files, CpuBackend())]
            found[name] = np.concatenate(tiles).astype(np.float64)
    return found


@pytest.mark.parametrize("with_update", [True, False], ids=["merged", "dequantized"])
@pytest.mark.parametrize("quant", ["nf4-dq", "nf4", "fp4", "int8"])
def test_a_packed_base_is_dequantized_in_its_recorded_dtype(tmp_path, quant, with_update):
    folder = tmp_path / "model"
    config = write_llama(folder, hidden=128, mlp=640, num_shards=3)  # more than 256 blocks a weight
    blocksize = 64 if quant == "int8" else 128
    packed = quantize(folder, tmp_path / "packed", Recipe(QuantFormat(quant, blocksize)))
    layers = linear_layers(config)
    some = layers if with_update else dict(list(layers.items())[:1])
    tensors = lora_tensors(some)
    adapter = write_adapter(tmp_path / "a", tensors, packed)
    planned, _ = merge(adapter, tmp_path / "out", tile_bytes=4096)
    assert planned.base.onto == "dequantized" and quant in planned.base.reason
    expected = expected_merge(read_folder(folder), {})
    for name, values in dequantized(packed).items():
        floats = values.reshape(expected[name].shape)
        module = name.removesuffix(".weight")
        if module in some:
            a, b = (tensors[f"{PREFIX}{module}.lora_{p}.weight"][1].astype("f8") for p in "AB")
            floats = floats + 2.0 * (b @ a)
        expected[name] = round_once(floats, BF16)
    assert_equal(tmp_path / "out", expected, dtype="BF16")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == config | {"torch_dtype": "bfloat16"}


def test_a_packed_conv1d_goes_back_to_its_own_orientation(tmp_path):
    write_gpt2(tmp_path / "model", "BF16")
    packed = quantize(tmp_path / "model", tmp_path / "packed", Recipe(QuantFormat("nf4")))
    tensors = lora_tensors(CONV1D)
    merge(write_adapter(tmp_path / "a", tensors, packed), tmp_path / "out", tile_bytes=4096)
    expected = expected_merge(read_folder(tmp_path / "model"), {})
    for name, values in dequantized(packed).items():
        total = values.reshape(expected[name].shape[::-1]).T
        module = f"transformer.{name.removesuffix('.weight')}"
        if module in CONV1D:
            a, b = (tensors[f"{PREFIX}{module}.lora_{p}.weight"][1].astype("f8") for p in "AB")
            total = total + 2.0 * (b @ a).T
        expected[name] = round_once(total, BF16)
    assert_equal(tmp_path / "out", expected)


def test_onto_original_follows_the_manifest_to_what_the_base_was_made_from(tmp_path, model):
    folder, config = model
    packed = quantize(folder, tmp_path / "packed", Recipe(QuantFormat("nf4-dq")))
    tensors = lora_tensors(linear_layers(config))
    adapter = write_adapter(tmp_path / "a", tensors, packed)
    planned, _ = merge(adapter, tmp_path / "out", onto="original")
    assert planned.base.trained_on == str(packed)
    assert_equal(tmp_path / "out", expected_merge(read_folder(folder), tensors))


# ---- Quantized output -------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["nf4-dq", "nf4", "fp4-dq", "int8"])
@pytest.mark.parametrize("kind", ["plain", "packed", "tied", "gpt2"])
def test_quant_gives_the_bytes_of_quantizing_the_merged_folder(tmp_path, kind, quant):
    folder = tmp_path / "model"
    if kind == "gpt2":
        write_gpt2(folder, "BF16")
        tensors = lora_tensors(CONV1D)
    else:
        config = write_llama(folder, num_shards=3, tied=kind == "tied")
        tensors = lora_tensors(linear_layers(config))
        tensors |= embedding_update()[0] if kind == "tied" else {}
    if kind == "packed":
        folder = quantize(folder, tmp_path / "packed", Recipe(QuantFormat("nf4")))
    adapter = write_adapter(tmp_path / "a", tensors, folder)
    recipe = Recipe(QuantFormat(quant), skip=("model.layers.0",) if kind == "plain" else ())
    onto = "dequantized" if kind == "packed" else None
    merge(adapter, tmp_path / "sum", onto=onto)
    quantize(tmp_path / "sum", tmp_path / "expected", recipe)
    merge(adapter, tmp_path / "out", recipe=recipe, onto=onto, tile_bytes=4096, num_workers=3)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "expected")


def test_shards_of_a_given_size_are_those_that_quantize_makes(tmp_path, model):
    folder, config = model
    adapter = write_adapter(tmp_path / "a", lora_tensors(linear_layers(config)), folder)
    recipe = Recipe(QuantFormat("nf4"), max_shard_bytes=15_000)
    merge(adapter, tmp_path / "sum")
    quantize(tmp_path / "sum", tmp_path / "expected", recipe)
    merge(adapter, tmp_path / "out", recipe=recipe)
    assert len(list((tmp_path / "out").glob("model-*"))) > 3
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "expected")
    planned, _ = merge(adapter, tmp_path / "small", max_shard_bytes=50_000)
    assert len(planned.shards) > 3
    assert_equal(
        tmp_path / "small",
        {n: float_values(v, d) for n, (d, v) in read_folder(tmp_path / "sum").items()},
    )


# ---- The folder as a transaction --------------------------------------------------------------


def test_the_manifest_says_what_was_merged(tmp_path, model):
    folder, config = model
    adapter = write_adapter(tmp_path / "a", lora_tensors(linear_layers(config)), folder)
    merge(adapter, tmp_path / "out")
    manifest = json.loads((tmp_path / "out/qtool_manifest.json").read_text())
    assert manifest["source"]["model"] == "model"
    assert manifest["source"]["adapter"]["name"] == "a"
    for name, digest in manifest["source"]["adapter"]["sha256"].items():
        assert hashlib.sha256((adapter / name).read_bytes()).hexdigest() == digest
    assert len(manifest["source"]["adapter"]["sha256"]) == 2
    assert manifest["options"] == {"onto": "original", "max_shard_bytes": None}
    # Of a merge there is no original that its manifest could name.
    packed = quantize(tmp_path / "out", tmp_path / "packed", Recipe(QuantFormat("nf4")))
    write_adapter(tmp_path / "b", lora_tensors(linear_layers(config)), packed)
    merge(tmp_path / "b", tmp_path / "out2", onto="original")
    merge(adapter, tmp_path / "out3", recipe=Recipe(QuantFormat("nf4")))
    write_adapter(tmp_path / "c", lora_tensors(linear_layers(config)), tmp_path / "out3")
    with pytest.raises(QtoolError, match="was merged from model and an adapter"):
        merge(tmp_path / "c", tmp_path / "out4", onto="original")


def test_another_adapter_is_no_continuation(tmp_path, model):
    folder, config = model
    first = write_adapter(tmp_path / "1/a", lora_tensors(linear_layers(config)), folder)
    other = write_adapter(tmp_path / "2/a", lora_tensors(linear_layers(config), seed=2), folder)
    merge(first, tmp_path / "out")
    _, again = merge(first, tmp_path / "out")
    assert again.resumed and again.read_bytes == 0
    with pytest.raises(QtoolError) as caught:
        merge(other, tmp_path / "out")
    said = "was made with other settings: adapter_model.safetensors is another one now"
    assert caught.value.message == f"{tmp_path / 'out'} {said}"
    named = write_adapter(tmp_path / "b", lora_tensors(linear_layers(config), seed=2), folder)
    with pytest.raises(QtoolError, match=r"other settings: adapter is a there, b now$"):
        merge(named, tmp_path / "out")
    with pytest.raises(QtoolError, match=r"other settings: quant is none there, nf4 now$"):
        merge(first, tmp_path / "out", recipe=Recipe(QuantFormat("nf4")))


def test_what_is_not_finite_leaves_no_folder(tmp_path):
    folder = tmp_path / "model"
    config = write_llama(folder, dtype="F16")
    tensors = lora_tensors(linear_layers(config))
    name = next(iter(tensors))
    tensors[name] = ("F32", tensors[name][1] * np.float32(1e7))  # finite, but beyond float16
    adapter = write_adapter(tmp_path / "a", tensors, folder)
    with pytest.raises(QtoolError, match=r"values are not finite") as caught:
        merge(adapter, tmp_path / "out")
    assert "the sum is beyond the dtype" in caught.value.hint
    assert not (tmp_path / "out").exists()
