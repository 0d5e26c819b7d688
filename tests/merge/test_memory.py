"""Memory while merging depends on tiles, workers and single tensors, never on the model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.merge.adapters import linear_layers, lora_tensors, write_adapter
from tests.tiny_models import write_llama

MIB = 1 << 20


def peak_of(folder, layers, *options: str) -> int:
    config = write_llama(folder / "model", hidden=1024, mlp=4096, layers=layers, num_shards=2)
    tensors = lora_tensors(linear_layers(config), rank=16)
    write_adapter(folder / "adapter", tensors, folder / "model", r=16)
    command = [sys.executable, "-m", "qtool", "merge", str(folder / "adapter"), "--json"]
    command += ["-o", str(folder / "out"), "--no-check", *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["peak_host_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--quant", "nf4-dq")], ids=["16 bit", "nf4-dq"])
def test_a_model_eight_times_as_large_takes_no_more_memory(tmp_path, options):
    small = peak_of(tmp_path / "small", 2, *options)
    large = peak_of(tmp_path / "large", 16, *options)
    assert large < 600 * MIB
    assert large - small < 48 * MIB
