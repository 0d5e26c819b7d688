"""Programs are watched from start to exit, and do not outlive who watches them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from qtool.bench.watched_process import MemoryPeaks, run_watched


def python(script):
    return run_watched([sys.executable, "-c", script])


def test_output_exit_code_and_time():
    ended = python("import sys, time; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert (ended.stdout, ended.stderr, ended.exit_code) == ("out\n", "err\n", 3)
    assert python("import time; time.sleep(0.3)").seconds > 0.3


def test_anonymous_and_shared_memory_are_seen():
    ended = python(
        "import mmap, time\n"
        "kept = bytearray(b'x') * (48 << 20)\n"
        "shared = mmap.mmap(-1, 32 << 20)\n"  # anonymous and shared, as page-locked memory is
        "shared.write(bytes(32 << 20))\n"
        "time.sleep(0.3)\n"
    )
    assert ended.memory.anonymous_bytes >= 48 << 20
    assert ended.memory.shared_bytes >= 32 << 20
    assert ended.memory.total_bytes >= 80 << 20


def test_peaks_are_the_largest_samples():
    peaks = MemoryPeaks().or_higher(5, 1).or_higher(2, 3).or_higher(0, 0)
    assert peaks == MemoryPeaks(anonymous_bytes=5, shared_bytes=3, total_bytes=6)


def test_an_interruption_ends_the_program(tmp_path):
    pid_file = tmp_path / "pid"
    script = (
        f"import os, pathlib, time; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)"
    )

    def interrupt():
        while not (pid_file.exists() and pid_file.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        python(script)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
