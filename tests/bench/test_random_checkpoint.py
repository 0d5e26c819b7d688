"""The checkpoint that is made to be measured is one that qtool reads, and as random as it says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qtool.bench.model_shapes import FULL_LAYERS, MODEL_SHAPES, read_model_shape
from qtool.bench.random_checkpoint import plan_checkpoint, write_checkpoint
from qtool.bench.random_weights import fill_with_gaussians
from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.safetensors_header import encode_header
from qtool.errors import QtoolError
from qtool.events import Advanced, Started
from qtool.formats.floats import widen
from qtool.quantize.plan import Recipe, build_plan
from tests.tiny_models import llama_config, llama_shapes


def write(folder, max_shard_bytes=50_000, events=None):
    files = plan_checkpoint(llama_config(), max_shard_bytes)
    on_event = (lambda event: None) if events is None else events.append
    write_checkpoint(files, folder, 2, on_event)
    return files


def stored_values(folder, name):
    checkpoint = open_checkpoint(str(folder), need="files")
    tensor = checkpoint.tensors[name]
    data = (folder / tensor.shard).read_bytes()[tensor.offset :][: tensor.num_bytes]
    return widen(np.frombuffer(data, np.uint16), "BF16")


def test_it_can_be_planned_before_and_after_it_is_written(tmp_path):
    files = write(tmp_path / "model")
    checkpoint = open_checkpoint(str(tmp_path / "model"), need="files")
    assert {t.name: t.shape for t in checkpoint.tensors.values()} == llama_shapes(llama_config())
    assert len(files.shards) == len(checkpoint.shards) > 2
    assert files.file_bytes == sum(shard.file_bytes for shard in checkpoint.shards)
    before, after = (build_plan(c, Recipe()) for c in (files.as_checkpoint(), checkpoint))
    headers = [[encode_header(s.outputs()) for s in plan.shards] for plan in (before, after)]
    assert headers[0] == headers[1]
    assert after.count("quantize") == 14


def test_one_shard_has_the_plain_name_and_no_index(tmp_path):
    write(tmp_path / "model", max_shard_bytes=1 << 30)
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == ["config.json", "model.safetensors"]


def test_weights_are_gaussians_and_no_two_tensors_or_runs_are_alike(tmp_path):
    for folder in ("one", "two"):
        write(tmp_path / folder)
    block = "model.layers.{}.mlp.up_proj.weight".format
    values = [stored_values(tmp_path / "one", block(layer)) for layer in (0, 1)]
    again = stored_values(tmp_path / "two", block(0))
    for other in (values[1], again):
        assert np.mean(values[0] == other) < 0.01
    assert np.std(values[0]) == pytest.approx(0.02, rel=0.1)
    assert abs(np.mean(values[0])) < 0.002
    assert np.mean(values[0] == 0) < 0.001


def test_long_arrays_do_not_repeat():
    values = np.zeros(300_000, np.uint16)
    fill_with_gaussians(values, "BF16", (1, 2))
    half = values.size // 2
    assert np.mean(values[:half] == values[half:]) < 0.01
    assert np.mean(values == 0) < 0.001


def test_progress_adds_up(tmp_path):
    events = []
    write(tmp_path / "model", events=events)
    (started,) = (event for event in events if isinstance(event, Started))
    advanced = sum(event.num_bytes for event in events if isinstance(event, Advanced))
    assert advanced == started.total_bytes > 0


def test_the_named_shapes_have_the_sizes_of_their_models():
    tensors = {name: plan_checkpoint(config).layouts for name, config in MODEL_SHAPES.items()}
    sizes = {name: sum(t.num_elements for t in found) for name, found in tensors.items()}
    assert sizes["llama-3.1-8b"] == 8_030_261_248
    assert sizes["llama-3.2-1b"] == 1_235_814_400
    layer_parameters = (sizes["llama-3.1-70b-4layers"] - 2 * 128256 * 8192 - 8192) // 4
    assert sizes["llama-3.1-70b-4layers"] + 76 * layer_parameters == 70_553_706_496
    assert FULL_LAYERS.keys() == {name for name in MODEL_SHAPES if name.endswith("layers")}
    largest = max(tensors["llama-3.1-405b-2layers"], key=lambda t: t.num_bytes)
    assert largest.shape == (128256, 16384)
    assert all(
        2e9 < sum(t.num_bytes for t in shard) <= 5e9
        for shard in list(plan_checkpoint(MODEL_SHAPES["llama-3.1-8b"]).shards.values())[:-1]
    )


def test_a_config_is_named_after_its_folder(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(llama_config()))
    (folder / "small.json").write_text(json.dumps(llama_config()))
    assert read_model_shape(str(folder / "config.json")) == ("my-model", llama_config())
    assert read_model_shape(str(folder / "small.json"))[0] == "small"


def test_unknown_shapes_are_refused_with_the_known_ones(tmp_path):
    with pytest.raises(QtoolError, match="llama-4") as caught:
        read_model_shape("llama-4")
    assert caught.value.kind == "usage" and "llama-3.1-8b" in caught.value.hint
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(QtoolError, match="object") as caught:
        read_model_shape(str(tmp_path / "config.json"))
    assert caught.value.kind == "bad_file"
