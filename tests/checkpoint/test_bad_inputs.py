"""Every broken or hostile checkpoint gets an error of its own that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtool.checkpoint import open_checkpoint
from qtool.errors import EXIT_CODES, QtoolError
from tests.checkpoint.bad_inputs import BAD_INPUTS, BadInput
from tests.checkpoint.tiny_models import write_sharded, write_single


@pytest.mark.parametrize("case", BAD_INPUTS, ids=lambda case: case.name)
def test_refused_with_what_where_expected_and_found(case: BadInput, tmp_path: Path):
    folder = case.build(tmp_path / "model")
    before = snapshot(folder)
    with pytest.raises(QtoolError) as caught:
        open_checkpoint(str(folder), need="files")
    error = caught.value
    assert error.kind == case.kind
    assert error.exit_code == EXIT_CODES[case.kind]
    for fragment in (*case.fragments, str(folder)):
        assert fragment in error.message, error.message
    assert error.hint
    assert len(error.message) < 600
    assert error.message.isprintable()
    assert snapshot(folder) == before


def test_no_two_cases_share_a_name():
    names = [case.name for case in BAD_INPUTS]
    assert len(names) == len(set(names)) >= 40


@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_the_models_they_are_made_from_are_accepted(write, tmp_path: Path):
    checkpoint = open_checkpoint(str(write(tmp_path / "model")), need="files")
    assert len(checkpoint.tensors) == 12
    assert checkpoint.other_files == ("tokenizer.json",)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    entries = ((path, path.lstat()) for path in folder.rglob("*"))
    return {str(path): (status.st_size, status.st_mtime_ns) for path, status in entries}
