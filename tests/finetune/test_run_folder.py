"""OUT: what is refused, which saves count, what a restart removes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from qtool.errors import QtoolError
from qtool.finetune.records import place_of
from qtool.finetune.run_folder import (
    CHECKPOINTS,
    RunFolder,
    identity_of,
    is_whole,
    mark_whole,
    no_space_in_words,
)

IDENTITY = identity_of({"model": "m", "lr": 0.1}, {"tokens_sha256": "a"})


def begun(path: Path) -> RunFolder:
    folder = RunFolder(path)
    assert folder.begin(IDENTITY, resume=False, restart=False) is None
    return folder


def save(folder: RunFolder, step: int, *, whole: bool = True) -> Path:
    path = folder.checkpoints / f"checkpoint-{step}"
    path.mkdir()
    (path / "adapter_model.safetensors").write_bytes(b"weights")
    (path / "trainer_state.json").write_text("{}")
    if whole:
        mark_whole(path)
    return path


def test_a_new_or_empty_folder_is_taken(tmp_path: Path) -> None:
    RunFolder(tmp_path).check(resume=False, restart=False)
    RunFolder(tmp_path / "new").check(resume=True, restart=False)


def test_files_of_others_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for restart in (False, True):
        with pytest.raises(QtoolError, match=r"not empty .* \(found thesis.tex\)"):
            RunFolder(tmp_path).check(resume=False, restart=restart)
    with pytest.raises(QtoolError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex").check(resume=False, restart=False)


def test_a_run_that_ended_before_it_began_is_not_in_the_way(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    folder.checkpoints.mkdir(parents=True)
    (folder.checkpoints / ".lock").touch()
    folder.check(resume=False, restart=False)
    (folder.checkpoints / "mine").touch()
    with pytest.raises(QtoolError, match="found checkpoints/mine"):
        folder.check(resume=False, restart=False)


def test_a_folder_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(QtoolError, match="/proc/a/b cannot be created: /proc takes") as caught:
        RunFolder(Path("/proc/a/b")).check(resume=False, restart=False)
    assert caught.value.exit_code == 2


def test_checking_leaves_nothing(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a/b").check(resume=False, restart=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_run_that_never_began_is_dropped(tmp_path: Path, is_ours: bool) -> None:
    folder = RunFolder(tmp_path / "out")
    folder.checkpoints.mkdir(parents=True)
    (folder.checkpoints / ".lock").touch()
    folder.drop_if_not_begun(is_ours=is_ours)
    assert (folder.path.exists(), folder.checkpoints.exists()) == (not is_ours, False)
    kept = begun(folder.path)
    kept.drop_if_not_begun(is_ours=True)
    assert kept.is_begun


def test_a_run_that_is_there_wants_a_word(tmp_path: Path) -> None:
    folder = begun(tmp_path / "out")
    with pytest.raises(QtoolError, match="holds an unfinished run") as caught:
        folder.check(resume=False, restart=False)
    assert "resume continues it, restart begins anew" in caught.value.hint
    folder.write_manifest({"files": []})
    with pytest.raises(QtoolError, match="holds a finished run"):
        folder.check(resume=False, restart=False)
    folder.check(resume=True, restart=False)
    folder.check(resume=False, restart=True)


def test_the_last_whole_save_is_resumed(tmp_path: Path) -> None:
    folder = begun(tmp_path / "out")
    save(folder, 2)
    expected = save(folder, 10)
    torn = save(folder, 12, whole=False)
    assert folder.begin(IDENTITY, resume=True, restart=False) == expected
    assert not torn.exists()


@pytest.mark.parametrize("damage", ["missing", "shorter", "no list", "list cut"])
def test_a_torn_save_does_not_count(tmp_path: Path, damage: str) -> None:
    path = save(begun(tmp_path / "out"), 1)
    assert is_whole(path)
    match damage:
        case "missing":
            (path / "trainer_state.json").unlink()
        case "shorter":
            (path / "adapter_model.safetensors").write_bytes(b"weight")
        case "no list":
            (path / "whole.json").unlink()
        case "list cut":
            (path / "whole.json").write_text('{"files": {"a')
    assert not is_whole(path)


def test_other_settings_are_named(tmp_path: Path) -> None:
    folder = begun(tmp_path / "out")
    other = identity_of({"model": "m", "lr": 0.2}, {"tokens_sha256": "a"})
    with pytest.raises(QtoolError, match=r"lr is 0\.1 there, 0\.2 now"):
        folder.begin(other, resume=True, restart=False)


def test_what_was_there_and_is_gone_is_to_be_moved_back(tmp_path: Path) -> None:
    folder, model = RunFolder(tmp_path / "out"), tmp_path / "model"
    model.mkdir()
    folder.begin({"model": str(model)}, resume=False, restart=False)
    moved = {"model": str(model.rename(tmp_path / "moved"))}
    for is_there, hint in ((False, f"move {model} back to continue it"), (True, "give the same")):
        if is_there:
            model.mkdir()
        with pytest.raises(QtoolError, match=f'model is "{model}" there, "{tmp_path}/moved"') as it:
            folder.check_run(moved, resume=True, restart=False)
        assert it.value.hint.startswith(hint)


def test_what_has_moved_with_its_folder_is_the_same(tmp_path: Path) -> None:
    before = tmp_path / "before"
    (before / "model").mkdir(parents=True)
    settings = {"model": str(before / "model"), "eval_split": "0.1"}
    RunFolder(before / "out").begin(settings, resume=False, restart=False)
    after = before.rename(tmp_path / "after")
    moved = {**settings, "model": str(after / "model")}
    RunFolder(after / "out").check_run(moved, resume=True, restart=False)
    with pytest.raises(QtoolError, match=r'eval_split is "0\.1" there, "0\.2" now'):
        RunFolder(after / "out").check_run(
            {**moved, "eval_split": "0.2"}, resume=True, restart=False
        )


def test_records_of_relative_names_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    folder = RunFolder(tmp_path / "out")
    folder.begin({"model": "model"}, resume=False, restart=False)
    monkeypatch.chdir(tmp_path)
    folder.check_run({"model": str(tmp_path / "model")}, resume=True, restart=False)
    (tmp_path / "other").mkdir()
    with pytest.raises(QtoolError, match='model is "model" there'):
        folder.check_run({"model": str(tmp_path / "other")}, resume=True, restart=False)


def test_a_manifest_that_lists_no_files_is_damaged(tmp_path: Path) -> None:
    folder = finished(tmp_path / "out")
    (folder.path / "qtool_finetune.json").write_text("{}")
    with pytest.raises(QtoolError, match='expected names of files as "files"'):
        folder.check(resume=False, restart=True)


@pytest.mark.parametrize("name", ["a" * 300, "~nobody_has_this_name/model", ""])
def test_what_cannot_be_a_place_stays_a_name(name: str) -> None:
    assert place_of(name) == name


DAMAGES = {
    "cut": (b'{"schema": 1, "files": ["ad', "expected JSON, found an error: Unterminated string"),
    "empty": (b"", "expected JSON, found an error: Expecting value"),
    "no text": (b"\x89PNG\xff", "expected JSON, found an error: 'utf-8'"),
    "no object": (b"[]", "expected a JSON object, found an array"),
    "other names": (b'{"files": {"a": 1}}', 'expected names of files as "files"'),
    "no names": (b'{"files": [1]}', 'expected names of files as "files"'),
}


@pytest.mark.parametrize("record", ["qtool_finetune.json", "checkpoints/run.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_never_trained_over(tmp_path: Path, record: str, damage: str) -> None:
    folder = finished(tmp_path / "out")
    if record.startswith(CHECKPOINTS):
        (folder.path / "qtool_finetune.json").unlink()
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    content, said = DAMAGES[damage]
    before[folder.path / record] = content
    (folder.path / record).write_bytes(content)
    for resume, restart in ((False, False), (True, False), (False, True)):
        if record.startswith(CHECKPOINTS) and not resume:
            continue  # which need not know what is in it
        with pytest.raises(QtoolError, match=f"{record}: {said}") as caught:
            folder.begin(IDENTITY, resume=resume, restart=restart)
        assert (caught.value.kind, caught.value.exit_code) == ("bad_file", 1)
        assert "put a whole copy of it back, or choose another -o" in caught.value.hint
        if not record.startswith(CHECKPOINTS):
            with pytest.raises(QtoolError, match=said):
                folder.check(resume=resume, restart=restart)
    assert {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()} == before


def test_what_is_left_to_do_about_a_damaged_record(tmp_path: Path) -> None:
    """What the hints promise."""
    folder = finished(tmp_path / "out")
    manifest, begun = folder.path / "qtool_finetune.json", folder.checkpoints / "run.json"
    manifest.write_text("{")
    with pytest.raises(QtoolError) as caught:
        folder.check(resume=True, restart=False)
    assert caught.value.hint.endswith("remove it: then resume makes the result from the last save")
    manifest.unlink()
    assert folder.begin(IDENTITY, resume=True, restart=False) == folder.last_whole() is not None
    begun.write_text("{")
    with pytest.raises(QtoolError) as caught:
        folder.begin(IDENTITY, resume=True, restart=False)
    assert caught.value.hint.endswith("restart begins anew")
    assert folder.begin(IDENTITY, resume=False, restart=True) is None
    manifest.write_text("{")
    with pytest.raises(QtoolError) as caught:  # no save to make it from
        folder.check(resume=True, restart=False)
    assert caught.value.hint == "put a whole copy of it back, or choose another -o"


def test_a_run_that_ends_early_leaves_a_damaged_record_alone(tmp_path: Path) -> None:
    folder = finished(tmp_path / "out")
    shutil.rmtree(folder.checkpoints)
    folder.write_manifest({})
    (folder.path / "qtool_finetune.json").write_text("{")
    before = names_in(folder.path)
    folder.drop_if_not_begun(is_ours=True)
    assert names_in(folder.path) == before


def test_restart_removes_what_the_run_made_and_nothing_else(tmp_path: Path) -> None:
    folder = begun(tmp_path / "out")
    save(folder, 1)
    made = folder.checkpoints / "result"
    made.mkdir()
    (made / "adapter_config.json").write_text("{}")
    (made / "adapter_config.json").chmod(0o600)
    folder.finish(made, {"schema": 1})
    mode = (folder.path / "adapter_config.json").stat().st_mode
    assert mode == (folder.path / "qtool_finetune.json").stat().st_mode
    assert json.loads((folder.path / "qtool_finetune.json").read_text()) == {
        "schema": 1,
        "files": ["adapter_config.json"],
    }
    (folder.path / "notes.txt").write_text("mine")
    assert folder.begin(IDENTITY, resume=False, restart=True) is None
    assert sorted(path.name for path in folder.path.iterdir()) == ["checkpoints", "notes.txt"]
    assert [path.name for path in folder.checkpoints.iterdir()] == ["run.json"]


CHANGES = ((os, "unlink"), (os, "rmdir"), (os, "replace"), (os, "mkdir"), (Path, "write_bytes"))


def stopped_before(change: int, work: Callable[[], object]) -> bool:
    """Do `work`, but end it by Ctrl-C where it has changed the disk `change` times."""
    left = change

    def counted(original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        return call

    with ExitStack() as patches:
        for place, name in CHANGES:
            patches.enter_context(mock.patch.object(place, name, counted(getattr(place, name))))
        try:
            work()
        except KeyboardInterrupt:
            return True
    return False


def finished(path: Path) -> RunFolder:
    """A run with two saves and a result."""
    folder = begun(path)
    for step in (1, 2):
        save(folder, step)
    folder.finish(result_of(folder), {"schema": 1})
    return folder


def result_of(folder: RunFolder) -> Path:
    made = folder.checkpoints / "result"
    made.mkdir(exist_ok=True)
    for name in RESULT:
        (made / name).write_text("new")
    return made


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


RESULT = ("adapter_config.json", "adapter_model.safetensors", "vocab.json")


def test_a_restart_that_is_cut_short_can_be_done_again(tmp_path: Path) -> None:
    for change in count():
        folder = finished(tmp_path / f"out{change}")
        (folder.path / "notes.txt").write_text("mine")
        was_stopped = stopped_before(
            change, partial(folder.begin, IDENTITY, resume=False, restart=True)
        )
        # What is left does not pass for a finished run, and is not in the way.
        if folder.manifest is not None:
            assert all((folder.path / name).is_file() for name in RESULT)
        folder.check(resume=False, restart=True)
        assert folder.begin(IDENTITY, resume=False, restart=True) is None
        assert names_in(folder.path) == ["checkpoints", "notes.txt"]
        assert names_in(folder.checkpoints) == ["run.json"]
        if not was_stopped:
            assert change > 10
            return


def test_files_stay_known_where_a_restart_was_cut_short_and_the_saves_deleted(
    tmp_path: Path,
) -> None:
    folder = finished(tmp_path / "out")
    shutil.rmtree(folder.checkpoints)
    folder.checkpoints.mkdir()
    assert stopped_before(2, partial(folder.begin, IDENTITY, resume=False, restart=True))
    assert folder.manifest is None
    assert folder.begin(IDENTITY, resume=True, restart=False) is None
    folder.begin(IDENTITY, resume=False, restart=True)
    assert names_in(folder.path) == ["checkpoints"]


def test_a_restart_that_is_cut_short_can_go_on(tmp_path: Path) -> None:
    for change in count():
        folder = finished(tmp_path / f"out{change}")
        was_stopped = stopped_before(
            change, partial(folder.begin, IDENTITY, resume=False, restart=True)
        )
        folder.check(resume=True, restart=False)
        if folder.manifest is None:
            last = folder.begin(IDENTITY, resume=True, restart=False)
            assert last is None or is_whole(last)
        if not was_stopped:
            return


def test_a_result_that_is_cut_short_is_none(tmp_path: Path) -> None:
    for change in count():
        folder = begun(tmp_path / f"out{change}")
        save(folder, 1)
        made = result_of(folder)
        was_stopped = stopped_before(change, partial(folder.finish, made, {"schema": 1}))
        is_loadable = (folder.path / "adapter_config.json").is_file()
        if is_loadable or folder.manifest is not None:
            assert all((folder.path / name).is_file() for name in RESULT)
        again = RunFolder(tmp_path / f"again{change}")
        shutil.copytree(folder.path, again.path)
        if folder.manifest is None:
            assert folder.begin(IDENTITY, resume=True, restart=False) is not None
            folder.finish(result_of(folder), {"schema": 1})
        assert names_in(folder.path) == sorted(("checkpoints", "qtool_finetune.json", *RESULT))
        # None of its files is left to the next run.
        again.begin(IDENTITY, resume=False, restart=True)
        assert names_in(again.path) == ["checkpoints"]
        assert names_in(again.checkpoints) == ["run.json"]
        if not was_stopped:
            assert change > 5
            return


def test_a_beginning_that_is_cut_short_is_not_in_the_way(tmp_path: Path) -> None:
    for change in count():
        folder = RunFolder(tmp_path / f"out{change}")
        was_stopped = stopped_before(
            change, partial(folder.begin, IDENTITY, resume=False, restart=False)
        )
        if not was_stopped:
            return
        folder.check(resume=False, restart=folder.is_begun)
    # As a process that is killed leaves it.
    folder = RunFolder(tmp_path / "killed")
    folder.checkpoints.mkdir(parents=True)
    (folder.checkpoints / ".run.json.part").write_text("{")
    folder.check(resume=False, restart=False)


def test_what_another_process_began_meanwhile_is_kept(tmp_path: Path) -> None:
    """Between `check` and `begin` it may have come and gone."""
    for another in (begun, finished):
        folder = RunFolder(tmp_path / another.__name__)
        folder.check(resume=False, restart=False)
        another(folder.path)
        found = (folder.checkpoints / "run.json").read_bytes()
        other = identity_of({"model": "m", "lr": 0.2}, {"tokens_sha256": "a"})
        with pytest.raises(QtoolError, match="finished run"):
            folder.begin(other, resume=False, restart=False)
        assert (folder.checkpoints / "run.json").read_bytes() == found
        with pytest.raises(QtoolError, match=r"lr is 0\.1 there, 0\.2 now"):
            folder.begin(other, resume=True, restart=False)
        assert folder.begin(other, resume=False, restart=True) is None


class SafetensorError(Exception):
    """As safetensors has it: no OSError."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
)
def test_a_full_disk_is_said_in_one_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    folder = begun(tmp_path / "out")
    with pytest.raises(QtoolError, match=r"no space left .*; no save is whole") as caught:
        raise_in_words(folder, error)
    assert (caught.value.kind, caught.value.exit_code) == ("no_space", 5)
    assert caught.value.hint.endswith("resume begins again")
    save(folder, 2)
    save(folder, 4, whole=False)
    with pytest.raises(QtoolError, match="the save after step 2 is kept") as caught:
        raise_in_words(folder, error)
    assert caught.value.hint.endswith("resume goes on from there")


def test_other_failures_stay_what_they_are(tmp_path: Path) -> None:
    folder = begun(tmp_path / "out")
    errors = (
        OSError(errno.EIO, "Input/output error"),
        SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)"),
        RuntimeError("basic_ios::clear: iostream error"),  # the disk is not full
        QtoolError("x", kind="usage", hint="y"),
    )
    for error in errors:
        with pytest.raises(type(error)) as caught:
            raise_in_words(folder, error)
        assert caught.value is error


def raise_in_words(folder: RunFolder, error: Exception) -> None:
    with no_space_in_words(folder):
        raise error


def test_what_a_run_left_gives_its_space_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1000))
    folder = begun(tmp_path / "out")
    (folder.path / "mine.bin").write_bytes(bytes(5000))
    (folder.path / "adapter_model.safetensors").write_bytes(bytes(300))
    held = folder.own_bytes()
    folder.require_space(1000 + held)
    with pytest.raises(QtoolError, match="need 1,301 bytes") as caught:
        folder.require_space(1301)
    assert caught.value.kind == "no_space"
    folder.write_manifest({"files": ["adapter_model.safetensors"]})
    assert folder.own_bytes() == held + 300
    folder.require_space(1301)
