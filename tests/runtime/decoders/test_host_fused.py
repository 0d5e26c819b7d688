"""The compiled step on the processor: what transformers' operations make, kind by kind."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from torch import nn

from qtool.backends import cpu_attention, cpu_step
from qtool.runtime.decoders import host_fused, host_warm_up
from qtool.runtime.decoders.blocks import NotFusable
from qtool.runtime.decoders.choose import DecoderOptions, choose_decoder
from qtool.runtime.decoders.host_fused import HostNetwork, make_host_decoder, step_cache
from qtool.runtime.decoders.host_warm_up import warm_up_step
from qtool.runtime.decoders.protocol import Sampling
from qtool.runtime.linear import Int8Layer, Linear4bit, LinearInt8
from qtool.runtime.loading import LoadedModel, LoadOptions, load_model
from qtool.runtime.random_model import build_random_model
from tests.runtime.decoders.common_blocks import BASE, MODELS

CAPACITY = 128
NUM_TOKENS = 100  # the cache grows once, and windows slide
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 0.03}
DTYPES = list(TOLERANCE)


def load(name: str = "llama", quant: str = "nf4-dq", **changes: Any) -> LoadedModel:
    config = BASE | MODELS[name] | changes
    return build_random_model(config, quant, device="cpu", model_id=name)  # type: ignore[arg-type]


def make(loaded: LoadedModel, path: str = "fused", capacity: int = CAPACITY) -> Any:
    options = DecoderOptions(path=path, prefill_chunk=48)  # type: ignore[arg-type]
    return choose_decoder(loaded, capacity, options=options)


def tokens(num: int = NUM_TOKENS) -> torch.Tensor:
    return torch.randint(0, 1000, (1, num), generator=torch.Generator().manual_seed(3))


def text(decoder: Any, ids: torch.Tensor, num: int = 20, start: int = 0, **how: Any) -> list[int]:
    decoder.prefill(ids, start)
    return [token for (token,) in decoder.decode(Sampling(**how), num)]


def worst_difference(model: Any, ids: torch.Tensor, *, prompt: int = 3) -> float:
    """Of logits after each token, of the largest of those of the model's own operations."""
    network = HostNetwork(model, 512, capacity=ids.shape[1])
    cache = step_cache(model.config)
    with torch.inference_mode():
        expected = model(input_ids=ids).logits[0].float()
        network.prefill(ids[:, :prompt], 0, cache, in_chunks=True)
        worst = 0.0
        for at in range(prompt, ids.shape[1]):
            found = network.step(int(ids[0, at]), at, cache)[0]
            assert torch.isfinite(found).all()
            worst = max(worst, float((found - expected[at]).abs().max() / expected[at].abs().max()))
    return worst


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant", ["nf4-dq", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model(name: str, quant: str, dtype: torch.dtype) -> None:
    model = load(name, quant).model.to(dtype)
    assert worst_difference(model, tokens()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant", ["nf4", "fp4-dq", "bf16", "fp32"])
def test_logits_are_those_of_the_model_in_other_formats(quant: str, dtype: torch.dtype) -> None:
    model = load(quant=quant).model.to(dtype)
    assert worst_difference(model, tokens()) <= TOLERANCE[dtype]


def test_rows_that_are_no_whole_pairs() -> None:
    """Of which the processor multiplies single values then."""
    model = load(hidden_size=192, intermediate_size=320, num_key_value_heads=4).model
    assert worst_difference(model, tokens()) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("name", ["llama", "mistral with a window"])
def test_a_long_text_is_attended_to_strip_by_strip(name: str) -> None:
    model = load(name, num_hidden_layers=1, max_position_embeddings=2048).model.to(torch.float32)
    ids = tokens(1100)
    assert worst_difference(model, ids, prompt=500) <= TOLERANCE[torch.float32]


def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtool.runtime.decoders.host_step.MIN_ELEMENTS_PER_THREAD", 1)
    model, ids = load().model, tokens(40)
    before, logits = torch.get_num_threads(), []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            network, cache = HostNetwork(model, 512, capacity=64), step_cache(model.config)
            with torch.inference_mode():
                network.prefill(ids[:, :3], 0, cache, in_chunks=True)
                steps = [network.step(int(ids[0, at]), at, cache).clone() for at in range(3, 40)]
            logits.append(torch.cat(steps))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*logits)


# -- the decoder --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral with a window", "gemma2"])
def test_greedy_texts_are_those_of_the_model(name: str) -> None:
    loaded = load(name)
    loaded.model.to(torch.float32)
    decoder = make(loaded)
    assert (decoder.path, decoder.can_rewind) == ("fused", True)
    assert decoder.path_reason == host_fused.REASON
    expected = text(make(loaded, "eager"), tokens(50), 60)
    assert text(decoder, tokens(50), 60) == expected
    assert text(decoder, tokens(1), 30) == text(make(loaded, "eager"), tokens(1), 30)


def test_the_processor_takes_it_by_itself() -> None:
    assert choose_decoder(load(), 64).path == "fused"


def test_a_text_that_was_broken_off_goes_on_from_the_cache() -> None:
    decoder = make(load())
    first = text(decoder, tokens(70), 10)
    decoder.prefill(tokens(70), 0)
    assert [token for (token,) in islice(decoder.decode(Sampling(), 40), 10)] == first
    decoder.prefill(tokens(70)[:, 40:], 40)
    assert [token for (token,) in decoder.decode(Sampling(), 10)] == first
    # What was made is the start of the next prompt, as in a chat.
    both = torch.cat([tokens(70), torch.tensor([first])], dim=1)
    again = text(decoder, both[:, 75:], 10, start=75)
    assert text(make(decoder_model(decoder)), both, 10) == again
    decoder.close()
    assert text(decoder, tokens(70), 10) == first


def test_a_long_prompt_moves_the_cache_and_a_short_one_goes_back() -> None:
    decoder = make(load())
    text(decoder, tokens(20).flip(1))  # steps know where these are
    decoder.prefill(tokens(100), 0)
    decoder.prefill(tokens(20)[:, 5:], 5)
    assert [token for (token,) in decoder.decode(Sampling(), 20)] == text(make(load()), tokens(20))


def decoder_model(decoder: Any) -> LoadedModel:
    from tests.runtime.decoders.tiny import as_loaded

    return as_loaded(decoder._network.model)


def test_a_text_ends_where_the_cache_is_full() -> None:
    decoder = make(load(), capacity=64)
    assert len(text(decoder, tokens(60), 20)) == 5


def test_sampling_with_a_seed_repeats() -> None:
    decoder = make(load())
    how = {"temperature": 1.0, "top_k": 50, "seed": 7}
    first = text(decoder, tokens(20), **how)
    assert text(decoder, tokens(20), **how) == first
    assert text(decoder, tokens(20), **how | {"seed": 8}) != first


def test_pytorch_keeps_its_threads() -> None:
    before = torch.get_num_threads()
    text(make(load()), tokens(5))
    assert torch.get_num_threads() == before


# -- what it does not do ------------------------------------------------------------------------


def test_what_is_not_fused_says_why() -> None:
    def refusal(loaded: LoadedModel, batch: int = 1) -> str:
        decoder = choose_decoder(loaded, 64, batch)
        assert decoder.path == "eager"
        return decoder.path_reason.partition(";")[0]

    assert refusal(load(), 2) == "the fused step takes one sequence, not 2"
    loaded = load(quant="fp16")
    assert refusal(loaded) == "the fused step computes in float32 or bfloat16, not float16"
    assert refusal(load(intermediate_size=96)) == "a layer of 96 columns does not fit the step"
    loaded = load()
    loaded.model.model.layers[1].mlp.down_proj = nn.Sequential()
    assert refusal(loaded) == "a layer is torch's Sequential"
    loaded = load()
    loaded.model.model.layers[0].mlp.down_proj.compute_dtype = torch.float16
    assert refusal(loaded) == (
        "layers compute in float16, activations are bfloat16: choose float16 as the compute "
        "dtype of both"
    )
    loaded = load()
    loaded.model.model.rotary_emb.rope_type = "dynamic"
    assert refusal(loaded) == "dynamic rotary embedding changes with the length of the text"
    loaded = load()
    loaded.model.model.layers[2].self_attn.o_proj._hf_hook = object()
    assert refusal(loaded) == "a layer is not in memory"
    loaded = load()
    loaded.model.config.model_type = "gpt2"
    assert refusal(loaded) == "gpt2 blocks have no fused step"


def test_other_logits_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load()
    own = HostNetwork._own_logits

    def others(network: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        logits = own(network, ids, cache)
        logits[2] += 0.1 * logits[2].abs().max()
        return logits

    monkeypatch.setattr(HostNetwork, "_own_logits", others)
    with pytest.raises(NotFusable, match="the fused step gives other logits at token 2"):
        make_host_decoder(loaded, capacity=64, prefill_chunk=512)


# -- trained models -----------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq", "fp4", "int8"])
@pytest.mark.parametrize("name", ["tinylm-19m", "TinyStories-656K-hf", "stories260K-hf"])
def test_greedy_texts_are_those_of_the_dequantized_model(
    models: Any, name: str, quant: str
) -> None:
    """64 tokens in float32; a model with layers that do not fit takes another path."""
    options = LoadOptions(quant=quant, compute_dtype="float32", device="cpu")  # type: ignore[arg-type]
    ids = torch.tensor([[5, 17, 30, 42, 8]])
    with load_model(str(models / name), options) as loaded:
        decoder = choose_decoder(loaded, 128)
        assert decoder.path == ("eager" if name == "stories260K-hf" else "fused")
        made = text(decoder, ids, 64)
        for parent in list(loaded.model.modules()):
            for child, layer in list(parent.named_children()):
                if isinstance(layer, Linear4bit | LinearInt8):
                    plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
                    plain.weight = nn.Parameter(layer.dequantize().float())
                    plain.bias = layer.bias
                    setattr(parent, child, plain)
        assert text(make(loaded, "eager"), ids, 64) == made


# -- making it ready ----------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["nf4-dq", "int8", "bf16"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3"])
def test_what_is_made_ready_is_what_steps_take(
    name: str, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is compiled by the first step that loading did not compile."""
    loaded = load(name, quant)
    modules = loaded.model.named_modules()
    layers = {
        path: module.layer if isinstance(module, Linear4bit) else Int8Layer(*module.weight.shape)
        for path, module in modules
        if isinstance(module, Linear4bit | LinearInt8)
    }
    for factory in (cpu_attention.attention_operator, cpu_step.products_operator):
        factory.cache_clear()
    warm_up_step(loaded.model.config, layers, torch.bfloat16)

    def compile_it(function: Any) -> Any:
        raise AssertionError(f"{function.__qualname__} was not compiled before")

    for module in (cpu_attention, cpu_step):
        monkeypatch.setattr(module, "operator", compile_it)
    make(loaded)


def test_nothing_is_made_ready_for_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_warm_up, "operator_for", None)
    config = load().model.config
    warm_up_step(config, {}, torch.float16)
    config.model_type = "gpt2"
    warm_up_step(config, {}, torch.bfloat16)
