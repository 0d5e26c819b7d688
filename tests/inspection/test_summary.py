"""What a folder is: precisions, parameters by real shapes, bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qtool.checkpoint import open_checkpoint
from qtool.errors import QtoolError
from qtool.formats.precisions import QUANTIZED_PRECISIONS, QuantFormat
from qtool.inspection import inspect_checkpoint
from tests.hub_server import HubServer, hub_server
from tests.inspection.folders import ODD_LLAMA, FolderParts, quantized_llama
from tests.tiny_models import llama_config, llama_shapes, write_llama

__all__ = ["hub_server"]  # the fixture

Q = "model.layers.0.self_attn.q_proj.weight"
PARAMETERS = sum(math.prod(shape) for shape in llama_shapes(llama_config(**ODD_LLAMA)).values())


def inspect(path):
    return inspect_checkpoint(open_checkpoint(str(path), need="headers", need_config=False))


def folder_of(tensors, config=None):
    return FolderParts(config, {"model.safetensors": tensors}, has_index=False)


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_packed_weights_count_by_their_real_shapes(precision, tmp_path):
    parts, _ = quantized_llama(QuantFormat(precision))
    inspection = inspect(parts.write(tmp_path / "out"))
    stored = [values for shard in parts.shards.values() for _, values in shard.values()]
    assert inspection.quant == precision
    assert inspection.quant_method == "bitsandbytes"
    assert inspection.parameters == PARAMETERS
    assert inspection.weights_bytes == sum(values.nbytes for values in stored)
    assert inspection.bits_per_parameter == 8 * inspection.weights_bytes / PARAMETERS
    assert inspection.precisions[precision].num_tensors == 14
    assert sum(total.num_parameters for total in inspection.precisions.values()) == PARAMETERS
    for totals in (inspection.precisions, inspection.dtypes):
        assert sum(total.num_bytes for total in totals.values()) == inspection.weights_bytes


def test_only_packed_weights_carry_the_packed_precision(tmp_path):
    parts, _ = quantized_llama(QuantFormat("nf4-dq"))
    quant_of = {t.name: t.quant for t in inspect(parts.write(tmp_path / "out")).tensors}
    assert sum(quant == "nf4-dq" for quant in quant_of.values()) == 14
    assert quant_of[Q] == "nf4-dq"
    assert quant_of["model.norm.weight"] == "bf16"
    assert quant_of[f"{Q}.absmax"] is None and quant_of[f"{Q}.quant_map"] is None


@pytest.mark.parametrize(("dtype", "word"), [("BF16", "bf16"), ("F16", "fp16"), ("F32", "fp32")])
def test_full_precision_folders_have_their_dtype_s_word(dtype, word, tmp_path):
    write_llama(tmp_path, dtype=dtype, num_shards=2)
    inspection = inspect(tmp_path)
    assert (inspection.quant, inspection.quant_method) == (word, None)
    assert list(inspection.dtypes) == [dtype] and list(inspection.precisions) == [word]


def test_a_fp32_norm_does_not_make_a_model_mixed(tmp_path):
    tensors = {
        "a.weight": ("BF16", np.zeros((4, 4), np.uint16)),
        "norm.weight": ("F32", np.zeros(4, np.float32)),
    }
    assert inspect(folder_of(tensors).write(tmp_path / "out")).quant == "bf16"


def test_two_precisions_are_mixed(tmp_path):
    parts, _ = quantized_llama(QuantFormat("nf4"))
    eight_bit, _ = quantized_llama(QuantFormat("int8"))
    for name in [name for name in parts.shard_of(Q) if name.startswith(Q)]:
        del parts[name]
    for name in (Q, Q.replace("weight", "SCB"), Q.replace("weight", "weight_format")):
        parts.shards["model-00001-of-00002.safetensors"][name] = eight_bit.shard_of(name)[name]
    inspection = inspect(parts.write(tmp_path / "out"))
    assert inspection.quant == "mixed"
    assert inspection.precisions["int8"].num_tensors == 1
    assert inspection.parameters == PARAMETERS


def test_integers_and_nothing_have_no_precision(tmp_path):
    integers = {"ids": ("I32", np.zeros((2, 2), np.int32))}
    assert inspect(folder_of(integers).write(tmp_path / "ids")).quant is None
    empty = inspect(folder_of({}).write(tmp_path / "empty"))
    assert (empty.quant, empty.parameters, empty.bits_per_parameter) == (None, 0, None)


def test_tied_weights_count_once_whichever_is_stored(tmp_path):
    config = write_llama(tmp_path / "tied", tied=True)
    shapes = llama_shapes(config)
    expected = sum(math.prod(shape) for shape in shapes.values())
    assert inspect(tmp_path / "tied").parameters == expected

    both, _ = quantized_llama(QuantFormat("nf4"), tied=True)
    both.shard_of("model.norm.weight")["lm_head.weight"] = (
        "BF16", both["model.embed_tokens.weight"],
    )  # fmt: skip
    assert inspect(both.write(tmp_path / "both")).parameters == expected

    both.config["model_type"] = both.config["architectures"] = None  # nothing but the flag
    assert inspect(both.write(tmp_path / "unknown")).parameters == expected
    del both.shard_of("model.embed_tokens.weight")["model.embed_tokens.weight"]
    assert inspect(both.write(tmp_path / "head")).parameters == expected


def test_buffers_are_stored_but_no_parameters(tmp_path):
    parts, _ = quantized_llama(QuantFormat("nf4"))
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    parts.shards["model-00001-of-00002.safetensors"][buffer] = ("F32", np.ones(4, np.float32))
    assert inspect(parts.write(tmp_path / "out")).parameters == PARAMETERS


def test_the_compute_dtype_is_the_entry_s_or_float32_in_4_bit(tmp_path):
    parts, original = quantized_llama(QuantFormat("nf4"))
    assert inspect(parts.write(tmp_path / "given")).compute_dtype == "bfloat16"
    del parts.quantization["bnb_4bit_compute_dtype"]
    assert inspect(parts.write(tmp_path / "default")).compute_dtype == "float32"
    original.config["torch_dtype"] = "float16"
    assert inspect(original.write(tmp_path / "original")).compute_dtype == "float16"
    eight_bit, _ = quantized_llama(QuantFormat("int8"))
    assert inspect(eight_bit.write(tmp_path / "int8")).compute_dtype is None


def test_another_method_is_named(tmp_path):
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    tensors = {"a.qweight": ("I32", np.zeros((4, 4), np.int32))}
    inspection = inspect(folder_of(tensors, config).write(tmp_path / "out"))
    assert (inspection.quant, inspection.quant_method) == (None, "gptq")


def test_a_broken_quant_state_is_an_error_that_points_to_verify(tmp_path):
    parts, _ = quantized_llama(QuantFormat("nf4"))
    parts.change_quant_state(Q, blocksize=7)
    with pytest.raises(QtoolError, match="blocksize is 7") as caught:
        inspect(parts.write(tmp_path / "out"))
    assert Q in caught.value.message and "--verify" in caught.value.hint


@pytest.fixture
def hub(hub_server: HubServer, tmp_path, monkeypatch) -> HubServer:
    from huggingface_hub import constants

    template = hub_server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    return hub_server


@pytest.mark.parametrize("precision", ["nf4-dq", "int8"])
def test_headers_from_the_hub_are_enough_where_the_model_is_known(precision, hub, tmp_path):
    parts, _ = quantized_llama(QuantFormat(precision))
    folder = parts.write(tmp_path / "out")
    hub.add_model("someone/tiny", folder)
    local, remote = inspect(folder), inspect("someone/tiny")
    assert (remote.parameters, remote.quant) == (local.parameters, local.quant)
    assert remote.precisions == local.precisions and remote.notes == ()


def test_headers_from_the_hub_of_an_unknown_model_give_an_estimate_and_say_so(hub, tmp_path):
    parts, _ = quantized_llama(QuantFormat("nf4"))
    parts.config["model_type"] = "nobody-knows"
    parts.config["architectures"] = ["NobodyKnows"]
    hub.add_model("someone/tiny", parts.write(tmp_path / "out"))
    inspection = inspect("someone/tiny")
    assert PARAMETERS <= inspection.parameters <= PARAMETERS + 14  # half bytes are counted whole
    assert "estimated" in inspection.notes[0]
