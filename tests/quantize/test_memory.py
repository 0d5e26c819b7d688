"""Memory while quantizing depends on tiles and workers, never on the model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.tiny_models import write_llama

MIB = 1 << 20


def peak_of(folder, out) -> int:
    command = [sys.executable, "-m", "qtool", "quantize", str(folder), "-o", str(out), "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["peak_host_bytes"]


@pytest.mark.slow
def test_a_model_eight_times_as_large_takes_no_more_memory(tmp_path):
    write_llama(tmp_path / "small", hidden=1024, mlp=4096, layers=2, num_shards=2)
    write_llama(tmp_path / "large", hidden=1024, mlp=4096, layers=16, num_shards=4)
    small = peak_of(tmp_path / "small", tmp_path / "small-out")
    large = peak_of(tmp_path / "large", tmp_path / "large-out")
    assert large < 600 * MIB
    assert large - small < 32 * MIB
