"""The process's own memory: what it claimed, not what the page cache keeps of its files."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from qtool.backends.protocol import Backend

_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """Anonymous resident memory now; where the system does not tell, the peak resident set."""
    try:
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class PeakMemory:
    """The largest of the samples taken: anonymous and page-locked memory."""

    def __init__(self, backend: Backend) -> None:
        self.peak_bytes = 0
        self._backend = backend
        self.sample()

    def sample(self) -> None:
        """Look now."""
        now_bytes = anonymous_bytes() + self._backend.page_locked_bytes
        self.peak_bytes = max(self.peak_bytes, now_bytes)
