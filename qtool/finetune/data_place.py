"""Where DATA is: a file that is there, or a dataset on the Hub, which is asked for nothing else.

path = find_file("chats.jsonl")     # None for a dataset
with asked_once("org/rows"): ...
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from qtool.checkpoint.config_json import CONFIG_NAME
from qtool.checkpoint.hub_errors import ONLINE_HINT
from qtool.checkpoint.hub_reach import hub_left_alone, why_unreachable
from qtool.checkpoint.open import HUB_ID, hint_for_missing
from qtool.errors import QtoolError

JSON_SUFFIXES: Final = (".jsonl", ".ndjson", ".json")
SUFFIXES: Final = (*JSON_SUFFIXES, ".parquet", ".txt")
EXPECTED: Final = "a .jsonl, .parquet or .txt file"
NUM_NEAREST: Final = 3
ALIKE: Final = 0.8  # of names that are one name mistyped, as difflib counts


def find_file(source: str) -> Path | None:
    """The file that `source` names; None if only a dataset on the Hub can be meant.

    Raises:
        QtoolError: not_found for the name of a file that is not there; unsupported for a folder,
            and for a file of another kind.
    """
    path = Path(source).expanduser() if source.startswith("~") else Path(source)
    if source and _exists(path):
        return _readable(path, source)
    near = _near_files(path)
    if near or _is_path(source):
        raise QtoolError(
            f"{source or 'the empty name'}: no such file, expected {EXPECTED}, or a dataset on the "
            "Hub as ORG/NAME",
            kind="not_found",
            hint=_where_else(source, near),
        )
    return None


@contextmanager
def asked_once(name: str) -> Iterator[None]:
    """Ask the Hub for the dataset before `datasets` does, which tries for half a minute.

    Where nothing answers, what is done meanwhile finds what the cache holds, or else ends as a
    QtoolError: network.
    """
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    reason = "it is told to stay offline" if before else why_unreachable(f"datasets/{name}")
    if reason is None:
        yield
        return
    datasets.config.HF_HUB_OFFLINE = True
    try:
        with hub_left_alone():
            yield
    except (ConnectionError, OSError) as error:
        raise QtoolError(
            f"{name}: no such file, not in the cache, and the Hub cannot be reached: {reason}",
            kind="network",
            hint=f"check the path, HF_HUB_OFFLINE and HF_DATASETS_OFFLINE; {ONLINE_HINT}",
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _readable(path: Path, source: str) -> Path:
    if path.is_dir():
        is_model = (path / CONFIG_NAME).is_file()
        files = [] if is_model else _files_in(path)[:1]
        raise QtoolError(
            f"{source} is a {'model' if is_model else 'folder'}, expected {EXPECTED} or a dataset "
            "on the Hub",
            kind="unsupported",
            hint=", ".join(["name the file", *(f"such as {file}" for file in files)]),
        )
    if path.suffix.lower() not in SUFFIXES:
        raise QtoolError(
            f"{source}: expected {EXPECTED}, found {path.suffix or 'a name without an ending'}",
            kind="unsupported",
            hint="rename the file if it is one of these",
        )
    return path


def _is_path(source: str) -> bool:
    """Whether nothing on the Hub can have this name."""
    name, at, revision = source.partition("@")
    return (
        source.startswith((".", "/", "~"))
        or Path(name).suffix.lower() in SUFFIXES
        or HUB_ID.fullmatch(name) is None
        or bool(at and not revision)
    )


def _near_files(path: Path) -> list[Path]:
    """Files beside it that may be meant: of the same name with an ending, or mistyped ones."""

    def likeness(file: Path) -> float:
        return max(
            difflib.SequenceMatcher(None, path.name, name).ratio()
            for name in (file.stem, file.name)
        )

    alike = {file: likeness(file) for file in _files_in(path.parent)}
    nearest = sorted(alike, key=lambda file: -alike[file])[:NUM_NEAREST]
    return [file for file in nearest if alike[file] >= ALIKE]


def _files_in(folder: Path) -> list[Path]:
    try:
        return sorted(
            file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()
        )
    except (OSError, ValueError):
        return []


def _where_else(source: str, files: list[Path]) -> str:
    if files:
        more = " or ".join(map(str, files[:NUM_NEAREST]))
        is_id = HUB_ID.fullmatch(source) is not None and not _is_path(source)
        on_hub = f" {source}@main is a dataset on the Hub" if is_id else ""
        return f"did you mean {more}?{on_hub}"
    nearest = hint_for_missing(source)  # a folder of the path may be mistyped
    return nearest if nearest.startswith("did you mean") else "check the path"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for a path
        return False
