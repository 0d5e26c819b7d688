"""Every broken checkpoint ends each verb with its own error, and nothing is written."""

from __future__ import annotations

import pytest

from qtool.errors import EXIT_CODES
from tests.checkpoint.bad_inputs import BAD_INPUTS, BadInput
from tests.cli.running import run


@pytest.mark.parametrize("case", BAD_INPUTS, ids=lambda case: case.name)
def test_quantize_refuses_and_writes_nothing(case: BadInput, tmp_path):
    model, out = case.build(tmp_path / "model"), tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    ran = run("quantize", model, "-o", out, "--json")
    assert ran.exit_code == EXIT_CODES[case.kind]
    assert ran.stdout == "" and ran.error["kind"] == case.kind and ran.error["hint"]
    for fragment in case.fragments:
        assert fragment in ran.error["message"]
    assert sorted(tmp_path.rglob("*")) == before


def test_messages_tell_the_cases_apart(tmp_path):
    messages = {}
    for case in BAD_INPUTS:
        model = case.build(tmp_path / case.name)
        message = run("quantize", model, "-o", tmp_path / "out", "--json").error["message"]
        messages[case.name] = message.replace(str(model), "")
    assert len(set(messages.values())) >= 0.9 * len(messages)
