"""`bench_finetune` on the CPU, with a model of some kilobytes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

pytest.importorskip("peft")

from qtool.bench import finetune
from qtool.bench.finetune import FinetuneBenchRequest, bench_finetune
from qtool.errors import QtoolError
from qtool.events import Note
from tests.bench.tiny_shape import write_tiny_shape
from tests.cli.running import run


@pytest.fixture
def request_(tmp_path):
    shape = str(write_tiny_shape(tmp_path))
    return FinetuneBenchRequest(shape=shape, batch=2, length=24, lora_r=4, steps=3, device="cpu")


@pytest.mark.parametrize("quant", ["nf4-dq", "int8"])
def test_both_engines_train_the_same_adapters(request_, quant):
    pytest.importorskip("bitsandbytes")
    result = bench_finetune(replace(request_, quant=quant, against="bitsandbytes"))
    own, rival = result.runs
    assert result.warnings == ()
    assert (own.engine, rival.engine) == ("qtool", "peft+bitsandbytes")
    assert own.trainable_parameters == rival.trainable_parameters > 0
    assert own.tokens_per_s == pytest.approx(48 / own.step_seconds_median)
    # After as many steps on the same tokens, from the same adapters but for dropout.
    assert own.final_loss == pytest.approx(rival.final_loss, rel=0.01)
    assert own.planned_peak_bytes > 0 and rival.planned_peak_bytes is None


def test_what_runs_is_told_before_it_begins_and_how_long_it_may_take(request_, monkeypatch):
    class Time:
        now_s = 0.0

        def perf_counter(self):
            Time.now_s += 3.0  # a step asks twice
            return Time.now_s

    monkeypatch.setattr(finetune, "time", Time())
    events = []
    bench_finetune(request_, events.append)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert notes == [
        "tiny in nf4-dq on cpu: steps of 2 x 24 tokens; 2 to warm up and 3 that count",
        "making random weights of tiny on the device",
        "qtool: the first step took 3.0 s",
        "3 steps come, about 9 s",
    ]


def test_a_rival_that_fails_is_a_warning(request_, monkeypatch):
    def fail(network):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(finetune, "share_network", fail)
    result = bench_finetune(replace(request_, against="bitsandbytes"))
    assert len(result.runs) == 1
    assert result.warnings == ("peft+bitsandbytes is not measured: no such kernel",)


def test_a_rival_that_is_not_installed_is_said_before_anything_is_measured(request_, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(finetune, "build_random_model", None)
    with pytest.raises(QtoolError, match="needs bitsandbytes, not installed here") as caught:
        bench_finetune(replace(request_, against="bitsandbytes"))
    assert caught.value.hint == "pip install bitsandbytes, or leave out against"


def test_what_cannot_be_measured(request_):
    with pytest.raises(QtoolError, match="over a packed model"):
        bench_finetune(replace(request_, quant="bf16"))
    with pytest.raises(QtoolError, match="was made for"):
        bench_finetune(replace(request_, length=1 << 30))


def test_the_command(tmp_path):
    shape = write_tiny_shape(tmp_path)
    path = tmp_path / "finetune.json"
    words = ("bench", "finetune", "--shape", shape, "--device", "cpu", "--steps", "2")
    words += ("--length", "16", "--lora-r", "2")
    ran = run(*words, "--output", path, "--json")
    assert ran.exit_code == 0 and ran.document["complete"]
    assert [row["engine"] for row in ran.document["runs"]] == ["qtool"]
    assert json.loads(path.read_text())["runs"] == ran.document["runs"]
    shown = run(*words).stdout
    assert "tokens/s" in shown and "vs qtool" not in shown
