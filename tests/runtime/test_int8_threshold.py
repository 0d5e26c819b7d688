"""`--int8-threshold`: from the option or config.json into the layers, and the path it leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import qtool
from qtool.errors import QtoolError
from qtool.events import Event, Note
from qtool.resources import demo_model_path
from qtool.runtime import loading
from qtool.runtime.linear import LinearInt8
from qtool.runtime.loading import LoadOptions, load_model
from qtool.runtime.placement import Placement
from tests.cli.running import run
from tests.runtime.folders import PackedFolders, load_stock
from tests.runtime.packed_layers import relative_error

MODEL = "tinylm-19m"


def thresholds(model: Any) -> set[float | None]:
    return {m.threshold for m in model.modules() if isinstance(m, LinearInt8)}


def load(folder: Path, threshold: Any, **options: Any) -> Any:
    options_ = LoadOptions(device="cpu", int8_threshold=threshold, **options)
    return load_model(str(folder), options_).model


def with_entry(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy whose quantization_config says something else; None takes a key out."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    entry = config["quantization_config"] | changes
    config["quantization_config"] = {k: v for k, v in entry.items() if v is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_it_reaches_every_layer_and_by_default_none(packed_folders: PackedFolders) -> None:
    folder = packed_folders.by_qtool(MODEL, "int8")
    assert thresholds(load(folder, None)) == {None}
    assert thresholds(load(folder, 3.5)) == {3.5}
    assert thresholds(load(folder, 0.0)) == {0.0}
    assert thresholds(load(folder, "config")) == {6.0}
    assert thresholds(load(packed_folders.sources / MODEL, "config", quant="int8")) == {6.0}
    # The head is packed afterwards, for tokens that come one by one.
    assert thresholds(load(folder, 3.5, head_quant="int8")) == {3.5, None}


def test_the_configs_own(packed_folders: PackedFolders, tmp_path: Path) -> None:
    folder = packed_folders.by_qtool(MODEL, "int8")
    other = with_entry(folder, tmp_path / "other", llm_int8_threshold=4)
    assert thresholds(load(other, "config")) == {4.0}
    silent = with_entry(folder, tmp_path / "silent", llm_int8_threshold=None)
    assert thresholds(load(silent, "config")) == {6.0}
    for number, wrong in enumerate(("6", -1, True, [6.0])):
        bad = with_entry(folder, tmp_path / f"bad{number}", llm_int8_threshold=wrong)
        with pytest.raises(QtoolError, match="llm_int8_threshold") as caught:
            load(bad, "config")
        assert caught.value.kind == "bad_file"


def test_without_int8_layers_it_is_refused(packed_folders: PackedFolders) -> None:
    for folder in (packed_folders.sources / MODEL, packed_folders.by_qtool(MODEL, "nf4-dq")):
        with pytest.raises(QtoolError, match="has no INT8 layers") as caught:
            load(folder, 6.0)
        assert caught.value.kind == "usage"


def test_each_layer_of_a_model_says_what_bitsandbytes_says(packed_folders: PackedFolders) -> None:
    """Of its own activations, of which some are outliers."""
    folder = packed_folders.by_bitsandbytes(MODEL, "int8")
    stock, own = load_stock(folder), load(folder, "config")
    seen: list[float] = []

    def compare(name: str, theirs: torch.Tensor, x: torch.Tensor) -> None:
        layer = own.get_submodule(name)
        exact = x.double() @ layer.dequantize().double().T
        seen.append(float(x.abs().max()))
        assert relative_error(layer(x), theirs) < 0.25 * relative_error(theirs, exact)

    for name, module in stock.named_modules():
        if type(module).__name__ == "Linear8bitLt":
            module.register_forward_hook(lambda _, x, y, name=name: compare(name, y, x[0]))
    with torch.inference_mode():
        stock(torch.randint(0, 500, (1, 100), generator=torch.Generator().manual_seed(0)))
    assert len(seen) == 35 and min(seen) < 6 < max(seen)


def test_what_a_gpu_does_not_round_is_told(packed_folders: PackedFolders) -> None:
    model = load(packed_folders.by_qtool(MODEL, "int8"), None)
    told: list[Event] = []
    dtypes = loading._Dtypes(torch.float32, None)
    placement = Placement(torch.device("cuda"), {"": "cuda"}, None, "")
    loading._set_int8_threshold(model, 6.0, placement, dtypes, told.append)
    assert thresholds(model) == {6.0}
    (note,) = told
    assert isinstance(note, Note) and note.level == "warning" and "changes nothing" in note.text


def test_qtool_load_takes_it() -> None:
    cases: list[tuple[Any, float | None]] = [(None, None), (2, 2.0), ("config", 6.0)]
    for threshold, found in cases:
        model = qtool.load(demo_model_path(), device="cpu", quant="int8", int8_threshold=threshold)
        assert thresholds(model) == {found}
    refused: list[Any] = [-1, float("nan"), "six"]
    for wrong in refused:
        with pytest.raises(qtool.QtoolError, match="int8_threshold="):
            qtool.load(demo_model_path(), device="cpu", quant="int8", int8_threshold=wrong)


@pytest.mark.parametrize("threshold", [0, 6.5, "config"])
def test_the_command_takes_it(threshold: float | str) -> None:
    arguments = ("generate", demo_model_path(), "ROMEO: " * 40, "--max-new-tokens", 4, "--json")
    ran = run(*arguments, "--quant", "int8", "--int8-threshold", threshold)
    assert ran.document["prompt_tokens"] > 64 and ran.document["new_tokens"] == 4


@pytest.mark.parametrize("wrong", ["-1", "nan", "six"])
def test_the_command_refuses_what_is_none(wrong: str) -> None:
    ran = run("generate", demo_model_path(), "x", "--int8-threshold", wrong, "--json")
    assert ran.exit_code == 2 and "is no threshold" in ran.error["message"]


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2", "gemma3_text"])
def test_fused_prompts_round_as_the_models_own_operations(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers alone, rows of a joined one, with biases, and with norms of what they make."""
    pytest.importorskip("cupy", exc_type=ImportError)
    from qtool.runtime.decoders import fused_prompt
    from qtool.runtime.decoders.caches import fixed_cache
    from qtool.runtime.decoders.fused import FusedNetwork
    from qtool.runtime.decoders.network import Network
    from qtool.runtime.random_model import build_random_model
    from tests.runtime.decoders.common_blocks import BASE, MODELS
    from tests.runtime.decoders.cpu_launches import launches_on_the_cpu

    rounded: list[int] = []
    multiply = fused_prompt.PromptLaunches.multiply_rounded

    def counted(self: Any, layers: Any, x: torch.Tensor, *others: Any, **options: Any) -> None:
        rounded.append(x.shape[0])
        multiply(self, layers, x, *others, **options)

    monkeypatch.setattr(fused_prompt.PromptLaunches, "multiply_rounded", counted)
    model = build_random_model(BASE | MODELS[name], "int8", device="cpu").model
    for module in model.modules():
        if isinstance(module, LinearInt8):
            module.threshold = 0.5
    ids = torch.randint(0, 1000, (1, 100), generator=torch.Generator().manual_seed(5))
    with launches_on_the_cpu(), torch.inference_mode():
        network = FusedNetwork(model, 70, batch=1, capacity=128)
        cache = fixed_cache(model.config, 128)
        network.prepare(cache)
        assert network.prompt_reason == ""
        found = network.prefill(ids, 0, cache, in_chunks=True)
        own_cache = fixed_cache(model.config, 128)
        expected = Network(model, 70).prefill(ids, 0, own_cache, in_chunks=True)
    assert set(rounded) == {70}
    assert (found.float() - expected.float()).abs().max() <= 0.03 * expected.abs().max()
