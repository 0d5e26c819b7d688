"""Every rule finds what breaks it, and nothing else is found."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from qtool.formats.precisions import QuantFormat
from qtool.inspection import RULES, verify_folder
from qtool.inspection.rules import rule_name
from tests.inspection.folders import INDEX, MANIFEST, FolderParts, quantized_llama, write_manifest

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
Q = "model.layers.0.self_attn.q_proj.weight"  # 21 x 21 values: an odd number
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"

NF4, NF4_DQ, INT8 = QuantFormat("nf4"), QuantFormat("nf4-dq"), QuantFormat("int8")
FORMATS = [
    *(QuantFormat(precision, 32) for precision in ("nf4", "nf4-dq", "fp4", "fp4-dq")),
    QuantFormat("nf4-dq", 4096),
    INT8,
]


def problems_of(path):
    return {problem.rule: problem for problem in verify_folder(path).problems}


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"{fmt.precision}-{fmt.blocksize}")
def test_a_sound_folder_breaks_no_rule(fmt, tmp_path):
    parts, original = quantized_llama(fmt)
    parts.has_manifest = True
    verification = verify_folder(parts.write(tmp_path / "out"))
    assert verification.problems == ()
    assert verification.ok and verification.num_layers == 14
    assert verify_folder(original.write(tmp_path / "original")).ok


def test_another_quant_storage_is_sound(tmp_path):
    fmt = QuantFormat("nf4", 64, "bfloat16")
    parts, _ = quantized_llama(fmt, hidden=64)
    assert verify_folder(parts.write(tmp_path / "out")).problems == ()


def test_a_single_file_needs_no_index(tmp_path):
    parts, _ = quantized_llama(NF4)
    tensors = {name: t for shard in parts.shards.values() for name, t in shard.items()}
    parts.shards, parts.has_index = {"model.safetensors": tensors}, False
    assert verify_folder(parts.write(tmp_path / "out")).problems == ()


def test_int8_without_weight_format_is_sound(tmp_path):
    parts, _ = quantized_llama(INT8)
    del parts[Q.replace("weight", "weight_format")]
    assert verify_folder(parts.write(tmp_path / "out")).problems == ()


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_either_of_two_tied_weights_may_be_the_stored_one(stored, tmp_path):
    parts, _ = quantized_llama(NF4, tied=True)
    embedding = parts["model.embed_tokens.weight"]
    del parts["model.embed_tokens.weight"]
    parts.shards[FIRST][stored] = ("BF16", embedding)
    assert verify_folder(parts.write(tmp_path / "out")).problems == ()


def test_zeros_padded_as_gpus_pad_them_are_sound(tmp_path):
    parts, _ = quantized_llama(NF4)
    parts[Q][-32:] = 0  # the last block holds zeros only, whose code on a GPU is 0
    parts[f"{Q}.absmax"][-1] = 0
    assert verify_folder(parts.write(tmp_path / "out")).problems == ()


# -- what breaks each rule: before writing, by changing values -------------------------------------

CASES: dict[
    str, list[tuple[QuantFormat, Callable[[FolderParts], None], str | None, str | None]]
] = {}


def breaks(rule: str, fmt: QuantFormat, *, file: str | None, tensor: str | None = None):
    """Register a change that must break `rule` and no other, reported for `file` and `tensor`."""

    def register(change: Callable[[FolderParts], None]) -> Callable[[FolderParts], None]:
        CASES.setdefault(rule, []).append((fmt, change, file, tensor))
        return change

    return register


@breaks("config", NF4, file="config.json")
def config_is_missing(parts):
    parts.config = None


@breaks("config", NF4, file="config.json")
def config_is_no_object(parts):
    parts.config = None
    parts.other_files["config.json"] = b"[1, 2]"


@breaks("index", NF4, file=INDEX)
def index_is_missing(parts):
    parts.has_index = False


@breaks("index", NF4, file=INDEX)
def index_is_no_json(parts):
    parts.has_index = False
    parts.other_files[INDEX] = b'{"weight_map": {'


@breaks("index", NF4, file=INDEX)
def index_has_no_weight_map(parts):
    parts.has_index = False
    parts.other_files[INDEX] = b'{"metadata": {}}'


@breaks("total-size", NF4, file=INDEX)
def total_size_is_wrong(parts):
    parts.metadata["total_size"] = 1


@breaks("duplicate-tensor", NF4, file=FIRST, tensor=NORM)
def a_tensor_is_in_two_shards(parts):
    parts.shards[FIRST][NORM] = ("BF16", parts[NORM])
    parts.metadata["total_size"] = parts.index()["metadata"]["total_size"] - parts[NORM].nbytes


@breaks("unfinished-run", NF4, file="model.safetensors.partial")
def a_file_in_work_is_left(parts):
    parts.other_files["model.safetensors.partial"] = b""


@breaks("stray-statistic", NF4, file=FIRST, tensor="model.gone.weight.absmax")
def statistics_belong_to_no_weight(parts):
    parts.shards[FIRST]["model.gone.weight.absmax"] = ("F32", np.ones(3, np.float32))


@breaks("bare-packed-weight", NF4, file=FIRST, tensor="model.extra.weight")
def a_packed_weight_has_no_statistics(parts):
    parts.shards[FIRST]["model.extra.weight"] = ("U8", np.zeros((4, 1), np.uint8))


@breaks("bare-packed-weight", INT8, file=FIRST, tensor="model.extra.weight")
def an_int8_weight_has_no_scb(parts):
    parts.shards[FIRST]["model.extra.weight"] = ("I8", np.zeros((4, 4), np.int8))


STATE = f"{Q}.quant_state.bitsandbytes__nf4"


@breaks("quant-state", NF4, file=FIRST, tensor=STATE)
def quant_state_has_an_unknown_key(parts):
    parts.change_quant_state(Q, extra=1)


@breaks("quant-state", NF4, file=FIRST, tensor=STATE)
def blocksize_is_no_power_of_two(parts):
    parts.change_quant_state(Q, blocksize=48)


@breaks("quant-state", NF4, file=FIRST, tensor=STATE)
def blocksize_is_out_of_range(parts):
    parts.change_quant_state(Q, blocksize=16)


@breaks("quant-state", NF4, file=FIRST, tensor=STATE)
def quant_state_is_no_json(parts):
    parts[STATE] = ("U8", np.full(40, 0xFF, np.uint8))


@breaks("quant-state", NF4_DQ, file=FIRST, tensor=STATE)
def nested_blocksize_is_unreadable_for_others(parts):
    parts.change_quant_state(Q, nested_blocksize=64)


@breaks("quant-type", NF4, file=FIRST, tensor=STATE)
def quant_state_names_another_table(parts):
    parts.change_quant_state(Q, quant_type="fp4")


@breaks("layout", NF4_DQ, file=FIRST, tensor=f"{Q}.nested_absmax")
def nested_absmax_is_missing(parts):
    del parts[f"{Q}.nested_absmax"]


@breaks("layout", NF4, file=FIRST, tensor=f"{Q}.quant_map")
def quant_map_is_missing(parts):
    del parts[f"{Q}.quant_map"]


@breaks("layout", NF4, file=FIRST, tensor=f"{Q}.absmax")
def absmax_is_too_short(parts):
    parts[f"{Q}.absmax"] = ("F32", parts[f"{Q}.absmax"][:-1])


@breaks("layout", NF4, file=FIRST, tensor=f"{Q}.absmax")
def absmax_has_another_dtype(parts):
    parts[f"{Q}.absmax"] = ("F16", parts[f"{Q}.absmax"].astype(np.float16))


@breaks("layout", NF4, file=FIRST, tensor=Q)
def packed_bytes_are_missing(parts):
    parts[Q] = ("U8", parts[Q][:-1])


@breaks("layout", INT8, file=FIRST, tensor=Q.replace("weight", "SCB"))
def scb_is_too_long(parts):
    parts[Q.replace("weight", "SCB")] = ("F32", np.ones(22, np.float32))


@breaks("packed-shape", NF4, file=FIRST, tensor=Q)
def packed_bytes_are_a_row(parts):
    parts[Q] = ("U8", parts[Q].reshape(1, -1))


@breaks("quant-map", NF4, file=FIRST, tensor=f"{Q}.quant_map")
def the_code_table_is_off_by_one_bit(parts):
    table = parts[f"{Q}.quant_map"].copy()
    table.view(np.uint32)[3] ^= 1
    parts[f"{Q}.quant_map"] = ("F32", table)


@breaks("nested-quant-map", NF4_DQ, file=FIRST, tensor=f"{Q}.nested_quant_map")
def the_dynamic_map_is_off_by_one_bit(parts):
    table = parts[f"{Q}.nested_quant_map"].copy()
    table.view(np.uint32)[200] ^= 1
    parts[f"{Q}.nested_quant_map"] = ("F32", table)


@breaks("absmax", NF4, file=FIRST, tensor=f"{Q}.absmax")
def absmax_is_nan(parts):
    parts[f"{Q}.absmax"][1] = np.nan


@breaks("absmax", NF4, file=FIRST, tensor=f"{Q}.absmax")
def absmax_is_negative(parts):
    parts[f"{Q}.absmax"][1] = -1


@breaks("nested-absmax", NF4_DQ, file=FIRST, tensor=f"{Q}.nested_absmax")
def nested_absmax_is_infinite(parts):
    parts[f"{Q}.nested_absmax"][0] = np.inf


@breaks("nested-offset", NF4_DQ, file=FIRST, tensor=STATE)
def nested_offset_is_negative(parts):
    parts.change_quant_state(Q, nested_offset=-0.5)


@breaks("padding", NF4, file=FIRST, tensor=Q)
def the_padding_nibble_is_a_value(parts):
    parts[Q][-1] = parts[Q][-1] & 0xF0 | 0x1


@breaks("padding", QuantFormat("fp4"), file=FIRST, tensor=Q)
def the_padding_nibble_of_fp4_is_a_value(parts):
    parts[Q][-1] = parts[Q][-1] & 0xF0 | 0x7


@breaks("scb", INT8, file=FIRST, tensor=Q.replace("weight", "SCB"))
def scb_is_infinite(parts):
    parts[Q.replace("weight", "SCB")][0] = np.inf


@breaks("weight-format", INT8, file=FIRST, tensor=Q.replace("weight", "weight_format"))
def weight_format_is_col32(parts):
    parts[Q.replace("weight", "weight_format")] = ("U8", np.ones((), np.uint8))


@breaks("weight-format", INT8, file=FIRST, tensor=Q.replace("weight", "weight_format"))
def weight_format_is_no_byte(parts):
    parts[Q.replace("weight", "weight_format")] = ("F32", np.zeros((), np.float32))


@breaks("quantization-config", NF4, file="config.json")
def the_config_does_not_say_that_it_is_quantized(parts):
    del parts.config["quantization_config"]


@breaks("quantization-config", NF4, file="config.json")
def the_config_names_another_method(parts):
    parts.quantization["quant_method"] = "gptq"


@breaks("load-in", NF4, file="config.json")
def the_config_does_not_load_in_4bit(parts):
    parts.quantization["load_in_4bit"] = False


@breaks("load-in", INT8, file="config.json")
def the_config_does_not_load_in_8bit(parts):
    del parts.quantization["load_in_8bit"]


@breaks("config-quant-type", NF4, file="config.json")
def the_config_names_another_code_table(parts):
    parts.quantization["bnb_4bit_quant_type"] = "fp4"


@breaks("config-double-quant", NF4_DQ, file="config.json")
def the_config_denies_double_quantization(parts):
    parts.quantization["bnb_4bit_use_double_quant"] = False


@breaks("config-quant-storage", NF4, file="config.json")
def the_config_names_another_storage(parts):
    parts.quantization["bnb_4bit_quant_storage"] = "bfloat16"


@breaks("config-compute-dtype", NF4, file="config.json")
def the_config_computes_in_an_unknown_dtype(parts):
    parts.quantization["bnb_4bit_compute_dtype"] = "float8"


@breaks("config-fp16-weight", INT8, file="config.json")
def the_config_wants_16_bit_weights(parts):
    parts.quantization["llm_int8_has_fp16_weight"] = True


@breaks("skip-modules", NF4, file=FIRST, tensor=Q)
def a_packed_layer_is_on_the_skip_list(parts):
    parts.quantization["llm_int8_skip_modules"] = ["lm_head", "layers.0.self_attn.q_proj"]


@breaks("skip-modules", NF4, file=SECOND, tensor="lm_head.weight")
def a_16_bit_layer_is_not_on_the_skip_list(parts):
    parts.quantization["llm_int8_skip_modules"] = ["embed_tokens"]


@breaks("skip-modules", NF4, file="config.json")
def the_skip_list_is_no_regular_expression(parts):
    parts.quantization["llm_int8_skip_modules"] = ["*["]


@breaks("missing-tensor", NF4, file="config.json", tensor=NORM)
def a_parameter_is_nowhere(parts):
    del parts[NORM]


@breaks("tensor-shape", NF4, file=SECOND, tensor=NORM)
def a_parameter_has_another_shape(parts):
    parts[NORM] = ("BF16", np.zeros(20, np.uint16))


@breaks("tensor-shape", NF4, file=FIRST, tensor=Q)
def a_packed_weight_says_that_it_has_another_shape(parts):
    parts.change_quant_state(Q, shape=[441, 1])


FLAT_CASES = [
    pytest.param(rule, *case, id=case[1].__name__)
    for rule, cases in CASES.items()
    for case in cases
]


@pytest.mark.parametrize(("rule", "fmt", "change", "file", "tensor"), FLAT_CASES)
def test_a_change_breaks_its_rule_alone(rule, fmt, change, file, tensor, tmp_path):
    parts, _ = quantized_llama(fmt)
    change(parts)
    found = verify_folder(parts.write(tmp_path / "out")).problems
    assert {problem.rule for problem in found} == {rule}
    assert (file, tensor) in {(problem.file, problem.tensor) for problem in found}
    assert all(problem.expected and problem.found for problem in found)


# -- and after writing, by changing files ----------------------------------------------------------

FILE_CASES: dict[str, list[tuple[Callable, str]]] = {}


def file_breaks(rule: str, *, file: str):
    def register(change):
        FILE_CASES.setdefault(rule, []).append((change, file))
        return change

    return register


def change_index(path, change):
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))
    write_manifest(path)


@file_breaks("header", file=FIRST)
def a_shard_is_cut_short(path):
    size = (path / FIRST).stat().st_size
    with (path / FIRST).open("r+b") as file:
        file.truncate(size - 10)
    write_manifest(path)


@file_breaks("index-name", file=INDEX)
def the_index_leads_out_of_the_folder(path):
    change_index(path, lambda weight_map: weight_map.update({"x": "../model.safetensors"}))


@file_breaks("missing-shard", file="model-00003-of-00003.safetensors")
def the_index_names_a_file_that_is_not_there(path):
    change_index(
        path, lambda weight_map: weight_map.update({"x": "model-00003-of-00003.safetensors"})
    )


@file_breaks("index-tensor", file=INDEX)
def the_index_names_the_wrong_shard(path):
    change_index(path, lambda weight_map: weight_map.update({NORM: FIRST}))


@file_breaks("index-tensor", file=INDEX)
def the_index_names_a_tensor_that_is_nowhere(path):
    change_index(path, lambda weight_map: weight_map.update({"model.gone.weight": FIRST}))


@file_breaks("unindexed-tensor", file=SECOND)
def the_index_leaves_out_a_tensor(path):
    change_index(path, lambda weight_map: weight_map.pop(NORM))


@file_breaks("unfinished-run", file=".qtool")
def a_journal_is_left(path):
    (path / ".qtool").mkdir()
    (path / ".qtool" / "journal.jsonl").write_text("{}\n")


@file_breaks("manifest", file=MANIFEST)
def the_manifest_is_no_json(path):
    (path / MANIFEST).write_text("{")


@file_breaks("manifest", file=MANIFEST)
def the_manifest_has_no_files(path):
    (path / MANIFEST).write_text(json.dumps({"schema": 1}))


@file_breaks("manifest", file=MANIFEST)
def the_manifest_is_of_another_schema(path):
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"schema": 2}))


@file_breaks("missing-file", file="tokenizer.json")
def a_file_is_gone(path):
    (path / "tokenizer.json").unlink()


@file_breaks("extra-file", file="notes.txt")
def a_file_was_added(path):
    (path / "notes.txt").write_text("mine")


@file_breaks("file-bytes", file="tokenizer.json")
def a_file_grew(path):
    (path / "tokenizer.json").write_bytes(b"{}  ")


@file_breaks("sha256", file="tokenizer.json")
def a_byte_changed(path):
    (path / "tokenizer.json").write_bytes(b"[]")


@file_breaks("sha256", file=SECOND)
def a_weight_changed(path):
    with (path / SECOND).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))


FLAT_FILE_CASES = [
    pytest.param(rule, *case, id=case[0].__name__)
    for rule, cases in FILE_CASES.items()
    for case in cases
]


@pytest.mark.parametrize(("rule", "change", "file"), FLAT_FILE_CASES)
def test_a_changed_file_breaks_its_rule_alone(rule, change, file, tmp_path):
    parts, _ = quantized_llama(NF4_DQ)
    parts.has_manifest = True
    parts.other_files["tokenizer.json"] = b"{}"
    path = parts.write(tmp_path / "out")
    change(path)
    found = verify_folder(path).problems
    expected = {rule}
    if rule == "header":  # what only that shard holds cannot be found either
        expected |= {"missing-tensor"}
    assert {problem.rule for problem in found} == expected
    assert file in {problem.file for problem in found}


def test_a_shard_beside_the_index_is_found(tmp_path):
    parts, _ = quantized_llama(NF4)
    path = parts.write(tmp_path / "out")
    (path / "model.safetensors").write_bytes((path / FIRST).read_bytes())
    found = problems_of(path)
    assert "transformers loads it" in found["unindexed-shard"].found
    assert found.keys() == {"unindexed-shard", "duplicate-tensor"}


def test_a_link_that_leaves_the_folder_is_not_followed(tmp_path):
    parts, _ = quantized_llama(NF4)
    parts.has_manifest = True
    parts.other_files["tokenizer.json"] = b"{}"
    path = parts.write(tmp_path / "out")
    (tmp_path / "elsewhere.json").write_bytes(b"{}")
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    assert "a link" in problems_of(path)["sha256"].found


def test_every_rule_has_a_case_that_breaks_it():
    tested = {*CASES, *FILE_CASES, "unindexed-shard"}
    assert tested == {rule_name(rule) for rule in RULES}


def test_every_rule_states_itself_in_one_sentence():
    for rule in RULES:
        assert rule.__doc__ and rule.__doc__.endswith(".") and "\n" not in rule.__doc__


def test_an_unknown_architecture_is_verified_without_the_model_s_rules(tmp_path):
    parts, _ = quantized_llama(NF4)
    parts.config["model_type"] = "nobody-knows"
    parts.config["architectures"] = ["NobodyKnows"]
    del parts[NORM]
    assert verify_folder(parts.write(tmp_path / "out")).ok
