"""`bench_optimizers` on the CPU, with parameters of some kilobytes."""

from __future__ import annotations

import json

import pytest
import torch

from qtool.bench import optimizers
from qtool.bench.optimizers import Case, OptimizerRequest, bench_optimizers, make_case
from qtool.bench.records import time_ratio
from qtool.errors import QtoolError
from tests.bench.tiny_shape import shrink_sizes
from tests.cli.running import run

SHAPES = ((64, 80), (96, 64))
NUM_PARAMETERS = 64 * 80 + 96 * 64


@pytest.fixture
def small_case(monkeypatch):
    shrink_sizes(monkeypatch)
    monkeypatch.setattr(
        optimizers, "make_case", lambda name: Case(name, "2 tensors", SHAPES, torch.float32)
    )


def test_engines_take_turns_at_the_same_parameters(small_case):
    pytest.importorskip("bitsandbytes")
    result = bench_optimizers(OptimizerRequest(device="cpu"))
    assert [(row.op, row.engine) for row in result.rows] == [
        ("AdamW", "qtool"),
        ("AdamW", "torch"),
        ("AdamW", "bitsandbytes"),
        ("Lion", "qtool"),
        ("Lion", "bitsandbytes"),
        ("SGD", "qtool"),
        ("SGD", "bitsandbytes"),
    ]
    assert all(row.n == 20 and row.seconds_median > 0 for row in result.rows)
    assert time_ratio(result.rows[2], result.rows) > 0
    # Parameters and gradients are 12 bytes a parameter, two float32 states 16 to read and write.
    assert result.rows[1].bytes == NUM_PARAMETERS * 28
    own = {size["op"]: size for size in result.details["state_sizes"] if size["engine"] == "qtool"}
    assert own["AdamW"]["state_bytes_per_parameter"] == pytest.approx(2 * (1 + 4 / 256), rel=0.01)


def test_the_steps_are_real(small_case, monkeypatch):
    """A step that is timed changes the parameters, from gradients that differ between steps."""
    seen = []
    step = optimizers._Step.__call__

    def watch(self, i):
        gradient = self._parameters[0].grad.clone()
        before = self._parameters[0].detach().clone()
        step(self, i)
        seen.append((gradient, not torch.equal(before, self._parameters[0])))

    monkeypatch.setattr(optimizers._Step, "__call__", watch)
    bench_optimizers(OptimizerRequest(device="cpu", with_rivals=False))
    assert len(seen) > 3 * 20 and all(changed for _, changed in seen)
    assert not torch.equal(seen[-1][0], seen[0][0]) or not torch.equal(seen[-2][0], seen[0][0])


def test_lora_has_the_tensors_of_the_eight_billion_shape():
    case = make_case("lora")
    assert len(case.shapes) == 448
    assert case.num_parameters == 41_943_040


def test_what_cannot_be_measured():
    with pytest.raises(QtoolError, match="no such case"):
        bench_optimizers(OptimizerRequest(cases=("half",), device="cpu"))
    with pytest.raises(QtoolError, match="fewer than 20"):
        bench_optimizers(OptimizerRequest(repeats=19, device="cpu"))


def test_the_command(small_case, tmp_path):
    path = tmp_path / "optimizers.json"
    ran = run("bench", "optimizers", "--no-rival", "--device", "cpu", "--output", path, "--json")
    assert ran.exit_code == 0
    assert ran.document["command"] == "bench optimizers" and ran.document["complete"]
    assert {row["op"] for row in ran.document["rows"]} == {"AdamW", "Lion", "SGD"}
    assert json.loads(path.read_text())["rows"] == ran.document["rows"]
    shown = run("bench", "optimizers", "--no-rival", "--device", "cpu")
    assert "bytes of states per parameter" in shown.stdout and "vs qtool" not in shown.stdout
    assert "2 tensors on cpu: 2 rounds to warm up and 20 that count" in shown.stderr
