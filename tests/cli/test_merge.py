"""`qtool merge` as users and scripts see it, and what docs/merge.md shows of it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.running import run
from tests.hub_server import hub_server  # noqa: F401
from tests.merge.adapters import linear_layers, lora_tensors, read_folder, write_adapter
from tests.test_readme import shape_of
from tests.tiny_models import write_llama

pytestmark = pytest.mark.usefixtures("enough_memory")

ROOT = Path(__file__).parent.parent.parent
DOCS = (ROOT / "docs/merge.md").read_text(encoding="utf-8")
DEMO = ROOT / "qtool/demo_model"
RESULT_FIELDS = {
    *("schema", "command", "warnings", "output", "quant", "onto", "onto_reason", "base"),
    *("backend", "backend_reason", "input_bytes", "output_bytes", "weights_bytes", "seconds"),
    *("resumed", "tensors", "max_logit_change", "adapter_logit_change", "prompt_tokens"),
    *("other_choices", "peak_host_bytes", "peak_device_bytes", "changed_codes", "compared_codes"),
}


@pytest.fixture
def adapter(tmp_path):
    config = write_llama(tmp_path / "model", num_shards=2)
    return write_adapter(tmp_path / "a", lora_tensors(linear_layers(config)), tmp_path / "model")


@pytest.fixture
def demo_adapter(tmp_path):
    config = json.loads((DEMO / "config.json").read_text())
    return write_adapter(tmp_path / "adapter", lora_tensors(linear_layers(config)), DEMO)


def test_json_is_one_document_with_the_contract_s_fields(adapter, tmp_path):
    ran = run("merge", adapter, "-o", tmp_path / "out", "--json", "--no-check")
    assert ran.exit_code == 0 and ran.stderr == ""
    document = ran.document
    assert document.keys() == RESULT_FIELDS
    assert document["schema"] == 1 and document["command"] == "merge"
    assert document["quant"] == "bf16" and document["onto"] == "original"
    assert document["tensors"] == {"merged": 14, "replaced": 0, "dequantized": 0, "copied": 7}
    assert document["max_logit_change"] is None and document["warnings"] == []
    assert "asked for" not in document["backend_reason"]
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert document["output_bytes"] == sum(file.stat().st_size for file in files)
    assert document["peak_host_bytes"] > 0 and document["seconds"] > 0
    again = run("merge", adapter, "-o", tmp_path / "out", "--json", "--no-check").document
    assert again["resumed"] is True


def test_peak_memory_is_that_of_the_check_too(demo_adapter, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    from qtool.merge import logits

    claimed = [1 << 20]
    run_model = logits._logits

    def claiming(*arguments):
        claimed[0] = 1 << 30
        return run_model(*arguments)

    monkeypatch.setattr("qtool.quantize.memory.anonymous_bytes", lambda: claimed[0])
    monkeypatch.setattr(logits, "_logits", claiming)
    ran = run("merge", demo_adapter, "-o", tmp_path / "out", "--json")
    assert ran.document["peak_host_bytes"] == 1 << 30
    claimed[0] = 1 << 20
    said = run("merge", demo_adapter, "-o", tmp_path / "out2").stderr
    assert "peak memory 1.00 MiB merging, 1.00 GiB checking, without the page cache" in said
    claimed[0] = 1 << 20
    said = run("merge", demo_adapter, "-o", tmp_path / "out3", "--no-check").stderr
    assert "peak memory 1.00 MiB, without the page cache" in said


def test_the_output_is_whole_by_every_rule(adapter, tmp_path):
    for options in ((), ("--quant", "nf4-dq"), ("--quant", "int8", "--skip", "model.layers.0")):
        output = tmp_path / f"out{len(options)}"
        assert run("merge", adapter, "-o", output, "--no-check", *options).exit_code == 0
        assert run("inspect", output, "--verify").exit_code == 0


def test_patterns_that_skip_nothing_are_a_warning(adapter, tmp_path):
    options = ("--quant", "nf4", "--skip", "lm_haed", "--no-check", "--dry-run")
    ran = run("merge", adapter, "-o", tmp_path / "out", *options, "--json")
    (warning,) = ran.document["warnings"]
    assert "--skip lm_haed" in warning and "lm_head" in warning
    quantize = run("quantize", tmp_path / "model", "-o", tmp_path / "q", *options[:4], "--dry-run")
    assert warning in quantize.stderr.replace("\n", " ")


@pytest.mark.parametrize("quant", [None, "nf4-dq"])
@pytest.mark.parametrize("packed", [False, True], ids=["16 bit", "packed"])
def test_the_change_of_logits_is_small_beside_what_the_adapter_does(
    demo_adapter, tmp_path, packed, quant
):
    pytest.importorskip("peft")
    options = ["--quant", quant] if quant else []
    if packed:
        run("quantize", DEMO, "-o", tmp_path / "packed")
        options += ["--base", tmp_path / "packed"]
        (tmp_path / DEMO.name).symlink_to(DEMO)  # where the manifest says that the original is
    ran = run(
        "merge", demo_adapter, "-o", tmp_path / "out", "--json", "--prompt", "A cat", *options
    )
    document = ran.document
    assert document["onto"] == ("dequantized" if packed and quant is None else "original")
    assert document["prompt_tokens"] > 0 and document["warnings"] == []
    assert 0 < document["max_logit_change"] < document["adapter_logit_change"]
    if quant is None:  # only rounded
        assert document["max_logit_change"] < 0.05 * document["adapter_logit_change"]


def test_onto_original_is_compared_with_the_packed_base(demo_adapter, tmp_path):
    pytest.importorskip("peft")
    run("quantize", DEMO, "-o", tmp_path / "packed")
    options = ("--base", tmp_path / "packed", "--json")
    close = run("merge", demo_adapter, "-o", tmp_path / "out", *options).document
    config = json.loads((demo_adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "packed")
    (demo_adapter / "adapter_config.json").write_text(json.dumps(config))
    options = ("--base", DEMO, "--onto", "original", "--json")
    far = run("merge", demo_adapter, "-o", tmp_path / "out2", *options).document
    assert far["onto"] == "original" and far["base"] == str(DEMO)
    assert far["max_logit_change"] > 4 * close["max_logit_change"]


def test_training_on_weights_packed_while_loading_is_told_and_compared_with(demo_adapter, tmp_path):
    pytest.importorskip("peft")
    plain = run("merge", demo_adapter, "-o", tmp_path / "out", "--json").document
    record = {"model": {"id": "demo", "quant": "nf4-dq"}}
    (demo_adapter / "qtool_finetune.json").write_text(json.dumps(record))
    warned = run("merge", demo_adapter, "-o", tmp_path / "out2", "--json").document
    [warning] = warned["warnings"]
    assert "trained against nf4-dq weights" in warning and "--base PACKED" in warning
    assert warned["max_logit_change"] > 4 * plain["max_logit_change"]
    options = ("--onto", "original", "--no-check", "--json")  # who asks for it need not be told
    assert not run("merge", demo_adapter, "-o", tmp_path / "out3", *options).document["warnings"]


@pytest.fixture
def small_adapter(tmp_path):
    """An adapter whose updates are far below a step of the packed base."""
    config = json.loads((DEMO / "config.json").read_text())
    tensors = lora_tensors(linear_layers(config))
    return write_adapter(tmp_path / "small", tensors, tmp_path / "packed", lora_alpha=0.5)


def codes_that_differ(one, other, weights):
    """(changed, all) of two folders' 4-bit codes, nibble by nibble."""
    before, after = read_folder(one), read_folder(other)
    changed = total = 0
    for name in weights:
        for mask in (0xF0, 0x0F):
            changed += ((before[name][1] & mask) != (after[name][1] & mask)).sum()
            total += before[name][1].size
    return changed, total


def test_packing_alike_again_is_told_before_and_after(small_adapter, tmp_path):
    pytest.importorskip("peft")
    run("quantize", DEMO, "-o", tmp_path / "packed")
    forced = ("--quant", "nf4-dq", "--onto", "dequantized", "--json")
    ran = run("merge", small_adapter, "-o", tmp_path / "lost", *forced).document
    before, after = ran["warnings"]
    assert "part of the adapter is lost" in before and "--onto original often keeps more" in before
    assert "is not what the adapter makes" in after and f"--adapter {small_adapter}" in after
    assert ran["max_logit_change"] > 0.5 * ran["adapter_logit_change"]
    weights = [name for name in read_folder(tmp_path / "packed") if name.endswith("proj.weight")]
    differ = codes_that_differ(tmp_path / "packed", tmp_path / "lost", weights)
    assert (ran["changed_codes"], ran["compared_codes"]) == differ
    assert ran["changed_codes"] < 0.05 * ran["compared_codes"]
    unchecked = run("merge", small_adapter, "-o", tmp_path / "lost2", *forced, "--no-check")
    assert unchecked.document["warnings"] == [before]
    options = ("--quant", "int8", "--no-check", "--json")  # other steps: nothing to tell
    assert not run("merge", small_adapter, "-o", tmp_path / "o", *options).document["warnings"]

    (tmp_path / DEMO.name).symlink_to(DEMO)
    options = ("--quant", "nf4-dq", "--json")
    kept = run("merge", small_adapter, "-o", tmp_path / "kept", *options).document
    assert kept["onto"] == "original" and "loses part of the adapter" in kept["onto_reason"]
    assert kept["changed_codes"] is None


def test_packing_alike_again_without_the_original_needs_a_word(small_adapter, tmp_path):
    run("quantize", DEMO, "-o", tmp_path / "packed")
    ran = run("merge", small_adapter, "-o", tmp_path / "out", "--quant", "nf4", "--json")
    assert ran.exit_code == 1 and "would lose part of the adapter" in ran.error["message"]
    for way in ("--base MODEL", "without --quant", "--onto dequantized"):
        assert way in ran.error["hint"]
    assert not (tmp_path / "out").exists()


def test_advice_on_training_does_not_lead_to_packing_alike_again(demo_adapter, tmp_path):
    record = {"model": {"id": "demo", "quant": "nf4-dq"}}
    (demo_adapter / "qtool_finetune.json").write_text(json.dumps(record))
    options = ("--quant", "nf4", "--no-check", "--json")
    ran = run("merge", demo_adapter, "-o", tmp_path / "out", *options)
    assert ran.document["onto"] == "original" and ran.document["warnings"] == []
    words = run("merge", demo_adapter, "-o", tmp_path / "out", *options[:-1]).stderr
    assert "packed while loading" in words and "PACKED" not in words
    options = ("--quant", "int8", "--no-check", "--json")
    [warning] = run("merge", demo_adapter, "-o", tmp_path / "o", *options).document["warnings"]
    assert "--base PACKED" in warning


def test_a_dry_run_refuses_what_a_run_does(adapter, tmp_path):
    out = tmp_path / "out"
    assert run("merge", adapter, "-o", out, "--no-check").exit_code == 0
    for output, options, said in (
        (tmp_path / "model/merged", (), "lies in the source folder"),
        (adapter, (), "lies in the source folder"),
        (out, ("--quant", "nf4"), "was made with other settings"),
    ):
        command = ("merge", adapter, "-o", output, "--no-check", "--json", *options)
        planned, done = run(*command, "--dry-run"), run(*command)
        assert planned.exit_code == done.exit_code == 2 and planned.error == done.error
        assert said in planned.error["message"]
    again = ("merge", adapter, "-o", out, "--quant", "nf4", "--restart", "--dry-run")
    assert run(*again).exit_code == 0
    weights = adapter / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4:] = b"\xff\xff\xff\xff"  # NaN, in whatever dtype
    weights.write_bytes(data)
    command = ("merge", adapter, "-o", tmp_path / "other", "--no-check", "--json")
    planned, done = run(*command, "--dry-run"), run(*command)
    assert planned.exit_code == done.exit_code == 1 and planned.error == done.error


@pytest.mark.parametrize("options", [(), ("--quant", "nf4-dq")], ids=["16 bit", "nf4-dq"])
def test_a_dry_run_tells_what_a_run_writes_and_writes_nothing(adapter, tmp_path, options):
    command = ("merge", adapter, "-o", tmp_path / "out", "--json", "--no-check", *options)
    planned = run(*command, "--dry-run").document
    assert not (tmp_path / "out").exists()
    plan = planned.pop("plan")
    assert {entry["reason"] for entry in plan} == {"merged", "copied"}
    assert sum(entry["output_bytes"] for entry in plan) == planned["weights_bytes"]
    done = run(*command).document
    measured = ("seconds", "resumed", "peak_host_bytes", "peak_device_bytes")
    assert planned.keys() <= done.keys()
    for key in planned.keys() - set(measured):
        assert planned[key] == done[key], key
    words = run("merge", adapter, "-o", tmp_path / "out2", "--dry-run", *options)
    assert words.exit_code == 0 and words.stdout.startswith("plan ")


def test_an_output_that_cannot_be_made(adapter):
    ran = run("merge", adapter, "-o", "/proc/none", "--no-check", "--json")
    assert ran.exit_code == 2
    assert ran.error["message"] == "/proc/none cannot be created: /proc takes no new files"
    assert "--output" in ran.error["hint"]


def test_an_adapter_on_the_hub_is_merged_like_its_copy(adapter, tmp_path, hub_server):  # noqa: F811
    commit = hub_server.add_model("org/adapter", adapter)
    environment = hub_server.environment(tmp_path / "home", PYTHONPATH=str(ROOT))
    program = "from qtool.cli import main; main()"
    options = ("merge", "org/adapter", "-o", str(tmp_path / "out"), "--no-check")
    command = [sys.executable, "-c", program, *options]
    for _ in range(2):  # the second finds it done
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"plan     org/adapter@{commit[:7]} → model · bf16" in ran.stderr
    assert "complete already" in ran.stdout
    run("merge", adapter, "-o", tmp_path / "local", "--no-check")
    manifests = [
        json.loads((tmp_path / name / "qtool_manifest.json").read_text())
        for name in ("out", "local")
    ]
    [remote, local] = [manifest["source"].pop("adapter") for manifest in manifests]
    assert manifests[0] == manifests[1]  # with the checksums of all files
    assert remote == {**local, "name": "org/adapter", "revision": commit}
    assert local["name"] == "a" and "revision" not in local


def test_a_model_that_cannot_be_run_is_merged_and_said_so(adapter, tmp_path):
    ran = run("merge", adapter, "-o", tmp_path / "out", "--json")  # it has no tokenizer
    assert ran.exit_code == 0 and ran.document["max_logit_change"] is None
    [warning] = ran.document["warnings"]
    assert "logits were not compared" in warning and "tokenizer" in warning
    said = run("merge", adapter, "-o", tmp_path / "out2").stderr
    assert "peak memory" in said and " checking," not in said


def test_without_the_run_extra_it_is_merged_and_said_so(adapter, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "qtool.runtime.requirements.importlib.util.find_spec",
        lambda name: None if name == "torch" else find_spec(name),
    )
    ran = run("merge", adapter, "-o", tmp_path / "out", "--json")
    assert ran.exit_code == 0
    assert 'pip install "qtool[run]"' in ran.document["warnings"][0]


def test_models_that_do_not_fit_into_memory_are_not_loaded(demo_adapter, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr("qtool.merge.logits.available_memory_bytes", lambda: (1 << 20, 1 << 30))
    ran = run("merge", demo_adapter, "-o", tmp_path / "out", "--json")
    assert ran.exit_code == 0 and ran.document["max_logit_change"] is None
    assert "more than is free on any device" in ran.document["warnings"][0]


def test_errors_are_json_with_their_kind(adapter, tmp_path):
    ran = run("merge", adapter, "--json")
    assert ran.exit_code == 2 and ran.error["kind"] == "usage"
    assert "-o" in ran.error["hint"] or "--output" in ran.error["hint"]
    ran = run("merge", tmp_path / "none", "-o", tmp_path / "out", "--json")
    assert ran.exit_code == 1 and ran.error["kind"] == "not_found"
    ran = run("merge", adapter, "-o", tmp_path / "out", "--base", tmp_path / "none", "--json")
    assert ran.exit_code == 1 and ran.error["kind"] == "not_found"


def test_stdout_has_the_answer_and_stderr_the_rest(adapter, tmp_path):
    ran = run("merge", adapter, "-o", tmp_path / "out", "--no-check")
    assert ran.stdout.startswith("complete, ") and "plan" not in ran.stdout
    assert "onto the original weights (model is not packed)" in ran.stderr
    quiet = run("merge", adapter, "-o", tmp_path / "quiet", "--no-check", "--quiet")
    assert quiet.stderr == "" and "complete" in quiet.stdout


def test_merging_loads_no_torch(adapter, tmp_path):
    from tests.test_structure import loaded_modules

    loaded = loaded_modules("merge", str(adapter), "-o", str(tmp_path / "out"), "--no-check")
    assert "numba" in loaded
    assert loaded.isdisjoint(["torch", "transformers", "accelerate", "peft"])


# ---- docs/merge.md ----------------------------------------------------------------------------


@pytest.mark.slow
def test_console_blocks_show_what_the_commands_print(demo_adapter, tmp_path):
    pytest.importorskip("peft")
    blocks = re.findall(r"^```console\n\$ (.+?)\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    for command, shown in blocks:
        program, *words = shlex.split(command)
        assert program == "qtool"
        done = subprocess.run(
            [sys.executable, "-m", "qtool", *words],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "COLUMNS": "100", "PYTHONPATH": str(ROOT)},
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        assert shape_of(done.stdout) == shape_of(shown), command


def test_every_option_of_the_docs_exists():
    from qtool.cli.app import build_command

    known = {name for param in build_command().commands["merge"].params for name in param.opts}
    known |= {n for p in build_command().commands["merge"].params for n in p.secondary_opts}
    merge_lines = re.findall(r"`(--[a-z][a-z-]*)", DOCS)
    assert set(merge_lines) <= known


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)\)", DOCS))
def test_links_point_at_files_that_exist(link):
    assert (ROOT / "docs" / link).exists()
