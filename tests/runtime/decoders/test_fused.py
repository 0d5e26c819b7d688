"""The fused path without a GPU: its launches, as `cpu_launches`, make the model's own logits."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("cupy", exc_type=ImportError)

from qtool.errors import QtoolError
from qtool.runtime.decoders import choose, fused, graphed
from qtool.runtime.decoders.caches import fixed_cache
from qtool.runtime.decoders.capture import CaptureFailed
from qtool.runtime.decoders.choose import choose_decoder
from qtool.runtime.decoders.fused import FusedNetwork, _Own, make_fused_decoder
from qtool.runtime.decoders.network import Network
from qtool.runtime.decoders.protocol import Sampling
from qtool.runtime.random_model import build_random_model
from tests.runtime.decoders.common_blocks import BASE, MODELS
from tests.runtime.decoders.cpu_launches import launches_on_the_cpu
from tests.runtime.decoders.tiny import as_loaded, run_again

CAPACITY = 64
CHUNK = 16
PROMPT_TOKENS = 28  # more than the windows of the models have
STEPS = 2
# Of the largest logit: several times what rounding in another order made of any of these models.
TOLERANCES = {"fp16": 0.005, "nf4-dq": 0.03, "int8": 0.03}
# Packed layers, whose model is bfloat16: of each way to lay them out one, and with added norms.
CASES = [
    *((name, "fp16") for name in MODELS),
    *((name, quant) for name in ("llama", "phi3", "gemma3_text") for quant in ("nf4-dq", "int8")),
]
# Whose prompts go through the model's own operations, and what says so.
OWN_PROMPTS = {"gemma2": "caps no scores"}


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other most of the time, so small is all
    with launches_on_the_cpu(), torch.inference_mode():
        yield
    torch.set_num_threads(before)


def load(name: str, quant: str = "fp16", **changes: Any) -> Any:
    config = BASE | MODELS[name] | changes
    return build_random_model(config, quant, device="cpu", model_id=name).model  # type: ignore[arg-type]


def prepared(model: Any, batch: int = 1) -> tuple[FusedNetwork, Any]:
    """The network and its cache."""
    network = FusedNetwork(model, CHUNK, batch=batch, capacity=CAPACITY)
    cache = fixed_cache(model.config, CAPACITY)
    network.prepare(cache)
    return network, cache


def tokens(batch: int, count: int) -> Tensor:
    return torch.randint(0, 1000, (batch, count), generator=torch.Generator().manual_seed(5))


def expected_logits(model: Any, ids: Tensor) -> Iterator[Tensor]:
    """After the prompt, and after each token behind it, by the model's own operations."""
    network, cache = Network(model, CHUNK), fixed_cache(model.config, CAPACITY)
    yield network.prefill(ids[:, :PROMPT_TOKENS], 0, cache, in_chunks=False)
    for at in range(PROMPT_TOKENS, ids.shape[1]):
        yield network.prefill(ids[:, at : at + 1], at, cache, in_chunks=False)


@pytest.mark.parametrize(("name", "quant"), CASES)
def test_logits_are_those_of_the_model(name: str, quant: str) -> None:
    model = load(name, quant)
    batch = 2 if quant == "fp16" else 1
    network, cache = prepared(model, batch)
    assert OWN_PROMPTS.get(name, "") in network.prompt_reason
    assert bool(network.prompt_reason) == (name in OWN_PROMPTS)
    ids = tokens(batch, PROMPT_TOKENS + STEPS)
    found = [network.prefill(ids[:, :PROMPT_TOKENS], 0, cache, in_chunks=True).clone()]
    for at in range(PROMPT_TOKENS, ids.shape[1]):
        position = torch.full((batch, 1), at)
        found.append(network.logits(ids[:, at : at + 1], position, cache).clone())
    for made, expected in zip(found, expected_logits(model, ids), strict=True):
        difference = (made.float() - expected.float()).abs().max()
        assert difference <= TOLERANCES[quant] * expected.abs().max()
    if network.has_own_choice:
        assert torch.equal(network.most_likely(), found[-1].argmax(-1))


@pytest.mark.parametrize("quant", ["nf4-dq", "int8"])
@pytest.mark.parametrize("most", [0, CHUNK])
def test_prompts_of_few_tokens_read_packed_bytes(
    monkeypatch: pytest.MonkeyPatch, most: int, quant: str
) -> None:
    """And others are dequantized; both give the logits of the model."""
    from qtool.runtime.decoders import fused_prompt

    multiplied: list[int] = []
    multiply = fused_prompt.PromptLaunches.multiply

    def counted(self: Any, product: Any, x: Tensor, outs: Any) -> None:
        multiplied.append(x.shape[0])
        multiply(self, product, x, outs)

    model = load("qwen2", quant)
    network, cache = prepared(model)
    monkeypatch.setattr(fused_prompt.PromptLaunches, "multiply", counted)
    network._prompt.max_packed_tokens = most
    ids = tokens(1, PROMPT_TOKENS)
    found = network.prefill(ids, 0, cache, in_chunks=True)
    assert set(multiplied) >= ({CHUNK, PROMPT_TOKENS - CHUNK} if most else set())
    assert bool(multiplied) == bool(most)
    expected = next(expected_logits(model, ids))
    difference = (found.float() - expected.float()).abs().max()
    assert difference <= TOLERANCES[quant] * expected.abs().max()


@pytest.mark.parametrize("many", [True, False])
def test_products_of_blocks_that_are_packed_differently(many: bool) -> None:
    """How one is made says nothing of another kind's at the same place in its block."""
    model = load("llama", "nf4-dq")
    down = model.model.layers[1].mlp.down_proj
    plain = torch.nn.Linear(down.in_features, down.out_features, bias=False, dtype=torch.bfloat16)
    model.model.layers[1].mlp.down_proj = plain
    network, cache = prepared(model)
    network._prompt.max_packed_tokens = 0 if many else CHUNK
    ids = tokens(1, PROMPT_TOKENS)
    found = network.prefill(ids, 0, cache, in_chunks=True)
    expected = next(expected_logits(model, ids))
    difference = (found.float() - expected.float()).abs().max()
    assert difference <= TOLERANCES["nf4-dq"] * expected.abs().max()


@pytest.mark.parametrize("few", [0, CHUNK])
def test_launches_are_told_where_tensors_are_now(few: int) -> None:
    """Elsewhere than in the prompt before, or of another length, or both."""
    network, cache = prepared(load("qwen2", "nf4-dq"))
    network._prompt.max_packed_tokens = few
    ids = tokens(1, PROMPT_TOKENS)
    first = {count: network.prefill(ids[:, :count], 0, cache, in_chunks=True) for count in (9, 28)}
    in_the_way = []
    for count in (28, 9, 28, 9):
        found = network.prefill(ids[:, :count], 0, cache, in_chunks=True)
        assert torch.equal(found, first[count])
        in_the_way += [torch.full((1 << size,), torch.nan) for size in range(6, 18) for _ in "abcd"]
        if count == 9:
            in_the_way = in_the_way[1::2]


@pytest.mark.parametrize("many", [True, False])
def test_fewer_tokens_at_the_same_place(many: bool) -> None:
    network, _ = prepared(load("llama", "nf4-dq"))
    launches, product = network._prompt._launches, network._prompt._products[1].down
    x = torch.randn(4, product.layers[0].kind.columns).bfloat16()
    out = x.new_empty(4, product.num_rows)

    def multiply(count: int) -> Tensor:
        launches.begin()
        if many:
            launches.multiply_many(product, x[:count], (out[:count],), added=False)
        else:
            launches.multiply(product, x[:count], (out[:count],))
        return out.clone()

    all_of_them = multiply(4)
    out.fill_(7)
    found = multiply(3)
    assert torch.allclose(found[:3].float(), all_of_them[:3].float(), atol=0.05)
    assert (found[3] == 7).all()


def test_how_products_are_made_is_decided_once_for_a_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qtool.runtime.decoders import fused_prompt

    asked: list[int] = []
    takes_many = fused_prompt.PromptLaunches.takes_many

    def counted(self: Any, layers: Any, num_tokens: int) -> bool:
        asked.append(num_tokens)
        return takes_many(self, layers, num_tokens)

    network, cache = prepared(load("llama", "nf4-dq", intermediate_size=768))
    monkeypatch.setattr(fused_prompt.PromptLaunches, "takes_many", counted)
    network._prompt.max_packed_tokens = 0
    network.prefill(tokens(1, PROMPT_TOKENS), 0, cache, in_chunks=True)
    # query, key and value; output; gate and up, together and alone; down
    assert [asked.count(n) for n in (CHUNK, PROMPT_TOKENS - CHUNK)] == [5, 5] and len(asked) == 10


def test_a_block_that_computes_something_else_is_refused() -> None:
    for part in ("input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"):
        model = load("gemma3_text")
        forward = getattr(model.model.layers[1], part).forward
        getattr(model.model.layers[1], part).forward = lambda x, forward=forward: 2 - forward(x)
        with pytest.raises(CaptureFailed, match="other logits at token"):
            prepared(model)


def test_only_tokens_that_hang_on_rounding_may_differ() -> None:
    logits = torch.tensor([[1.0, -2.0, 4.0]])
    wrong, nearly = logits + 1, logits + 0.01
    steady = _Own([logits], lambda: [nearly])
    assert steady.may_be(nearly, 0) and not steady.may_be(wrong, 0)
    assert not steady.may_be(torch.full_like(logits, torch.nan), 0)
    doubtful = _Own([logits], lambda: [logits - 1])
    assert doubtful.may_be(wrong, 0) and doubtful.last_near is None


def test_rounded_weights_may_move_logits_as_far_as_rounded_embeddings() -> None:
    logits = torch.tensor([[1.0, -2.0, 4.0]])
    made = []

    def make_nudged() -> list[torch.Tensor]:
        made.append(1)
        return [logits + 0.4]  # a tenth of the largest

    own = _Own([logits], make_nudged)
    assert own.differs_by_rounding(logits - 0.1, 0) and not made
    assert own.differs_by_rounding(logits - 0.4, 0)
    assert not own.differs_by_rounding(logits - 0.5, 0)
    assert not own.differs_by_rounding(torch.full_like(logits, torch.nan), 0)
    assert len(made) == 1


def test_prompts_are_compared_up_to_a_token_that_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the last one does not; a prompt that is wrong is found out all the same."""
    asked = _Own.may_be
    monkeypatch.setattr(_Own, "may_be", lambda own, found, at: at == 3 or asked(own, found, at))
    network, _ = prepared(load("llama"))
    assert network.prompt_reason == ""
    run = FusedNetwork._run_prompt
    monkeypatch.setattr(FusedNetwork, "_run_prompt", lambda *args: 2 + run(*args))
    network, _ = prepared(load("llama"))
    assert network.prompt_reason == "a prompt gives other logits there"


def test_where_every_token_hangs_on_rounding_nothing_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nudged = FusedNetwork._nudged_logits
    moved = lambda network, ids: [2 + 9 * row for row in nudged(network, ids)]  # noqa: E731
    monkeypatch.setattr(FusedNetwork, "_nudged_logits", moved)
    prepared(load("llama"))  # whose kernels are right: nobody asks
    model = load("llama")
    model.model.norm.forward = lambda x: x * 0 + x.flip(-1)
    with pytest.raises(CaptureFailed, match="hang on rounding"):
        prepared(model)


def test_nudges_are_as_small_as_rounding() -> None:
    model = load("llama")
    network, _ = prepared(model)
    ids = torch.arange(1, 5)[None]
    own, nudged = network._own_logits(ids), network._nudged_logits(ids)
    for before, after in zip(own, nudged, strict=True):
        assert not torch.equal(before, after)
        assert (before - after).abs().max() <= TOLERANCES["nf4-dq"] * before.abs().max()
    assert torch.equal(network._own_logits(ids)[-1], own[-1])  # and are gone afterwards


def test_nudges_are_for_their_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may run the model meanwhile."""
    network, _ = prepared(load("llama"))
    ids = torch.arange(1, 5)[None]
    real = network._own_logits
    expected, elsewhere = real(ids), list[Tensor]()

    def also_elsewhere(tokens: Tensor) -> list[Tensor]:
        with ThreadPoolExecutor(1) as other:
            elsewhere.extend(other.submit(torch.inference_mode()(real), tokens).result())
        return real(tokens)

    monkeypatch.setattr(network, "_own_logits", also_elsewhere)
    nudged = network._nudged_logits(ids)
    assert all(map(torch.equal, elsewhere, expected)) and len(elsewhere) == len(expected)
    assert not any(map(torch.equal, nudged, expected))


def test_a_build_without_windows_takes_no_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtool.runtime.decoders import fused_prompt
    from tests.runtime.decoders import cpu_launches

    def without_windows(*tensors: Tensor, scale: float, window: int) -> Tensor:
        return cpu_launches.flash_attention(*tensors, scale=scale, window=0)

    monkeypatch.setattr(fused_prompt, "flash_attention", without_windows)
    network, _ = prepared(load("gemma3_text"))
    assert "no windows" in network.prompt_reason
    network, _ = prepared(load("gemma3_text", sliding_window=CAPACITY))
    assert not network.prompt_reason


# -- what holds the cache -------------------------------------------------------------------------


@pytest.fixture
def references_count() -> Iterator[None]:
    """What is not freed by counting them is not freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# The latter two have norms of what is added, and gemma2 no fused prompt.
@pytest.mark.usefixtures("references_count")
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text"])
def test_close_gives_the_cache_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "GraphCapture", lambda device: run_again)
    model = load(name)
    cache = fixed_cache(model.config, CAPACITY)
    decoder = make_fused_decoder(
        as_loaded(model), cache, capacity=CAPACITY, batch=1, prefill_chunk=CHUNK
    )
    decoder.prefill(tokens(1, PROMPT_TOKENS), 0)
    assert len(list(decoder.decode(Sampling(), STEPS))) == STEPS
    held = weakref.ref(cache), weakref.ref(cache.layers[-1].keys)
    del cache
    assert all(it() is not None for it in held)
    decoder.close()
    assert [it() for it in held] == [None, None]
    with pytest.raises(QtoolError, match="do not go into a cache of 0"):
        decoder.prefill(tokens(1, PROMPT_TOKENS), 0)


@pytest.mark.usefixtures("references_count")
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text"])
def test_the_next_path_begins_without_the_cache_of_this_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the fused step cannot be recorded; both may not fit."""
    layers: list[Any] = []  # the last of each cache

    def make_cache(config: Any, capacity: int) -> Any:
        assert all(layer() is None for layer in layers)
        cache: Any = fixed_cache(config, capacity)
        layers.append(weakref.ref(cache.layers[-1]))
        return cache

    def record(*args: Any, **kwargs: Any) -> Any:
        if len(layers) == 1:
            raise CaptureFailed("no recording")
        return run_again(*args, **kwargs)

    loaded = as_loaded(load(name))
    object.__setattr__(loaded, "device", torch.device("cuda", 0))
    monkeypatch.setattr(choose, "fixed_cache", make_cache)
    monkeypatch.setattr(choose, "_network", lambda wish: Network(wish.loaded.model, CHUNK))
    monkeypatch.setattr(fused, "why_not_fused", lambda loaded, batch: None)
    monkeypatch.setattr(graphed, "GraphCapture", lambda device: record)
    decoder = choose_decoder(loaded, CAPACITY)
    assert (decoder.path, len(layers)) == ("graph", 2)
    assert "no fused kernels: no recording" in decoder.path_reason
