"""`qtool estimate` as users and scripts see it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.running import run
from tests.hub_server import hub_server  # noqa: F401
from tests.merge.adapters import linear_layers, lora_tensors, read_folder, write_adapter
from tests.tiny_models import llama_config, write_llama

PLAN_FIELDS = {
    "quant",
    "mode",
    "runtime",
    "batch",
    "context",
    "components",
    "checkpoint_bytes",
    "steady_bytes",
    "allocated_peak_bytes",
    "peak_bytes",
    "load_peak_bytes",
    "peak_low_bytes",
    "peak_high_bytes",
    "suggestions",
    "fits",
}


@pytest.fixture
def model(tmp_path):
    write_llama(tmp_path / "model", num_shards=2)
    return tmp_path / "model"


@pytest.fixture
def large(tmp_path):
    """A bare config of 8 billion parameters."""
    config = llama_config(hidden=4096, layers=32, mlp=14336, vocab=128_256, heads=32)
    config |= {"dtype": "bfloat16", "max_position_embeddings": 131_072, "num_key_value_heads": 8}
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(config))
    return tmp_path / "large"


def test_json_is_one_document_with_the_contract_s_fields(model):
    ran = run("estimate", model, "--gpu", "4090", "--json")
    assert ran.exit_code == 0 and ran.stderr == ""
    document = ran.document
    assert document.keys() == {"schema", "command", "warnings", "model", "plans", "best"}
    assert (document["schema"], document["command"], document["warnings"]) == (1, "estimate", [])
    facts = document["model"]
    assert facts.keys() >= {
        "id",
        "architecture",
        "source",
        "parameters",
        "active_parameters",
        "checkpoint_parameters",
    }
    assert (facts["source"], facts["architecture"]) == ("headers", "LlamaForCausalLM")
    assert [plan["quant"] for plan in document["plans"]] == ["bf16", "int8", "nf4", "nf4-dq"]
    for plan in document["plans"]:
        assert plan.keys() >= PLAN_FIELDS
        parts = plan["components"].values()
        assert all(part.keys() == {"bytes", "basis"} for part in parts)
        assert plan["peak_bytes"] == sum(part["bytes"] for part in parts)
        assert all(type(plan[name]) is int for name in PLAN_FIELDS if name.endswith("_bytes"))
        (fit,) = plan["fits"]
        assert fit.keys() >= {
            "gpu",
            "gpus",
            "usable_bytes",
            "verdict",
            "max_context",
            "max_batch",
        }
        assert fit["gpu"] == "NVIDIA GeForce RTX 4090" and fit["gpus"] == 1
        assert fit["verdict"] == "yes" and fit["max_context"] == 128


def test_options_reach_the_plan(model):
    options = ("--quant", "fp16", "--quant", "fp4-dq", "--context", 77, "--batch", 3)
    plans = run("estimate", model, *options, "--json").document["plans"]
    assert [(plan["quant"], plan["context"], plan["batch"]) for plan in plans] == [
        ("fp16", 77, 3),
        ("fp4-dq", 77, 3),
    ]
    (wide,) = run("estimate", model, "--quant", "fp32", "--json").document["plans"]
    (narrow,) = run("estimate", model, "--quant", "fp32", "--kv-dtype", "bf16", "--json").document[
        "plans"
    ]
    assert wide["components"]["kv_cache"]["bytes"] == 2 * narrow["components"]["kv_cache"]["bytes"]


def test_a_smaller_chunk_of_the_prompt_takes_less(large):
    options = ("--quant", "nf4", "--context", 8192)
    (usual,) = plans_of(large, *options)
    (small,) = plans_of(large, *options, "--prefill-chunk", 64)
    assert (usual["prefill_chunk"], small["prefill_chunk"]) == (1024, 64)
    assert component_bytes(small, "activations") < 0.6 * component_bytes(usual, "activations")
    assert component_bytes(usual, "dequant_buffer") > component_bytes(small, "dequant_buffer") == 0
    (other,) = plans_of(large, *options, "--runtime", "transformers")
    assert other["prefill_chunk"] is None


def test_a_packed_output_head_takes_less(large):
    options = ("--quant", "bf16", "--quant", "nf4-dq")
    for plain, packed in zip(
        plans_of(large, *options), plans_of(large, *options, "--head-quant", "nf4-dq"), strict=True
    ):
        assert (plain["head_quant"], packed["head_quant"]) == (None, "nf4-dq")
        saved = component_bytes(plain, "weights") - component_bytes(packed, "weights")
        assert 0.7 < saved / (128_256 * 4096 * 2) < 0.8
        assert packed["checkpoint_bytes"] == plain["checkpoint_bytes"]
    text = run("estimate", large, "--head-quant", "int8").stdout
    assert "generate with qtool, output head int8:" in text
    ran = run("estimate", large, "--head-quant", "bf16", "--json")
    assert ran.exit_code == 2 and "--head-quant" in ran.error["message"]


def test_rounded_activations_take_no_dequantized_weight(large):
    options = ("--quant", "int8", "--quant", "nf4")
    usual = plans_of(large, *options)
    for threshold in ("config", "6", "0"):
        rounded = plans_of(large, *options, "--int8-threshold", threshold)
        assert component_bytes(rounded[0], "dequant_buffer") == 0
        assert component_bytes(rounded[0], "activations") > component_bytes(usual[0], "activations")
        assert rounded[1] == usual[1]  # 4-bit layers never do
    ran = run("estimate", large, "--int8-threshold", "config", "--exact", "--json")
    assert ran.exit_code == 2 and "round no activations" in ran.error["message"]
    assert "--int8-threshold" in ran.error["hint"]


@pytest.mark.parametrize(
    ("arguments", "without_effect"),
    [
        (("--runtime", "vllm", "--prefill-chunk", 64), "--prefill-chunk .. --runtime vllm"),
        (("--runtime", "transformers", "--head-quant", "nf4"), "--head-quant .. --runtime tran"),
        (("--runtime", "vllm", "--int8-threshold", 6), "--int8-threshold .. --runtime vllm"),
        (("--mode", "qlora", "--prefill-chunk", 512), "--prefill-chunk .. --mode qlora"),
        (("--mode", "qlora", "--kv-dtype", "fp8"), "--kv-dtype .. --mode qlora"),
        (("--mode", "full", "--lora-r", 16), "--lora-r .. --mode full"),
        (("--lora-r", 8), "--lora-r .. --mode generate"),
        (("--lora-dropout", 0), "--lora-dropout .. --mode generate"),
        (("--optimizer", "lion"), "--optimizer .. --mode generate"),
        (("--no-gradient-checkpointing",), "--no-gradient-checkpointing .. --mode generate"),
        (("--headroom", 5), "--headroom .. without"),
        (("--lora-r", 8, "--mode", "lora"), None),
        (("--head-quant", "nf4", "--prefill-chunk", 64), None),
        (("--headroom", 5, "--gpu", "H200"), None),
    ],
)
def test_options_without_effect_are_a_warning(large, arguments, without_effect):
    ran = run("estimate", large, *arguments, "--json")
    assert ran.exit_code == 0
    warnings = [text for text in ran.document["warnings"] if "changes nothing" in text]
    if without_effect is None:
        assert warnings == []
        return
    option, why = without_effect.split(" .. ")
    (warning,) = warnings
    assert warning.startswith(f"{option} changes nothing with") and why in warning


def test_a_variable_without_effect_is_named(large, monkeypatch):
    monkeypatch.setenv("QTOOL_LORA_R", "8")
    warnings = run("estimate", large, "--json").document["warnings"]
    assert "QTOOL_LORA_R changes nothing with --mode generate" in warnings
    monkeypatch.setenv("QTOOL_MODE", "qlora")
    message = run("estimate", large, "--quant", "bf16", "--json").error["message"]
    assert message.startswith("QTOOL_MODE=qlora trains on a packed base")


def test_text_names_the_unit_the_source_and_every_plan(large):
    ran = run("estimate", large, "--context", 9216, "--gpu", "4090", "--gpu", "RTX 4060")
    assert ran.exit_code == 0
    assert "GiB (2^30 bytes)" in ran.stdout and "8.03 B parameters" in ran.stdout
    assert "config.json, exact if it is right" in ran.stdout
    assert "~7.88" in ran.stdout
    assert "a GPU's memory marked ~ is not confirmed" in " ".join(ran.stdout.split())
    for word in ("bf16", "int8", "nf4", "nf4-dq", "✓ yes", "✗ no", "! tight"):
        assert word in ran.stdout
    assert "bf16: fits with" not in ran.stdout


@pytest.mark.parametrize("width", [80, 140])
def test_text_fits_the_terminal(large, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    ran = run("estimate", large, "--gpu", "4090", "--gpu", "RTX PRO 6000", "--quant", "bf16")
    lines = ran.stdout.splitlines()
    assert max(map(len, lines)) <= width
    assert "max context" in ran.stdout and "✓ yes" in ran.stdout
    assert "…" not in ran.stdout
    assert ("allocator" in ran.stdout) == (width == 140)


def test_long_numbers_leave_bars_less_room(large, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("estimate", large, "--context", 999_999_999_999).stdout.splitlines()
    bars = [line for line in lines if "▓▓" in line]
    assert len(bars) == 4
    assert all(len(bar) <= 80 and bar[-1].isdigit() for bar in bars)


def test_sizes_that_are_known_in_different_ways_are_told_apart(large):
    config = json.loads((large / "config.json").read_text())
    for method, said in (
        ("eetq", "by the format's formula (eetq)"),
        ("what comes next", "not known, unpacked at most (what comes next)"),
    ):
        entry = {"quantization_config": {"quant_method": method}}
        (large / "config.json").write_text(json.dumps({**config, **entry}))
        ran = run("estimate", large)
        text = " ".join(ran.stdout.split())
        assert said in text
        assert "config.json, exact if it is right (bf16, int8, nf4, nf4-dq)" in text
        assert ("is not known" in ran.stderr) == (method != "eetq")


@pytest.mark.parametrize("size", ["512MB", "1TB"])
def test_sizes_of_gpus_in_other_units(large, size):
    ran = run("estimate", large, "--gpu", size, "--json")
    assert ran.exit_code == (3 if size == "512MB" else 0)
    assert run("sizing", large, "--gpu", size, "--json").exit_code == ran.exit_code
    refused = run("estimate", large, "--gpu", "0.1GB", "--json")
    assert refused.exit_code == 2 and "from 256MB to 1024TB" in refused.error["message"]


@pytest.mark.parametrize("width", [124, 140, 155, 170, 200])
@pytest.mark.parametrize("mode", ["generate", "qlora", "full"])
def test_a_column_for_every_component_only_where_a_line_holds_them(large, monkeypatch, width, mode):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = run("estimate", large, "--mode", mode).stdout.splitlines()
    (heading,) = (index for index, line in enumerate(lines) if line.startswith("quant "))
    assert max(map(len, lines)) <= width
    rows = lines[heading + 1 : lines.index("", heading)]
    assert all(not row.startswith(" ") for row in rows)  # none goes on in a second line
    if width in (124, 200):  # the least takes 133, the most 163
        assert ("allocator" in lines[heading]) == (width == 200)


def test_training_on_more_gpus_is_not_what_is_suggested(large):
    """Each of them has the whole model."""
    arguments = ("--mode", "full", "--gpu", "4090", "--quant", "bf16")
    own, other = (
        run("estimate", large, *arguments, "--runtime", runtime, "--json").document["plans"][0]
        for runtime in ("qtool", "transformers")
    )
    changes = [[it["change"] for it in plan["suggestions"]] for plan in (own, other)]
    assert not any("GPUs" in change for change in changes[0])
    assert any("GPUs" in change for change in changes[1])
    document = run("estimate", large, *arguments, "--gpus", 4, "--json").document
    assert any("has all of them on each GPU" in warning for warning in document["warnings"])


def test_nothing_fits_is_exit_code_3_with_what_would_help(large):
    ran = run("estimate", large, "--quant", "bf16", "--gpu", "RTX 3060", "--gpu", "4060")
    assert ran.exit_code == 3
    assert "fits with int8 (saves " in ran.stdout
    document = run("estimate", large, "--quant", "bf16", "--gpu", "3060", "--json").document
    (plan,) = document["plans"]
    assert plan["fits"][0]["verdict"] == "no" and plan["fits"][0]["max_context"] == 0
    assert plan["suggestions"][0]["change"] == "int8"
    assert plan["suggestions"][0]["saves_bytes"] > 1 << 30


def test_without_a_gpu_nothing_can_fail_to_fit(large):
    ran = run("estimate", large, "--context", 10_000_000)
    assert ran.exit_code == 0
    assert "next: add --gpu" in ran.stderr and "is longer than" in ran.stderr
    assert "1 sequence of 10,000,000 tokens" in ran.stdout
    ran = run("estimate", large, "--context", 4096, "--batch", 1173)
    assert "1,173 sequences of 4,096 of at most 131,072 tokens" in ran.stdout
    assert run("estimate", large, "--quiet", "--context", 131_072).stderr == ""


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (("--gpu", "a100"), "usage", "A100 40GB"),
        (("--gpu", "rtx 4091"), "usage", "RTX 4090"),
        (("--quant", "nf3"), "usage", "nf4-dq"),
        (("--quant", "q4_0"), "usage", "none of"),
        (("--context", 0), "usage", "--context"),
        (("--batch", "many"), "usage", "--batch"),
        (("--headroom", 100), "usage", "--headroom"),
    ],
)
def test_usage_errors_say_what_would_be_right(model, arguments, kind, said):
    ran = run("estimate", model, *arguments, "--json")
    assert ran.exit_code == 2 and ran.stdout == ""
    assert ran.error["kind"] == kind
    assert said in ran.error["message"] + ran.error["hint"]


def test_a_quantized_folder_is_estimated_as_what_it_is(model, tmp_path):
    run("quantize", model, "-o", tmp_path / "out", "--quant", "int8")
    (plan,) = run("estimate", tmp_path / "out", "--json").document["plans"]
    assert plan["quant"] == "int8"
    ran = run("estimate", tmp_path / "out", "--quant", "nf4", "--json")
    assert ran.exit_code == 1 and ran.error["kind"] == "unsupported"


def test_no_color_and_no_escape_codes_when_piped(large):
    assert "\x1b[" not in run("estimate", large, "--gpu", "4090").stdout
    assert "\x1b[" in run("estimate", large, "--gpu", "4090", "--color", "always").stdout


PROGRAM = "from qtool.cli import main; main()"


def test_a_hub_model_is_estimated_from_its_headers(hub_server, tmp_path):  # noqa: F811
    model = tmp_path / "model"
    write_llama(model, hidden=512, num_shards=2)
    commit = hub_server.add_model("org/model", model)
    command = [sys.executable, "-c", PROGRAM, "estimate", "org/model@main", "--json"]
    environment = hub_server.environment(tmp_path / "home", PYTHONPATH=str(Path.cwd()))
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    remote, local = json.loads(ran.stdout), run("estimate", model, "--json").document
    assert remote["plans"] == local["plans"]
    assert (remote["model"]["id"], remote["model"]["revision"]) == ("org/model", commit)
    file_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert 0 < hub_server.sent_bytes(".safetensors") < file_bytes / 10


# ---- Adapters ---------------------------------------------------------------------------------


@pytest.fixture
def adapter(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    return write_adapter(tmp_path / "lora", lora_tensors(linear_layers(config)), model)


def test_an_adapter_is_counted(model, adapter):
    (without,) = plans_of(model, "--quant", "nf4")
    (plan,) = plans_of(model, "--quant", "nf4", "--adapter", adapter)
    assert without["adapter"] is None and "adapters" not in without["components"]
    assert plan["adapter"] == {"id": str(adapter), "rank": 4, "layers": 14}
    assert plan["components"]["adapters"]["basis"] == "exact"
    tensors = read_folder(adapter).values()
    held = sum(-(-values.nbytes // 512) * 512 for _, values in tensors)  # as they are allocated
    assert component_bytes(plan, "adapters") == held
    steady = plan["steady_bytes"] - without["steady_bytes"]
    assert steady == component_bytes(plan, "adapters")
    ran = run("estimate", model, "--quant", "nf4", "--adapter", adapter)
    assert "adapter lora (rank 4)" in ran.stdout and "▚ adapter" in ran.stdout
    held_mib = f"{held / (1 << 20):.2f}"
    assert f"the adapter's {held_mib} are among the weights" in ran.stdout and held_mib != "0.00"


def test_an_adapter_on_the_hub_is_counted_from_its_header(
    model,
    adapter,
    hub_server,  # noqa: F811
    tmp_path,
):
    weights = adapter / "adapter_model.safetensors"
    big = lora_tensors({"model.layers.0.mlp.up_proj": (160, 64)}, rank=20_000)
    weights.unlink()
    shutil.rmtree(adapter)
    write_adapter(adapter, big, model, r=20_000)
    hub_server.add_model("org/lora", adapter, revision="v2")
    environment = hub_server.environment(tmp_path / "home", PYTHONPATH=str(Path.cwd()))
    command = ["estimate", str(model), "--adapter", "org/lora@v2", "--quant", "nf4", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "qtool", *command],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    (plan,) = json.loads(done.stdout)["plans"]
    assert plan["adapter"] == {"id": "org/lora@v2", "rank": 20_000, "layers": 1}
    assert component_bytes(plan, "adapters") == 4 * 20_000 * (160 + 64)
    assert 0 < hub_server.sent_bytes(".safetensors") < weights.stat().st_size / 10


def test_an_adapter_of_another_model_is_refused(large, adapter):
    ran = run("estimate", large, "--adapter", adapter, "--json")
    assert ran.exit_code == 1 and ran.error["kind"] == "bad_file"
    assert "adapter_model.safetensors" in ran.error["message"]
    assert "model.layers.0.self_attn.q_proj: expected a weight [4096, 4096]" in ran.error["message"]


# ---- INT8 activations -------------------------------------------------------------------------


def test_the_threshold_is_said_where_it_matters(large):
    plans = plans_of(large, "--quant", "int8", "--quant", "nf4", "--int8-threshold", "config")
    assert [plan["int8_threshold"] for plan in plans] == [6.0, None]
    (plain,) = plans_of(large, "--quant", "int8")
    assert plain["int8_threshold"] is None
    ran = run("estimate", large, "--int8-threshold", "4.5")
    said = " ".join(ran.stdout.split())
    assert "in int8 also the activations of prompts, threshold 4.5:" in said
    ran = run("estimate", large, "--quant", "nf4", "--int8-threshold", "4.5", "--json")
    (warning,) = ran.document["warnings"]
    assert warning.startswith("--int8-threshold changes nothing: no plan has INT8 layers")


def test_estimating_imports_nothing_heavy(model):
    program = f"""
import sys
from qtool.cli import main
sys.argv = ["qtool", "estimate", {str(model)!r}, "--json"]
try:
    main()
finally:
    heavy = {{"torch", "transformers", "numba", "cupy", "huggingface_hub"}} & sys.modules.keys()
    assert not heavy, heavy
"""
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True
    )


# -- training, runtimes, several GPUs -------------------------------------------------------------


def plans_of(*arguments):
    return run("estimate", *arguments, "--json").document["plans"]


def component_bytes(plan, *names):
    return sum(plan["components"][name]["bytes"] for name in names)


def test_mode_and_runtime_reach_the_plan(large):
    plans = plans_of(large, "--mode", "qlora", "--runtime", "transformers")
    assert [plan["quant"] for plan in plans] == ["nf4", "nf4-dq"]
    for plan in plans:
        assert (plan["mode"], plan["runtime"]) == ("qlora", "transformers")
        assert component_bytes(plan, "adapters", "gradients", "optimizer") > 0
        assert any("prepare_model_for_kbit_training" in note for note in plan["notes"])
    text = run("estimate", large, "--mode", "qlora", "--runtime", "transformers").stdout
    assert "prepare_model_for_kbit_training" in text


@pytest.mark.parametrize(
    ("arguments", "parts", "grows"),
    [
        (("--lora-r", 64), ("adapters",), True),
        (("--lora-targets", "q_proj,v_proj"), ("adapters",), False),
        (("--adapter-dtype", "bf16"), ("adapters",), False),
        (("--optimizer", "adamw-8bit"), ("optimizer",), False),
        (("--lora-dropout", 0), ("activations",), False),
        (("--no-gradient-checkpointing",), ("activations",), True),
    ],
)
def test_training_options_reach_the_plan(large, arguments, parts, grows):
    usual = ("--mode", "qlora", "--quant", "nf4", "--no-gradient-checkpointing")
    usual = usual[: 4 if arguments[0] == usual[-1] else 5]
    (before,), (after,) = plans_of(large, *usual), plans_of(large, *usual, *arguments)
    one, other = component_bytes(before, *parts), component_bytes(after, *parts)
    assert (one < other) if grows else (other < one)


def test_devices_and_cache_dtype_reach_the_plan(large):
    (one,) = plans_of(large, "--quant", "bf16")
    for split in ("pipeline", "tensor"):
        (two,) = plans_of(large, "--quant", "bf16", "--gpus", 2, "--split", split)
        assert (two["gpus"], two["split"]) == (2, split) and two["peak_bytes"] < one["peak_bytes"]
    (narrow,) = plans_of(large, "--quant", "bf16", "--kv-dtype", "fp8")
    assert 2 * component_bytes(narrow, "kv_cache") == component_bytes(one, "kv_cache")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--mode", "qlora", "--optimizer", "adamv"), "adamw"),
        (("--mode", "lora", "--lora-targets", "q_porj"), "q_proj"),
        (("--mode", "pretrain"), "--mode"),
        (("--gpus", 0), "--gpus"),
        (("--plot", "memory.pdf"), ".svg"),
    ],
)
def test_bad_training_and_plot_options_are_usage_errors(large, arguments, said):
    ran = run("estimate", large, *arguments, "--json")
    assert ran.exit_code == 2 and ran.stdout == "" and ran.error["kind"] == "usage"
    assert said in ran.error["message"] + ran.error["hint"] and ran.error["hint"]


@pytest.mark.parametrize("arguments", [("--gpus", 2), ("--runtime", "vllm")])
def test_exact_refuses_what_it_cannot_run(model, arguments):
    pytest.importorskip("torch")
    ran = run("estimate", model, "--exact", *arguments, "--json")
    assert ran.exit_code == 2 and ran.error["message"].startswith("--exact") and ran.error["hint"]


def test_exact_stands_beside_the_plan(model):
    pytest.importorskip("torch")
    (plan,) = plans_of(model, "--quant", "bf16", "--context", 64, "--exact")
    assert plan["exact"]["allocated_peak_bytes"] > 0


def test_plot_writes_the_picture(model, tmp_path):
    ran = run("estimate", model, "--plot", tmp_path / "memory.html")
    assert ran.exit_code == 0 and "<svg" in (tmp_path / "memory.html").read_text()


# -- what else is said ----------------------------------------------------------------------------


def test_a_tiny_model_is_counted_in_mib(model, large):
    text = run("estimate", model, "--gpu", "4090").stdout
    (plan, *_) = plans_of(model)
    assert "GPU memory in MiB (2^20 bytes)" in text and "GiB" not in text
    row = next(line.split() for line in text.splitlines() if line.startswith("bf16 "))
    assert row[1] == f"{plan['checkpoint_bytes'] / (1 << 20):,.2f}" != "0.00"
    usable_mib = plans_of(model, "--gpu", "4090")[0]["fits"][0]["usable_bytes"] / (1 << 20)
    fits = next(line for line in text.splitlines() if line.startswith("RTX 4090"))
    assert f" {usable_mib:,.2f} " in fits  # all of an answer is in one unit
    assert "GPU memory in GiB (2^30 bytes)" in run("estimate", large).stdout


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")


def test_what_is_true_of_several_gpus_is_said_once(large, wide):
    gpus = [part for name in ("MI300X", "V100 16GB", "P40", "T4") for part in ("--gpu", name)]
    ran = run("estimate", large, *gpus)
    (line,) = (line for line in ran.stdout.splitlines() if "7.5 or newer" in line)
    # 16 GB hold three of the four precisions, which changes nothing.
    assert line.startswith("AMD Instinct MI300X, P40, V100 16GB: ")
    assert "bf16 on P40: it has no bfloat16 arithmetic" in ran.stdout
    assert "7.5 or newer" not in run("estimate", large, *gpus, "--runtime", "vllm").stdout
    fits = run("estimate", large, *gpus, "--json").document["plans"][-1]["fits"]
    assert [any("7.5" in note for note in fit["notes"]) for fit in fits] == [1, 1, 1, 0]
    assert {fit["verdict"] for fit in fits} == {"yes"}  # memory is memory


def test_verbose_says_what_each_stage_took(large):
    stages = run("estimate", large, "--gpu", "4090", "-v").stderr.splitlines()
    assert [line.partition(":")[0] for line in stages] == ["config and headers", "plans"]
    assert run("estimate", large, "--gpu", "4090").stderr == ""


def test_no_line_ends_in_blanks(large, monkeypatch):
    for columns in ("60", "80", "100"):
        monkeypatch.setenv("COLUMNS", columns)
        text = run("estimate", large, "--gpu", "P40", "--mode", "qlora").stdout
        assert "marked" in text and not any(line.endswith(" ") for line in text.splitlines())


@pytest.mark.parametrize("text", ['[quantize]\nquant = "nf4"\n', ""])
def test_a_config_file_with_nothing_for_the_verb_is_a_warning(large, tmp_path, monkeypatch, text):
    (config := tmp_path / "run.toml").write_text(text)
    ran = run("estimate", large, "--config", config, "--json")
    assert ran.exit_code == 0
    (warning,) = ran.document["warnings"]
    assert warning == f"--config {config} changes nothing: no option of qtool estimate is in it"
    monkeypatch.setenv("QTOOL_CONFIG", str(config))  # which is for all verbs
    assert run("estimate", large, "--json").document["warnings"] == []


def test_an_option_that_can_be_repeated_may_have_one_value_in_a_file(large, tmp_path):
    config = tmp_path / "plan.toml"
    config.write_text('quant = "nf4"\ngpu = ["4090", "L4"]\n')
    (plan,) = run("estimate", large, "--config", config, "--json").document["plans"]
    assert plan["quant"] == "nf4" and len(plan["fits"]) == 2


def test_variables_and_tables_set_options(large, tmp_path, monkeypatch):
    config = tmp_path / "plan.toml"
    config.write_text('[estimate]\nmode = "lora"\nlora-r = 64\n')
    assert {plan["mode"] for plan in plans_of(large, "--config", config)} == {"lora"}
    monkeypatch.setenv("QTOOL_MODE", "qlora")
    assert {plan["mode"] for plan in plans_of(large)} == {"qlora"}
    assert {plan["mode"] for plan in plans_of(large, "--mode", "full")} == {"full"}


@pytest.mark.parametrize("more", [(), ("--mode", "qlora", "--runtime", "transformers")])
def test_a_mixture_whose_experts_are_stored_one_by_one_is_planned(test_data, more):
    plans = plans_of(test_data / "models/tinymoe-6m", *more)
    assert {"nf4", "nf4-dq"} <= {plan["quant"] for plan in plans}


def test_qlora_of_a_model_in_another_format_is_planned_with_its_base_packed(test_data):
    plans = plans_of(test_data / "configs/openai--gpt-oss-120b", "--mode", "qlora")
    assert [plan["quant"] for plan in plans] == ["nf4", "nf4-dq"]
    notes = [note for plan in plans for note in plan["notes"]]
    assert notes and not any("as `qtool finetune` trains" in note for note in notes)
