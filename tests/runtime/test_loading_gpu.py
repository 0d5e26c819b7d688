"""Loading to an NVIDIA GPU: the bytes of the CPU's load, bounded memory, the same errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qtool
from qtool.errors import QtoolError
from qtool.events import Advanced, Event, Started
from qtool.resources import demo_model_path
from qtool.runtime import read_ahead
from qtool.runtime.linear import Linear4bit
from qtool.runtime.loading import LoadOptions, load_model
from tests.runtime.folders import PackedFolders, edit_tensors

pytestmark = pytest.mark.gpu

MODELS = (
    "stories260K-hf",
    "TinyStories-656K-hf",
    "slm4096-gpt2-hf",
    "tinylm-19m",
    "tinymoe-6m",
)
PRECISIONS = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")
MODEL = "TinyStories-656K-hf"


def load(folder: Path, device: str, **options: Any) -> Any:
    return load_model(str(folder), LoadOptions(device=device, **options)).model


def assert_same_bytes(folder: Path, **options: Any) -> None:
    expected = load(folder, "cpu", **options).state_dict()
    found = load(folder, "cuda", **options).state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].is_cuda, name
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].cpu(), tensor), name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", MODELS[:4])
def test_same_bytes_as_on_the_cpu(
    packed_folders: PackedFolders, model: str, precision: str
) -> None:
    assert_same_bytes(packed_folders.by_qtool(model, precision))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_same_bytes_of_unpacked_models(models: Path, model: str, dtype: str | None) -> None:
    """As stored, converted while loading, and merged (experts)."""
    assert_same_bytes(models / model, compute_dtype=dtype)


@pytest.mark.parametrize("precision", ["nf4-dq", "int8"])
def test_same_bytes_from_several_shards(packed_folders: PackedFolders, precision: str) -> None:
    folder = packed_folders.by_bitsandbytes("tinylm-19m", precision)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_same_bytes(folder)


def test_same_bytes_in_small_pieces_and_a_small_window(
    packed_folders: PackedFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 4096)
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", 1 << 18)
    assert_same_bytes(packed_folders.by_qtool("tinylm-19m", "nf4"))


def test_tensors_at_odd_offsets_are_aligned_on_the_gpu(
    packed_folders: PackedFolders, tmp_path: Path
) -> None:
    folder = packed_folders.by_qtool(MODEL, "nf4-dq")
    folder = edit_tensors(folder, tmp_path / "odd", lambda tensors: None)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    data = path.read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + header_bytes] + b" "  # shifts the data by one byte
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + header_bytes :])
    assert load_file(path).keys() == tensors.keys()
    assert_same_bytes(folder)
    for module in load(folder, "cuda").modules():
        if isinstance(module, Linear4bit):
            assert module.weight.data_ptr() % 16 == 0


@pytest.mark.parametrize("quant", ["nf4-dq", "int8"])
def test_quantizing_while_loading_gives_the_same_bytes(models: Path, quant: str) -> None:
    assert_same_bytes(models / "tinylm-19m", quant=quant)


@pytest.mark.parametrize("precision", ["nf4-dq", None])
def test_progress_adds_up(
    packed_folders: PackedFolders, models: Path, precision: str | None
) -> None:
    name = "tinylm-19m"
    folder = packed_folders.by_qtool(name, precision) if precision else models / name
    events: list[Event] = []
    load_model(str(folder), LoadOptions(device="cuda"), on_event=events.append)
    total = next(event.total_bytes for event in events if isinstance(event, Started))
    assert sum(event.num_bytes for event in events if isinstance(event, Advanced)) == total > 0


def test_a_file_that_is_cut_while_loading_is_an_error(
    packed_folders: PackedFolders, tmp_path: Path
) -> None:
    folder = packed_folders.by_qtool(MODEL, "nf4-dq")
    folder = edit_tensors(folder, tmp_path / "cut", lambda tensors: None)
    path = folder / "model.safetensors"

    def cut(event: Event) -> None:
        if isinstance(event, Started):
            os.truncate(path, path.stat().st_size // 2)

    with pytest.raises(QtoolError, match="the file is truncated") as caught:
        load_model(str(folder), LoadOptions(device="cuda"), on_event=cut)
    assert caught.value.kind == "bad_file"


def test_nan_in_a_statistic_is_found(packed_folders: PackedFolders, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight.absmax"][-1] = float("nan")

    folder = edit_tensors(packed_folders.by_qtool(MODEL, "nf4"), tmp_path / "bad", spoil)
    with pytest.raises(QtoolError, match=r"up_proj\.weight: absmax holds NaN or infinity"):
        load(folder, "cuda")


def write_large(source: Path, target: Path, num_layers: int, dtype: torch.dtype) -> None:
    """A Llama of about 80 MiB per layer in 16 bit."""
    config = AutoModelForCausalLM.from_pretrained(source).config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 2048, 4096, num_layers
    config.num_attention_heads = config.num_key_value_heads = 16
    config.head_dim, config.dtype = 128, torch.bfloat16
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    config.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((source / name).read_bytes())
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 4096, tensor.shape, generator=generator, dtype=torch.int16)
        .to(dtype)
        .contiguous()
        for name, tensor in shapes.items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def check_peak(folder: Path, *, least_bytes: int) -> None:
    file_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load(folder, "cuda")
    peak = torch.cuda.max_memory_allocated() - before
    weights_bytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert weights_bytes > least_bytes
    assert peak <= file_bytes + (256 << 20)
    assert torch.cuda.memory_allocated() - before <= weights_bytes + (8 << 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_peak_is_the_files_bytes(models: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    write_large(models / MODEL, tmp_path, 12, dtype)
    check_peak(tmp_path, least_bytes=512 << 20)


def test_the_peak_of_a_packed_model_is_its_files_bytes(models: Path, tmp_path: Path) -> None:
    write_large(models / MODEL, tmp_path / "large", 12, torch.bfloat16)
    packed = PackedFolders(tmp_path, tmp_path / "packed")
    for precision in ("nf4-dq", "int8"):
        check_peak(packed.by_qtool("large", precision), least_bytes=192 << 20)


def test_register_loads_to_the_gpu(packed_folders: PackedFolders) -> None:
    for precision in ("nf4-dq", "int8"):
        folder = packed_folders.by_qtool("tinylm-19m", precision)
        expected = load(folder, "cpu").state_dict()
        qtool.register()
        try:
            for device_map in (None, "auto", "cuda"):
                model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
                for name, tensor in model.state_dict().items():
                    assert tensor.is_cuda, name
                    assert torch.equal(tensor.cpu(), expected[name]), name
        finally:
            qtool.unregister()


def test_load_and_stream() -> None:
    texts = set()
    for device in ("cpu", "cuda"):
        model = qtool.load(demo_model_path(), quant="nf4-dq", device=device, dtype="float32")
        texts.add("".join(qtool.stream(model, "Once upon a time", max_new_tokens=32)))
    assert len(texts) == 1
