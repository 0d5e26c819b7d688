"""Runs a program from start to exit and looks at its memory from outside."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SAMPLE_INTERVAL_S: Final = 0.005
PATIENCE_S: Final = 10.0  # for a program that was told to end


@dataclass(frozen=True, slots=True)
class MemoryPeaks:
    """Largest values of /proc/PID/status, bytes: each by itself, and of their sum.

    RssAnon is what the program allocated. RssShmem holds shared memory, to which page-locked memory
    of the CUDA driver belongs as far as the kernel counts it at all. The page cache is in neither.
    """

    anonymous_bytes: int = 0
    shared_bytes: int = 0
    total_bytes: int = 0

    def or_higher(self, anonymous_bytes: int, shared_bytes: int) -> MemoryPeaks:
        """These, or a later sample where that is higher."""
        return MemoryPeaks(
            max(self.anonymous_bytes, anonymous_bytes),
            max(self.shared_bytes, shared_bytes),
            max(self.total_bytes, anonymous_bytes + shared_bytes),
        )


@dataclass(frozen=True, slots=True)
class Ended:
    """A program that has ended; `seconds` from before its start until after its exit."""

    seconds: float
    exit_code: int
    stdout: str
    stderr: str
    memory: MemoryPeaks


def run_watched(command: Sequence[str]) -> Ended:
    """Run `command` to its end. Whatever interrupts this ends the program too."""
    start_s = time.perf_counter()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        with _MemoryWatch(process.pid) as watch:
            stdout, stderr = process.communicate()
            seconds = time.perf_counter() - start_s
    except BaseException:
        _end(process)
        raise
    return Ended(seconds, process.returncode, stdout, stderr, watch.peaks)


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


class _MemoryWatch:
    """Samples a process in a thread of its own."""

    def __init__(self, pid: int) -> None:
        self.peaks = MemoryPeaks()
        self._status = Path(f"/proc/{pid}/status")
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(SAMPLE_INTERVAL_S):
            try:
                text = self._status.read_text(encoding="ascii", errors="replace")
            except OSError:
                return  # it is gone
            fields = dict(line.split(":", 1) for line in text.splitlines())
            self.peaks = self.peaks.or_higher(
                _kibibytes(fields.get("RssAnon")), _kibibytes(fields.get("RssShmem"))
            )


def _kibibytes(field: str | None) -> int:
    """ " 1234 kB" in bytes; 0 for a process without memory, which has no such line."""
    return int(field.split()[0]) << 10 if field else 0
