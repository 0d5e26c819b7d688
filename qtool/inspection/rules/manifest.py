"""Rules for qtool_manifest.json, in folders that qtool wrote: every file is as it was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from qtool.checkpoint.names import quoted
from qtool.checkpoint.other_files import MANIFEST
from qtool.errors import QtoolError
from qtool.inspection.rules.rule import Finding, unreadable
from qtool.inspection.stored_folder import StoredFolder
from qtool.quantize.folder_state import MANIFEST_SCHEMA


def manifest(folder: StoredFolder) -> Iterator[Finding]:
    """The manifest, where there is one, is readable."""
    if folder.manifest is None:
        return
    if isinstance(folder.manifest, QtoolError):
        yield unreadable(MANIFEST, folder.manifest)
        return
    schema = folder.manifest.get("schema")
    if schema != MANIFEST_SCHEMA:
        yield Finding(MANIFEST, None, f"schema {MANIFEST_SCHEMA}", quoted(schema))
    for name, entry in folder.manifest_files.items():
        if not _is_entry(entry):
            yield Finding(MANIFEST, None, f"bytes and sha256 of {quoted(name)}", quoted(entry))
    if not folder.manifest_files:
        found = quoted(folder.manifest.get("files"))
        yield Finding(MANIFEST, None, "files: name -> bytes and sha256", found)


def missing_file(folder: StoredFolder) -> Iterator[Finding]:
    """Every file of the manifest is there."""
    for name in folder.manifest_files:
        if name not in folder.files:
            yield Finding(name, None, "a file that the manifest lists", "no such file")


def extra_file(folder: StoredFolder) -> Iterator[Finding]:
    """There is no file that the manifest does not list."""
    if folder.manifest_files:
        for name in folder.files:
            if name != MANIFEST and name not in folder.manifest_files:
                yield Finding(name, None, "only files that the manifest lists", "an extra file")


def file_bytes(folder: StoredFolder) -> Iterator[Finding]:
    """Every file has the size of the manifest."""
    for name, entry in _entries_of_files(folder):
        if folder.files[name] != entry["bytes"]:
            yield Finding(name, None, f"{entry['bytes']} bytes", f"{folder.files[name]} bytes")


def sha256(folder: StoredFolder) -> Iterator[Finding]:
    """Every file has the checksum of the manifest."""
    for name, entry in _entries_of_files(folder):
        if folder.files[name] != entry["bytes"]:
            continue
        try:
            found = folder.sha256_of(name)
        except QtoolError as error:
            yield unreadable(name, error)
            continue
        if found != entry["sha256"]:
            yield Finding(name, None, entry["sha256"], found)


def _entries_of_files(folder: StoredFolder) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, entry in folder.manifest_files.items():
        if name in folder.files and _is_entry(entry):
            yield name, entry


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, Mapping)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
    )


MANIFEST_RULES: Final = (
    manifest,
    missing_file,
    extra_file,
    file_bytes,
    sha256,
)
