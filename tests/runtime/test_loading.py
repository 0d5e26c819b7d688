"""Loading stored tensors: progress, dtypes, files that change meanwhile, what the model carries."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qtool.errors import QtoolError
from qtool.events import Advanced, Event, Finished, Started
from qtool.runtime import loading, read_ahead
from qtool.runtime.answers import Request, encode_prompt
from qtool.runtime.generate import Limits, Sampling
from qtool.runtime.loading import LoadOptions, load_model
from qtool.runtime.placement import Placement
from tests.runtime.folders import PackedFolders, edit_tensors

MODEL = "TinyStories-656K-hf"


def load(folder: Path, events: list[Event] | None = None, **options: Any) -> Any:
    on_event = (lambda event: None) if events is None else events.append
    return load_model(str(folder), LoadOptions(device="cpu", **options), on_event=on_event).model


@pytest.mark.parametrize("precision", ["nf4", "nf4-dq", "int8"])
def test_progress_adds_up_to_what_was_announced(
    packed_folders: PackedFolders, precision: str
) -> None:
    events: list[Event] = []
    load(packed_folders.by_bitsandbytes("tinylm-19m", precision), events)  # several shards
    total = next(event.total_bytes for event in events if isinstance(event, Started))
    done = sum(event.num_bytes for event in events if isinstance(event, Advanced))
    assert done == total > 0
    assert Finished("loading") in events


def test_stored_float32_becomes_the_models_dtype(packed_folders: PackedFolders) -> None:
    folder = packed_folders.sources / MODEL
    stored = load_file(folder / "model.safetensors")
    model = load(folder, compute_dtype="bfloat16")
    name = "model.layers.0.mlp.up_proj.weight"
    assert stored[name].dtype == torch.float32
    assert torch.equal(model.state_dict()[name], stored[name].to(torch.bfloat16))


def test_small_pieces_make_the_same_model(
    packed_folders: PackedFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packed_folders.by_qtool("tinylm-19m", "nf4-dq")
    expected = load(folder).state_dict()
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 4096)
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", 1 << 20)
    found = load(folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_nan_in_the_last_piece_of_absmax_is_found(
    packed_folders: PackedFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 64)
    name = "model.layers.0.mlp.up_proj.weight.absmax"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][-1] = float("inf")

    folder = edit_tensors(packed_folders.by_qtool(MODEL, "nf4"), tmp_path / "bad", spoil)
    with pytest.raises(QtoolError, match=r"up_proj\.weight: absmax holds NaN or infinity"):
        load(folder)


@pytest.mark.parametrize("precision", ["nf4-dq", None])
def test_a_file_that_is_cut_while_loading_is_an_error(
    packed_folders: PackedFolders, tmp_path: Path, precision: str | None
) -> None:
    source = packed_folders.sources / MODEL
    folder = packed_folders.by_qtool(MODEL, precision) if precision else source
    folder = edit_tensors(folder, tmp_path / "cut", lambda tensors: None)
    path = folder / "model.safetensors"

    def cut(event: Event) -> None:
        if isinstance(event, Started):
            os.truncate(path, path.stat().st_size // 2)

    with pytest.raises(QtoolError, match="the file is truncated") as caught:
        load_model(str(folder), LoadOptions(device="cpu"), on_event=cut)
    assert caught.value.kind == "bad_file"


def test_an_error_while_progress_is_shown_ends_the_loading(packed_folders: PackedFolders) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Advanced):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_model(
            str(packed_folders.by_qtool(MODEL, "nf4-dq")),
            LoadOptions(device="cpu"),
            on_event=interrupt,
        )


def test_generate_goes_by_the_folders_generation_config(
    packed_folders: PackedFolders, tmp_path: Path
) -> None:
    folder = edit_tensors(packed_folders.sources / MODEL, tmp_path / "m", lambda tensors: None)
    path = folder / "generation_config.json"
    path.unlink(missing_ok=True)
    assert not load(folder).generation_config.do_sample
    path.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "eos_token_id": [1, 2]}))
    config = load(folder).generation_config
    assert (config.do_sample, config.temperature, config.eos_token_id) == (True, 0.6, [1, 2])


def test_packed_models_may_be_compiled(packed_folders: PackedFolders) -> None:
    assert load(packed_folders.by_qtool(MODEL, "nf4-dq")).hf_quantizer.is_compileable


def test_saving_a_packed_model_says_why_not(
    packed_folders: PackedFolders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(packed_folders.by_qtool(MODEL, "nf4-dq"))
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")
    assert "qtool quantize" in caplog.text


@pytest.fixture
def all_logs(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Those of transformers too, which do not go up to the root."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_what_transformers_and_accelerate_log_is_held_back(
    packed_folders: PackedFolders, all_logs: pytest.LogCaptureFixture
) -> None:
    levels = [logging.getLogger(name).level for name in ("accelerate", "transformers")]
    options = LoadOptions(device="cpu", max_memory="cpu=1KB")
    with load_model(str(packed_folders.sources / "tinylm-19m"), options) as loaded:
        assert "disk" in loaded.devices
        request = Request("", None, None, Sampling(), Limits(4))
        assert len(encode_prompt(loaded, request, "a" * 20_000)) == 20_000 > loaded.max_context
    assert all_logs.text == ""
    assert levels == [logging.getLogger(name).level for name in ("accelerate", "transformers")]


def test_compiling_that_outlasts_the_loading_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "QUIET_S", 0.0)
    compiling: Future[None] = Future()
    notes: list[Event] = []

    def on_event(event: Event) -> None:
        notes.append(event)
        compiling.set_result(None)

    loading._wait_for_kernels(compiling, on_event)
    assert "waiting for kernels" in str(notes)
    loading._wait_for_kernels(compiling, on_event)
    assert len(notes) == 1


def test_tensors_of_a_spread_model_are_read_to_the_host() -> None:
    gpu = torch.device("cuda", 0)
    assert Placement(gpu, {"": "cuda:0"}).reading_device == gpu
    assert Placement(gpu, "sequential", {0: 1 << 30}).reading_device.type == "cpu"


def test_frequencies_are_those_of_transformers(packed_folders: PackedFolders) -> None:
    folder = packed_folders.sources / MODEL
    expected = dict(AutoModelForCausalLM.from_pretrained(folder).named_buffers())
    found = dict(load(folder).named_buffers())
    assert expected
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], buffer) for name, buffer in expected.items())
    assert all(found[name].dtype == buffer.dtype for name, buffer in expected.items())
