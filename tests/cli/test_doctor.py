"""`qtool doctor` as users and scripts see it."""

from __future__ import annotations

import re

import pytest

from qtool.architecture import KNOWN_MODEL_TYPES
from qtool.doctor import machine
from tests.cli.running import run
from tests.tiny_models import write_llama


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def broken(monkeypatch):
    def explode():
        raise OSError("cannot look")
        yield

    monkeypatch.setattr(machine, "check_memory", explode)


def test_json_lists_the_checks():
    ran = run("doctor", "--json")
    assert ran.exit_code == 0 and ran.stderr == ""
    assert ran.document.keys() == {"schema", "command", "warnings", "ready", "checks"}
    assert all(
        check.keys() == {"section", "name", "status", "found", "fix"}
        for check in ran.document["checks"]
    )
    assert {check["status"] for check in ran.document["checks"]} <= {"ok", "info", "warn", "fail"}


def test_verbose_lists_the_model_types_that_are_known():
    ran = run("doctor", "-v")
    known = f"types {len(KNOWN_MODEL_TYPES)} are known by name: {', '.join(KNOWN_MODEL_TYPES)}"
    assert known in " ".join(ran.stdout.split())  # for a pipe to look through
    assert "known by name" not in run("doctor").stdout


def test_verbose_says_what_each_section_took():
    ran = run("doctor", "-v")
    number = r"\d+\.\d\d"
    sections = ("Software", "Machine", "GPU", "Hub", "Round trip")
    assert re.fullmatch(
        "seconds: " + " · ".join(f"{name} {number}" for name in sections), ran.stderr.strip()
    )


def test_words_end_with_a_verdict():
    ran = run("doctor")
    assert ran.exit_code == 0 and ran.stderr == ""
    assert "Round trip" in ran.stdout and "bit for bit" in ran.stdout
    assert ran.stdout.rstrip().splitlines()[-1].startswith("ready: ")


def test_a_failed_check_is_exit_code_1_without_a_traceback(broken):
    ran = run("doctor")
    assert ran.exit_code == 1
    assert "OSError: cannot look" in ran.stdout and "1 failed" in ran.stdout
    assert "Traceback" not in ran.stdout + ran.stderr
    assert run("doctor", "--json").exit_code == 1


def test_warnings_do_not_count_as_failure(monkeypatch):
    monkeypatch.setattr(machine, "ENOUGH_MEMORY_BYTES", 1 << 60)
    ran = run("doctor")
    assert ran.exit_code == 0 and "warning" in ran.stdout


def test_a_model_is_looked_at_when_named(tmp_path):
    write_llama(tmp_path / "model")
    ran = run("doctor", tmp_path / "model", "--json")
    names = {check["name"] for check in ran.document["checks"]}
    assert {"model", "size", "tokenizer", "pad token"} <= names
    assert run("doctor", tmp_path / "none", "--json").exit_code == 1
