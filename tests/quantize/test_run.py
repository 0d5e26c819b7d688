"""The whole of `quantize`, from folder to folder, with the reference formats as the oracle."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from qtool.backends import choose_backend
from qtool.checkpoint import open_checkpoint
from qtool.errors import QtoolError
from qtool.events import Advanced, Started
from qtool.formats import double_quant, floats, four_bit, int8
from qtool.formats.bitsandbytes import parse_quant_state
from qtool.formats.precisions import QUANTIZED_PRECISIONS, QuantFormat
from qtool.quantize import run
from qtool.quantize import workers as workers_module
from qtool.quantize.pipeline import PipelineSettings
from qtool.quantize.plan import Recipe, build_plan
from qtool.quantize.run import output_file_bytes, quantize_checkpoint
from tests.quantize.watched_backend import WatchedBackend
from tests.tiny_models import save_tensors, write_llama

SETTINGS = PipelineSettings(num_workers=2, tile_bytes=4096)


def quantize(
    source: Path,
    output: Path,
    *,
    settings=SETTINGS,
    backend=None,
    restart=False,
    on_event=None,
    **recipe,
):
    checkpoint = open_checkpoint(str(source), need="files")
    plan = build_plan(checkpoint, Recipe(**recipe))
    result = quantize_checkpoint(
        checkpoint,
        plan,
        output,
        backend or choose_backend("cpu").backend,
        settings,
        restart=restart,
        on_event=on_event or (lambda event: None),
    )
    return plan, result


def folder_digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def raw_tensors(folder: Path) -> dict[str, bytes]:
    """Every tensor's bytes, read with the safetensors library."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            data = file.read()
        with safe_open(path, "np") as checked:  # the library accepts the file
            assert set(checked.keys()) == header.keys() - {"__metadata__"}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = data[begin:end]
    return found


def expected_tensors(values, dtype, fmt, name):
    """What the reference formats make of one weight."""
    wide = floats.widen(values.reshape(-1), dtype)
    if fmt.is_int8:
        codes, scb = int8.quantize_int8(values, dtype)
        return {name: codes.tobytes(), f"{name.removesuffix('weight')}SCB": scb.tobytes()}
    packed, absmax = four_bit.quantize_4bit(wide, fmt.quant_type, fmt.blocksize)
    if not fmt.double_quant:
        return {name: packed.tobytes(), f"{name}.absmax": absmax.tobytes()}
    codes, nested, offset = double_quant.quantize_absmax(absmax)
    return {
        name: packed.tobytes(),
        f"{name}.absmax": codes.tobytes(),
        f"{name}.nested_absmax": nested.tobytes(),
        "offset": offset,
    }


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("blocksize", [32, 64, 512])
def test_written_bytes_are_the_reference_formats(tmp_path, precision, dtype, blocksize):
    write_llama(tmp_path / "in", dtype=dtype, hidden=72, mlp=172)
    fmt = QuantFormat(precision, blocksize)
    quantize(tmp_path / "in", tmp_path / "out", format=fmt)
    source, written = raw_tensors(tmp_path / "in"), raw_tensors(tmp_path / "out")
    item = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[dtype]
    for name, data in source.items():
        if "_proj" not in name:
            assert written[name] == data, name
            continue
        shape = (-1, 172 if "down" in name else 72)
        values = np.frombuffer(data, item).reshape(shape)
        expected = expected_tensors(values, dtype, fmt, name)
        offset = expected.pop("offset", None)
        for key, reference in expected.items():
            assert written[key] == reference, key
        if not fmt.is_int8:
            state = parse_quant_state(written[f"{name}.quant_state.bitsandbytes__{fmt.quant_type}"])
            assert state.shape == values.shape and state.blocksize == blocksize
            assert state.nested_offset == (None if offset is None else float(offset))


def test_conv1d_weights_are_written_transposed(tmp_path, test_data):
    source = test_data / "models" / "slm4096-gpt2-hf"
    fmt = QuantFormat("nf4-dq")
    for settings in (SETTINGS, PipelineSettings(3, 1 << 22)):
        out = tmp_path / str(settings.tile_bytes)
        plan, _ = quantize(source, out, settings=settings, format=fmt)
        original, written = load_file(source / "model.safetensors"), raw_tensors(out)
        transposed = [tensor for tensor in plan.tensors if tensor.transposed]
        assert transposed
        for tensor in transposed:
            name = tensor.source.name
            expected = expected_tensors(
                np.ascontiguousarray(original[name].T), tensor.source.dtype, fmt, name
            )
            assert written[name] == expected[name]
            assert written[f"{name}.absmax"] == expected[f"{name}.absmax"]


@pytest.mark.parametrize("precision", ["nf4-dq", "int8", "fp4"])
def test_workers_tiles_shards_in_work_and_repetition_change_no_byte(
    tmp_path, precision, monkeypatch
):
    write_llama(tmp_path / "in", num_shards=12, hidden=128, mlp=352)
    digests = []
    for number, (workers, tile, in_turn) in enumerate(
        [(1, 4096, 4), (2, 8192, 1), (5, 1 << 20, 2), (3, 4096, 4), (2, 4096, 20)]
    ):
        monkeypatch.setattr(workers_module, "SHARDS_IN_TURN", in_turn)
        monkeypatch.setattr(run, "OPEN_SHARDS", 2 * in_turn)
        out = tmp_path / f"out{number}"
        quantize(
            tmp_path / "in",
            out,
            settings=PipelineSettings(workers, tile),
            format=QuantFormat(precision),
        )
        digests.append(folder_digest(out))
    assert all(digest == digests[0] for digest in digests)


def test_the_place_of_the_source_changes_no_byte(tmp_path):
    for place in ("a", "b"):
        write_llama(tmp_path / place / "model", num_shards=2)
        quantize(tmp_path / place / "model", tmp_path / place / "out")
    assert folder_digest(tmp_path / "a" / "out") == folder_digest(tmp_path / "b" / "out")


def test_sizes_on_disk_are_the_planned_ones(tmp_path):
    write_llama(tmp_path / "in", num_shards=2)
    plan, result = quantize(tmp_path / "in", tmp_path / "out")
    assert sum(map(len, raw_tensors(tmp_path / "out").values())) == plan.weights_bytes
    files = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == output_file_bytes(plan) == result.output_bytes
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plan.weights_bytes


def test_manifest_lists_every_file_with_its_checksum(tmp_path):
    write_llama(tmp_path / "in", num_shards=2)
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    (tmp_path / "in" / "chat_templates").mkdir()
    (tmp_path / "in" / "chat_templates" / "tools.jinja").write_text("x")
    quantize(tmp_path / "in", tmp_path / "out")
    digests = folder_digest(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "qtool_manifest.json").read_text())
    digests.pop("qtool_manifest.json")
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == digests
    assert {"config.json", "tokenizer.json", "chat_templates/tools.jinja"} <= digests.keys()


def test_progress_adds_up_to_the_total(tmp_path):
    write_llama(tmp_path / "in", num_shards=2)
    events = []
    quantize(tmp_path / "in", tmp_path / "out", on_event=events.append)
    total = next(event.total_bytes for event in events if isinstance(event, Started))
    assert total == sum(event.num_bytes for event in events if isinstance(event, Advanced))


# -- what is there already -------------------------------------------------------------------------


def test_the_same_command_over_a_finished_folder_does_nothing(tmp_path):
    write_llama(tmp_path / "in")
    quantize(tmp_path / "in", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    _, result = quantize(tmp_path / "in", tmp_path / "out")
    assert result.resumed
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_other_options_over_a_finished_folder_are_refused_and_named(tmp_path):
    write_llama(tmp_path / "in")
    quantize(tmp_path / "in", tmp_path / "out")
    before = folder_digest(tmp_path / "out")
    with pytest.raises(QtoolError, match="blocksize is 64 there, 128 now"):
        quantize(tmp_path / "in", tmp_path / "out", format=QuantFormat("nf4-dq", 128))
    assert folder_digest(tmp_path / "out") == before
    quantize(tmp_path / "in", tmp_path / "out", format=QuantFormat("nf4-dq", 128), restart=True)
    quantize(tmp_path / "in", tmp_path / "fresh", format=QuantFormat("nf4-dq", 128))
    assert folder_digest(tmp_path / "out") == folder_digest(tmp_path / "fresh")


def test_another_model_over_a_finished_folder_is_named_without_its_files(tmp_path):
    write_llama(tmp_path / "in")
    write_llama(tmp_path / "other", layers=1)
    quantize(tmp_path / "in", tmp_path / "out")
    with pytest.raises(QtoolError, match=r"other settings: model is in there, other now$"):
        quantize(tmp_path / "other", tmp_path / "out")
    write_llama(tmp_path / "in", layers=1)
    with pytest.raises(QtoolError, match=r"other settings: model\.safetensors is another one now$"):
        quantize(tmp_path / "in", tmp_path / "out")


def test_a_finished_folder_that_lost_a_file_is_made_anew(tmp_path):
    write_llama(tmp_path / "in", num_shards=2)
    quantize(tmp_path / "in", tmp_path / "out")
    before = folder_digest(tmp_path / "out")
    (tmp_path / "out" / "model-00002-of-00002.safetensors").unlink()
    quantize(tmp_path / "in", tmp_path / "out")
    assert folder_digest(tmp_path / "out") == before


def test_foreign_folders_are_refused_and_left_alone(tmp_path):
    write_llama(tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(QtoolError, match=r"notes\.txt"):
        quantize(tmp_path / "in", out, restart=True)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    write_llama(tmp_path / "in")
    (tmp_path / "out").write_text("mine")
    with pytest.raises(QtoolError, match="is a file"):
        quantize(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("place", [".", "sub/out"])
def test_writing_into_the_source_is_refused(tmp_path, place):
    write_llama(tmp_path)
    with pytest.raises(QtoolError, match="source folder"):
        quantize(tmp_path, tmp_path / place)


def test_a_second_writer_is_refused(tmp_path):
    write_llama(tmp_path / "in")
    (tmp_path / "out" / ".qtool").mkdir(parents=True)
    with (tmp_path / "out" / ".qtool" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(QtoolError, match="another qtool process"):
            quantize(tmp_path / "in", tmp_path / "out")


# -- sources that prove bad while they are read ----------------------------------------------------


def break_value(folder: Path, name: str, index: int, value: float) -> None:
    from safetensors.numpy import load_file as load

    path = next(p for p in folder.glob("*.safetensors") if name in load(p))
    tensors = load(path)
    tensors[name].reshape(-1)[index] = value
    save_tensors(path, {key: ("F32", array) for key, array in tensors.items()})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("precision", ["nf4-dq", "int8"])
def test_nonfinite_values_are_named_and_leave_nothing(tmp_path, value, name, precision):
    write_llama(tmp_path / "in", dtype="F32", num_shards=2)
    break_value(tmp_path / "in", name, 37, value)
    with pytest.raises(QtoolError) as caught:
        quantize(tmp_path / "in", tmp_path / "out", format=QuantFormat(precision))
    assert caught.value.kind == "bad_file"
    assert name in caught.value.message and "element 37" in caught.value.message
    assert "--allow-nonfinite" in caught.value.hint
    assert not (tmp_path / "out").exists()
    allowing = PipelineSettings(2, 4096, allow_nonfinite=True)
    quantize(tmp_path / "in", tmp_path / "out", settings=allowing, format=QuantFormat(precision))
    assert (tmp_path / "out" / "config.json").exists()


def test_int8_refuses_what_float16_cannot_hold(tmp_path):
    write_llama(tmp_path / "in", dtype="F32")
    name = "model.layers.0.mlp.up_proj.weight"
    break_value(tmp_path / "in", name, 5, 70000.0)
    with pytest.raises(QtoolError, match="beyond float16"):
        quantize(tmp_path / "in", tmp_path / "out", format=QuantFormat("int8"))
    quantize(tmp_path / "in", tmp_path / "out4", format=QuantFormat("nf4"))


def test_a_source_cut_short_after_its_header_was_read_is_refused(tmp_path):
    write_llama(tmp_path / "in")
    checkpoint = open_checkpoint(str(tmp_path / "in"), need="files")
    plan = build_plan(checkpoint, Recipe())
    shard = tmp_path / "in" / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 4096)
    with pytest.raises(QtoolError) as caught:
        quantize_checkpoint(checkpoint, plan, tmp_path / "out", choose_backend().backend, SETTINGS)
    assert caught.value.kind == "bad_file" and "model.safetensors" in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["touched", "grown"])
def test_a_source_that_changes_meanwhile_is_refused(tmp_path, change):
    write_llama(tmp_path / "in")
    shard = tmp_path / "in" / "model.safetensors"
    counting = WatchedBackend()
    quantize(tmp_path / "in", tmp_path / "undisturbed", backend=counting)
    num_kernels = counting.num_kernels

    def at_the_last_kernel(number):
        if number == num_kernels and change == "touched":
            os.utime(shard, ns=(1, 1))
        elif number == num_kernels:
            os.truncate(shard, shard.stat().st_size + 1)

    with pytest.raises(QtoolError, match="changed while reading") as caught:
        quantize(tmp_path / "in", tmp_path / "out", backend=WatchedBackend(at_the_last_kernel))
    assert caught.value.kind == "bad_file" and str(shard) in caught.value.message
    assert not (tmp_path / "out").exists()


def test_a_source_cut_short_meanwhile_is_refused(tmp_path):
    write_llama(tmp_path / "in", num_shards=2)
    shard = tmp_path / "in" / "model-00001-of-00002.safetensors"

    def at_the_tenth_kernel(number):
        if number == 10:
            os.truncate(shard, 4096)

    with pytest.raises(QtoolError, match=r"truncated|changed while reading") as caught:
        quantize(tmp_path / "in", tmp_path / "out", backend=WatchedBackend(at_the_tenth_kernel))
    assert caught.value.kind == "bad_file" and str(shard) in caught.value.message
    assert not (tmp_path / "out").exists()


def test_too_little_space_is_said_before_the_first_byte(tmp_path, monkeypatch):
    write_llama(tmp_path / "in")
    real = os.statvfs

    class Full:
        def __init__(self, path):
            self.f_frsize, self.f_bavail = real(path).f_frsize, 1

    monkeypatch.setattr(os, "statvfs", Full)
    with pytest.raises(QtoolError) as caught:
        quantize(tmp_path / "in", tmp_path / "out")
    assert caught.value.kind == "no_space" and caught.value.exit_code == 5
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_keeps_finished_shards(tmp_path, monkeypatch):
    write_llama(tmp_path / "in", num_shards=12, layers=6)
    real, calls = os.posix_fallocate, []

    def fill_up(descriptor, offset, num_bytes):
        calls.append(num_bytes)
        if len(calls) == run.OPEN_SHARDS + 3:  # a small file, and so two shards are finished
            raise OSError(28, "No space left on device")
        real(descriptor, offset, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", fill_up)
    with pytest.raises(QtoolError) as caught:
        quantize(tmp_path / "in", tmp_path / "out")
    assert caught.value.kind == "no_space" and "model-000" in caught.value.message
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "config.json" not in names and sum("model-" in name for name in names) >= 2
    assert not list((tmp_path / "out" / ".qtool").glob("*.partial"))
    _, result = quantize(tmp_path / "in", tmp_path / "out")
    assert result.resumed
    quantize(tmp_path / "in", tmp_path / "fresh")
    assert folder_digest(tmp_path / "out") == folder_digest(tmp_path / "fresh")


def test_a_source_that_changed_between_two_runs_is_refused(tmp_path):
    write_llama(tmp_path / "in", num_shards=2)
    shard = tmp_path / "in" / "model-00001-of-00002.safetensors"

    def interrupt(number):
        if number == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tmp_path / "in", tmp_path / "out", backend=WatchedBackend(interrupt))
    os.utime(shard, ns=(1, 1))
    with pytest.raises(QtoolError, match="model-00001-of-00002"):
        quantize(tmp_path / "in", tmp_path / "out")
