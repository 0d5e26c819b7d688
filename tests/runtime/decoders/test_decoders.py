"""Decoders make the tokens of transformers' own loop, however the prompt goes in."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qtool.errors import QtoolError
from qtool.runtime.decoders.caches import CONTINUING_STATES, fixed_cache
from qtool.runtime.decoders.capture import CaptureFailed
from qtool.runtime.decoders.graphed import GraphDecoder
from qtool.runtime.decoders.network import Network
from qtool.runtime.decoders.protocol import Decoder, Sampling
from qtool.runtime.decoders.token_ring import FIRST_STEPS_AHEAD, STEPS_AHEAD
from qtool.runtime.loading import LoadOptions, load_model
from tests.runtime.decoders.tiny import (
    CAPACITY,
    NUM_NEW,
    PROMPT,
    break_off,
    decode,
    eager_decoder,
    expected_tokens,
    graph_decoder,
    make_tiny_model,
    run_again,
    tiny_model,
    transformers_tokens,
)

Make = Callable[..., Decoder]
MAKERS: dict[str, Make] = {"eager": eager_decoder, "graph": graph_decoder}
ATTENTION = ["llama", "gpt2", "opt", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen2_vl"]
STARTING_AGAIN = ["mamba", "jamba"]  # recurrent states that take a prompt whole
WITHOUT_GRAPH = {"deepseek_v4"}
CASES = [
    (model_type, way)
    for model_type in [*ATTENTION, *STARTING_AGAIN, *sorted(CONTINUING_STATES)]
    for way in MAKERS
    if not (way == "graph" and model_type in WITHOUT_GRAPH)
]


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, Make]:
    model_type, way = request.param
    return model_type, MAKERS[way]


@pytest.mark.parametrize("chunk", [3, 512])
def test_tokens_are_those_of_transformers_loop(case: tuple[str, Make], chunk: int) -> None:
    model_type, make = case
    assert decode(make(tiny_model(model_type), chunk=chunk), PROMPT) == expected_tokens(model_type)


def test_a_prompt_may_start_within_what_is_held(case: tuple[str, Make]) -> None:
    model_type, make = case
    decoder = make(tiny_model(model_type), chunk=3)
    decode(decoder, [*PROMPT[:5], 1, 1, 1])
    # also where can_rewind is False: slower, but right
    assert decode(decoder, PROMPT[5:], 5) == expected_tokens(model_type)
    assert decode(decoder, PROMPT) == expected_tokens(model_type)


def test_a_text_that_was_broken_off_goes_on_where_its_reader_stopped(
    case: tuple[str, Make],
) -> None:
    model_type, make = case
    decoder = make(tiny_model(model_type), chunk=3)
    begun = break_off(decoder, PROMPT, 5)
    start = len(PROMPT) + 4  # the last token that was read is not in the cache
    rest = decode(decoder, begun[-1:], start, num=NUM_NEW - 5)
    assert begun + rest == expected_tokens(model_type)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    "name", ["stories260K-hf", "TinyStories-656K-hf", "slm4096-gpt2-hf", "tinylm-19m", "tinymoe-6m"]
)
def test_trained_models_too(models: Path, name: str, make: Make) -> None:
    loaded = load_model(str(models / name), LoadOptions(device="cpu", compute_dtype="float32"))
    ids = torch.tensor([PROMPT])
    loaded.model.generation_config = transformers.GenerationConfig()
    expected = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
    )
    assert (
        decode(make(loaded.model, chunk=4), PROMPT, num=24) == expected[0, len(PROMPT) :].tolist()
    )


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 8.0, 16.0]},
        {"rope_type": "dynamic", "factor": 4.0},
    ],
    ids=lambda rotary: rotary["rope_type"],
)
def test_rotary_frequencies_are_those_of_the_whole_text(rotary: dict[str, Any], make: Make) -> None:
    """Some change with the text's length, so that a long prompt must not go in piece by piece."""
    parameters = {"rope_theta": 100.0, "original_max_position_embeddings": 6} | rotary
    length = {"original_max_position_embeddings": 6, "max_position_embeddings": 64}
    model_type = "phi3" if rotary["rope_type"] == "longrope" else "llama"
    model = make_tiny_model(model_type, rope_parameters=parameters, **length)
    expected = transformers_tokens(model)
    decoder = make(model, chunk=3)
    assert decode(decoder, PROMPT) == expected
    decode(decoder, PROMPT[:5], num=1)
    assert decode(decoder, PROMPT[5:], 5) == expected


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_sequences_of_a_batch_do_not_meet(make: Make) -> None:
    decoder = make(tiny_model("llama"), batch=2)
    other = [9, 4, *PROMPT[2:]]
    decoder.prefill(torch.tensor([PROMPT, other]), 0)
    rows = list(decoder.decode(Sampling(), NUM_NEW))
    assert [first for first, _ in rows] == expected_tokens("llama")
    assert [second for _, second in rows] == decode(eager_decoder(tiny_model("llama")), other)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_capacity_is_never_overrun(make: Make) -> None:
    decoder = make(tiny_model("llama"))
    tokens = decode(decoder, PROMPT, num=1000)
    assert len(PROMPT) + len(tokens) == CAPACITY + 1, "the last token needs no place"
    assert tokens[:NUM_NEW] == expected_tokens("llama")
    with pytest.raises(QtoolError, match=f"{CAPACITY + 1} tokens do not go into a cache of"):
        decoder.prefill(torch.ones(1, CAPACITY + 1, dtype=torch.int64), 0)
    with pytest.raises(QtoolError, match="do not go into"):
        decoder.prefill(torch.ones(1, 2, dtype=torch.int64), CAPACITY - 1)
    full = decode(decoder, [1] * CAPACITY, num=5)
    assert len(full) == 1


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_seed_gives_the_same_text_in_any_order_of_requests(make: Make) -> None:
    decoder = make(tiny_model("llama"))
    how = {"temperature": 1.0, "top_k": 20, "top_p": 0.9}
    first = decode(decoder, PROMPT, seed=3, **how)
    assert decode(decoder, PROMPT, seed=4, **how) != first
    assert decode(decoder, PROMPT) == expected_tokens("llama")
    assert decode(decoder, PROMPT, seed=3, **how) == first
    assert decode(decoder, PROMPT, **how) != decode(decoder, PROMPT, **how), "seeds differ"


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_logits_that_are_no_numbers_make_no_text(make: Make, temperature: float) -> None:
    model = copy.deepcopy(tiny_model("llama"))
    decoder = make(model)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(QtoolError, match="no numbers"):
        decode(decoder, PROMPT, temperature=temperature, seed=1)


def test_both_ways_draw_the_same_tokens() -> None:
    drawn = [
        decode(make(tiny_model("llama")), PROMPT, temperature=0.9, seed=11)
        for make in MAKERS.values()
    ]
    assert drawn[0] == drawn[1]


def test_the_device_runs_ahead_but_not_far() -> None:
    decoder = graph_decoder(tiny_model("llama"))
    model = tiny_model("llama")
    decoder.prefill(torch.tensor([PROMPT]), 0)
    steps: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: steps.append(1))
    tokens = decoder.decode(Sampling(), 40)
    next(tokens)
    assert len(steps) == FIRST_STEPS_AHEAD - 1  # the first token comes from prefill
    next(tokens)
    assert len(steps) == STEPS_AHEAD
    hook.remove()


def test_a_recording_that_stands_still_is_found_out() -> None:
    """What a graph would do whose model counts positions on the host."""

    class StandingStill(GraphDecoder):
        def _step(self, sampling: Sampling) -> None:
            if self._graphs_are_made:
                self._position.fill_(1)
            super()._step(sampling)

        _graphs_are_made = False

    def record(step: Callable[[], Any], **kwargs: Any) -> Callable[[], None]:
        StandingStill._graphs_are_made = True
        return run_again(step, **kwargs)

    network = Network(tiny_model("llama"), 512)
    cache = fixed_cache(network.model.config, CAPACITY)
    with pytest.raises(CaptureFailed, match="other logits at token 2"):
        StandingStill(network, cache, capacity=CAPACITY, batch=1, capture=record)


def test_a_model_that_fails_over_a_static_cache_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("sizes do not match\nat a place")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(CaptureFailed, match=r"^sizes do not match$"):
        graph_decoder(model)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_next"])
def test_close_gives_the_cache_back(model_type: str, make: Make) -> None:
    decoder: Any = make(tiny_model(model_type))
    decode(decoder, PROMPT)
    held = [weakref.ref(decoder._cache), *map(weakref.ref, tensors_of(decoder._cache))]
    assert len(held) > 1
    gc.disable()  # counting references has to do
    try:
        decoder.close()
        assert not [it for it in held if it() is not None]
    finally:
        gc.enable()


def tensors_of(cache: Any) -> list[torch.Tensor]:
    return [
        value
        for layer in cache.layers
        for value in vars(layer).values()
        if isinstance(value, torch.Tensor)
    ]


def test_a_closed_decoder_begins_anew_or_refuses() -> None:
    eager, graph = (make(tiny_model("llama")) for make in MAKERS.values())
    for decoder in (eager, graph):
        decode(decoder, PROMPT)
        decoder.close()
    assert decode(eager, PROMPT) == expected_tokens("llama")
    with pytest.raises(QtoolError, match="do not go into a cache of 0"):
        decode(graph, PROMPT)
    with pytest.raises(ValueError, match="closed"):
        next(graph.decode(Sampling(), 1))


def test_closing_ends_a_text_whose_next_step_would_write_where_the_cache_was() -> None:
    decoder = graph_decoder(tiny_model("llama"))
    decoder.prefill(torch.tensor([PROMPT]), 0)
    tokens = decoder.decode(Sampling(), NUM_NEW)
    next(tokens)
    decoder.close()
    with pytest.raises(ValueError, match="closed"):
        list(tokens)
