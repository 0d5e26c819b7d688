"""Values of options that the parser alone would let through, or read in a way of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import run

LLAMA = "docs/examples/llama-3.1-8b"
DEMO = "qtool/demo_model"


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", DEMO, "-o", "never", "--quant", "int8", "--int8-threshold", "nan"),
        ("quantize", DEMO, "-o", "never", "--quant", "int8", "--int8-threshold", "inf"),
        ("estimate", LLAMA, "--headroom", "nan"),
        ("sizing", "--vram", "16", "--vram", "nan"),
        ("sizing", "--vram", "inf"),
        ("finetune", DEMO, "rows.jsonl", "-o", "never", "--lr", "inf"),
        ("generate", DEMO, "hi", "--temperature", "nan"),
    ],
)
def test_numbers_are_finite(arguments: tuple[str, ...]) -> None:
    ran = run(*arguments, "--json")
    assert ran.exit_code == 2 and ran.error["kind"] == "usage"
    assert arguments[-2] in ran.error["message"] and arguments[-1] in ran.error["message"]
    assert not Path("never").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("context = 1.9", "context"),
        ("batch = true", "batch"),
        ("context = [1, 2]", "context = [1, 2]"),
        ("exact = 2", "exact"),
        ("context = 2020-01-01", "context = 2020-01-01"),
        ("headroom = nan", "headroom"),
        ('config = "other.toml"', "'config'"),
    ],
)
def test_values_of_a_file_are_of_the_option_s_type(text: str, named: str, tmp_path: Path) -> None:
    (file := tmp_path / "plan.toml").write_text(text)
    ran = run("estimate", LLAMA, "--config", file, "--json")
    assert ran.exit_code == 2 and ran.error["kind"] == "usage"
    assert named in ran.error["message"] and str(file) in ran.error["message"]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("context = 8192", ("--context", 8192)),
        ("headroom = 5", ("--headroom", 5)),
        ("headroom = 2.5", ("--headroom", 2.5)),
        ('mode = "qlora"\nno-gradient-checkpointing = true', "--no-gradient-checkpointing"),
        ('mode = "qlora"\nno-gradient-checkpointing = false', "--gradient-checkpointing"),
        ('mode = "qlora"\ngradient-checkpointing = false', "--no-gradient-checkpointing"),
        ('mode = "qlora"\nno_gradient_checkpointing = true', "--no-gradient-checkpointing"),
        ("prefill-chunk = 512\n[estimate]\nprefill_chunk = 64", ("--prefill-chunk", 64)),
    ],
)
def test_a_file_says_what_the_command_line_does(
    text: str, arguments: str | tuple[str, float], tmp_path: Path
) -> None:
    (file := tmp_path / "plan.toml").write_text(text)
    given = ("--mode", "qlora", arguments) if isinstance(arguments, str) else arguments
    plan = ("estimate", LLAMA, "--gpu", "4090", "--json")
    assert run(*plan, "--config", file).document == run(*plan, *given).document


def test_a_table_of_a_verb_of_two_words_wants_quotes(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[bench.generate]\nnew = 8\n")
    ran = run("estimate", LLAMA, "--config", file, "--json")
    assert (ran.exit_code, ran.error["kind"]) == (2, "usage")
    assert ran.error["hint"].endswith('quotes: ["bench generate"]')


def test_a_name_that_no_file_can_have_hides_no_error() -> None:
    ran = run("quantize", "/no/such/model", "-o", "/tmp/" + "a" * 300, "--json")
    assert ran.error["kind"] == "not_found" and "/no/such/model" in ran.error["message"]


def test_a_link_to_itself_is_no_folder(tmp_path: Path) -> None:
    (loop := tmp_path / "loop").symlink_to(loop)
    ran = run("quantize", DEMO, "-o", loop, "--json")
    assert ran.error["kind"] != "internal" and str(loop) in ran.error["message"]


def test_what_is_wrong_with_an_option_is_not_the_model_s() -> None:
    ran = run("quantize", DEMO, "--skip", "(", "--dry-run", "--json")
    assert ran.error["kind"] == "usage" and ran.error["message"].startswith("skip pattern '('")


@pytest.mark.parametrize(
    "arguments", [("quantize", DEMO), ("merge", "lora"), ("finetune", DEMO, "rows.jsonl")]
)
def test_an_empty_name_is_not_the_current_folder(arguments: tuple[str, ...]) -> None:
    ran = run(*arguments, "-o", "", "--json")
    assert ran.exit_code == 2 and "found an empty one" in ran.error["message"]
