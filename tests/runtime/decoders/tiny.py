"""Tiny random models of many types, and decoders over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import islice
from typing import Any

import torch
import transformers

from qtool.architecture import build_architecture
from qtool.runtime.decoders.caches import fixed_cache
from qtool.runtime.decoders.eager import EagerDecoder
from qtool.runtime.decoders.graphed import GraphDecoder
from qtool.runtime.decoders.network import Network
from qtool.runtime.decoders.protocol import Decoder, Sampling
from qtool.runtime.loading import LoadedModel
from qtool.runtime.memory import DeviceMemory
from tests.architecture import oracle
from tests.architecture.families import TINY

CAPACITY = 64
PROMPT = [7, 3, 11, 30, 2, 19, 5, 23, 14, 8, 27]  # longer than the windows of tiny models
NUM_NEW = 12


@cache
def tiny_model(model_type: str, device: str = "cpu") -> Any:
    """The model of `model_type` that all tests share."""
    return make_tiny_model(model_type).to(device)


def make_tiny_model(model_type: str, **changes: Any) -> Any:
    """One in float32 on the CPU whose greedy texts do not repeat a single token."""
    config = {"model_type": model_type, **TINY[model_type], **changes}
    class_name = build_architecture(config).class_name
    model = oracle.build_model(config, class_name, device="cpu").eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3, generator=generator)
    model.generation_config = transformers.GenerationConfig()
    return model


@cache
def expected_tokens(model_type: str) -> list[int]:
    """What transformers' own loop makes of PROMPT with the shared model."""
    return transformers_tokens(tiny_model(model_type))


def transformers_tokens(model: Any) -> list[int]:
    """The same with any model on the CPU."""
    ids = torch.tensor([PROMPT])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_NEW,
        do_sample=False,
        pad_token_id=0,
    )
    return made[0, len(PROMPT) :].tolist()


def as_loaded(model: Any) -> LoadedModel:
    """`model` as if it had been loaded, without a tokenizer."""
    device = model.get_input_embeddings().weight.device
    return LoadedModel(
        model=model,
        tokenizer=None,
        eos_token_ids=(),
        max_context=None,
        num_packed_layers=0,
        load_s=0.0,
        device=device,
        devices=str(device),
        memory=DeviceMemory(device),
        _offloaded=ExitStack(),
    )


def run_again(
    step: Callable[[], Any], *, warm_up: Callable[[], Any], generator: torch.Generator
) -> Callable[[], None]:
    """Stands for a graph where there is no GPU: the step itself, run each time."""
    warm_up()

    @torch.inference_mode()
    def replay() -> None:
        step()

    return replay


def eager_decoder(model: Any, *, chunk: int = 512, batch: int = 1) -> Decoder:
    network = Network(model, chunk)
    return EagerDecoder(network, capacity=CAPACITY, batch=batch, reason="a test")


def graph_decoder(model: Any, *, chunk: int = 512, batch: int = 1) -> Decoder:
    """With a recorded graph on a GPU, and the step itself elsewhere."""
    network = Network(model, chunk)
    kept = fixed_cache(model.config, CAPACITY)
    assert kept is not None
    capture = None if network.device.type == "cuda" else run_again
    return GraphDecoder(network, kept, capacity=CAPACITY, batch=batch, capture=capture)


def decode(
    decoder: Decoder, ids: Sequence[int], start: int = 0, *, num: int = NUM_NEW, **how: Any
) -> list[int]:
    """The tokens after `ids` at `start`."""
    decoder.prefill(torch.tensor([list(ids)]), start)
    return [token for (token,) in decoder.decode(Sampling(**how), num)]


def break_off(decoder: Decoder, ids: Sequence[int], num: int) -> list[int]:
    """The first tokens of a longer text that nobody reads to its end."""
    decoder.prefill(torch.tensor([list(ids)]), 0)
    tokens = decoder.decode(Sampling(), NUM_NEW)
    return [token for (token,) in islice(tokens, num)]
