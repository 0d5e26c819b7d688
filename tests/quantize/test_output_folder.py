"""OUT as a transaction: what is synced before what, what a kill leaves, whose files are whose."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qtool.checkpoint import output_place
from qtool.errors import QtoolError
from qtool.formats.precisions import QuantFormat
from qtool.quantize import folder_state, run
from qtool.quantize.folder_state import RunIdentity, read_state
from qtool.quantize.output_folder import (
    check_output_folder,
    hash_bytes,
    open_output_folder,
)
from tests.quantize.test_run import break_value, folder_digest, quantize
from tests.quantize.watched_backend import WatchedBackend
from tests.tiny_models import write_llama

SMALL = {"tokenizer.json": b"{}", "templates/chat.jinja": b"hello", "LICENSE": b"free"}
SHARDS = {"model-1.safetensors": b"1" * 5000, "model-2.safetensors": b"2" * 7000}
LAST = {"model.safetensors.index.json": b"{}\n", "config.json": b'{"a": 1}\n'}
ALL = {**SMALL, **SHARDS, **LAST}
SIZES = {name: len(data) for name, data in SHARDS.items()}
IDENTITY = RunIdentity(
    source={"model": "m", "revision": None, "files": SIZES, "samples": {}},
    options={"quant": "nf4"},
    source_state={},
    file_names=tuple(ALL),
    digests={name: hash_bytes(data).sha256 for name, data in {**SMALL, **LAST}.items()},
)


class Killed(BaseException):
    pass


@contextmanager
def opened(path, identity=IDENTITY, *, restart=False):
    with open_output_folder(path, identity, SIZES, restart=restart) as folder:
        yield folder


def write(path, identity=IDENTITY, *, restart=False, until=None):
    """A run as `run.write_folder` has it; with `until` it ends before that file."""
    made = []
    with opened(path, identity, restart=restart) as folder:
        if folder.is_complete:
            return made
        for name, data in {**SMALL, **SHARDS}.items():
            if name == until:
                raise Killed
            if name not in folder.finished:
                folder.write_file(name, data)
                made.append(name)
        folder.complete(LAST)
    return made


def begin(path, until="model-2.safetensors", **options):
    with pytest.raises(Killed):
        write(path, until=until, **options)


def contents(path):
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != "qtool_manifest.json"
    }


# -- order -----------------------------------------------------------------------------------------


def test_a_file_is_synced_and_journalled_before_it_gets_its_name(tmp_path, monkeypatch):
    path, events, names = tmp_path / "out", [], []
    real_sync, real_replace = os.fsync, Path.replace

    def fsync(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        real_sync(descriptor)

    def replace_(partial, target):
        journal = path / ".qtool/journal.jsonl"
        assert partial.stat().st_ino in events
        assert events[-1] == journal.stat().st_ino
        listed = json.loads(journal.read_text().splitlines()[-1])
        assert path / listed["file"] == target
        assert listed["bytes"] == partial.stat().st_size
        names.append(listed["file"])
        events.clear()
        return real_replace(partial, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace_)
    write(path)
    assert events[0] == path.stat().st_ino  # config.json's name is on the disk, too
    assert names[-3:] == ["qtool_manifest.json", *LAST]
    assert contents(path) == ALL


def test_killed_at_any_sync_it_ends_in_the_same_files_and_looks_finished_only_then(tmp_path):
    write(tmp_path / "whole")
    expected = folder_digest(tmp_path / "whole")
    num_syncs = 0
    while True:
        path, num_syncs = tmp_path / f"out{num_syncs}", num_syncs + 1
        status = run_until_sync(path, num_syncs)
        if (path / "config.json").exists():
            names = {name for name in folder_digest(path) if not name.startswith(".qtool")}
            assert names == expected.keys()
        elif path.exists():
            assert read_state(path).kind in ("empty", "unfinished")
        write(path)
        assert folder_digest(path) == expected
        if status == 0:
            break
    assert num_syncs > 2 * len(ALL)


def run_until_sync(path, number):
    pid = os.fork()
    if pid == 0:
        real, left = os.fsync, [number]

        def fsync(descriptor):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            real(descriptor)

        os.fsync = fsync
        code = 1
        try:
            write(path)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_begun_run_over_a_finished_one_never_looks_finished(tmp_path):
    write(tmp_path / "out")
    begin(tmp_path / "out", until="tokenizer.json", restart=True)
    assert contents(tmp_path / "out").keys() == {".qtool/journal.jsonl", ".qtool/lock"}
    write(tmp_path / "out")
    assert contents(tmp_path / "out") == ALL


def test_a_finished_folder_that_is_being_cleared_away_never_looks_finished(tmp_path, monkeypatch):
    for num_unlinks in range(len(ALL) + 1):
        path, left = tmp_path / f"out{num_unlinks}", [num_unlinks]
        write(path)
        real = Path.unlink

        def unlink(file, left=left, real=real, **options):
            if file.parent.name != ".qtool":
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
            real(file, **options)

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Path, "unlink", unlink)
            write(path, restart=True)
        kind = read_state(path).kind
        assert kind == ("finished" if num_unlinks == 0 else "incomplete")
        assert (path / "config.json").exists() == (num_unlinks == 0)
        write(path)
        assert contents(path) == ALL


# -- an interrupted run ----------------------------------------------------------------------------


def test_a_continued_run_makes_only_what_is_missing(tmp_path):
    begin(tmp_path / "out")
    assert write(tmp_path / "out") == ["model-2.safetensors"]
    assert write(tmp_path / "out") == []
    assert not (tmp_path / "out/.qtool").exists()


def test_a_torn_line_is_cut_off_before_the_next_one(tmp_path):
    begin(tmp_path / "out", until="model-1.safetensors")
    with (tmp_path / "out/.qtool/journal.jsonl").open("ab") as journal:
        journal.write(b'{"file": "model-1.safetens')
    begin(tmp_path / "out", until="model-2.safetensors")
    assert write(tmp_path / "out") == ["model-2.safetensors"]
    assert contents(tmp_path / "out") == ALL


def test_a_journalled_file_that_was_cut_is_made_again(tmp_path):
    begin(tmp_path / "out")
    os.truncate(tmp_path / "out/model-1.safetensors", 100)
    assert write(tmp_path / "out") == ["model-1.safetensors", "model-2.safetensors"]
    assert contents(tmp_path / "out") == ALL


def test_a_run_that_another_version_began_is_not_continued(tmp_path, monkeypatch):
    begin(tmp_path / "out")
    monkeypatch.setattr(folder_state, "__version__", "99.0")
    with pytest.raises(QtoolError, match=r"was begun by qtool '\d.*', this is 99\.0") as caught:
        write(tmp_path / "out")
    assert "restart" in caught.value.hint
    write(tmp_path / "out", restart=True)
    assert contents(tmp_path / "out") == ALL


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": {"quant": "fp4"}}, "quant is nf4 there, fp4 now"),
        ({"source": {**IDENTITY.source, "model": "n"}}, "model is m there, n now"),
        (
            {"source": {**IDENTITY.source, "samples": {"model-1.safetensors": "0"}}},
            "model-1.safetensors is another one now",
        ),
        ({"digests": {**IDENTITY.digests, "config.json": "0"}}, "config.json is another one now"),
        (
            {"digests": {**IDENTITY.digests, "tokenizer.json": "0"}},
            "tokenizer.json is another one now",
        ),
        ({"file_names": (*ALL, "README.md")}, "README.md is new"),
        ({"file_names": tuple(ALL)[1:]}, "tokenizer.json is no longer to be written"),
    ],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_another_command_is_refused_and_changes_nothing(tmp_path, change, said, is_finished):
    write(tmp_path / "out") if is_finished else begin(tmp_path / "out")
    before = folder_digest(tmp_path / "out")
    other = replace(IDENTITY, **change)
    for refuse in (write, lambda path, other: check_output_folder(path, other, SIZES, restart=0)):
        with pytest.raises(QtoolError, match=f"made with other settings: {said}$") as caught:
            refuse(tmp_path / "out", other)
        assert caught.value.kind == "usage" and "restart" in caught.value.hint
        assert folder_digest(tmp_path / "out") == before


# -- a finished folder -----------------------------------------------------------------------------


def test_a_finished_folder_with_a_file_cut_is_made_anew(tmp_path):
    write(tmp_path / "out")
    os.truncate(tmp_path / "out/model-1.safetensors", 4999)
    assert not check_output_folder(tmp_path / "out", IDENTITY, SIZES, restart=False)
    assert write(tmp_path / "out") == [*SMALL, *SHARDS]
    assert contents(tmp_path / "out") == ALL


def test_a_small_file_that_somebody_edited_is_not_overwritten(tmp_path):
    write(tmp_path / "out")
    (tmp_path / "out/tokenizer.json").write_text("edited, and longer than it was by a good deal")
    for refuse in (write, lambda path: check_output_folder(path, IDENTITY, SIZES, restart=False)):
        with pytest.raises(QtoolError, match=r"tokenizer\.json was changed since") as caught:
            refuse(tmp_path / "out")
        assert caught.value.kind == "usage"
    write(tmp_path / "out", restart=True)
    assert contents(tmp_path / "out") == ALL


def test_what_a_run_left_that_was_killed_at_its_very_end_is_tidied_up(tmp_path):
    write(tmp_path / "out")
    (tmp_path / "out/.qtool").mkdir()
    (tmp_path / "out/.qtool/lock").touch()
    assert not check_output_folder(tmp_path / "out", IDENTITY, SIZES, restart=False)
    assert write(tmp_path / "out") == [] and contents(tmp_path / "out") == ALL
    assert not (tmp_path / "out/.qtool").exists()


def test_a_finished_folder_is_complete_where_nothing_can_be_written(tmp_path, monkeypatch):
    write(tmp_path / "out")

    def refuse(path):
        raise AssertionError("tried to write")

    monkeypatch.setattr("qtool.quantize.output_folder.require_writable", refuse)
    assert check_output_folder(tmp_path / "out", IDENTITY, SIZES, restart=False)


def test_an_earlier_manifest_does_not_tell_of_which_weights_it_is(tmp_path):
    sampled = replace(IDENTITY, source={**IDENTITY.source, "samples": {"model-1.safetensors": "0"}})
    source = {key: value for key, value in IDENTITY.source.items() if key != "samples"}
    write(tmp_path / "out", replace(IDENTITY, source=source))
    before = folder_digest(tmp_path / "out")
    with pytest.raises(QtoolError, match="earlier qtool, which did not record of which weights"):
        write(tmp_path / "out", sampled)
    assert folder_digest(tmp_path / "out") == before
    write(tmp_path / "out", sampled, restart=True)
    assert write(tmp_path / "out", sampled) == []


@pytest.mark.parametrize("change", ["weights", "config", "small file"])
def test_another_model_of_the_same_name_and_shapes_is_not_complete_already(tmp_path, change):
    for number, folder in enumerate((tmp_path / "a/final", tmp_path / "b/final")):
        config = write_llama(folder, seed=number if change == "weights" else 0)
        if change == "config":
            (folder / "config.json").write_text(json.dumps({**config, "rope_theta": number + 1e4}))
        if change == "small file":
            (folder / "generation_config.json").write_text(f'{{"top_k": {number}}}\n')
    quantize(tmp_path / "a/final", tmp_path / "out")
    changed = {
        "weights": "model.safetensors",
        "config": "config.json",
        "small file": "generation_config.json",
    }[change]
    with pytest.raises(QtoolError, match=f"other settings: {changed} is another one now$"):
        quantize(tmp_path / "b/final", tmp_path / "out")
    _, result = quantize(tmp_path / "a/final", tmp_path / "out")
    assert result.read_bytes == 0


def test_weights_trained_in_place_are_not_complete_already(tmp_path):
    write_llama(tmp_path / "in", dtype="F32", hidden=256, mlp=512)
    quantize(tmp_path / "in", tmp_path / "out")
    shard = tmp_path / "in/model.safetensors"
    times = shard.stat()
    break_value(tmp_path / "in", "model.layers.1.mlp.down_proj.weight", -1, 0.5)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(QtoolError, match=r"model\.safetensors is another one now"):
        quantize(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("spelling", ["{folder}/", "{folder}/../final", ".", "../link"])
def test_the_spelling_of_the_source_changes_no_byte(tmp_path, monkeypatch, spelling):
    folder = tmp_path / "final"
    write_llama(folder)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    quantize(folder, tmp_path / "plain")
    quantize(spelling.format(folder=folder), tmp_path / "spelled")
    assert folder_digest(tmp_path / "spelled") == folder_digest(tmp_path / "plain")
    manifest = json.loads((tmp_path / "spelled/qtool_manifest.json").read_text())
    assert manifest["source"]["model"] == "final"


# -- two at once -----------------------------------------------------------------------------------


def test_what_another_process_finished_meanwhile_is_left_as_it_is(tmp_path, monkeypatch):
    write_llama(tmp_path / "in")
    real, calls, inodes = run._warm_up, [], {}

    def warm_up(*arguments):
        real(*arguments)
        calls.append(arguments)
        if len(calls) == 1:
            quantize(tmp_path / "in", tmp_path / "out")
            inodes.update({path: path.stat().st_ino for path in (tmp_path / "out").iterdir()})

    monkeypatch.setattr(run, "_warm_up", warm_up)
    _, result = quantize(tmp_path / "in", tmp_path / "out")
    assert result.resumed and result.read_bytes == 0
    assert {path: path.stat().st_ino for path in (tmp_path / "out").iterdir()} == inodes


def test_a_lock_that_was_removed_while_it_was_taken_is_taken_again(tmp_path, monkeypatch):
    path, real, calls = tmp_path / "out", fcntl.flock, []

    def flock(file, operation):
        calls.append(operation)
        if len(calls) == 1:  # the file is open: now another process removes it and begins itself
            shutil.rmtree(path / ".qtool")
            write(path)
        real(file, operation)

    monkeypatch.setattr(output_place.fcntl, "flock", flock)
    assert write(path) == []
    assert len(calls) == 3 and contents(path) == ALL


def test_a_lock_that_another_process_took_by_its_name_is_not_shared(tmp_path, monkeypatch):
    lock, real, calls = tmp_path / "out/.qtool/lock", fcntl.flock, []
    monkeypatch.setattr(output_place, "_LOCK_ATTEMPTS", 3)
    others = []

    def flock(file, operation):
        calls.append(operation)
        if len(calls) == 1:
            lock.unlink()
            others.append(lock.open("w"))
            real(others[0], fcntl.LOCK_EX)
        real(file, operation)

    monkeypatch.setattr(output_place.fcntl, "flock", flock)
    with pytest.raises(QtoolError, match="another qtool process is writing"):
        write(tmp_path / "out")
    assert len(calls) == 2 and lock.exists()
    others[0].close()


# -- whose files are whose -------------------------------------------------------------------------


def test_files_that_qtool_did_not_write_outlive_a_restart_whose_source_is_bad(tmp_path):
    write_llama(tmp_path / "good", dtype="F32")
    write_llama(tmp_path / "bad", dtype="F32")
    break_value(tmp_path / "bad", "model.norm.weight", 3, np.inf)
    quantize(tmp_path / "good", tmp_path / "out")
    (tmp_path / "out/NOTES.md").write_text("mine")
    (tmp_path / "out/tokenizer.json").write_text("mine too")
    with pytest.raises(QtoolError, match="not finite"):
        quantize(tmp_path / "bad", tmp_path / "out", restart=True)
    assert contents(tmp_path / "out") == {"NOTES.md": b"mine", "tokenizer.json": b"mine too"}


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tokenizer.json", "tokenizer.json"),
        ("config.json/a", "config.json"),
        ("templates", "templates"),
    ],
)
def test_no_file_is_overwritten_that_no_record_lists(tmp_path, restart, name, said):
    out = tmp_path / "out"
    begin(out, until="tokenizer.json")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    for refuse in (
        write,
        lambda path, restart: check_output_folder(path, IDENTITY, SIZES, restart=restart),
    ):
        with pytest.raises(QtoolError, match=f"out/{said} is in the way") as caught:
            refuse(out, restart=restart)
        assert caught.value.kind == "usage" and "move it away" in caught.value.hint
        assert (out / name).read_text() == "mine"
    assert not (out / "model-1.safetensors").exists()


def test_a_finished_folder_stays_whole_where_a_restart_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "out")
    before = folder_digest(tmp_path / "out")
    (tmp_path / "out/README.md").write_text("mine")
    more = replace(IDENTITY, file_names=(*ALL, "README.md"))
    with pytest.raises(QtoolError, match=r"README\.md is in the way"):
        write(tmp_path / "out", more, restart=True)
    huge = {**SIZES, "model-1.safetensors": 1 << 60}
    with (
        pytest.raises(QtoolError, match="the output needs") as caught,
        open_output_folder(tmp_path / "out", IDENTITY, huge, restart=True),
    ):
        pass
    assert caught.value.kind == "no_space"
    (tmp_path / "out/README.md").unlink()
    assert folder_digest(tmp_path / "out") == before


def test_what_is_discarded_is_what_the_run_published(tmp_path):
    out = tmp_path / "out"
    with opened(out) as folder:
        folder.write_file("templates/chat.jinja", b"hello")
        (out / "notes.txt").write_text("mine")
        (out / "model-1.safetensors").write_text("mine")  # which would have been written later
        folder.discard()
    assert contents(out) == {"notes.txt": b"mine", "model-1.safetensors": b"mine"}
    assert not (out / "templates").exists()


@pytest.mark.parametrize("name", ["../mine", "/{tmp}/mine", "link/mine", "folder", "\0", "x" * 300])
def test_a_manifest_that_lists_what_is_not_below_removes_nothing(tmp_path, name):
    name = name.replace("/{tmp}", str(tmp_path))
    (tmp_path / "mine").write_text("mine")
    write(tmp_path / "out")
    (tmp_path / "out/link").symlink_to(tmp_path)
    (tmp_path / "out/folder").mkdir()
    manifest = json.loads((tmp_path / "out/qtool_manifest.json").read_text())
    manifest["files"][name] = {"bytes": 4, "sha256": "0" * 64}
    (tmp_path / "out/qtool_manifest.json").write_text(json.dumps(manifest))
    write(tmp_path / "out", restart=True)
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "out/folder").is_dir()


# -- damaged records -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"\0\0\0\0\0\0", "expected JSON"),
        (b"\xff\xfe", "expected JSON in UTF-8"),
        (b"[1]", "expected a JSON object, found an array"),
        (b"", "expected JSON"),
        (b'{"file": 3}', "'file': expected a string, found a number"),
        (b'{"file": "a", "bytes": true, "sha256": "0"}', "'bytes': expected a number"),
        (b'{"file": "a", "bytes": 1, "sha256": "?"}', "expected a size and 64 hexadecimal digits"),
        (b'{"file": "a", "bytes": 1}', "'sha256': expected a string, found nothing"),
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_damaged_journal_is_said_and_cured_by_a_restart(tmp_path, line, said, is_first):
    out = tmp_path / "out"
    if is_first:
        (out / ".qtool").mkdir(parents=True)
        said = "was begun by qtool None" if line.startswith(b'{"') else said
    else:
        begin(out)
    with (out / ".qtool/journal.jsonl").open("ab") as journal:
        journal.write(line + b"\n")
    with pytest.raises(QtoolError) as caught:
        write(out)
    assert caught.value.kind in ("bad_file", "usage") and said in caught.value.message
    assert str(out) in caught.value.message and "restart" in caught.value.hint
    write(out, restart=True)
    assert contents(out) == ALL


@pytest.mark.parametrize("key", ["source", "options", "source_state", "file_names", "digests"])
def test_a_journal_s_head_needs_all_its_parts(tmp_path, key):
    begin(tmp_path / "out")
    journal = tmp_path / "out/.qtool/journal.jsonl"
    head, *entries = journal.read_text().splitlines()
    changed = {**json.loads(head), key: 3}
    journal.write_text("\n".join([json.dumps(changed), *entries, ""]))
    with pytest.raises(QtoolError, match=rf"journal\.jsonl: '{key}': expected an? (arr|obj)"):
        write(tmp_path / "out")
    changed = {**json.loads(head), "file_names": [[]]}
    journal.write_text("\n".join([json.dumps(changed), *entries, ""]))
    with pytest.raises(QtoolError, match="'file_names': '0': expected a string, found an array"):
        write(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": []}, "'files': expected an object, found an array"),
        ({"files": {"config.json": 3}}, "'config.json': expected an object, found a number"),
        ({"files": {"config.json": {"bytes": "1"}}}, "'bytes': expected a number, found a string"),
        ({"options": 3}, "'options': expected an object, found a number"),
        ({"source": None}, "'source': expected an object, found null"),
        ({"schema": 2}, "expected schema 1, found 2"),
        (b"\0\0", "expected JSON"),
        (b"[]", "expected a JSON object"),
    ],
)
def test_a_damaged_manifest_is_said(tmp_path, change, said):
    out = tmp_path / "out"
    write(out)
    manifest = json.loads((out / "qtool_manifest.json").read_text())
    damaged = change if isinstance(change, bytes) else json.dumps({**manifest, **change}).encode()
    (out / "qtool_manifest.json").write_bytes(damaged)
    with pytest.raises(QtoolError) as caught:
        write(out)
    assert caught.value.kind == "bad_file" and said in caught.value.message
    assert "qtool_manifest.json" in caught.value.message
    if "restart" not in caught.value.hint:  # nothing lists the others any more
        assert f"move {out} away" in caught.value.hint
        out.rename(tmp_path / "away")
    write(out, restart="restart" in caught.value.hint)
    assert contents(out) == ALL


def test_a_restart_over_a_damaged_manifest_takes_nothing_that_it_does_not_list(tmp_path):
    out = tmp_path / "out"
    write(out)
    (out / "qtool_manifest.json").write_text("[]")
    names = IDENTITY.file_names
    more = f"and {len(names) - 3} more"
    with pytest.raises(QtoolError) as caught:
        write(out)
    assert f"no record is left of {', '.join(names[:3])} {more}: move" in caught.value.hint
    with pytest.raises(QtoolError) as caught:
        write(out, restart=True)
    assert f"out: {', '.join(names[:3])} {more} are in the way" in caught.value.message
    assert f"move {out} away" in caught.value.hint
    for name in names[2:]:
        (out / name).unlink()
    with pytest.raises(QtoolError, match=f"out: {names[0]} and {names[1]} are in the way"):
        write(out, restart=True)
    for name in names[:2]:
        (out / name).unlink()
    write(out, restart=True)
    assert contents(out) == ALL


# -- what the system refuses -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "said", "hint"),
    [
        (errno.ENOSPC, "no space for its 7,000 bytes", "free some space"),
        (errno.EDQUOT, "no space for its 7,000 bytes", "free some space"),
        (errno.EFBIG, "expected room for a file of 7,000 bytes, found a limit", "ulimit -f"),
    ],
)
def test_a_file_that_finds_no_room_is_named(tmp_path, monkeypatch, number, said, hint):
    real = os.posix_fallocate

    def fallocate(descriptor, offset, num_bytes):
        if num_bytes == 7000:
            raise OSError(number, os.strerror(number))
        real(descriptor, offset, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(QtoolError) as caught:
        write(tmp_path / "out")
    assert caught.value.kind == "no_space"
    assert f"out/model-2.safetensors: {said}" in caught.value.message
    assert hint in caught.value.hint


def test_it_is_said_that_files_are_kept_only_where_they_are(tmp_path, monkeypatch):
    write_llama(tmp_path / "in", num_shards=2)
    real, refused = os.posix_fallocate, []

    def fallocate(descriptor, offset, num_bytes):
        if num_bytes > 100:  # a shard
            refused.append(num_bytes)
            raise OSError(errno.ENOSPC, "no space")
        real(descriptor, offset, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(QtoolError) as caught:
        quantize(tmp_path / "in", tmp_path / "out")
    assert refused and "kept" not in caught.value.hint
    assert not (tmp_path / "out").exists()

    def fallocate_one(descriptor, offset, num_bytes):
        if num_bytes == 7000:
            raise OSError(errno.ENOSPC, "no space")
        real(descriptor, offset, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", fallocate_one)
    with pytest.raises(QtoolError) as caught:
        write(tmp_path / "two")
    assert "finished files are kept" in caught.value.hint
    assert (tmp_path / "two/model-1.safetensors").exists()


@pytest.mark.parametrize("below", ["", "sub/out"])
def test_a_link_to_nothing_is_no_output(tmp_path, below):
    write_llama(tmp_path / "in")
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(QtoolError, match=r"out is a link to .*gone, which does not exist"):
        quantize(tmp_path / "in", tmp_path / "out" / below)


@pytest.mark.parametrize("change", ["gone", "other"])
def test_a_small_file_that_changes_is_noticed_before_the_work(tmp_path, monkeypatch, change):
    write_llama(tmp_path / "in")
    small = tmp_path / "in/generation_config.json"
    real = run._warm_up

    def warm_up(*arguments):
        if change == "other":  # after it was read for the first time
            small.write_text("[]\n")
        real(*arguments)

    if change == "gone":
        real_plan = run.plan_folder

        def plan_folder(*arguments):
            planned = real_plan(*arguments)
            small.unlink()
            return planned

        monkeypatch.setattr(run, "plan_folder", plan_folder)
    monkeypatch.setattr(run, "_warm_up", warm_up)
    backend = WatchedBackend()
    said = "changed while reading" if change == "other" else "expected a file to carry along"
    with pytest.raises(QtoolError, match=rf"generation_config\.json: {said}") as caught:
        quantize(tmp_path / "in", tmp_path / "out", backend=backend)
    assert caught.value.kind == ("bad_file" if change == "other" else "not_found")
    assert backend.num_kernels <= 4  # those of the warm-up
    assert not (tmp_path / "out").exists()


# -- what is said of values ------------------------------------------------------------------------


def test_of_a_copied_tensor_in_an_int8_run_only_what_is_not_finite_is_said(tmp_path):
    write_llama(tmp_path / "in", dtype="F32")
    name = "model.norm.weight"
    break_value(tmp_path / "in", name, 3, 1e5)
    quantize(tmp_path / "in", tmp_path / "out", format=QuantFormat("int8"))
    written = load_file(tmp_path / "out/model.safetensors")
    assert written[name][3] == np.float32(1e5)
    break_value(tmp_path / "in", name, 9, np.inf)
    with pytest.raises(QtoolError, match=rf"{name}: 1 value is not finite; element 9 is inf$"):
        quantize(tmp_path / "in", tmp_path / "out2", format=QuantFormat("int8"))
