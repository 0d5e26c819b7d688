"""`qtool inspect` as users and scripts see it."""

from __future__ import annotations

import json
import re

import pytest

from qtool.formats.precisions import QuantFormat
from tests.cli.running import run
from tests.inspection.folders import quantized_llama

Q = "model.layers.0.self_attn.q_proj.weight"
FIELDS = {
    "schema",
    "command",
    "warnings",
    "path",
    "quant_method",
    "quant",
    "compute_dtype",
    "parameters",
    "weights_bytes",
    "bits_per_parameter",
    "dtypes",
    "precisions",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(quantized, original), sound."""
    folder = tmp_path_factory.mktemp("inspect")
    quantized, original = quantized_llama(QuantFormat("nf4-dq"))
    quantized.has_manifest = True
    return quantized.write(folder / "quantized"), original.write(folder / "original")


@pytest.fixture
def broken(tmp_path):
    parts, _ = quantized_llama(QuantFormat("nf4"))
    parts[f"{Q}.absmax"][0] = float("nan")
    return parts.write(tmp_path / "broken")


def test_json_has_the_contract_s_fields(folders):
    ran = run("inspect", folders[0], "--json")
    assert ran.exit_code == 0 and ran.stderr == ""
    assert ran.document.keys() == FIELDS
    assert ran.document["schema"] == 1 and ran.document["command"] == "inspect"
    assert (ran.document["quant"], ran.document["quant_method"]) == ("nf4-dq", "bitsandbytes")
    assert ran.document["dtypes"]["U8"].keys() == {"tensors", "bytes"}
    assert isinstance(ran.document["weights_bytes"], int)


def test_json_has_more_fields_when_asked(folders):
    quantized, original = folders
    ran = run("inspect", quantized, "--tensors", "--against", original, "--verify", "--json")
    document = ran.document
    assert document.keys() == FIELDS | {"tensors", "errors", "verify", "copied"}
    entry = next(tensor for tensor in document["tensors"] if tensor["name"] == Q)
    assert entry == {
        "name": Q,
        "dtype": "U8",
        "shape": [221, 1],
        "bytes": 221,
        "quant": "nf4-dq",
        "shard": "model-00001-of-00002.safetensors",
    }
    assert len(document["errors"]) == 14
    measures = {"name", "mse", "relative_error", "max_abs_error", "sqnr_db"}
    assert all(measures <= error.keys() for error in document["errors"])
    assert document["verify"]["ok"] is True and document["verify"]["problems"] == []
    assert document["copied"] == {"equal": 7, "different": []}


def test_verify_exits_with_3_and_lists_problems(broken):
    ran = run("inspect", broken, "--verify", "--json")
    assert ran.exit_code == 3 and ran.stderr == ""
    assert ran.document["verify"]["ok"] is False
    assert ran.document["verify"]["problems"] == [
        {
            "file": "model-00001-of-00002.safetensors",
            "tensor": f"{Q}.absmax",
            "rule": "absmax",
            "expected": "finite values >= 0",
            "found": "nan at 0 (1 of 7 values)",
        }
    ]


def test_verify_says_in_words_where_and_what(broken):
    ran = run("inspect", broken, "--verify")
    assert ran.exit_code == 3
    assert "not ok: 1 problem" in ran.stdout
    assert f"{Q}.absmax" in ran.stdout.replace("\n", "")
    assert "finite values >= 0" in ran.stdout and "nan at 0" in ran.stdout
    assert "nf4" in ran.stdout  # the rest of the answer is there too


RESTART = "--restart and the command that made it"
MOVE = "next: move it away, then write it anew with the command that made it"


@pytest.mark.parametrize(
    ("manifest", "files", "said"),
    [
        ("as written", "changed", RESTART),
        ("{", "as written", MOVE),
        ('{"schema": 1, "files": {}}', "as written", MOVE),
        (None, "changed", MOVE),
    ],
)
def test_the_way_out_is_one_that_quantize_takes(folders, tmp_path, manifest, files, said):
    folder = tmp_path / "out"
    arguments = ("quantize", folders[1], "-o", folder, "-q")
    assert run(*arguments).exit_code == 0
    if manifest is None:
        (folder / "qtool_manifest.json").unlink()
    elif manifest != "as written":
        (folder / "qtool_manifest.json").write_text(manifest)
    if files == "changed":
        shard = next(folder.glob("*.safetensors"))
        data = bytearray(shard.read_bytes())
        data[8] ^= 1
        shard.write_bytes(data)
    told = run("inspect", folder, "--verify")
    assert told.exit_code == 3
    assert said in " ".join(told.stderr.split())
    assert (run(*arguments, "--restart").exit_code == 0) is (said == RESTART)


def test_verify_of_a_folder_that_cannot_be_opened_lists_what_is_wrong(folders, tmp_path):
    parts, _ = quantized_llama(QuantFormat("nf4"))
    path = parts.write(tmp_path / "cut")
    shard = path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    plain = run("inspect", path, "--json")
    assert plain.exit_code == 1 and plain.error["kind"] == "bad_file"
    ran = run("inspect", path, "--verify", "--json")
    assert ran.exit_code == 3
    assert ran.document["quant"] is None and ran.document["parameters"] is None
    assert "header" in {problem["rule"] for problem in ran.document["verify"]["problems"]}
    assert run("inspect", path, "--verify").exit_code == 3
    compared = run("inspect", path, "--verify", "--against", folders[1], "--json")
    assert compared.exit_code == 1 and compared.error["kind"] == "bad_file"


def test_undefined_errors_are_null_in_json(broken, folders):
    ran = run("inspect", broken, "--against", folders[1], "--json")
    assert ran.exit_code == 0
    error = next(error for error in ran.document["errors"] if error["name"] == Q)
    assert error["mse"] is None and error["sqnr_db"] is None


def test_the_worst_layers_are_shown_and_all_with_verbose(folders):
    quantized, original = folders
    short = run("inspect", quantized, "--against", original).stdout
    assert "worst 5 of 14" in short and "self_attn.q_proj" in short
    assert "7 other tensors equal the original" in short
    full = run("inspect", quantized, "--against", original, "--verbose").stdout
    assert sum("_proj" in line and "model.layers" in line for line in full.splitlines()) == 14


def test_differences_are_grouped_by_reason_and_listed_with_verbose(tmp_path):
    quantized, original = quantized_llama(QuantFormat("nf4"))
    for shard in original.shards.values():
        for name, (_, values) in shard.items():
            if "norm" in name:
                shard[name] = ("F16", values)
    a, b = quantized.write(tmp_path / "a"), original.write(tmp_path / "b")
    short = run("inspect", a, "--against", b).stdout
    assert "5 tensors: dtype BF16, in the original F16" in short and "4 more" in short
    full = run("inspect", a, "--against", b, "-v").stdout
    assert full.count("layernorm.weight") == 4


def test_changed_values_are_a_table_by_kind_and_listed_with_verbose(tmp_path):
    _, original = quantized_llama(QuantFormat("nf4"))
    base = original.write(tmp_path / "base")
    for shard in original.shards.values():
        for name, (dtype, values) in shard.items():
            if "up_proj" in name or "q_proj" in name:
                shard[name] = (dtype, values ^ 1)  # the last bit of each bfloat16
    merged = original.write(tmp_path / "merged")
    short = run("inspect", merged, "--against", base).stdout
    assert re.search(r"^changed +tensors +mean error", short, re.MULTILINE)
    assert re.search(r"^self_attn.q_proj +2 +0\.\d\d %", short, re.MULTILINE)
    assert "bytes differ" not in short and "model.layers" not in short
    assert "17 other tensors equal the original" in short
    full = run("inspect", merged, "--against", base, "-v").stdout
    assert sum("model.layers" in line for line in full.splitlines()) == 4
    different = run("inspect", merged, "--against", base, "--json").document["copied"]["different"]
    assert len(different) == 4
    assert all(0 < it["relative_error"] < 0.01 and "differ" in it["reason"] for it in different)


def test_equal_models_have_no_error_in_the_heading(folders):
    equal = run("inspect", folders[1], "--against", folders[1]).stdout
    assert "error against" not in equal
    assert "21 tensors equal the original byte for byte" in equal


def test_another_model_of_the_same_shapes_is_a_warning(folders, tmp_path):
    quantized, original = folders
    _, other = quantized_llama(QuantFormat("nf4"))
    for shard in other.shards.values():
        for name, (dtype, values) in shard.items():
            shard[name] = (dtype, values[::-1])
    unrelated = other.write(tmp_path / "other")
    ran = run("inspect", quantized, "--against", unrelated)
    assert ran.exit_code == 0
    assert "or more in every layer" in ran.stderr and "hardly the original" in ran.stderr
    assert run("inspect", quantized, "--against", unrelated, "--json").document["warnings"]
    assert run("inspect", quantized, "--against", original, "--json").document["warnings"] == []


def test_a_model_of_other_shapes_is_no_success(folders, tmp_path):
    _, wider = quantized_llama(QuantFormat("nf4"), hidden=24, heads=3, mlp=33, vocab=40)
    ran = run("inspect", folders[0], "--against", wider.write(tmp_path / "wider"), "--json")
    assert ran.exit_code == 2 and ran.stdout == ""
    assert "original [24, 24]" in ran.error["message"] and "--against" in ran.error["hint"]


def test_a_single_file_is_described_but_not_verified(folders):
    shard = folders[0] / "model-00001-of-00002.safetensors"
    assert run("inspect", shard, "--json").document["quant"] == "nf4-dq"
    ran = run("inspect", shard, "--verify", "--json")
    assert ran.exit_code == 2 and str(folders[0]) in ran.error["hint"]


@pytest.mark.parametrize("arguments", [("nowhere/at/all",), ("--against",), ()])
def test_wrong_usage_is_an_error_with_a_hint(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = run("inspect", *arguments, "--json")
    assert ran.exit_code in (1, 2) and ran.stdout == ""
    assert ran.error["hint"]


def test_nothing_is_written(folders):
    quantized, original = folders
    before = sorted((file.name, file.stat().st_mtime_ns) for file in quantized.iterdir())
    run("inspect", quantized, "--verify", "--against", original)
    assert before == sorted((file.name, file.stat().st_mtime_ns) for file in quantized.iterdir())


def test_a_folder_that_qtool_wrote_is_sound(folders, tmp_path):
    run("quantize", folders[1], "-o", tmp_path / "out", "-q")
    ran = run("inspect", tmp_path / "out", "--verify", "--against", folders[1], "--json")
    assert ran.exit_code == 0, ran.document["verify"]
    assert ran.document["copied"]["different"] == []
    manifest = json.loads((tmp_path / "out" / "qtool_manifest.json").read_text())
    (tmp_path / "out" / next(iter(manifest["files"]))).unlink()
    assert run("inspect", tmp_path / "out", "--verify").exit_code == 3


def test_verbose_says_what_reading_took(folders):
    assert re.fullmatch(r"headers: \d+\.\d\d s\n", run("inspect", folders[0], "-v").stderr)
    assert run("inspect", folders[0]).stderr == ""
