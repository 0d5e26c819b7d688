"""`qtool quantize` as users and scripts see it."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qtool.errors import EXIT_CODES
from tests.cli.running import run
from tests.hub_server import hub_server  # noqa: F401
from tests.tiny_models import write_llama


@pytest.fixture
def model(tmp_path):
    write_llama(tmp_path / "model", num_shards=2)
    (tmp_path / "model/tokenizer.json").write_text("{}")
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


def test_sizes_before_and_after_have_one_unit(tmp_path):
    write_llama(tmp_path / "model", hidden=320)
    ran = run("quantize", tmp_path / "model", "-o", tmp_path / "out")
    assert "1.88 MiB → 0.59 MiB, 5.03 bits" in ran.stderr
    assert "complete, 0.60 MiB in" in ran.stdout


def test_an_output_that_cannot_be_made(model):
    ran = run("quantize", model, "-o", "/proc/none", "--json")
    assert ran.exit_code == 2
    assert ran.error["message"] == "/proc/none cannot be created: /proc takes no new files"
    assert "--output" in ran.error["hint"]


def test_running_again_says_that_it_is_complete(model, tmp_path):
    run("quantize", model, "-o", tmp_path / "out")
    again = run("quantize", model, "-o", tmp_path / "out", "--json")
    assert again.exit_code == 0 and again.document["resumed"] is True
    shown = run("quantize", model, "-o", tmp_path / "out")
    assert "nothing to do" in shown.stdout and "peak memory" not in shown.stderr


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
        ("dry_rum = true", "'dry_rum' is no option", "usage"),
        ("dry-run = true\ndry_run = true", "dry-run is there with dashes and with", "usage"),
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


def refused_alike(*arguments):
    """The error of a run and of its dry run, which is the same and changes no file."""
    out = arguments[arguments.index("-o") + 1]
    before = state_of(out)
    dry = run(*arguments, "--dry-run", "--json")
    assert state_of(out) == before
    real = run(*arguments, "--json")
    assert (dry.exit_code, dry.stdout, dry.error) == (real.exit_code, "", real.error)
    return dry.error


def state_of(folder):
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted((folder, *folder.rglob("*")))
        if path.is_file()
    }


@pytest.mark.parametrize("below", ["", "out"])
def test_a_dry_run_refuses_to_write_into_its_source(model, below):
    error = refused_alike("quantize", model, "-o", model / below)
    assert error["kind"] == "usage" and "lies in the source folder" in error["message"]


def test_a_dry_run_refuses_what_is_not_its_own(model, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/to.md").write_text("hello")
    assert "found to.md" in refused_alike("quantize", model, "-o", tmp_path / "notes")["message"]
    error = refused_alike("quantize", model, "-o", tmp_path / "notes/to.md")
    assert "is a file" in error["message"]
    error = refused_alike("quantize", model, "-o", Path("/proc/none"))
    assert "takes no new files" in error["message"]


def test_a_dry_run_refuses_other_settings_but_not_with_restart(model, tmp_path):
    out = tmp_path / "out"
    assert run("quantize", model, "-o", out).exit_code == 0
    error = refused_alike("quantize", model, "-o", out, "--blocksize", 128)
    assert "blocksize is 64 there, 128 now" in error["message"]
    before = state_of(out)
    assert run("quantize", model, "-o", out, "--dry-run").exit_code == 0
    arguments = ("quantize", model, "-o", out, "--blocksize", 128, "--restart", "--dry-run")
    assert run(*arguments).exit_code == 0
    assert state_of(out) == before


def test_a_dry_run_of_a_hub_model_knows_its_output_from_headers(hub_server, model, tmp_path):  # noqa: F811
    hub_server.add_model("org/model", model)
    out = tmp_path / "out"

    def quantize(home, *options):
        program = "from qtool.cli import main; main()"
        words = ("quantize", "org/model@main", "-o", out, "--json", *options)
        return subprocess.run(
            [sys.executable, "-c", program, *map(str, words)],
            env=hub_server.environment(tmp_path / home, PYTHONPATH=str(Path.cwd())),
            capture_output=True,
            text=True,
            check=False,
        )

    assert quantize("cached").returncode == 0
    for home in ("cached", "fresh"):  # the fresh one has headers alone
        assert quantize(home, "--dry-run").returncode == 0
        ran = quantize(home, "--dry-run", "--blocksize", 128)
        error = json.loads(ran.stderr.splitlines()[-1])["error"]
        assert ran.returncode == 2 and "blocksize is 64 there, 128 now" in error["message"]


@pytest.mark.parametrize("verb", ["quantize", "bench quantize"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "zebra"}, "model type 'zebra' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized already"),
    ],
)
def test_of_a_model_that_cannot_be_quantized_no_weights_are_downloaded(
    hub_server,  # noqa: F811
    tmp_path,
    verb,
    changes,
    said,
):
    config = write_llama(tmp_path / "model", hidden=512, num_shards=2) | changes
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    hub_server.add_model("org/model", tmp_path / "model")
    out = ("-o", str(tmp_path / "out")) if verb == "quantize" else ()
    program = "from qtool.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *verb.split(), "org/model", *out, "--json"],
        env=hub_server.environment(tmp_path / "home", PYTHONPATH=str(Path.cwd())),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and said in json.loads(done.stderr)["error"]["message"]
    asked = [request for request in hub_server.requests if "safetensors" in request.path]
    assert all(request.range for request in asked)  # headers
    assert not [*(tmp_path / "home").rglob("*.safetensors")]


def test_to_a_folder_that_cannot_be_written_nothing_is_downloaded(hub_server, tmp_path):  # noqa: F811
    write_llama(tmp_path / "model", hidden=512)
    hub_server.add_model("org/model", tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").touch()
    program = "from qtool.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "quantize", "org/model", "-o", str(out), "--json"],
        env=hub_server.environment(tmp_path / "home", PYTHONPATH=str(Path.cwd())),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "thesis.txt" in json.loads(done.stderr)["error"]["message"]
    asked = [request for request in hub_server.requests if "safetensors" in request.path]
    assert all(request.range for request in asked)  # headers


def test_a_dry_run_refuses_a_folder_that_is_being_written(model, tmp_path):
    work = tmp_path / "out/.qtool"
    work.mkdir(parents=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        error = refused_alike("quantize", model, "-o", tmp_path / "out")
    assert "another qtool process" in error["message"]


def test_a_dry_run_finds_too_little_space(model, tmp_path, monkeypatch):
    """What is there already needs none again, and what is to be replaced gives its own."""
    out = tmp_path / "out"
    full = SimpleNamespace(f_frsize=1, f_bavail=0)
    with monkeypatch.context() as patched:
        patched.setattr("os.statvfs", lambda path: full)
        assert refused_alike("quantize", model, "-o", out)["kind"] == "no_space"
    assert run("quantize", model, "-o", out, "--blocksize", 32).exit_code == 0
    monkeypatch.setattr("os.statvfs", lambda path: full)
    assert run("quantize", model, "-o", out, "--blocksize", 32, "--dry-run").exit_code == 0
    ran = run("quantize", model, "-o", out, "--restart", "--dry-run")
    assert ran.exit_code == 0, ran.stderr
    larger = ("--skip", "down_proj", "--restart", "--dry-run", "--json")
    ran = run("quantize", model, "-o", out, *larger)
    assert (ran.exit_code, ran.error["kind"]) == (5, "no_space")


def test_pickles_are_told_of_alike(model, tmp_path):
    for shard in model.glob("*.safetensors*"):
        shard.unlink()
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    error = refused_alike("quantize", model, "-o", tmp_path / "out")
    assert error["kind"] == "unsupported"
    assert "found only pickles (pytorch_model.bin)" in error["message"]
    assert "save_pretrained" in error["hint"]


@pytest.mark.parametrize("is_dry", [True, False])
def test_a_skip_that_matches_nothing_is_warned_of(model, tmp_path, is_dry):
    skips = ("--skip", "down_prj", "--skip", "up_proj", "--skip", r"model\.layers\.0\.self_attn")
    arguments = ("quantize", model, "-o", tmp_path / "out", "--json", *skips)
    ran = run(*arguments, *["--dry-run"] * is_dry)
    assert ran.exit_code == 0
    [said] = ran.document["warnings"]
    assert said.startswith("--skip down_prj matches no module; names such as down_proj")


@pytest.mark.parametrize("is_dry", [True, False])
def test_a_model_without_a_tokenizer_is_warned_of_once(model, tmp_path, is_dry):
    arguments = ("quantize", model, "-o", tmp_path / "out", *["--dry-run"] * is_dry, "--json")
    assert run(*arguments, "--restart").document["warnings"] == []
    (model / "tokenizer.json").unlink()
    [said] = run(*arguments, "--restart").document["warnings"]
    assert said.startswith(f"{model} brings no tokenizer along")


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors"])
def test_a_file_that_is_no_whole_model_is_told_its_folder(model, tmp_path, name):
    error = refused_alike("quantize", model / name, "-o", tmp_path / "out")
    assert error["hint"] == f"give its folder, {model}"


def test_a_packed_model_is_not_packed_again(model, tmp_path):
    assert run("quantize", model, "-o", tmp_path / "packed").exit_code == 0
    error = refused_alike("quantize", tmp_path / "packed", "-o", tmp_path / "out")
    assert "is quantized already" in error["message"]
    assert error["hint"].startswith("start from the full-precision checkpoint")


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
