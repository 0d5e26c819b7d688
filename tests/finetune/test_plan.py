"""Which device a run is planned on, and when there is certainly none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from qtool.errors import QtoolError
from qtool.finetune import plan
from qtool.finetune.records import DataOptions, FinetuneRequest
from qtool.planner.gpus import ListedGpu

LAUNCHER = ("WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(plan, "DRIVER", "libc.so.6")


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    file = tmp_path / "nvidiactl"
    monkeypatch.setattr(plan, "DRIVER", "libno_such_driver.so")
    monkeypatch.setattr(plan, "DRIVER_FILE", file)
    return file


def list_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: tuple[str, int | None] | ListedGpu) -> None:
    """What nvidia-smi says: names and MiB, of all that is free."""
    found = tuple(
        gpu if isinstance(gpu, ListedGpu) else ListedGpu(index, gpu[0], gpu[1], gpu[1], False)
        for index, gpu in enumerate(gpus)
    )
    monkeypatch.setattr(plan, "list_gpus", lambda: found)


def refuse(*arguments: object) -> None:
    raise QtoolError("nvidia-smi could not be asked", kind="not_found", hint="")


@pytest.mark.parametrize("visible", [None, "0", "1,0", "3", "GPU-8a3f", "MIG-51b2", "0,-1"])
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0", "cuda:1"])
def test_where_there_may_be_a_gpu_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, visible: str | None
) -> None:
    list_gpus(monkeypatch, ("A", 8192))  # one, though MIG may have made several of it
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert plan._why_no_gpu(device) == ""
    monkeypatch.setattr(plan, "list_gpus", refuse)
    assert plan._why_no_gpu(device) == ""


@pytest.mark.parametrize("visible", ["", "-1"])
def test_hidden_gpus_are_none(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    list_gpus(monkeypatch, ("A", 8192))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert "hides all GPUs" in plan._why_no_gpu("cuda")
    host = plan._training_device("auto")
    assert host is not None
    assert host.name == plan.HOST_NAME


def test_a_library_that_only_pytorch_finds_is_a_driver(no_driver: Path) -> None:
    assert plan._why_no_gpu("cuda") == "no NVIDIA driver was found"
    no_driver.touch()
    assert plan._why_no_gpu("cuda") == ""


@pytest.mark.parametrize(
    ("device", "environment", "free_mib"),
    [
        ("auto", {}, 1),
        ("cuda:1", {}, 2),
        ("cuda:2", {}, None),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "1"}, 2),
        ("cuda:1", {"CUDA_VISIBLE_DEVICES": "1, 0"}, 1),
        ("cuda:1", {"CUDA_VISIBLE_DEVICES": "1"}, None),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "GPU-8a3f"}, None),
        ("auto", {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 2),
        ("auto", {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "1,0"}, 1),
    ],
)
def test_the_plan_is_on_the_gpu_that_will_train(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    environment: dict[str, str],
    free_mib: int | None,
) -> None:
    list_gpus(monkeypatch, ("A", 1), ("A", 2))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = plan._training_device(device)
    assert (found and found.free_mib) == free_mib


@pytest.mark.parametrize(("processes", "is_refused"), [(None, False), ("1", False), ("2", True)])
def test_a_number_is_refused_where_each_process_takes_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, processes: str | None, is_refused: bool
) -> None:
    if processes is not None:
        monkeypatch.setenv("WORLD_SIZE", processes)
    for device in ("auto", "cuda"):
        plan._check_device(asking(device))
    if not is_refused:
        plan._check_device(asking("cuda:1"))
        return
    with pytest.raises(QtoolError, match=r"cuda:1.*each of 2 processes takes its own") as caught:
        plan._check_device(asking("cuda:1"))
    assert caught.value.kind == "usage"


def asking(device: str) -> FinetuneRequest:
    return FinetuneRequest(model="m", output=Path("o"), data=DataOptions(source="d"), device=device)


def test_unequal_gpus_are_known_by_number_only_in_one_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    list_gpus(monkeypatch, ("slow", 1), ("fast", 2))
    assert plan._training_device("cuda") is None
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    found = plan._training_device("cuda")
    assert found is not None
    assert found.name == "slow"


def test_a_gpu_without_memory_of_its_own_moves_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    list_gpus(monkeypatch, ("A", None), ("A", 2))
    found = plan._training_device("cuda:1")
    assert found is not None and found.free_mib == 2
    host = plan._training_device("cuda:0")
    assert host is not None and host.name == plan.HOST_NAME
    list_gpus(monkeypatch, ListedGpu(0, "A", 2, None, False))  # it has some, but how much is left?
    assert plan._training_device("cuda:0") is None


def test_a_part_of_a_gpu_has_not_the_memory_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    list_gpus(monkeypatch, ListedGpu(0, "A", 2, 2, True), ("A", 2))
    assert plan._training_device("cuda:0") is None
    assert plan._training_device("cuda:1") is None  # whichever that is among the parts


def test_a_gpu_that_nobody_can_be_asked_about_has_not_the_hosts_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "list_gpus", refuse)
    monkeypatch.setattr(plan, "shutil", SimpleNamespace(which=lambda name: None))
    assert plan._training_device("cuda") is None
    # Listed without memory of its own it shares the host's.
    monkeypatch.setattr(plan, "shutil", SimpleNamespace(which=lambda name: name))
    host = plan._training_device("cuda")
    assert host is not None
    assert host.name == plan.HOST_NAME
