"""Devices and --max-memory; offloaded layers give the same tokens."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch

from qtool.errors import QtoolError
from qtool.runtime import placement
from qtool.runtime.generate import Limits, Sampling, generate
from qtool.runtime.linear import Linear4bit, LinearInt8
from qtool.runtime.loading import LoadOptions, load_model
from qtool.runtime.memory_limits import parse_max_memory
from qtool.runtime.placement import choose_placement, weights_by_device
from tests.runtime.folders import PackedFolders


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0=6GiB,cpu=20GiB", {0: 6 << 30, "cpu": 20 << 30}),
        ("cpu=1.5GB", {"cpu": 1_500_000_000}),
        ("cuda:1=512MiB", {1: 512 << 20}),
        ("cpu=1024", {"cpu": 1024}),
        (" 0 = 2 gib , cpu = 1TiB", {0: 2 << 30, "cpu": 1 << 40}),
    ],
)
def test_max_memory_is_read(text: str, expected: dict[int | str, int]) -> None:
    assert parse_max_memory(text) == expected


@pytest.mark.parametrize(
    "text", ["", "6GiB", "0:6GiB", "gpu=6GiB", "0=", "0=six", "0=-1GiB", "0=1XB"]
)
def test_malformed_max_memory_is_a_usage_error(text: str) -> None:
    with pytest.raises(QtoolError, match="is not of the form") as caught:
        parse_max_memory(text)
    assert caught.value.kind == "usage"


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "CPU", "cuda:-1", "mps"])
def test_unknown_devices_are_usage_errors(device: str) -> None:
    with pytest.raises(QtoolError, match="there is no such device"):
        choose_placement(device, None, 0)


def test_a_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(QtoolError, match=r"^device='cuda' cannot run here: ") as caught:
        choose_placement("cuda", None, 0)
    assert caught.value.kind == "unsupported" and "device='cpu'" in caught.value.hint
    assert choose_placement("auto", None, 1 << 50).device.type == "cpu"


def test_limits_for_a_gpu_that_is_not_there_are_refused() -> None:
    with pytest.raises(QtoolError, match="names GPU 0, but the model runs on cpu"):
        choose_placement("cpu", "0=1GiB,cpu=1GiB", 0)


def test_a_model_too_large_for_the_gpu_is_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 << 30, 16 << 30))
    free = {0: 10 << 30, "cpu": 40 << 30}
    monkeypatch.setattr(accelerate.utils, "get_max_memory", lambda: free)
    fits = 10 * (1 << 30) - placement.RESERVED_BYTES
    assert choose_placement("auto", None, fits).device_map == {"": "cuda:0"}
    spread = choose_placement("auto", None, fits + 1)
    assert spread.device_map == "sequential"
    assert spread.max_memory == {0: fits, "cpu": 40 << 30}
    assert "too large" in spread.reason
    assert choose_placement("cuda:0", None, 1 << 50).device_map == {"": "cuda:0"}


@pytest.mark.parametrize("precision", ["nf4-dq", "int8", None])
def test_layers_on_disk_give_the_same_tokens(
    packed_folders: PackedFolders, precision: str | None
) -> None:
    model = "tinylm-19m"
    folder = packed_folders.sources / model
    if precision is not None:
        folder = packed_folders.by_qtool(model, precision)
    prompt = list(range(3, 20))
    # In float32, since the whole model runs on the fused path, which rounds elsewhere.
    in_memory = LoadOptions(device="cpu", compute_dtype="float32")
    with load_model(str(folder), in_memory) as whole:
        expected = generate(whole, prompt, Sampling(), Limits(8)).token_ids
    total_bytes = sum(t.numel() * t.element_size() for t in whole.model.state_dict().values())
    options = LoadOptions(
        device="cpu", compute_dtype="float32", max_memory=f"cpu={int(total_bytes * 0.8)}"
    )
    with load_model(str(folder), options) as spread:
        assert "disk" in spread.devices
        found = generate(spread, prompt, Sampling(), Limits(8)).token_ids
        kinds = (Linear4bit, LinearInt8) if precision else (torch.nn.Linear,)
        away = [m for m in spread.model.modules() if isinstance(m, kinds) and m.weight.is_meta]
        assert away, "some layers must lie on disk between forward passes"
        assert all(tensor.is_meta for m in away for tensor in m.buffers()), "statistics too"
        offload_folder = Path(next(iter(spread._offloaded._exit_callbacks))[1].__self__.name)
        assert any(offload_folder.iterdir())
    assert found == expected
    assert not offload_folder.exists()


def test_weights_are_counted_where_they_lie() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(2, 8))
    model[1].register_buffer("scales", torch.zeros(3, dtype=torch.uint8))
    assert weights_by_device(model, torch.device("cpu")) == {"cpu": 4 * (8 + 16 + 8) + 3}
    model.hf_device_map = {"0": 1, "1": "cpu", "1.scales": "disk"}
    found = weights_by_device(model, torch.device("cuda", 1))
    assert found == {"cuda:1": 32, "cpu": 96, "disk": 3}
