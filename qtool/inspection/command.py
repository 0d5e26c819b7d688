"""What `qtool inspect` does: open, describe, compare, verify, as asked."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from qtool.backends import choose_backend
from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.records import Checkpoint
from qtool.errors import Option, QtoolError
from qtool.events import Note, OnEvent, ignore_events
from qtool.inspection.compare import compare_checkpoints
from qtool.inspection.records import Comparison, Inspection, Verification
from qtool.inspection.summary import inspect_checkpoint
from qtool.inspection.verify import verify_folder


@dataclass(frozen=True, slots=True)
class InspectionResult:
    """Everything that was asked for; None for the rest.

    `inspection` is None, too, for a folder too broken to be described, which only verification
    looks at.
    """

    path: str
    inspection: Inspection | None
    against: str | None
    comparison: Comparison | None
    verification: Verification | None


def inspect_path(
    path: str, *, against: str | None, verify: bool, on_event: OnEvent = ignore_events
) -> InspectionResult:
    """Inspect the folder or Hub id `path`.

    A Hub id is described by its headers alone; `against` and `verify` download its files.

    Raises:
        QtoolError: as for `open_checkpoint`; of a broken local folder only without `verify`.
    """
    start_s = time.perf_counter()
    try:
        checkpoint = open_checkpoint(
            path,
            need="files" if against is not None or verify else "headers",
            need_config=False,
            need_weights=True,
            on_event=on_event,
        )
        inspection = inspect_checkpoint(checkpoint)
        on_event(Note(f"headers: {time.perf_counter() - start_s:.2f} s", level="detail"))
    except QtoolError as error:
        if not verify or against is not None or not _is_broken_folder(path, error):
            raise
        return InspectionResult(path, None, None, None, _verify_broken(Path(path), error, on_event))
    return InspectionResult(
        path=path,
        inspection=inspection,
        against=against,
        comparison=_compare(checkpoint, against, on_event) if against is not None else None,
        verification=_verify(checkpoint, on_event) if verify else None,
    )


def _compare(checkpoint: Checkpoint, against: str, on_event: OnEvent) -> Comparison:
    original = open_checkpoint(against, need="files", need_config=False, on_event=on_event)
    return compare_checkpoints(checkpoint, original, choose_backend("cpu").backend, on_event)


def _verify(checkpoint: Checkpoint, on_event: OnEvent) -> Verification:
    if checkpoint.folder is None or Path(checkpoint.id).is_file():
        raise QtoolError(
            (f"{checkpoint.id} is a file; ", Option("verify"), " checks a folder as a whole"),
            kind="usage",
            hint=f"`qtool inspect {Path(checkpoint.id).parent} --verify`",
        )
    return verify_folder(checkpoint.folder, on_event)


def _is_broken_folder(path: str, error: QtoolError) -> bool:
    return error.kind == "bad_file" and Path(path).is_dir()


def _verify_broken(folder: Path, error: QtoolError, on_event: OnEvent) -> Verification:
    """Verification of a folder that could not be opened; it must not come out as sound."""
    verification = verify_folder(folder, on_event)
    if verification.ok:
        raise error
    return verification
