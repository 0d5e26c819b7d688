"""Killed at any point and run again, `quantize` gives the folder that it gives undisturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from qtool.quantize.pipeline import PipelineSettings
from tests.quantize.test_run import folder_digest, quantize
from tests.quantize.watched_backend import WatchedBackend
from tests.tiny_models import write_llama

NUM_KILLS = 60
NUM_SHARDS = 24  # many more than are in work at once
SLOW = PipelineSettings(num_workers=2, tile_bytes=4096)  # many tiles: many points to be killed at


def run_in_child(source, output, kernel_pause_s=0.0005):
    """Start the run in a forked child, so that the kernels are loaded already."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        try:
            backend = WatchedBackend(lambda number: time.sleep(kernel_pause_s))
            quantize(source, output, settings=SLOW, backend=backend)
        finally:
            os._exit(0)
    return pid


def test_sixty_kills_at_random_points_end_in_the_same_bytes(tmp_path):
    source, rng = tmp_path / "in", random.Random(7)
    write_llama(source, num_shards=NUM_SHARDS, layers=12, hidden=32, mlp=80)
    quantize(source, tmp_path / "whole")
    expected = folder_digest(tmp_path / "whole")
    start_s = time.monotonic()
    os.waitpid(run_in_child(source, tmp_path / "timed"), 0)
    run_s = time.monotonic() - start_s
    stages, kills, round_number = set(), 0, 0
    while kills < NUM_KILLS:
        output, round_number = tmp_path / f"out{round_number}", round_number + 1
        while True:
            pid = run_in_child(source, output)
            time.sleep(rng.uniform(0, run_s))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if not os.WIFSIGNALED(status):
                break
            kills += 1
            done = len(list(output.glob("model-*"))) if output.exists() else -1
            stages.add(done)
            assert not (output / "config.json").exists() or done == NUM_SHARDS
        assert folder_digest(output) == expected
    assert len(stages) >= 8, f"the kills all fell into the same stages: {stages}"


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_their_exit_code_and_the_run_continues(tmp_path, signal_number, code):
    write_llama(tmp_path / "in", num_shards=12, hidden=512, mlp=2048, layers=4)
    command = [sys.executable, "-m", "qtool", "quantize", str(tmp_path / "in")]
    command += ["-o", str(tmp_path / "out"), "--tile-size", "4KiB", "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list((tmp_path / "out").glob("model-*")):
        time.sleep(0.002)
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out" / "config.json").exists()
    subprocess.run(command, check=True, capture_output=True)
    quantize(tmp_path / "in", tmp_path / "whole")
    assert folder_digest(tmp_path / "out") == folder_digest(tmp_path / "whole")
