"""Which path is taken, and what is said about it."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from qtool.errors import QtoolError
from qtool.runtime.decoders import choose
from qtool.runtime.decoders.capture import CaptureFailed
from qtool.runtime.decoders.choose import DecoderOptions, choose_decoder
from qtool.runtime.decoders.network import Network
from qtool.runtime.loading import LoadedModel
from tests.runtime.decoders.tiny import as_loaded, run_again, tiny_model

FUSED_MODULE = "qtool.runtime.decoders.fused"


def fused_module(refusal: str | None) -> ModuleType:
    """Stands for the module of fused kernels, which a machine without a GPU cannot run."""
    module: Any = ModuleType(FUSED_MODULE)
    module.why_not_fused = lambda loaded, batch: refusal

    def make(loaded: Any, cache: Any, **how: int) -> Any:
        return SimpleNamespace(path="fused", path_reason="because", how=how)

    module.make_fused_decoder = make
    return module


@pytest.fixture(autouse=True)
def networks_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `on_gpu` says of them."""

    def make_network(wish: Any) -> Network:
        return Network(wish.loaded.model, wish.prefill_chunk)

    monkeypatch.setattr(choose, "_network", make_network)


@pytest.fixture
def no_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, FUSED_MODULE, fused_module("not fused"))


def on_gpu(model: Any) -> LoadedModel:
    """A model of which it is said that it is on a GPU; its tensors are not."""
    loaded = as_loaded(model)
    object.__setattr__(loaded, "device", torch.device("cuda", 0))
    return loaded


@pytest.fixture
def recording_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtool.runtime.decoders.graphed.GraphCapture", lambda device: run_again)


@pytest.mark.usefixtures("no_fused")
def test_the_cpu_runs_eagerly_what_has_no_compiled_step() -> None:
    decoder = choose_decoder(as_loaded(tiny_model("llama")), 100)
    assert decoder.path == "eager"
    assert decoder.path_reason == (
        "a layer of 32 columns does not fit the step; CUDA graphs need an NVIDIA GPU"
    )
    assert decoder.capacity == 128


@pytest.mark.usefixtures("no_fused", "recording_works")
def test_a_gpu_runs_a_graph() -> None:
    decoder = choose_decoder(on_gpu(tiny_model("llama")), 100)
    assert decoder.path == "graph"
    assert decoder.path_reason == "one CUDA graph per token over a static cache; not fused"
    assert decoder.capacity == 128


@pytest.mark.usefixtures("no_fused", "recording_works")
@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [("deepseek_v4", "DeepseekV4ForCausalLM"), ("falcon_mamba", "FalconMambaForCausalLM")],
)
def test_models_without_a_static_cache_say_so(model_type: str, class_name: str) -> None:
    decoder = choose_decoder(on_gpu(tiny_model(model_type)), 64)
    assert decoder.path == "eager"
    assert decoder.path_reason == f"not fused; {class_name} has no static cache in transformers"


@pytest.mark.usefixtures("recording_works")
def test_spread_models_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = on_gpu(tiny_model("llama"))
    monkeypatch.setattr(loaded.model, "hf_device_map", {"a": 0, "b": "cpu"}, raising=False)
    reason = choose_decoder(loaded, 64).path_reason
    assert reason == "the weights are spread over several devices"


@pytest.mark.usefixtures("no_fused")
def test_a_failed_recording_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise CaptureFailed("operation not permitted when stream is capturing")

    monkeypatch.setattr("qtool.runtime.decoders.graphed.GraphCapture", lambda device: fail)
    decoder = choose_decoder(on_gpu(tiny_model("llama")), 64)
    assert decoder.path == "eager"
    assert decoder.path_reason == (
        "not fused; no graph of LlamaForCausalLM: operation not permitted when stream is capturing"
    )


def test_fused_comes_first_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, FUSED_MODULE, fused_module(None))
    options = DecoderOptions(prefill_chunk=7)
    decoder: Any = choose_decoder(on_gpu(tiny_model("llama")), 100, 3, options=options)
    assert decoder.path == "fused"
    assert decoder.how == {"capacity": 128, "batch": 3, "prefill_chunk": 7}


def test_the_fused_module_is_not_loaded_where_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, FUSED_MODULE, None)  # importing it fails
    assert choose_decoder(as_loaded(tiny_model("llama")), 64).path == "eager"
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    decoder = choose_decoder(on_gpu(tiny_model("falcon_mamba")), 64)
    assert decoder.path_reason.startswith("the fused kernels need CuPy; ")


def test_a_path_that_is_asked_for_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, FUSED_MODULE, fused_module("no such block"))
    loaded = as_loaded(tiny_model("llama"))
    decoder = choose_decoder(loaded, 64, options=DecoderOptions("eager"))
    assert (decoder.path, decoder.path_reason) == ("eager", "asked for")
    refused = [
        ("fused", on_gpu(loaded.model), "no such block"),
        ("graph", loaded, "CUDA graphs need an NVIDIA GPU"),
    ]
    for path, asking, why in refused:
        monkeypatch.setenv("QTOOL_PATH", path)
        with pytest.raises(QtoolError, match=f"cannot take the {path} path: {why}") as caught:
            choose_decoder(asking, 64)
        assert caught.value.kind == "unsupported"
    assert choose_decoder(loaded, 64, options=DecoderOptions("eager")).path == "eager"
    monkeypatch.setenv("QTOOL_PATH", "fast")
    with pytest.raises(QtoolError, match="QTOOL_PATH=fast is no path"):
        choose_decoder(loaded, 64)
