"""`qtool generate` as a user meets it: streams, JSON, prompts, chat, exit codes."""

from __future__ import annotations

import fcntl
import importlib.util
import io
import json
import math
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from safetensors.numpy import save_file

from qtool.backends.cuda_driver import NoCudaError
from qtool.runtime import requirements
from qtool.runtime.text_stream import TextStream
from tests.cli.running import run
from tests.hub_server import HubServer, hub_server  # noqa: F401
from tests.merge.adapters import linear_layers, lora_tensors, write_adapter
from tests.test_structure import loaded_modules

PROMPT = "Once upon a time"
LONG = f"{PROMPT} " * 20  # more than 64 tokens, fewer than 512
START = ", there was a little girl named Lily."
PROGRAM = (sys.executable, "-c", "from qtool.cli import main; main()", "generate")
TIMES = {"load", "prefill", "decode", "start_to_first_token"}
DOCUMENT = {
    "schema": int,
    "command": str,
    "text": str,
    "prompt_tokens": int,
    "new_tokens": int,
    "token_ids": list,
    "seconds": dict,
    "prefill_tok_s": float,
    "decode_tok_s": float,
    "allocated_peak_bytes": int,
    "peak_device_bytes": int,
    "peak_device_basis": type(None),
    "int8_threshold": type(None),
    "device": str,
    "path": str,
    "path_reason": str,
    "stop_reason": str,
    "length_limit": str,
    "seed": type(None),
    "warnings": list,
}


@pytest.fixture
def stories(test_data: Path) -> Path:
    return test_data / "models" / "stories260K-hf"


def pipe_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_text_goes_to_stdout_and_statistics_to_stderr(stories: Path) -> None:
    ran = run("generate", stories, PROMPT, "--max-new-tokens", 12, "--device", "cpu")
    assert ran.exit_code == 0
    assert ran.stdout.startswith(", there was")
    assert ran.stdout.endswith("\n")
    assert "prompt 5 tokens" in ran.stderr
    assert "new 12 tokens" in ran.stderr
    assert "cpu · eager: " in ran.stderr


def test_one_token_is_no_tokens(stories: Path) -> None:
    ran = run("generate", stories, "", "--max-new-tokens", 1)
    assert "\nprompt 1 token, " in ran.stderr and " · new 1 token · " in ran.stderr


def test_quiet_says_the_text_only(stories: Path) -> None:
    ran = run("generate", stories, PROMPT, "--max-new-tokens", 6, "--quiet")
    assert ran.stdout.startswith(", there")
    assert ran.stderr == ""


def test_verbose_tells_phases_and_where_the_weights_went_and_lists_no_tensors(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine lines of progress would name what is in work.
    monkeypatch.setattr("qtool.report.progress.FIRST_LINE_S", {False: math.inf, True: math.inf})
    arguments = ("generate", stories, PROMPT, "--max-new-tokens", 6, "--device", "cpu")
    ran = run(*arguments, "--quant", "int8", "-v")
    said = " ".join(ran.stderr.split())
    assert ".weight" not in said and len(ran.stderr.splitlines()) < 15
    assert re.search(r"headers, config and tokenizer: [\d.]+ s", said)
    assert re.search(r"loading: [\d.,]+ \wiB in [\d.]+ s", said)
    assert re.search(r"weights: [\d.,]+ \wiB on cpu, 35 packed layers", said)
    phases = r"packages [\d.]+ · loading [\d.]+ · eager path [\d.]+ · prompt [\d.]+ · new tokens"
    assert re.search(phases, said)
    assert "cpu · eager: " in said
    assert "weights:" not in run(*arguments).stderr
    assert run(*arguments, "-v", "-q").stderr == ""


def test_json_is_one_document_with_the_contracts_fields(stories: Path) -> None:
    ran = run("generate", stories, PROMPT, "--max-new-tokens", 20, "--json", "--device", "cpu")
    assert ran.stderr == ""
    document = ran.document
    assert set(document) == set(DOCUMENT)
    for name, kind in DOCUMENT.items():
        assert type(document[name]) is kind, name
    assert set(document["seconds"]) == TIMES
    assert all(isinstance(s, float) and s > 0 for s in document["seconds"].values())
    assert document["schema"] == 1
    assert document["command"] == "generate"
    assert document["text"].startswith(START)
    assert document["new_tokens"] == len(document["token_ids"]) == 20
    assert document["prompt_tokens"] == 5
    assert document["device"] == "cpu"
    assert document["allocated_peak_bytes"] == document["peak_device_bytes"] == 0
    assert document["path"] == "eager"
    assert document["path_reason"]
    assert (document["stop_reason"], document["length_limit"]) == ("length", "max_new_tokens")
    assert document["warnings"] == []


def test_a_threshold_is_in_the_report(stories: Path) -> None:
    options = ("--max-new-tokens", 2, "--device", "cpu", "--int8-threshold", "4.5")
    ran = run("generate", stories, PROMPT, *options, "--quant", "int8", "--json")
    assert ran.document["int8_threshold"] == 4.5
    said = "int8 activations of prompts, threshold 4.5"
    for prompt, chunk, is_rounded in ((PROMPT, 512, False), (LONG, 512, True), (LONG, 64, False)):
        chunks = ("--prefill-chunk", chunk)
        ran = run("generate", stories, prompt, *options, *chunks, "--quant", "int8")
        assert (said in ran.stderr.replace("\n", " ")) is is_rounded


def test_quantizing_while_loading(stories: Path) -> None:
    arguments = ("generate", stories, PROMPT, "--max-new-tokens", 8, "--json")
    document = run(*arguments, "--quant", "nf4-dq").document
    assert document["text"].startswith(", there was")


def test_a_long_prompt_goes_in_in_chunks(stories: Path) -> None:
    arguments = ("generate", stories, f"{PROMPT} {PROMPT}", "--max-new-tokens", 8, "--json")
    whole = run(*arguments).document
    chunked = run(*arguments, "--prefill-chunk", 4).document
    assert whole["prompt_tokens"] > 8
    assert chunked["token_ids"] == whole["token_ids"]


def test_a_path_can_be_asked_for(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("generate", stories, PROMPT, "--max-new-tokens", 2, "--device", "cpu", "--json")
    document = run(*arguments, "--path", "eager").document
    assert (document["path"], document["path_reason"]) == ("eager", "asked for")
    monkeypatch.setenv("QTOOL_PATH", "graph")
    ran = run(*arguments)
    assert (ran.exit_code, ran.error["kind"]) == (1, "unsupported")
    assert "cannot take the graph path: CUDA graphs need an NVIDIA GPU" in ran.error["message"]


@pytest.mark.parametrize("prompt", [["-"], []])
def test_a_pipe_is_the_prompt(
    stories: Path, monkeypatch: pytest.MonkeyPatch, prompt: list[str]
) -> None:
    pipe_in(monkeypatch, PROMPT + "\n")
    ran = run("generate", stories, *prompt, "--max-new-tokens", 12, "--json")
    assert ran.document["text"].startswith(", there was")
    assert ran.document["prompt_tokens"] == 5


@pytest.mark.parametrize("place", ["pipe", "file"])
def test_bytes_that_are_no_utf_8_are_told_before_the_model_loads(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr("qtool.runtime.head_start.begin", in_vain)
    broken = b"abc \xff"
    (tmp_path / "prompt.txt").write_bytes(broken)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(broken), errors="surrogateescape"))
    words = ["-"] if place == "pipe" else ["--prompt-file", tmp_path / "prompt.txt"]
    ran = run("generate", stories, *words, "--json")
    assert (ran.exit_code, ran.error["kind"]) == (1, "bad_file")
    assert "not UTF-8 at byte 4" in ran.error["message"]


def test_a_file_is_the_prompt(stories: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT + "\n")
    ran = run("generate", stories, "--prompt-file", path, "--max-new-tokens", 12, "--json")
    assert ran.document["text"].startswith(", there was")


def test_a_stop_text_ends_the_answer(stories: Path) -> None:
    document = run("generate", stories, PROMPT, "--stop", "Lily", "--json").document
    assert (document["stop_reason"], document["length_limit"]) == ("stop_string", None)
    assert document["text"] == ", there was a little girl named "


def test_useless_sampling_options_are_a_warning(stories: Path) -> None:
    options = ("--top-k", 5, "--seed", 3)
    ran = run("generate", stories, PROMPT, "--max-new-tokens", 2, *options, "--json")
    useless = ("--top-k", "--seed")
    expected = [f"{name} changes nothing at --temperature 0" for name in useless]
    assert ran.document["warnings"] == expected


def test_the_end_of_a_text_is_told_apart(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("generate", stories, PROMPT, "--device", "cpu")
    assert "· --max-new-tokens reached\n" in run(*arguments, "--max-new-tokens", 3).stderr
    assert "· context full: 8 tokens\n" in run(*arguments, "--max-context", 8).stderr
    full = run(*arguments, "--max-context", 8, "--json").document
    assert (full["stop_reason"], full["length_limit"]) == ("length", "context")
    monkeypatch.setenv("QTOOL_MAX_NEW_TOKENS", "3")
    assert "· QTOOL_MAX_NEW_TOKENS reached\n" in run(*arguments).stderr


BAD_VARIABLES = {
    "MAX_CONTEXT": ("9999", "QTOOL_MAX_CONTEXT=9999: the model was made for", "QTOOL_MAX_CONTEXT="),
    "DEVICE": ("tpu", "QTOOL_DEVICE=tpu: there is no such device", "cuda:N"),
    "MAX_MEMORY": ("lots", "QTOOL_MAX_MEMORY=lots: 'lots' is not", "QTOOL_MAX_MEMORY=0=6GiB"),
    "CHAT": ("true", "no chat template", "leave out QTOOL_CHAT"),
    "PATH": ("graph", "cannot take the graph path", "leave out QTOOL_PATH:"),
    "TEMPERATURE": ("hot", "Invalid value for QTOOL_TEMPERATURE: 'hot'", "--help"),
    "PROMPT_FILE": ("p.txt", "both PROMPT and QTOOL_PROMPT_FILE were given", "one of them"),
}


@pytest.mark.parametrize("name", BAD_VARIABLES)
def test_an_error_names_the_variable_that_it_is_about(
    stories: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    value, message, hint = BAD_VARIABLES[name]
    monkeypatch.setenv(f"QTOOL_{name}", value)
    ran = run("generate", stories, PROMPT, "--json")
    assert ran.exit_code in (1, 2)
    assert message in ran.error["message"]
    assert hint in ran.error["hint"]


def test_an_error_names_the_file_that_it_is_about(stories: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    for line, message in (
        ("max-context = 9999", f"max-context = 9999 in {config}: the model was made for"),
        ('device = "tpu"', f'device = "tpu" in {config}: there is no such device'),
        ('top-k = "few"', f"Invalid value for top-k in {config}: 'few'"),
    ):
        config.write_text(line)
        ran = run("generate", stories, PROMPT, "--config", config, "--json")
        assert ran.exit_code == 2
        assert message in ran.error["message"]


def test_a_flag_beats_the_variable_and_is_named(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QTOOL_DEVICE", "cpu")
    ran = run("generate", stories, PROMPT, "--device", "tpu", "--json")
    assert ran.error["message"] == "--device tpu: there is no such device"


BAD_USAGE: dict[str, tuple[list[Any], str]] = {
    "two prompts": (["x", "--prompt-file", "y"], "both PROMPT and --prompt-file"),
    "empty pipe": (["-"], "stdin holds no prompt"),
    "no such device": (["x", "--device", "tpu"], "--device tpu: there is no such device"),
    "system without template": (["x", "--system", "s"], "no chat template"),
    "chat without template": (["x", "--chat"], "no chat template"),
    "context beyond the model": (["x", "--max-context", 9999], "made for 512 tokens"),
    "prompt too long": (["x " * 600], "the context only 512"),
    "malformed limits": (["x", "--max-memory", "lots"], "is not of the form"),
    "limits of no GPU": (["x", "--max-memory", "9=1GiB", "--device", "cpu"], "names GPU 9"),
    "system without chat": (["x", "--system", "s", "--no-chat"], "but --no-chat was given"),
    "temperature": (["x", "--temperature", -1], "--temperature"),
    "no temperature": (["x", "--temperature", "nan"], "nan is neither 0 nor from 0.000001 on"),
    "absolute zero": (["x", "--temperature", 1e-320], "is neither 0 nor from"),
    "heat death": (["x", "--temperature", "inf"], "inf is neither 0 nor from"),
    "no probability": (["x", "--top-p", "nan"], "nan is not above 0 and at most 1"),
    "zero probability": (["x", "--top-p", 0], "0.0 is not above 0 and at most 1"),
    "large seed": (["x", "--seed", 1 << 63], "is not between 0 and"),
    "empty stop": (["x", "--stop", ""], "found an empty one"),
    "no tokens": (["x", "--max-new-tokens", 0], "--max-new-tokens"),
    "no chunk": (["x", "--prefill-chunk", 0], "--prefill-chunk"),
}


def test_a_seed_that_nobody_gave_is_told_and_makes_the_text_again(stories: Path) -> None:
    def document(*options: object) -> dict[str, Any]:
        words = ("--temperature", 1.5, "--max-new-tokens", 12, "--device", "cpu", "--json")
        return run("generate", stories, PROMPT, *words, *options).document

    first, other = document(), document()
    assert first["seed"] != other["seed"]
    again = document("--seed", first["seed"])
    assert (again["seed"], again["token_ids"]) == (first["seed"], first["token_ids"])
    assert other["token_ids"] != first["token_ids"]


def test_a_line_break_in_a_stop_text_may_be_none(stories: Path) -> None:
    def warnings_of(stop: str) -> list[str]:
        ran = run("generate", stories, PROMPT, "--stop", stop, "--max-new-tokens", 1, "--json")
        return ran.document["warnings"]

    (warning,) = warnings_of(r"\n")
    assert warning == r"--stop '\n' is a backslash and an n; a line break is $'\n' in bash and zsh"
    assert warnings_of("\n") == []


@pytest.mark.parametrize(
    ("piped", "num_warnings"),
    [("more text", 1), ("", 0), (None, 0)],
    ids=["text", "none", "no pipe"],
)
def test_text_on_a_pipe_beside_a_prompt_is_left_there_with_a_warning(
    stories: Path, monkeypatch: pytest.MonkeyPatch, piped: str | None, num_warnings: int
) -> None:
    reading, writing = os.pipe()
    os.write(writing, (piped or "").encode())
    os.close(writing)
    source = Path(f"/dev/fd/{reading}" if piped is not None else os.devnull)
    with source.open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        ran = run("generate", stories, PROMPT, "--max-new-tokens", 1, "--json")
        assert len(ran.document["warnings"]) == num_warnings
        assert stdin.read() == (piped or "")
    os.close(reading)


def test_a_model_that_is_not_there_is_told_before_a_pipe_without_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe_in(monkeypatch, "")
    ran = run("generate", "./nowhere", "--json")
    assert "./nowhere" in ran.error["message"]


def in_vain(*arguments: Any, **options: Any) -> NoReturn:
    raise AssertionError("what was done already, for nothing")


@pytest.mark.parametrize("case", BAD_USAGE)
def test_bad_usage_exits_2_with_a_hint_before_weights_are_read(
    stories: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("qtool.runtime.loading._open_weights", in_vain)
    pipe_in(monkeypatch, "")
    arguments, message = BAD_USAGE[case]
    ran = run("generate", stories, *arguments, "--json")
    assert ran.exit_code == 2
    assert ran.stdout == ""
    assert ran.error["kind"] == "usage"
    assert message in ran.error["message"]
    assert ran.error["hint"]


def test_who_means_a_pipe_by_a_file_named_dash_is_told_how(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, hint in (("-", "PROMPT takes - for a pipe"), ("gone", "check the path")):
        ran = run("generate", stories, "--prompt-file", name, "--json")
        assert (ran.error["kind"], ran.error["message"]) == ("not_found", f"{name} does not exist")
        assert ran.error["hint"].endswith(hint)


@pytest.mark.parametrize("options", [("--chat",), ("--system", "s"), ("--max-context", 513)])
def test_so_does_that_of_a_chat(
    stories: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...]
) -> None:
    monkeypatch.setattr("qtool.runtime.loading._open_weights", in_vain)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    ran = run("generate", stories, *options)
    assert ran.exit_code == 2, ran.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--device", "tpu"),
        ("--max-memory", "lots"),
        ("--max-memory", "9=1GiB", "--device", "cpu"),
        ("--system", "s", "--no-chat"),
    ],
)
def test_what_the_command_line_tells_comes_before_a_download(
    stories: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.setattr("qtool.runtime.loading.open_checkpoint", in_vain)
    ran = run("generate", stories, "x", *options)
    assert ran.exit_code == 2, ran.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--max-context", 513), "--max-context 513: the model was made for 512 tokens"),
        (("--max-memory", "0=6GiB", "--device", "cpu"), "--max-memory names GPU 0, but"),
        (("--max-memory", "0=6GiB"), "--max-memory names GPU 0, but the model runs on cpu"),
    ],
)
def test_what_the_headers_and_the_driver_tell_comes_before_pytorch(
    stories: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], said: str
) -> None:
    def no_driver() -> NoReturn:
        raise NoCudaError("no NVIDIA driver", "install one")

    monkeypatch.setattr("qtool.runtime.head_start.begin", in_vain)
    monkeypatch.setattr("qtool.runtime.memory_limits.find_driver", no_driver)
    ran = run("generate", stories, "x", *options, "--json")
    assert ran.exit_code == 2 and said in ran.error["message"]


def test_a_prompt_through_a_template_is_measured_with_it(
    chatty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = chatty / "tokenizer_config.json"
    template = "{{ bos_token }}" + "Once upon a time " * 200 + "{{ messages[-1]['content'] }}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    assert run("generate", chatty, "x", "--no-chat", "--max-new-tokens", 1).exit_code == 0
    monkeypatch.setattr("qtool.runtime.loading._open_weights", in_vain)
    ran = run("generate", chatty, "x", "--json")
    assert ran.exit_code == 2 and "the context only 512" in ran.error["message"]


def test_a_path_that_the_device_has_not_is_refused_at_once(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtool.runtime.loading._open_weights", in_vain)
    ran = run("generate", stories, "x", "--path", "graph", "--device", "cpu", "--json")
    assert (ran.exit_code, ran.error["kind"]) == (1, "unsupported")
    assert "cannot take the graph path: CUDA graphs need an NVIDIA GPU" in ran.error["message"]


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("slm4096-gpt2-hf", ("--path", "fused"), "path: gpt2 blocks have no fused kernels"),
        ("TinyStories-656K-hf", ("--chat",), "the tokenizer has no chat template"),
        ("TinyStories-656K-hf", ("--system", "s"), "a chat, but there is no chat template"),
        ("mute", (), "no usable tokenizer: there is none among its files"),
    ],
)
def test_what_the_files_tell_loads_no_torch(
    test_data: Path, tmp_path: Path, model: str, options: tuple[str, ...], said: str
) -> None:
    folder = test_data / "models" / model
    if model == "mute":
        without = shutil.ignore_patterns("*token*")
        folder = shutil.copytree(
            test_data / "models/TinyStories-656K-hf", tmp_path / "m", ignore=without
        )
    command = ("generate", str(folder), "Hi", *options)
    assert said in run(*command, "--json").error["message"]
    assert "torch" not in loaded_modules(*command)


def test_a_fused_path_on_a_gpu_needs_cupy(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("qtool.runtime.requirements.find_driver", lambda: None)
    monkeypatch.setattr(
        requirements.importlib.util,
        "find_spec",
        lambda name: None if name == "cupy" else found(name),
    )
    monkeypatch.setattr("qtool.runtime.head_start.begin", in_vain)
    ran = run("generate", stories, "x", "--path", "fused", "--device", "cuda:0", "--json")
    assert (ran.exit_code, ran.error["kind"]) == (1, "unsupported")
    assert ran.error["message"].endswith("cannot take the fused path: the fused kernels need CuPy")


def test_a_missing_prompt_file_is_not_found(stories: Path) -> None:
    ran = run("generate", stories, "--prompt-file", "/nowhere/p.txt", "--json")
    assert (ran.exit_code, ran.error["kind"]) == (1, "not_found")


def test_a_missing_extra_is_one_sentence_and_one_command(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
    ran = run("generate", stories, PROMPT, "--json")
    assert ran.exit_code == 1
    assert ran.error["message"].startswith("running models needs torch, transformers and")
    assert ran.error["hint"] == 'pip install "qtool[run]"'


# ---- In processes of their own ----------------------------------------------------------------


def test_an_adapter_may_lie_on_the_hub(
    stories: Path,
    tmp_path: Path,
    hub_server: HubServer,  # noqa: F811
) -> None:
    pytest.importorskip("peft")
    config = json.loads((stories / "config.json").read_text())
    tensors = lora_tensors(linear_layers(config))
    adapter = write_adapter(tmp_path / "adapter", tensors, stories)
    hub_server.add_model("org/adapter", adapter)
    arguments = (stories, PROMPT, "--max-new-tokens", "8", "--device", "cpu", "--json")
    environment = hub_server.environment(tmp_path / "home", PYTHONPATH=str(Path.cwd()))
    fetched = subprocess.run(
        [*PROGRAM, *map(str, arguments), "--adapter", "org/adapter@main"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    own = run("generate", *arguments, "--adapter", adapter).document["token_ids"]
    assert json.loads(fetched.stdout)["token_ids"] == own
    assert run("generate", *arguments).document["token_ids"] != own


def test_an_adapters_package_is_told_and_imported_with_the_others(
    stories: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    config = json.loads((stories / "config.json").read_text())
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(linear_layers(config)), stories)
    script = (
        "import sys\n"
        "from qtool.cli import main\n"
        "from qtool.runtime import loading\n"
        "def load_model(*arguments, **options):\n"
        "    sys.exit('peft' not in sys.modules)\n"
        "assert 'peft' not in sys.modules\n"
        "loading.load_model = load_model\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, "generate", str(stories), PROMPT]
    for options, is_imported, packages in (
        (("--adapter", str(adapter)), True, "PyTorch, transformers and PEFT"),
        ((), False, "PyTorch and transformers"),
    ):
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert done.returncode == (not is_imported)
        assert done.stderr.splitlines() == [f"loading {packages}"]


USELESS = {
    "unknown type": (
        {"model_type": "zebra"},
        (),
        "model_type 'zebra', which this transformers does not know",
    ),
    "no text": ({"model_type": "clip_vision_model"}, (), "models do not generate text"),
    "another's format": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        (),
        "quant_method 'gptq', expected bitsandbytes",
    ),
    "nothing packed": (
        {"quantization_config": {"load_in_4bit": True}},
        (),
        "no packed weight is in it",
    ),
    "packed twice": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        ("--quant", "nf4"),
        "is quantized already",
    ),
    "unknown type to pack": (
        {"model_type": "zebra"},
        ("--quant", "nf4"),
        "model type 'zebra' is not supported",
    ),
}


@pytest.mark.parametrize("case", USELESS)
def test_of_a_model_that_cannot_run_no_weights_are_downloaded(
    stories: Path,
    tmp_path: Path,
    hub_server: HubServer,  # noqa: F811
    case: str,
) -> None:
    changes, options, said = USELESS[case]
    source = tmp_path / "source"
    shutil.copytree(stories, source, copy_function=shutil.copyfile)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    hub_server.add_model("org/useless", source)
    done = generate_from(hub_server, "org/useless", "Hi", *options, "--json", home=tmp_path / "hub")
    error = json.loads(done.stderr)["error"]
    assert (done.returncode, said in error["message"], bool(error["hint"])) == (1, True, True), (
        error
    )
    asked = [request for request in hub_server.requests if "safetensors" in request.path]
    assert all(request.range for request in asked)  # headers
    assert hub_server.sent_bytes(".safetensors") < weight_bytes(source) / 10
    assert not [*(tmp_path / "hub").rglob("*.safetensors")]


@pytest.mark.parametrize("options", [(), ("--quant", "nf4-dq")])
def test_a_model_may_lie_on_the_hub(
    stories: Path,
    tmp_path: Path,
    hub_server: HubServer,  # noqa: F811
    options: tuple[str, ...],
) -> None:
    hub_server.add_model("org/stories", stories)
    arguments = (PROMPT, "--max-new-tokens", "8", "--device", "cpu", "--json", *options)
    own = run("generate", stories, *arguments).document["token_ids"]
    for _ in range(2):
        fetched = generate_from(hub_server, "org/stories", *arguments, home=tmp_path / "hub")
        assert json.loads(fetched.stdout)["token_ids"] == own, fetched.stderr
    sent = [r for r in hub_server.requests if r.path.endswith(".safetensors") and r.status == 200]
    assert len(sent) == len(list(stories.glob("*.safetensors")))  # once


def generate_from(hub: HubServer, *arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments],
        env=hub.environment(home, PYTHONPATH=str(Path.cwd())),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_an_adapter_that_is_nowhere_is_not_found(stories: Path) -> None:
    pytest.importorskip("peft")
    ran = run("generate", stories, PROMPT, "--adapter", "./gone", "--json")
    assert ran.exit_code == 1 and ran.error["kind"] == "not_found"
    assert "./gone: no such folder" in ran.error["message"]
    assert "adapter_config.json" in ran.error["hint"]


@pytest.fixture
def chatty(stories: Path, tmp_path: Path) -> Path:
    """The stories model with a chat template that is the last message alone."""
    folder = tmp_path / "chatty"
    shutil.copytree(stories, folder, copy_function=shutil.copyfile)
    path = folder / "tokenizer_config.json"
    template = "{{ bos_token }}{{ messages[-1]['content'] }}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return folder


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize(("number", "exit_code"), SIGNALS)
def test_a_signal_keeps_the_text_that_was_made(
    stories: Path, monkeypatch: pytest.MonkeyPatch, number: int, exit_code: int
) -> None:
    add = TextStream.add

    def add_and_signal(stream: TextStream, token_id: int) -> None:
        add(stream, token_id)
        if "little" in stream.text:
            signal.raise_signal(number)

    monkeypatch.setattr(TextStream, "add", add_and_signal)
    ran = run("generate", stories, PROMPT, "--device", "cpu", "--json")
    assert ran.exit_code == exit_code and ran.stderr == ""
    assert ran.document["stop_reason"] == "interrupted"
    assert ran.document["text"].startswith(", there was a little")
    assert ran.document["new_tokens"] == len(ran.document["token_ids"]) > 4
    ran = run("generate", stories, PROMPT, "--device", "cpu")
    assert ran.exit_code == exit_code and ran.stdout.startswith(", there was a little")
    assert ("terminated" if number == signal.SIGTERM else "interrupted") in ran.stderr


@pytest.mark.parametrize(("number", "exit_code"), SIGNALS)
def test_a_signal_from_outside_ends_the_text(stories: Path, number: int, exit_code: int) -> None:
    command = [*PROGRAM, str(stories), PROMPT, "--max-new-tokens", "500", "--ignore-eos"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(12)  # streaming has begun
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == exit_code
    assert (first + stdout).decode().startswith(", there was")
    assert (b"terminated" if number == signal.SIGTERM else b"interrupted") in stderr
    assert b"Traceback" not in stderr


class Terminal:
    """The program on a terminal of its own."""

    def __init__(self, *arguments: object, term: str = "dumb") -> None:
        self._fd, child = pty.openpty()
        environment = os.environ | {"TERM": term, "COLUMNS": "100"}
        self.process = subprocess.Popen(
            [*PROGRAM, *map(str, arguments)],
            stdin=child,
            stdout=child,
            stderr=child,
            env=environment,
            start_new_session=True,
            # makes it the controlling terminal, so that Ctrl-C becomes a signal
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(child)
        self.seen = ""

    def wait_for(self, pattern: str, timeout_s: float = 120) -> str:
        """Read until `pattern` appears after what was matched before."""
        end_s = time.monotonic() + timeout_s
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < end_s, f"no {pattern!r} in {self.seen!r}"
            if select.select([self._fd], [], [], 1)[0]:
                self.seen += os.read(self._fd, 65536).decode(errors="replace")
        found, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return found

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)


def test_a_seed_makes_a_conversation_repeatable_and_no_two_turns_alike(chatty: Path) -> None:
    def answers(seed: int) -> list[str]:
        options = ("--temperature", 1.5, "--seed", seed, "--max-new-tokens", 12, "--device", "cpu")
        terminal, found = Terminal(chatty, *options), []
        try:
            for _ in range(3):
                terminal.wait_for(">>> ")
                terminal.type("Once upon\n")
                found.append(terminal.wait_for(r"\(--max-new-tokens reached\)"))
        finally:
            terminal.close()
        return found

    first = answers(7)
    assert len(set(first)) == 3
    assert answers(7) == first


def test_a_terminal_without_prompt_opens_a_chat(chatty: Path) -> None:
    terminal = Terminal(chatty, "--max-new-tokens", 480, "--ignore-eos", "--device", "cpu")
    try:
        assert "chat" in terminal.wait_for(r"/help for\s+commands")
        terminal.wait_for(">>> ")
        terminal.type("/help\n")
        assert "/clear" in terminal.wait_for(">>> ")
        terminal.type("Tim")
        terminal.wait_for("Tim")
        time.sleep(0.5)  # readline sees a signal before its wait only with the next key
        terminal.type("\x03")  # Ctrl-C drops the line
        assert "(Ctrl-D or /exit leaves)" in terminal.wait_for(">>> ")
        for _ in range(2):
            terminal.type(PROMPT + "\n")
            terminal.wait_for("there was")
            time.sleep(0.1)  # what comes within some milliseconds of another is taken for the same
            terminal.type("\x03")  # Ctrl-C ends the answer, not the chat
            assert "(interrupted)" in terminal.wait_for(">>> ")
        terminal.type("\x04")  # Ctrl-D
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()


def test_lines_that_are_pasted_are_one_turn(chatty: Path) -> None:
    terminal = Terminal(chatty, "--max-new-tokens", 4, "--device", "cpu", "--verbose", term="xterm")
    try:
        terminal.wait_for(">>> ")
        terminal.type("\x1b[200~Once upon\na time\nthere was\x1b[201~")
        time.sleep(0.5)
        terminal.type("\n")
        told = terminal.wait_for(r"prompt \d+ tokens")
        terminal.wait_for(">>> ")
        terminal.type("/exit\n")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()
    whole = run("generate", chatty, "Once upon\na time\nthere was", "--max-new-tokens", 1, "--json")
    assert int(re.findall(r"\d+", told)[-1]) == whole.document["prompt_tokens"]


def test_a_chat_tells_the_way_once_and_what_the_cache_held(chatty: Path) -> None:
    terminal = Terminal(chatty, "--max-new-tokens", 4, "--device", "cpu", "--verbose")
    try:
        terminal.wait_for(">>> ")
        terminal.type("Once upon\n")
        first = terminal.wait_for(">>> ")
        terminal.type("and then\n")
        second = terminal.wait_for(">>> ")
    finally:
        terminal.close()
    assert " in the cache" not in first and first.count("cpu · ") == 1
    assert re.search(r"prompt \d+ tokens, \d+ in the cache, ", second) and "cpu · " not in second


@pytest.mark.parametrize("in_an_answer", [True, False])
def test_sigterm_ends_a_chat_wherever_it_is(chatty: Path, in_an_answer: bool) -> None:
    terminal = Terminal(chatty, "--max-new-tokens", 480, "--ignore-eos", "--device", "cpu")
    try:
        terminal.wait_for(">>> ")
        if in_an_answer:
            terminal.type(PROMPT + "\n")
            terminal.wait_for("there was")
        else:
            time.sleep(0.5)  # readline sees a signal before its wait only with the next key
        terminal.process.send_signal(signal.SIGTERM)
        terminal.wait_for("error: terminated")
        assert terminal.process.wait(timeout=60) == 143
    finally:
        terminal.close()


def test_without_a_template_nothing_is_remembered_and_commands_say_so(stories: Path) -> None:
    terminal = Terminal(stories, "--max-new-tokens", 4, "--device", "cpu")
    try:
        terminal.wait_for(r"no chat template: each line is\s+continued")
        terminal.wait_for(">>> ")
        terminal.type("/help\n")
        assert "/clear" not in terminal.wait_for("/help +show this")
        terminal.wait_for(">>> ")
        terminal.type("/clear\n")
        terminal.wait_for("there is nothing to forget")
        terminal.wait_for(">>> ")
        terminal.type("/celar\n")
        terminal.wait_for("/celar is no command, /help shows them")
        terminal.wait_for(">>> ")
        for command in ("/clear now", "/exit now", "/help /exit"):
            terminal.type(f"{command}\n")
            terminal.wait_for(f"{command} is no command, /help shows them")
            terminal.wait_for(">>> ")
        for text in (" /celar", " /exit now", "/etc/passwd", "/celar or what", "/clear/it all"):
            terminal.type(f"{text}\n")
            terminal.wait_for(r"\(--max-new-tokens reached\)")
            terminal.wait_for(">>> ")
        terminal.type("/bye\n")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()


def test_a_chat_that_fills_the_context_begins_anew_after_clear(chatty: Path) -> None:
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    path = chatty / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    terminal = Terminal(chatty, "--ignore-eos", "--max-context", 24, "--device", "cpu")
    try:
        terminal.wait_for(">>> ")
        terminal.type(PROMPT + "\n")
        terminal.wait_for(r"\(context full: 24 tokens; /clear forgets what was said before\)")
        terminal.wait_for(">>> ")
        terminal.type(PROMPT + "\n")
        terminal.wait_for("the context only 24")
        terminal.wait_for("/clear forgets what was said before")
        terminal.wait_for(">>> ")
        terminal.type("/clear\n")
        terminal.wait_for("forgotten")
        terminal.wait_for(">>> ")
        terminal.type(PROMPT + "\n")
        terminal.wait_for(r"\(context full: 24 tokens; /clear forgets what was said before\)")
    finally:
        terminal.close()


def test_a_broken_generation_config_is_an_error_that_names_it(
    stories: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(stories, folder, copy_function=shutil.copyfile)
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    ran = run("generate", folder, PROMPT, "--json")
    assert ran.exit_code == 1 and ran.error["kind"] == "bad_file"
    assert f"{folder}/generation_config.json: eos_token_id: expected" in ran.error["message"]


def test_a_mixture_that_is_to_be_packed_is_refused_with_the_way_to_run_it(test_data: Path) -> None:
    folder = test_data / "models" / "tinymoe-6m"
    ran = run("generate", folder, PROMPT, "--quant", "nf4-dq", "--json")
    assert ran.exit_code == 1
    assert ran.error["message"].startswith(f"{folder}: config.json: Qwen3MoeForCausalLM is a mix")
    assert "leave out --quant nf4-dq to run it as it is stored" in ran.error["hint"]


def test_an_unknown_type_is_told_with_its_folder(stories: Path, tmp_path: Path) -> None:
    folder = tmp_path / "foo"
    shutil.copytree(stories, folder, copy_function=shutil.copyfile)
    (folder / "config.json").write_text('{"model_type": "foo"}')
    ran = run("generate", folder, PROMPT, "--quant", "nf4", "--json")
    assert ran.error["message"].startswith(f"{folder}: config.json: model type 'foo' is not")


def test_an_adapter_given_as_the_model_is_refused_with_its_base(
    stories: Path, tmp_path: Path
) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": str(stories)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"lora": np.zeros((2, 2), np.float32)}, tmp_path / "adapter_model.safetensors")
    ran = run("generate", tmp_path, PROMPT, "--json")
    assert ran.exit_code == 1 and "found a PEFT adapter alone" in ran.error["message"]
    assert f"give its base model, {stories};" in ran.error["hint"]
    assert f"--adapter {tmp_path}" in ran.error["hint"]
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "base model" in run("generate", tmp_path, PROMPT, "--json").error["hint"]
