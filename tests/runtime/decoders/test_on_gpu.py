"""On an NVIDIA GPU: graphs make the tokens that running operation by operation makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qtool.errors import QtoolError
from qtool.formats.precisions import QuantizedPrecision
from qtool.resources import demo_model_path
from qtool.runtime.decoders import choose
from qtool.runtime.decoders.caches import fixed_cache
from qtool.runtime.decoders.capture import CaptureFailed, GraphCapture
from qtool.runtime.decoders.choose import DecoderOptions, choose_decoder
from qtool.runtime.decoders.graphed import GraphDecoder
from qtool.runtime.decoders.history import History
from qtool.runtime.decoders.network import Network
from qtool.runtime.decoders.protocol import Sampling
from qtool.runtime.decoders.token_ring import STEPS_AHEAD
from qtool.runtime.generate import Limits, generate
from qtool.runtime.loading import LoadedModel, LoadOptions, load_model
from tests.runtime.decoders.tiny import (
    CAPACITY,
    NUM_NEW,
    PROMPT,
    as_loaded,
    break_off,
    decode,
    eager_decoder,
    graph_decoder,
    tiny_model,
)

pytestmark = pytest.mark.gpu

GRAPHED = [
    "llama",
    "gpt2",
    "phi3",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "cohere",
    "olmo2",
    "qwen2_vl",
]
# What they run depends on versions of transformers, so either way will do: kernels of mixtures and
# recurrent states, masks and frequencies that are made on the host.
MAY_BE_GRAPHED = [
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "mamba2",
    "qwen3_next",
    "jamba",
    "bloom",
    "opt",
    "falcon",
    "deepseek_v3",
]


@pytest.fixture(scope="module", autouse=True)
def exact_float32() -> Any:
    """TF32 would make the choice between near tokens depend on the shape of a product."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def load_demo(quant: QuantizedPrecision | None) -> LoadedModel:
    options = LoadOptions(quant, device="cuda", compute_dtype="float32")
    return load_model(str(demo_model_path()), options)


@pytest.mark.parametrize("model_type", GRAPHED)
def test_a_graph_makes_the_eager_tokens(model_type: str) -> None:
    model = tiny_model(model_type, "cuda")
    expected = decode(eager_decoder(model), PROMPT, num=40)
    decoder = graph_decoder(model, chunk=4)
    assert decode(decoder, PROMPT, num=40) == expected
    assert decode(decoder, PROMPT, num=40) == expected, "and again with the same graph"


@pytest.mark.parametrize("model_type", MAY_BE_GRAPHED)
def test_whatever_is_chosen_makes_the_eager_tokens(model_type: str) -> None:
    model = tiny_model(model_type, "cuda")
    expected = decode(eager_decoder(model), PROMPT)
    decoder = choose_decoder(as_loaded(model), CAPACITY)
    assert decode(decoder, PROMPT) == expected, decoder.path_reason
    begun = break_off(decoder, PROMPT, 5)
    rest = decode(decoder, begun[-1:], len(PROMPT) + 4, num=NUM_NEW - 5)
    assert begun + rest == expected, decoder.path_reason


@pytest.mark.parametrize("quant", ["nf4-dq", "nf4", "int8", None])
def test_packed_layers_run_in_a_graph(quant: QuantizedPrecision | None) -> None:
    with load_demo(quant) as loaded:
        eager = choose_decoder(loaded, 128, options=DecoderOptions("eager"))
        graph = choose_decoder(loaded, 128, options=DecoderOptions("graph"))
        assert (graph.path, graph.path_reason) == (
            "graph",
            "one CUDA graph per token over a static cache",
        )
        assert decode(graph, PROMPT, num=64) == decode(eager, PROMPT, num=64)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_rewinding_and_breaking_off(model_type: str) -> None:
    model = tiny_model(model_type, "cuda")
    expected = decode(eager_decoder(model), PROMPT)
    decoder = graph_decoder(model)
    assert decoder.can_rewind
    decode(decoder, [*PROMPT[:5], 1, 1, 1])
    assert decode(decoder, PROMPT[5:], 5) == expected
    begun = break_off(decoder, PROMPT, 5)
    rest = decode(decoder, begun[-1:], len(PROMPT) + 4, num=NUM_NEW - 5)
    assert begun + rest == expected


def test_the_capacity_is_never_overrun() -> None:
    decoder = graph_decoder(tiny_model("llama", "cuda"))
    tokens = decode(decoder, PROMPT, num=1000)
    torch.cuda.synchronize()
    assert len(PROMPT) + len(tokens) == CAPACITY + 1


def test_sequences_of_a_batch_do_not_meet() -> None:
    model = tiny_model("llama", "cuda")
    other = [9, 4, *PROMPT[2:]]
    decoder = graph_decoder(model, batch=2)
    decoder.prefill(torch.tensor([PROMPT, other]), 0)
    rows = list(decoder.decode(Sampling(), NUM_NEW))
    assert [first for first, _ in rows] == decode(eager_decoder(model), PROMPT)
    assert [second for _, second in rows] == decode(eager_decoder(model), other)


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 10},
        {"temperature": 1.2, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 30, "top_p": 0.8},
    ],
    ids=str,
)
def test_a_seed_gives_the_same_text(how: dict[str, Any]) -> None:
    decoder = graph_decoder(tiny_model("llama", "cuda"))
    first = decode(decoder, PROMPT, seed=3, num=30, **how)
    assert len(set(first)) > 3
    decode(decoder, PROMPT, num=7, **how)  # draws from another seed between
    assert decode(decoder, PROMPT, seed=3, num=30, **how) == first
    assert decode(decoder, PROMPT, seed=4, num=30, **how) != first
    fresh = graph_decoder(tiny_model("llama", "cuda"))
    assert decode(fresh, PROMPT, seed=3, num=30, **how) == first


def test_the_narrowest_choice_is_greedy() -> None:
    decoder = graph_decoder(tiny_model("llama", "cuda"))
    expected = decode(decoder, PROMPT)
    assert decode(decoder, PROMPT, temperature=1.5, top_k=1) == expected
    assert decode(decoder, PROMPT, temperature=1.5, top_p=1e-6) == expected


def test_no_step_waits_for_the_device() -> None:
    """Launching more steps than a token takes must not stop the host."""
    model = tiny_model("llama", "cuda")
    decoder = graph_decoder(model)
    decoder.prefill(torch.tensor([PROMPT]), 0)
    decode(decoder, PROMPT)
    decoder.prefill(torch.tensor([PROMPT]), 0)
    tokens = decoder.decode(Sampling(), STEPS_AHEAD)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = [token for (token,) in tokens]  # waits for events only
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert made == decode(eager_decoder(model), PROMPT)[:STEPS_AHEAD]


def test_generate_stops_at_eos_and_tells_the_path() -> None:
    with load_demo("nf4-dq") as loaded:
        options = DecoderOptions("graph")
        with History(loaded, options) as history:
            free = generate(
                loaded, PROMPT, Sampling(), Limits(48, ignore_eos=True), history=history
            )
            assert len(free.token_ids) == 48
            eos = free.token_ids[20]
            first = free.token_ids.index(eos)
            object.__setattr__(loaded, "eos_token_ids", (eos,))
            ended = generate(loaded, PROMPT, Sampling(), Limits(48), history=history)
    assert ended.stop_reason == "eos"
    assert ended.token_ids == free.token_ids[: first + 1]
    assert (ended.path, ended.reused_tokens) == ("graph", len(PROMPT) - 1)
    assert ended.prefill_s > 0
    assert ended.decode_s > 0 or first == 0


def test_a_step_that_waits_cannot_be_recorded_and_the_device_goes_on() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    values = torch.ones(4, device=device)

    def wait() -> None:
        values.sum().item()

    with pytest.raises(CaptureFailed) as caught:
        GraphCapture(device)(wait, warm_up=wait, generator=torch.Generator(device))
    assert "captur" in str(caught.value)
    assert torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
    assert torch.rand(3, device=device).shape == (3,)  # the default generator is free again
    model = tiny_model("llama", "cuda")
    assert decode(graph_decoder(model), PROMPT) == decode(eager_decoder(model), PROMPT)


def test_a_model_that_waits_runs_eagerly_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "WAYS", [way for way in choose.WAYS if way[0] != "fused"])
    model = tiny_model("olmo", "cuda")

    def look(module: Any, arguments: Any, output: Any) -> None:
        float(output.logits.max())

    hook = model.register_forward_hook(look)
    try:
        decoder = choose_decoder(as_loaded(model), CAPACITY)
        assert decoder.path == "eager"
        assert "no graph of OlmoForCausalLM: " in decoder.path_reason
        waiting = decode(decoder, PROMPT)
    finally:
        hook.remove()
    assert waiting == decode(eager_decoder(model), PROMPT)


def test_a_cache_that_does_not_fit_says_what_would() -> None:
    model = tiny_model("llama", "cuda")
    network = Network(model, 512)
    capacity = 1 << 30  # a terabyte of keys and values
    cache = fixed_cache(model.config, capacity)
    assert cache is not None
    with pytest.raises(QtoolError, match=f"the cache for {capacity} tokens takes") as caught:
        GraphDecoder(network, cache, capacity=capacity, batch=1)
    assert caught.value.kind == "memory"
    assert "max_context=" in caught.value.hint
    assert decode(graph_decoder(model), PROMPT) == decode(eager_decoder(model), PROMPT)
