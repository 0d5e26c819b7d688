"""`qtool sizing` as users and scripts see it."""

from __future__ import annotations

import pytest

from tests.cli.running import run
from tests.tiny_models import write_llama

ROW_FIELDS = {
    "gpus",
    "model",
    "quant",
    "verdict",
    "peak_bytes",
    "usable_bytes",
    "max_context",
    "decode_tok_s_ceiling",
    "notes",
}


@pytest.fixture
def model(tmp_path):
    write_llama(tmp_path / "my-model")
    return tmp_path / "my-model"


def test_the_guide_in_json(capsys):
    ran = run("sizing", "--json")
    assert ran.exit_code == 0 and ran.stderr == ""
    assert ran.document["schema"] == 1 and ran.document["command"] == "sizing"
    assert all(row.keys() == ROW_FIELDS | {"vram_gib"} for row in ran.document["rows"])
    assert ran.document["reference_models"]["8B"] == "Llama 3.1 8B"


def test_models_and_gpus_in_json(model):
    ran = run("sizing", model, "--gpu", "4090", "--quant", "nf4", "--json")
    (row,) = ran.document["rows"]
    assert row.keys() == ROW_FIELDS | {"gpu"}
    assert row["gpu"] == "NVIDIA GeForce RTX 4090" and row["model"] == str(model)
    assert row["verdict"] == "yes" and row["decode_tok_s_ceiling"] > 0


@pytest.mark.parametrize("width", [80, 140])
def test_text_fits_the_terminal(model, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    for arguments in ((), (model, "--quant", "nf4"), (model, "--vram", 12.5)):
        lines = run("sizing", *arguments).stdout.splitlines()
        assert max(map(len, lines)) <= width


def test_the_guide_names_its_models_and_its_signs():
    text = run("sizing").stdout
    assert "reference models: Llama 3.2 1B" in text and "Llama 3.1 70B" in text
    assert "✓ fits" in text and "k: 1,024 tokens" in text and "GiB (2^30 bytes)" in text
    assert "tok/s" not in text  # a memory size has no bandwidth


def test_speed_is_called_a_ceiling(model):
    text = run("sizing", model).stdout
    assert "my-model" in text and "RTX 4090" in text
    assert "tok/s: a ceiling" in text and "not confirmed" in text


def test_gpus_that_qtool_does_not_run_on_are_named(model):
    gpus = ("--gpu", "MI300X", "--gpu", "4090", "--gpu", "V100 16GB", "--gpu", "24GB")
    text = run("sizing", model, *gpus, "--quant", "nf4", "--quant", "bf16").stdout
    assert "memory alone: V100 16GB, AMD Instinct MI300X, where" in text
    assert "memory alone" not in run("sizing", model, "--gpu", "4090").stdout
    rows = run("sizing", model, *gpus, "--quant", "nf4", "--json").document["rows"]
    assert [bool(row["notes"]) for row in rows] == [True, False, False, True]
    assert [row["gpu"] for row in rows][1:3] == ["NVIDIA GeForce RTX 4090", "24 GiB"]


def test_verbose_says_what_it_took(model):
    assert "plans: 0." in run("sizing", model, "-v").stderr
    assert run("sizing", model).stderr == ""


def test_nothing_fits_is_exit_code_3_only_for_named_gpus():
    options = ("--quant", "int8", "--context", 131_072, "--batch", 1024)
    assert run("sizing", "--gpu", "RTX 4060", *options).exit_code == 3
    assert run("sizing", "--vram", 8, *options).exit_code == 0


@pytest.mark.parametrize(
    "arguments", [("--gpu", "rtx 9999"), ("--quant", "int9"), ("--vram", 0), ("--context", -1)]
)
def test_usage_errors(arguments):
    ran = run("sizing", *arguments, "--json")
    assert ran.exit_code == 2 and ran.stdout == "" and ran.error["kind"] == "usage"


def test_mode_and_gpus_reach_the_rows(model):
    ran = run("sizing", model, "--mode", "qlora", "--gpu", "4090", "--gpus", 2, "--json")
    assert {row["quant"] for row in ran.document["rows"]} == {"nf4", "nf4-dq"}
    assert {(row["gpus"], row["decode_tok_s_ceiling"]) for row in ran.document["rows"]} == {
        (2, None)
    }


def test_plot_writes_the_picture_and_refuses_other_kinds(model, tmp_path):
    assert run("sizing", model, "--plot", tmp_path / "sizes.html").exit_code == 0
    assert "<svg" in (tmp_path / "sizes.html").read_text()
    ran = run("sizing", model, "--plot", tmp_path / "sizes.pdf", "--json")
    assert ran.exit_code == 2 and ".svg" in ran.error["hint"]
