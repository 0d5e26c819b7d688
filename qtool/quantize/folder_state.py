"""What lies in OUT: its journal and manifest, read with checked types, judged and compared.

    state = read_state(Path("out"))
    state.require_same(identity)

    OUT/.qtool/journal.jsonl    of an unfinished run: its identity, then a line for each file
    OUT/qtool_manifest.json     of a finished one: source, options, and all files

Writes nothing. A record may be torn, damaged or made by hand, so nothing in it is trusted; what
cannot be read is a state like others, which a run that begins anew need not understand.
"""

from __future__ import annotations

import contextlib
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal, TypeVar

from qtool import __version__
from qtool.checkpoint.names import quoted
from qtool.checkpoint.other_files import MANIFEST
from qtool.checkpoint.output_place import WORK_FOLDER, encode_json
from qtool.checkpoint.strict_json import json_type, parse_json_object
from qtool.errors import Option, QtoolError

JOURNAL: Final = "journal.jsonl"
MANIFEST_SCHEMA: Final = 1
SAMPLES: Final = "samples"  # in `RunIdentity.source`: what tells weights of one size apart

_NAMED_DIFFERENCES: Final = 4
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_NAMED_FILES: Final = 3
_BEGIN_ANEW: Final = (Option("restart"), " begins anew; or choose another ", Option("output"))

# empty: nothing, or what a run left that had not begun. foreign: files, and no record of ours.
# unfinished: a journal. incomplete: a manifest, but a file that it lists is missing or cut.
# finished: a manifest, and all its files. unreadable: a record that this qtool cannot read.
Kind = Literal["empty", "foreign", "unfinished", "incomplete", "finished", "unreadable"]

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and SHA-256 of a finished file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What makes two runs the same command: equal identities give equal folders.

    `source` and `options` also stand in the manifest. `source_state` (sizes and times of the source
    files; empty where they are not here) only guards a resumed run against a source that changed in
    between. `digests` are the SHA-256 of those files whose content is known before the work:
    config.json, the index and small files.
    """

    source: Mapping[str, Any]
    options: Mapping[str, Any]
    source_state: Mapping[str, Any]
    file_names: tuple[str, ...]  # every file that will be written, but the manifest
    digests: Mapping[str, str] = field(default_factory=dict)

    def as_journal_head(self) -> dict[str, Any]:
        """The journal's first line."""
        return {
            "qtool_version": __version__,
            "source": self.source,
            "options": self.options,
            "source_state": self.source_state,
            "file_names": list(self.file_names),
            "digests": self.digests,
        }


@dataclass(frozen=True, slots=True)
class FolderState:
    """What lies in OUT.

    Args:
        identity: of the run that made it; None where no record tells.
        files: those of its files that are there in their size.
        own_names: all files there that runs of ours published, as far as records can be read.
        fault: why they cannot.
    """

    path: Path
    kind: Kind
    identity: RunIdentity | None
    files: Mapping[str, FileRecord]
    own_names: frozenset[str]
    fault: QtoolError | None = None

    def refuse_foreign(self) -> None:
        """Raise QtoolError(usage) where OUT holds files, and nothing says that they are ours."""
        if self.kind == "foreign":
            first = min(entry.name for entry in self.path.iterdir())
            raise QtoolError(
                f"{self.path} is not empty and was not written by qtool (found {first})",
                kind="usage",
                hint="choose another folder with -o; qtool never overwrites files it did not write",
            )

    def require_same(self, identity: RunIdentity) -> None:
        """Raise QtoolError naming in what `identity` differs from what OUT was made of."""
        if self.fault is not None:
            raise self._with_way_out(self.fault, identity)
        if self.identity is None:
            return
        differences = list(dict.fromkeys(_differences(self.identity, identity)))
        if differences:
            raise QtoolError(
                f"{self.path} was made with other settings: "
                f"{'; '.join(differences[:_NAMED_DIFFERENCES])}",
                kind="usage",
                hint=(
                    "the same options and source go on with it, ",
                    Option("restart"),
                    " begins anew; or choose another ",
                    Option("output"),
                ),
            )
        if SAMPLES in identity.source and SAMPLES not in self.identity.source:
            raise QtoolError(
                f"{self.path} was made by an earlier qtool, which did not record of which weights; "
                "whether they are those of this model cannot be told",
                kind="usage",
                hint=_BEGIN_ANEW,
            )

    def refuse_overwriting(self, names: Iterable[str]) -> None:
        """Raise QtoolError(usage) where some of `names` are files that no run of ours published."""
        paths = self._in_the_way(names)
        if not paths:
            return
        is_one = len(paths) == 1
        what = f"{paths[0]} is" if is_one else f"{self.path}: {self._named(paths)} are"
        raise QtoolError(
            f"{what} in the way of what is to be written, and neither journal nor manifest lists "
            f"{'it' if is_one else 'them'} as qtool's own",
            kind="usage",
            hint=(
                f"move {'it' if is_one else self.path} away, or choose another folder with ",
                Option("output"),
            ),
        )

    def refuse_edited(self, identity: RunIdentity) -> None:
        """Raise QtoolError(usage) where a finished folder's small file is there in another size:
        somebody has edited it, a chat template say."""
        if self.kind != "incomplete":
            return
        for name in identity.digests:
            if name in self.own_names and name not in self.files:
                raise QtoolError(
                    f"{self.path / name} was changed since it was written",
                    kind="usage",
                    hint=(
                        Option("restart"),
                        " writes all anew; or choose another ",
                        Option("output"),
                    ),
                )

    def _with_way_out(self, fault: QtoolError, identity: RunIdentity) -> QtoolError:
        """Whose the files are that a damaged record listed, nobody can tell: those stay."""
        paths = self._in_the_way((*identity.file_names, MANIFEST))
        if not paths:
            return fault
        lost = f"no record is left of {self._named(paths)}: move {self.path} away"
        return fault.with_hint((f"{lost}, or choose another folder with ", Option("output")))

    def _named(self, paths: Sequence[Path]) -> str:
        """The first names, and how many more there are."""
        names = [str(path.relative_to(self.path)) for path in paths]
        hidden = len(names) - _NAMED_FILES
        *shown, last = names if hidden <= 0 else [*names[:_NAMED_FILES], f"{hidden} more"]
        return f"{', '.join(shown)} and {last}" if shown else last

    def _in_the_way(self, names: Iterable[str]) -> list[Path]:
        """What lies where files with these names would go, and no run of ours published."""
        found = (self._at_place_of(name) for name in names if name not in self.own_names)
        return list(dict.fromkeys(path for path in found if path is not None))

    def _at_place_of(self, name: str) -> Path | None:
        target = self.path / name
        if target.is_symlink() or target.exists():
            return target
        folders = target.parents[: len(PurePosixPath(name).parts) - 1]
        return next((path for path in folders if path.exists() and not path.is_dir()), None)


def read_state(path: Path) -> FolderState:
    """What OUT holds now; of a folder that is being written only its lock's holder knows."""
    own_names = frozenset(name for name in _listed_names(path) if _is_file_below(path, name))
    journal = path / WORK_FOLDER / JOURNAL
    identity: RunIdentity | None = None
    listed: Mapping[str, FileRecord] = {}
    kind: Kind = "empty"
    try:
        if lines := _whole_lines(journal):
            kind = "unfinished"
            identity, listed = _parse_journal(journal, lines)
        elif (path / MANIFEST).is_file():
            kind = "finished"
            identity, listed = _parse_manifest(path / MANIFEST)
    except QtoolError as fault:
        return FolderState(path, "unreadable", None, {}, own_names, fault)
    files = {name: r for name, r in listed.items() if _has_size(path / name, r.num_bytes)}
    if kind == "finished" and len(files) < len(listed):
        kind = "incomplete"
    if kind == "empty" and not (path / WORK_FOLDER).is_dir() and _holds_anything(path):
        kind = "foreign"
    return FolderState(path, kind, identity, files, own_names)


def read_finished_manifest(path: Path) -> Mapping[str, Any] | None:
    """The manifest of a finished folder; None for an unfinished, foreign or missing one."""
    if not (path / MANIFEST).is_file() or (path / WORK_FOLDER / JOURNAL).exists():
        return None
    try:
        return _read_manifest(path / MANIFEST)
    except QtoolError:
        return None


def encode_manifest(identity: RunIdentity, files: Mapping[str, FileRecord]) -> bytes:
    """The manifest's bytes; nothing in them depends on machine, time or backend."""
    return encode_json(
        {
            "schema": MANIFEST_SCHEMA,
            "qtool_version": __version__,
            "source": identity.source,
            "options": identity.options,
            "files": {
                name: {"bytes": record.num_bytes, "sha256": record.sha256}
                for name, record in sorted(files.items())
            },
        }
    )


# -- the same run, or what differs -----------------------------------------------------------------


def _differences(found: RunIdentity, wanted: RunIdentity) -> list[str]:
    """What differs, in words; nothing that only follows from something named already."""
    return (
        [*_changed_options(found.options, wanted.options), *_changed_source(found, wanted)]
        or [f"{name} has changed since" for name in _changed_state(found, wanted)]
        or list(_changed_files(found, wanted))
    )


def _changed_options(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    keys = _changed(old, new)
    # Those that only quantizing has say no more than that it is done.
    keys = [key for key in keys if key == "quant" or (key in old and key in new)] or keys
    return (_in_words(key, old.get(key), new.get(key)) for key in keys)


def _changed_source(found: RunIdentity, wanted: RunIdentity) -> Iterator[str]:
    old, new = found.source, wanted.source
    keys = _changed(old, new)
    if SAMPLES not in old:  # see `FolderState.require_same`
        keys = [key for key in keys if key != SAMPLES]
    # Another model has other files: those are named only where nothing else tells it.
    for key in [key for key in keys if key not in ("files", SAMPLES)] or keys:
        before, now = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping) and _same_name(before, now):
            names = _changed(_files_of(before), _files_of(now))
            yield from (f"{name} is another one now" for name in names or [key])
        else:
            yield _in_words(key, before, now)


def _changed_state(found: RunIdentity, wanted: RunIdentity) -> list[str]:
    if not found.source_state or not wanted.source_state:
        return []
    return _changed(found.source_state, wanted.source_state)


def _changed_files(found: RunIdentity, wanted: RunIdentity) -> Iterator[str]:
    for name in sorted({*found.file_names, *wanted.file_names}):
        digests = [identity.digests.get(name) for identity in (found, wanted)]
        if name not in found.file_names:
            yield f"{name} is new"
        elif name not in wanted.file_names:
            yield f"{name} is no longer to be written"
        elif None not in digests and digests[0] != digests[1]:
            yield f"{name} is another one now"


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def _files_of(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Sizes or checksums by file; those of an adapter stand beside its name."""
    digests = entry.get("sha256")
    return digests if isinstance(digests, Mapping) else entry


def _same_name(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two adapters are called alike; lists of files have no names."""
    return bool(before.get("name") == now.get("name"))


def _in_words(key: str, before: Any, now: Any) -> str:
    return f"{key} is {_value_in_words(before)} there, {_value_in_words(now)} now"


def _value_in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("name", "another"))
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


# -- records on disk -------------------------------------------------------------------------------


def _whole_lines(journal: Path) -> list[bytes]:
    """The journal's lines, without a last one that a crash has torn."""
    try:
        data = journal.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return []
    return data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]


def _parse_journal(
    journal: Path, lines: list[bytes]
) -> tuple[RunIdentity, Mapping[str, FileRecord]]:
    where = str(journal)
    head, *entries = (
        parse_json_object(line, file=f"{where}: line {number}", hint=_BEGIN_ANEW)
        for number, line in enumerate(lines, start=1)
    )
    version = head.get("qtool_version")
    if version != __version__:  # before anything whose form may be another
        raise QtoolError(
            f"{journal.parent.parent} was begun by qtool {quoted(version)}, this is {__version__}",
            kind="usage",
            hint=_BEGIN_ANEW,
        )
    identity = RunIdentity(
        source=_take(head, "source", dict, where),
        options=_take(head, "options", dict, where),
        source_state=_take(head, "source_state", dict, where),
        file_names=_take_names(head, "file_names", where),
        digests=_take(head, "digests", dict, where),
    )
    return identity, {
        _take(entry, "file", str, where): _take_record(entry, where) for entry in entries
    }


def _read_manifest(manifest: Path) -> dict[str, Any]:
    content = parse_json_object(manifest.read_bytes(), file=str(manifest), hint=_BEGIN_ANEW)
    if content.get("schema") != MANIFEST_SCHEMA:
        found = quoted(content.get("schema"))
        raise QtoolError(
            f"{manifest}: expected schema {MANIFEST_SCHEMA}, found {found}",
            kind="bad_file",
            hint=_BEGIN_ANEW,
        )
    return content


def _parse_manifest(manifest: Path) -> tuple[RunIdentity, Mapping[str, FileRecord]]:
    content, where = _read_manifest(manifest), str(manifest)
    entries = _take(content, "files", dict, where)
    files = {
        name: _take_record(
            _take(entries, name, dict, f"{where}: files"),
            f"{where}: files: {quoted(name)}",
        )
        for name in entries
    }
    identity = RunIdentity(
        source=_take(content, "source", dict, where),
        options=_take(content, "options", dict, where),
        source_state={},
        file_names=tuple(files),
        digests={name: record.sha256 for name, record in files.items()},
    )
    return identity, files


def _take_record(entry: Mapping[str, Any], where: str) -> FileRecord:
    num_bytes = _take(entry, "bytes", int, where)
    sha256 = _take(entry, "sha256", str, where)
    if num_bytes < 0 or not _SHA256.fullmatch(sha256):
        raise QtoolError(
            f"{where}: expected a size and 64 hexadecimal digits, found {num_bytes} and "
            f"{quoted(sha256)}",
            kind="bad_file",
            hint=_BEGIN_ANEW,
        )
    return FileRecord(num_bytes, sha256)


def _take_names(entry: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    names: list[Any] = _take(entry, key, list, where)
    by_place = {str(place): name for place, name in enumerate(names)}
    return tuple(_take(by_place, place, str, f"{where}: {quoted(key)}") for place in by_place)


def _take(entry: Mapping[str, Any], key: str, kind: type[Value], where: str) -> Value:
    value = entry.get(key)
    if type(value) is not kind:  # not isinstance: true is no number
        found = json_type(value) if key in entry else "nothing"
        raise QtoolError(
            f"{where}: {quoted(key)}: expected {json_type(kind())}, found {found}",
            kind="bad_file",
            hint=_BEGIN_ANEW,
        )
    return value


def _listed_names(path: Path) -> Iterator[str]:
    """Every name in journal and manifest that can be read, whatever else is wrong with them."""
    for line in _whole_lines(path / WORK_FOLDER / JOURNAL):
        with contextlib.suppress(QtoolError):
            name = parse_json_object(line, file="", hint="").get("file")
            if isinstance(name, str):
                yield name
    if (path / MANIFEST).is_file():
        yield MANIFEST
        with contextlib.suppress(QtoolError):
            files = parse_json_object((path / MANIFEST).read_bytes(), file="", hint="").get("files")
            yield from files if isinstance(files, dict) else ()


def _is_file_below(path: Path, name: str) -> bool:
    """Whether what a record lists is a file there: one made to harm may name any place."""
    try:
        is_folder = stat.S_ISDIR((path / name).lstat().st_mode)
        is_below = (path / name).parent.resolve().is_relative_to(path.resolve())
    except (OSError, ValueError):  # not there; a name that no file can have
        return False
    return is_below and not is_folder


def _has_size(path: Path, num_bytes: int) -> bool:
    try:
        return path.is_file() and path.stat().st_size == num_bytes
    except (OSError, ValueError):
        return False


def _holds_anything(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())
