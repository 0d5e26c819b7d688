"""Is a folder whole? Every rule of the layout, the index, the config and the manifest.

    verification = verify_folder(Path("out"))
    verification.ok, verification.problems

Reads headers, statistics and, where there is a manifest, every byte for its checksum. A broken file
is a problem in the list, not an exception.
"""

from __future__ import annotations

from pathlib import Path

from qtool.events import Finished, OnEvent, Started, ignore_events
from qtool.inspection.records import Problem, Verification
from qtool.inspection.rules import RULES, rule_name
from qtool.inspection.stored_folder import read_stored_folder
from qtool.inspection.weights import TensorFiles


def verify_folder(path: Path, on_event: OnEvent = ignore_events) -> Verification:
    """Apply every rule to the folder at `path`.

    Raises:
        QtoolError: the folder cannot be listed, or changes while it is read.
    """
    with TensorFiles(path) as reader:
        folder = read_stored_folder(path, reader, on_event)
        to_hash_bytes = sum(folder.files.get(name, 0) for name in folder.manifest_files)
        if to_hash_bytes:
            on_event(Started("verify", to_hash_bytes))
        problems = tuple(
            Problem(found.file, found.tensor, rule_name(rule), found.expected, found.found)
            for rule in RULES
            for found in rule(folder)
        )
        if to_hash_bytes:
            on_event(Finished("verify"))
    return Verification(len(RULES), len(folder.quantized), problems)


__all__ = ["RULES", "verify_folder"]
