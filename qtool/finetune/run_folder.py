"""OUT while it is made: what run it holds, which saves are whole, and how it becomes finished.

    OUT/checkpoints/run.json                what the run depends on, written first
    OUT/checkpoints/checkpoint-N/           the Trainer's save after step N
    OUT/checkpoints/checkpoint-N/whole.json every file of it with its size, synced, written last
    OUT/checkpoints/files.json              which files of OUT are the run's, without a manifest
    OUT/adapter_model.safetensors, ...      the result
    OUT/qtool_finetune.json                 the manifest, the last file to appear

A save that was cut short has no `whole.json`, or other sizes than it says, and is never resumed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qtool import __version__
from qtool.checkpoint.output_place import encode_json, refuse_file, require_writable, sync
from qtool.checkpoint.strict_json import json_type
from qtool.errors import Option, QtoolError
from qtool.finetune.records import place_of

CHECKPOINTS: Final = "checkpoints"
LOCK: Final = ".lock"
RUN: Final = "run.json"
WHOLE: Final = "whole.json"
FILES: Final = "files.json"
MANIFEST: Final = "qtool_finetune.json"
MANIFEST_SCHEMA: Final = 1
PLACES: Final = frozenset({"model", "source", "eval_split"})  # of the settings
CONFIGS: Final = ("adapter_config.json", "config.json")  # without which nobody loads the folder
NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)
WRITER_WORDS: Final = ("PytorchStreamWriter", "unexpected pos", "iostream error")
NEARLY_FULL_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class RunFolder:
    """OUT."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where the Trainer saves."""
        return self.path / CHECKPOINTS

    @property
    def manifest(self) -> dict[str, Any] | None:
        """Of a finished run; QtoolError (bad_file) if it is damaged."""
        return self._read_record(self.path / MANIFEST)

    @property
    def is_begun(self) -> bool:
        """Whether it holds a run of ours, finished or not."""
        signs = (self.path / MANIFEST, self.checkpoints / RUN, self.checkpoints / FILES)
        return any(sign.is_file() for sign in signs)

    def check(self, *, resume: bool, restart: bool) -> None:
        """Object to what OUT holds, before any work.

        Raises:
            QtoolError: foreign files; a run that neither option says what to do with; a damaged
                record of one.
        """
        refuse_file(self.path)
        self._require_asked(resume=resume, restart=restart)
        require_writable(self.path)

    def _require_asked(self, *, resume: bool, restart: bool) -> None:
        if not self.is_begun:
            first = self._first_foreign()
            if first is not None:
                raise QtoolError(
                    f"{self.path} is not empty and holds no run of qtool finetune (found {first})",
                    kind="usage",
                    hint="choose another folder with -o; files of others are never overwritten",
                )
            return
        is_finished = self.manifest is not None
        if not (resume or restart):
            raise QtoolError(
                f"{self.path} holds {'a finished' if is_finished else 'an unfinished'} run",
                kind="usage",
                hint=(
                    *(() if is_finished else (Option("resume"), " continues it, ")),
                    Option("restart"),
                    " begins anew, or choose another -o",
                ),
            )

    def check_run(self, identity: Mapping[str, Any], *, resume: bool, restart: bool) -> None:
        """Object to the run that is there, and change nothing.

        The caller holds the lock. Since `check` another process may have come and gone.

        Raises:
            QtoolError: as `check` does; the run that is there depends on something else.
        """
        self._require_asked(resume=resume, restart=restart)
        found = self._read_record(self.checkpoints / RUN) if resume else None
        if found is not None:
            self.require_same(found, identity)

    def begin(self, identity: Mapping[str, Any], *, resume: bool, restart: bool) -> Path | None:
        """Start a run, or find the save to go on from; None begins at step 0.

        Raises:
            QtoolError: as `check_run` does.
        """
        self.check_run(identity, resume=resume, restart=restart)
        if restart:
            self._discard()
        if resume and (self.checkpoints / RUN).is_file():
            self._drop_torn()
            return self.last_whole()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        _write_synced(self.checkpoints / RUN, encode_json(identity))
        if restart:  # none of them is left
            (self.checkpoints / FILES).unlink(missing_ok=True)
        return None

    def _discard(self) -> None:
        """Remove a run of ours: its saves, and the files that it lists.

        It can be cut short at any moment and done again: what says that there is a run stays, and
        from the first moment on not as a finished one.
        """
        files = _configs_last(self._own_files())[::-1]
        if self.manifest is not None:
            self.checkpoints.mkdir(exist_ok=True)
            (self.path / MANIFEST).replace(self.checkpoints / FILES)
        for path in (*files, self.path / MANIFEST, self.path / _unfinished(MANIFEST)):
            path.unlink(missing_ok=True)
        for path in self.checkpoints.glob("*"):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (LOCK, RUN, FILES):  # this process holds the lock
                path.unlink()

    def own_bytes(self) -> int:
        """What a run of ours holds here: its saves, and the files that it lists."""
        paths = (*self._own_files(), *self.checkpoints.rglob("*"))
        return sum(path.stat().st_size for path in paths if path.is_file())

    def require_space(self, num_bytes: int) -> None:
        """Raise QtoolError(no_space) unless `num_bytes` fit, in place of what a run left here."""
        free_bytes = shutil.disk_usage(self.path).free + self.own_bytes()
        if free_bytes < num_bytes:
            raise QtoolError(
                f"{self.path}: the result and the saves need {num_bytes:,} bytes, "
                f"{free_bytes:,} are free",
                kind="no_space",
                hint="free some space, or write elsewhere with -o",
            )

    def last_whole(self) -> Path | None:
        """The latest save that is whole."""
        return next((path for path in reversed(self._saves()) if is_whole(path)), None)

    def finish(self, made: Path, manifest: Mapping[str, Any]) -> None:
        """Move the files of `made` into OUT, then write the manifest that lists them."""
        files = _configs_last(made.iterdir())
        listed = {"files": sorted(file.name for file in files)}
        _write_synced(self.checkpoints / FILES, encode_json(listed))
        for file in files:
            sync(file)
            _open_to_umask(file)
            file.replace(self.path / file.name)
        made.rmdir()
        sync(self.path)
        self.write_manifest({**manifest, **listed})
        (self.checkpoints / FILES).unlink()

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Whole or not at all."""
        _write_synced(self.path / MANIFEST, encode_json(manifest))

    def drop_if_not_begun(self, *, is_ours: bool) -> None:
        """Leave no empty folders behind where a run ended before it began.

        Args:
            is_ours: OUT itself was not there before.
        """
        if not self.is_begun:
            for name in (_unfinished(RUN), LOCK):
                (self.checkpoints / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # there is something else in it
                self.checkpoints.rmdir()
                if is_ours:
                    self.path.rmdir()

    def _first_foreign(self) -> str | None:
        """A file that no run of ours made: one that ended before it began left only its lock."""
        paths = sorted(self.path.rglob("*")) if self.path.is_dir() else []
        own = [self.checkpoints, *(self.checkpoints / name for name in (LOCK, _unfinished(RUN)))]
        return next((str(p.relative_to(self.path)) for p in paths if p not in own), None)

    def _own_files(self) -> list[Path]:
        """Those of the result, finished or not."""
        lists = (self.manifest, self._read_record(self.checkpoints / FILES))
        names = {name for listed in lists if listed for name in listed.get("files", [])}
        return [self.path / name for name in sorted(names) if Path(name).name == name]

    def _saves(self) -> list[Path]:
        """In the order of their steps."""
        found = {}
        for path in self.checkpoints.glob("checkpoint-*"):
            match = re.fullmatch(r"checkpoint-(\d+)", path.name)
            if match and path.is_dir():
                found[int(match[1])] = path
        return [found[step] for step in sorted(found)]

    def _drop_torn(self) -> None:
        """Remove saves that were cut short, lest the Trainer count them among those it keeps."""
        for path in self._saves():
            if not is_whole(path):
                shutil.rmtree(path)

    def require_same(self, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        """QtoolError (usage) that names what differs, of what a run depends on."""
        differences = _differences(found, identity)
        if differences:
            named = "; ".join(
                f"{part} is {json.dumps(old)} there, {json.dumps(new)} now"
                for part, old, new in differences[:4]
            )
            gone = next((old for _, old, _ in differences if _is_gone(old)), None)
            way = f"move {gone} back" if gone else "give the same"
            raise QtoolError(
                f"{self.path} was begun with other settings: {named}",
                kind="usage",
                hint=(f"{way} to continue it, or ", Option("restart"), " to begin anew"),
            )

    def _read_record(self, path: Path) -> dict[str, Any] | None:
        """One that appears whole or not at all; None where there is none.

        Raises:
            QtoolError: bad_file, if it is damaged.
        """
        if not path.is_file():
            return None
        try:
            value = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise self.damaged(path, f"expected JSON, found an error: {error}") from error
        if not isinstance(value, dict):
            raise self.damaged(path, f"expected a JSON object, found {json_type(value)}")
        names = value.get("files", [] if path.name == RUN else None)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self.damaged(path, 'expected names of files as "files"')
        return value

    def damaged(self, path: Path, what: str) -> QtoolError:
        """The error for a record of ours that cannot be read, and what is left to do: without it
        nobody knows which files of OUT are the run's."""
        hint: tuple[str | Option, ...] = ("put a whole copy of it back, or choose another -o",)
        if path.name == RUN:
            hint = (*hint, ", or ", Option("restart"), " begins anew")
        elif path.name == MANIFEST and self.last_whole() is not None:
            hint = (
                *hint,
                ", or remove it: then ",
                Option("resume"),
                " makes the result from the last save",
            )
        return QtoolError(f"{path}: {what}", kind="bad_file", hint=hint)


@contextlib.contextmanager
def no_space_in_words(folder: RunFolder) -> Iterator[None]:
    """Raise QtoolError(no_space) for a full disk, of which each library has words of its own."""
    try:
        yield
    except Exception as error:
        if not _is_no_space(error, folder.path):
            raise
        save = folder.last_whole()
        kept = f"the save after step {step_of(save):,} is kept" if save else "no save is whole"
        goes_on = "goes on from there" if save else "begins again"
        raise QtoolError(
            f"{getattr(error, 'filename', None) or folder.path}: no space left on the device; "
            f"{kept}",
            kind="no_space",
            hint=("free some space; the same command with ", Option("resume"), f" {goes_on}"),
        ) from error


def _is_no_space(error: Exception, place: Path) -> bool:
    if isinstance(error, OSError):
        return error.errno in NO_SPACE
    text = str(error)
    if any(f"(os error {number})" in text for number in NO_SPACE):  # safetensors
        return True
    # PyTorch's writer says only that it could not write. What it wrote is still there.
    is_writer = isinstance(error, RuntimeError) and any(words in text for words in WRITER_WORDS)
    return is_writer and shutil.disk_usage(place).free < NEARLY_FULL_BYTES


def step_of(save: Path) -> int:
    """The step that a save was made after."""
    return int(save.name.rpartition("-")[2])


def mark_whole(save: Path) -> None:
    """Say that a save is complete: sync its files and list them with their sizes."""
    paths = sorted(path for path in save.rglob("*") if path.is_file() and path.name != WHOLE)
    for path in paths:
        _open_to_umask(path)
        sync(path)
    sizes = {str(path.relative_to(save)): path.stat().st_size for path in paths}
    _write_synced(save / WHOLE, encode_json({"files": sizes}))


def is_whole(save: Path) -> bool:
    """Whether every file that `whole.json` lists is there with its size."""
    listed = (_read_json(save / WHOLE) or {}).get("files")
    if not isinstance(listed, dict) or not listed:
        return False
    try:
        return all((save / name).stat().st_size == size for name, size in listed.items())
    except OSError:
        return False


def identity_of(settings: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two runs the same."""
    return {"qtool_version": __version__, **settings, **data}


def _differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> list[tuple[str, object, object]]:
    wanted = json.loads(json.dumps(wanted))
    names = [*wanted, *(name for name in found if name not in wanted)]
    return [
        (name, found.get(name), wanted.get(name))
        for name in names
        if not _is_same(name, found.get(name), wanted.get(name))
    ]


def _is_same(name: str, old: object, new: object) -> bool:
    """Whether a setting is. Of what names a place: the place, or the same name where the old place
    is gone, as after the folder around all of it has moved. Data has its checksum besides."""
    if old == new or name not in PLACES or not isinstance(old, str) or not isinstance(new, str):
        return old == new
    if place_of(old) == new:
        return True
    is_moved = not Path(old).exists() and Path(old).name == Path(new).name
    return is_moved and Path(new).is_absolute()


def _is_gone(value: object) -> bool:
    """Whether it is the whole path of what is there no more."""
    return isinstance(value, str) and Path(value).is_absolute() and not Path(value).exists()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _write_synced(path: Path, data: bytes) -> None:
    unfinished = path.with_name(_unfinished(path.name))
    unfinished.write_bytes(data)
    sync(unfinished)
    unfinished.replace(path)
    sync(path.parent)


def _unfinished(name: str) -> str:
    """Where a file is written, one process at a time: what a kill leaves is written over."""
    return f".{name}.part"


def _configs_last(files: Iterable[Path]) -> list[Path]:
    """In the order in which they may appear, so that what can be loaded is whole."""
    return sorted(files, key=lambda file: (file.name in CONFIGS, file.name))


def _open_to_umask(path: Path) -> None:
    """Give the file the mode that others get: safetensors writes for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
