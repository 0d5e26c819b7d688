"""Killed at any point and run again, `merge` gives the folder that it gives undisturbed."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from qtool.checkpoint.records import Checkpoint
from qtool.merge.command import MergeRequest, plan_merge, run_merge
from qtool.merge.reading import MergeReader
from tests.merge.adapters import linear_layers, lora_tensors, write_adapter
from tests.merge.test_merge import file_bytes
from tests.tiny_models import write_llama

NUM_KILLS = 12
NUM_SHARDS = 8


def run_in_child(request: MergeRequest) -> int:
    pid = os.fork()
    if pid == 0:
        os.setsid()
        try:
            run_merge(plan_merge(request))
        finally:
            os._exit(0)
    return pid


def wait_for_a_shard(output: Path, *, at_most_s: float) -> None:
    deadline_s = time.monotonic() + at_most_s
    while not any(output.glob("model-*")) and time.monotonic() < deadline_s:
        time.sleep(0.001)


def test_kills_at_random_points_end_in_the_same_bytes(tmp_path, monkeypatch):
    config = write_llama(tmp_path / "model", num_shards=NUM_SHARDS, layers=4)
    tensors = lora_tensors(linear_layers(config))
    adapter = write_adapter(tmp_path / "a", tensors, tmp_path / "model")
    run_merge(plan_merge(MergeRequest(adapter, tmp_path / "whole")))
    expected, open_tensors = file_bytes(tmp_path / "whole"), MergeReader.__call__

    def slowly(self: MergeReader, checkpoint: Checkpoint, names: set[str]):
        time.sleep(0.01)
        return open_tensors(self, checkpoint, names)

    monkeypatch.setattr(MergeReader, "__call__", slowly)
    request = MergeRequest(adapter, tmp_path / "timed", num_workers=2, tile_bytes=4096)
    start_s = time.monotonic()
    os.waitpid(run_in_child(request), 0)
    run_s = time.monotonic() - start_s
    rng, kills, number, resumed = random.Random(3), 0, 0, 0
    while kills < NUM_KILLS:
        output = tmp_path / f"out{number}"
        number += 1
        request = MergeRequest(adapter, output, num_workers=2, tile_bytes=4096)
        while True:
            resumed += bool(output.exists() and list(output.glob("model-*")))
            pid = run_in_child(request)
            if kills % 3:
                time.sleep(rng.uniform(0, run_s))
            else:  # however fast the machine is, something is there to go on with
                wait_for_a_shard(output, at_most_s=10 * run_s)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if not os.WIFSIGNALED(status):
                break
            kills += 1
            assert not (output / "config.json").exists() or file_bytes(output) == expected
        assert file_bytes(output) == expected
        assert not (output / ".qtool").exists()  # where an unfinished run keeps its own
    assert resumed, "no run had anything to go on with"
