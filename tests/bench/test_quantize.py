"""`bench_quantize` on the CPU, with models of a few hundred kilobytes."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qtool.bench import quantize
from qtool.bench.quantize import (
    QtoolRun,
    QuantizeBenchRequest,
    RivalRun,
    Samples,
    bench_quantize,
    quantize_rows,
)
from qtool.bench.records import Moved
from qtool.bench.transformers_process import quantization_options
from qtool.bench.watched_process import Ended, MemoryPeaks
from qtool.errors import QtoolError
from tests.tiny_models import llama_config, write_llama

NO_MEMORY = MemoryPeaks()


@pytest.fixture
def shape(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(llama_config()))
    return str(path)


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def request(shape, work, **options):
    defaults = {"backend": "cpu", "repeats": 2, "rival_repeats": 0, "num_threads": 2}
    return QuantizeBenchRequest(shape=shape, work_dir=work, **(defaults | options))


def test_the_whole_command_is_measured_and_nothing_stays(shape, work):
    result = bench_quantize(request(shape, work))
    read, write, command = result.rows
    assert (read.op, write.op, command.op) == ("raw read", "raw write", "quantize nf4-dq")
    assert [row.engine for row in result.rows] == ["limit", "limit", "qtool"]
    assert read.n == write.n == command.n == 2
    assert (read.bytes, write.bytes) == (
        result.details["input_bytes"],
        result.details["output_bytes"],
    )
    assert command.bytes == read.bytes + write.bytes
    assert result.limits.keys() == {"raw_read", "raw_write"}
    for run in result.details["runs"]:
        assert run["wall_seconds"] > run["seconds"] > 0
        assert run["peak_host_bytes"] > 0 and run["memory"]["anonymous_bytes"] > 1 << 20
    assert list(work.iterdir()) == []


def test_a_model_of_one_s_own_is_left_alone(work, tmp_path):
    write_llama(tmp_path / "model", num_shards=2)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "model").iterdir()}
    result = bench_quantize(
        request("", work, model=str(tmp_path / "model"), precision="int8", repeats=1)
    )
    assert result.rows[2].op == "quantize int8" and result.rows[2].shape == "model"
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "model").iterdir()}
    assert before == after and list(work.iterdir()) == []


def test_more_turns_of_the_rival_than_rounds_are_refused(shape, work):
    with pytest.raises(QtoolError, match="rival_repeat=3") as caught:
        bench_quantize(request(shape, work, repeats=2, rival_repeats=3))
    assert caught.value.kind == "usage"


def samples(rival_runs=()):
    run = QtoolRun(5.0, 4.0, 1, 0, NO_MEMORY)
    return Samples([1.0, 2.0, 3.0], [4.0, 3.0, 5.0], [run], list(rival_runs))


def test_the_limit_is_the_slower_one_of_read_and_write():
    read, write, command = quantize_rows(samples(), "nf4", "m", "bf16", Moved(60, 20))
    assert (read.share_of_limit, write.share_of_limit) == (1, 1)
    assert (read.seconds_median, write.seconds_median) == (2.0, 4.0)
    assert command.share_of_limit == 4.0 / 5.0
    assert command.bytes_per_s == 80 / 5.0


def test_the_rival_is_compared_by_load_and_save():
    rival = RivalRun(30.0, 10.0, 5.0, 0, NO_MEMORY)
    rows = quantize_rows(samples([rival]), "nf4", "m", "bf16", Moved(60, 20))
    took = {row.op: row.seconds_median for row in rows if row.engine.startswith("transformers")}
    assert took == {
        "quantize nf4": 15.0,
        "quantize nf4: load": 10.0,
        "quantize nf4: save": 5.0,
        "quantize nf4: start to exit": 30.0,
    }


def test_the_rival_makes_the_same_format():
    assert quantization_options("int8") == {"load_in_8bit": True}
    options = quantization_options("fp4-dq")
    assert options["bnb_4bit_quant_type"] == "fp4" and options["bnb_4bit_use_double_quant"] is True


def test_a_rival_that_fails_is_a_warning(shape, work, monkeypatch):
    run_watched = quantize.run_watched

    def without_rival(command):
        if "qtool.bench.transformers_process" in command:
            error = "Traceback ...\nModuleNotFoundError: No module named 'transformers'\n"
            return Ended(0.1, 1, "", error, NO_MEMORY)
        return run_watched(command)

    monkeypatch.setattr(quantize, "run_watched", without_rival)
    result = bench_quantize(request(shape, work, repeats=2, rival_repeats=2))
    (warning,) = result.warnings
    assert "No module named 'transformers'" in warning
    assert {row.engine for row in result.rows} == {"limit", "qtool"}


@pytest.mark.slow
def test_transformers_and_bitsandbytes_take_part(shape, work):
    pytest.importorskip("bitsandbytes")
    result = bench_quantize(request(shape, work, repeats=1, rival_repeats=1))
    assert result.warnings == ()
    (run,) = result.details["rival_runs"]
    assert run["wall_seconds"] > run["load_seconds"] + run["save_seconds"]
    assert {"torch", "transformers", "bitsandbytes"} <= result.versions.keys()
    assert list(work.iterdir()) == []


def test_a_command_that_fails_ends_the_measurement_in_its_own_words(shape, work, monkeypatch):
    said = {"error": {"kind": "no_space", "message": "disk full", "hint": "free some"}}
    failed = Ended(0.1, 5, "", f"noise\n{json.dumps(said)}\n", NO_MEMORY)
    monkeypatch.setattr(quantize, "run_watched", lambda command: failed)
    with pytest.raises(QtoolError, match="qtool quantize failed: disk full") as caught:
        bench_quantize(request(shape, work))
    assert (caught.value.kind, caught.value.hint) == ("no_space", "free some")
    assert list(work.iterdir()) == []
    killed = Ended(0.1, -9, "", "", NO_MEMORY)
    monkeypatch.setattr(quantize, "run_watched", lambda command: killed)
    with pytest.raises(QtoolError, match="exit code -9"):
        bench_quantize(request(shape, work))


def test_runs_that_write_different_bytes_are_no_figures(shape, work, monkeypatch):
    run_watched, runs = quantize.run_watched, []

    def forgetful(command):
        ended = run_watched(command)
        runs.append(ended)
        manifest = work.glob("*/output/qtool_manifest.json").__next__()
        text = json.loads(manifest.read_text())
        text["files"]["model.safetensors"]["sha256"] = str(len(runs))
        manifest.write_text(json.dumps(text))
        return ended

    monkeypatch.setattr(quantize, "run_watched", forgetful)
    with pytest.raises(QtoolError, match="different bytes"):
        bench_quantize(request(shape, work))
    assert len(runs) == 2 and list(work.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "exit_code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
def test_a_signal_leaves_neither_files_nor_processes(shape, work, number, exit_code):
    words = ["bench", "quantize", "--model-shape", shape, "--work-dir", str(work), "--json"]
    words += ["--backend", "cpu", "--no-rival", "--repeat", "1000"]
    command = [sys.executable, "-m", "qtool", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while not list(work.glob("*/output/.qtool")):  # the command is at work
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == exit_code
    assert json.loads(errors.splitlines()[-1])["error"]["kind"] == "interrupted"
    assert list(work.iterdir()) == []
    assert not any(str(work) in command for command in commands_running())


def commands_running():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_text()
