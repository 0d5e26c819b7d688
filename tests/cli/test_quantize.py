"""`qtool quantize` as users and scripts see it."""

from __future__ import annotations

import json

import pytest

from qtool.errors import EXIT_CODES
from tests.cli.running import run
from tests.tiny_models import write_llama


@pytest.fixture
def model(tmp_path):
    write_llama(tmp_path / "model", num_shards=2)
    return tmp_path / "model"


RESULT_FIELDS = {
    "schema",
    "command",
    "warnings",
    "output",
    "quant",
    "backend",
    "backend_reason",
    "input_bytes",
    "output_bytes",
    "weights_bytes",
    "seconds",
    "resumed",
    "tensors",
    "peak_host_bytes",
    "peak_device_bytes",
}


def test_json_is_one_document_with_the_contract_s_fields(model, tmp_path):
    ran = run("quantize", model, "-o", tmp_path / "out", "--json")
    assert ran.exit_code == 0 and ran.stderr == ""
    assert ran.document.keys() == RESULT_FIELDS
    assert ran.document["schema"] == 1 and ran.document["command"] == "quantize"
    assert ran.document["tensors"] == {"quantized": 14, "copied": 7}
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert ran.document["output_bytes"] == sum(file.stat().st_size for file in files)
    assert ran.document["peak_host_bytes"] > 0 and ran.document["seconds"] > 0


def test_dry_run_plans_every_tensor_and_writes_nothing(model, tmp_path):
    ran = run("quantize", model, "-o", tmp_path / "out", "--dry-run", "--json")
    assert not (tmp_path / "out").exists()
    assert ran.document.keys() == RESULT_FIELDS | {"plan"}
    assert ran.document["seconds"] == 0
    plan = ran.document["plan"]
    assert len(plan) == 21
    assert all(
        entry.keys()
        == {"name", "action", "dtype", "shape", "input_bytes", "output_bytes", "reason"}
        for entry in plan
    )
    assert sum(entry["output_bytes"] for entry in plan) == ran.document["weights_bytes"]
    done = run("quantize", model, "-o", tmp_path / "out", "--json").document
    assert done["weights_bytes"] == ran.document["weights_bytes"]
    assert done["output_bytes"] == ran.document["output_bytes"]


def test_stdout_has_the_answer_and_stderr_the_rest(model, tmp_path):
    ran = run("quantize", model, "-o", tmp_path / "out")
    assert "complete" in ran.stdout and "plan" not in ran.stdout
    assert "backend  cpu (auto" in ran.stderr
    quiet = run("quantize", model, "-o", tmp_path / "quiet", "--quiet")
    assert quiet.stderr == "" and "complete" in quiet.stdout


def test_an_output_that_cannot_be_made(model):
    ran = run("quantize", model, "-o", "/proc/none", "--json")
    assert ran.exit_code == 2
    assert ran.error["message"] == "/proc/none cannot be created: /proc takes no new files"
    assert "--output" in ran.error["hint"]


def test_running_again_says_that_it_is_complete(model, tmp_path):
    run("quantize", model, "-o", tmp_path / "out")
    again = run("quantize", model, "-o", tmp_path / "out", "--json")
    assert again.exit_code == 0 and again.document["resumed"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no output folder"),
        (("-o", "out", "--blocksize", "65"), "expected one of 32, 64"),
        (("-o", "out", "--quant", "nf5"), "nf5"),
        (("-o", "out", "--max-shard-size", "5 parsecs"), "no size"),
        (("-o", "out", "--skip", "*["), "regular expression"),
        (("-o", "out", "--threads", "0"), "threads"),
        (("-o", "out", "--frobnicate"), "--frobnicate"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_was_expected(
    model, arguments, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    ran = run("quantize", model, *arguments, "--json")
    assert ran.exit_code == 2 and ran.stdout == ""
    assert ran.error["kind"] == "usage" and ran.error["hint"]
    assert words in ran.error["message"]
    assert not (tmp_path / "out").exists()


def test_options_come_from_flags_then_variables_then_the_file(model, tmp_path, monkeypatch):
    config = tmp_path / "run.toml"
    config.write_text(
        'blocksize = 128\nquant = "fp4"\n[quantize]\nthreads = 1\n[estimate]\ncontext = 1\n'
    )

    def planned(*flags):
        ran = run("quantize", model, "--dry-run", "--json", "--config", config, *flags)
        assert ran.exit_code == 0, ran.stderr
        return ran.document["quant"]

    assert planned() == "fp4"
    monkeypatch.setenv("QTOOL_QUANT", "int8")
    assert planned() == "int8"
    assert planned("--quant", "nf4") == "nf4"


@pytest.mark.parametrize(
    ("text", "words", "kind"),
    [
        ("blocksiez = 64", "did you mean 'blocksize'", "usage"),
        ("[quantise]\nblocksize = 64", "did you mean 'quantize'", "usage"),
        ("blocksize = ", "TOML", "bad_file"),
    ],
)
def test_mistakes_in_the_config_file_are_named(model, tmp_path, text, words, kind):
    (tmp_path / "run.toml").write_text(text)
    ran = run("quantize", model, "--dry-run", "--json", "--config", tmp_path / "run.toml")
    assert (ran.exit_code, ran.error["kind"]) == (EXIT_CODES[kind], kind)
    assert words in ran.error["message"] + ran.error["hint"]


def test_recipes_are_found_by_name(model, tmp_path):
    ran = run("quantize", model, "--dry-run", "--json", "--config", "int8")
    assert ran.exit_code == 0, ran.stderr
    assert ran.document["quant"] == "int8"


def test_nonfinite_weights_exit_with_1_and_leave_nothing(model, tmp_path):
    shard = model / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    header = int.from_bytes(data[:8], "little")
    data[8 + header : 8 + header + 2] = b"\xc0\x7f"  # NaN in bfloat16
    shard.write_bytes(data)
    ran = run("quantize", model, "-o", tmp_path / "out", "--json")
    assert ran.exit_code == 1
    assert ran.error["kind"] == "bad_file"
    assert "model.embed_tokens.weight" in ran.error["message"]
    assert not (tmp_path / "out").exists()


def test_no_color_means_no_escape_codes(model, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    ran = run("quantize", model, "--dry-run")
    assert "\x1b" not in ran.stdout + ran.stderr
    colored = run("quantize", model, "--dry-run", "--color", "always")
    assert "\x1b" in colored.stdout + colored.stderr


@pytest.mark.parametrize("is_dry", [True, False])
def test_a_skip_that_matches_nothing_is_warned_of(model, tmp_path, is_dry):
    skips = ("--skip", "down_prj", "--skip", "up_proj", "--skip", r"model\.layers\.0\.self_attn")
    arguments = ("quantize", model, "-o", tmp_path / "out", "--json", *skips)
    ran = run(*arguments, *["--dry-run"] * is_dry)
    assert ran.exit_code == 0
    [said] = ran.document["warnings"]
    assert said.startswith("--skip down_prj matches no module; names such as down_proj")


def test_errors_have_no_traceback_unless_asked_for(tmp_path, monkeypatch):
    ran = run("quantize", tmp_path / "nowhere", "--dry-run")
    assert ran.exit_code == 1
    assert "error:" in ran.stderr and "hint:" in ran.stderr and "Traceback" not in ran.stderr
    monkeypatch.setenv("QTOOL_DEBUG", "1")
    assert "Traceback" in run("quantize", tmp_path / "nowhere", "--dry-run").stderr


def test_the_written_config_is_what_transformers_reads(model, tmp_path):
    run(
        "quantize",
        model,
        "-o",
        tmp_path / "out",
        "--compute-dtype",
        "float16",
        "--skip",
        "down_proj",
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    entry = config["quantization_config"]
    assert entry["quant_method"] == "bitsandbytes" and entry["load_in_4bit"] is True
    assert entry["bnb_4bit_compute_dtype"] == "float16"
    assert entry["bnb_4bit_use_double_quant"] is True
    kept = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    assert sorted(entry["llm_int8_skip_modules"]) == ["lm_head", *kept]
    assert config["model_type"] == "llama"
