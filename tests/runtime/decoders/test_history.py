"""A decoder across prompts: what runs again, and how it grows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import pytest
import torch

from qtool.runtime.decoders import history
from qtool.runtime.decoders.history import History
from qtool.runtime.decoders.protocol import Sampling
from tests.runtime.decoders.tiny import (
    NUM_NEW,
    PROMPT,
    as_loaded,
    decode,
    eager_decoder,
    expected_tokens,
    tiny_model,
)


@pytest.fixture(params=["llama", "gemma3_text", "qwen3_next"])
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Forwards:
    """Counts the tokens that go through a model."""

    def __init__(self, model: Any) -> None:
        self.num_tokens = 0
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.num_tokens += kwargs["input_ids"].shape[1]

    def close(self) -> None:
        self._hook.remove()


@pytest.fixture
def forwards(model_type: str) -> Iterator[Forwards]:
    with closing(Forwards(tiny_model(model_type))) as counter:
        yield counter


def test_a_conversation_runs_only_what_is_new(model_type: str, forwards: Forwards) -> None:
    with History(as_loaded(tiny_model(model_type))) as texts:
        answer = list(texts.answer(PROMPT, Sampling(), NUM_NEW))
        assert answer == expected_tokens(model_type)
        longer = [*PROMPT, *answer, 4, 9, 31]
        forwards.num_tokens = 0
        second = list(texts.answer(longer, Sampling(), NUM_NEW))
        held = len(PROMPT) + NUM_NEW - 1
        assert texts.num_run == len(longer) - held == 4
        assert forwards.num_tokens == 4 + NUM_NEW - 1
    assert second == decode(eager_decoder(tiny_model(model_type)), longer)


def test_an_answer_that_was_broken_off_is_in_the_cache(model_type: str) -> None:
    with History(as_loaded(tiny_model(model_type))) as texts:
        with closing(texts.answer(PROMPT, Sampling(), NUM_NEW)) as tokens:
            begun = list(islice(tokens, 4))
        rest = list(texts.answer([*PROMPT, *begun], Sampling(), NUM_NEW - 4))
        assert texts.num_run == 1
    assert begun + rest == expected_tokens(model_type)


def test_another_text_runs_from_where_it_differs() -> None:
    with History(as_loaded(tiny_model("llama"))) as texts:
        list(texts.answer([*PROMPT[:6], 1, 1, 1], Sampling(), 3))
        assert list(texts.answer(PROMPT, Sampling(), NUM_NEW)) == expected_tokens("llama")
        assert texts.num_run == len(PROMPT) - 6


def test_the_same_prompt_runs_its_last_token() -> None:
    with History(as_loaded(tiny_model("llama"))) as texts:
        for _ in range(2):
            assert list(texts.answer(PROMPT, Sampling(), NUM_NEW)) == expected_tokens("llama")
        assert texts.num_run == 1


def test_where_nothing_rewinds_another_text_runs_whole() -> None:
    with History(as_loaded(tiny_model("qwen3_next"))) as texts:
        list(texts.answer([*PROMPT[:6], 1, 1, 1], Sampling(), 3))
        assert list(texts.answer(PROMPT, Sampling(), NUM_NEW)) == expected_tokens("qwen3_next")
        assert texts.num_run == len(PROMPT)


def test_an_interrupted_prefill_leaves_nothing_to_reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    with History(as_loaded(tiny_model("llama"))) as texts:
        expected = list(texts.answer(PROMPT, Sampling(), NUM_NEW))
        decoder = texts.decoder_for(1)

        def interrupt(input_ids: torch.Tensor, start: int) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(decoder, "prefill", interrupt)
            with pytest.raises(KeyboardInterrupt):
                list(texts.answer([*PROMPT, 1, 2], Sampling(), 3))
        assert list(texts.answer(PROMPT, Sampling(), NUM_NEW)) == expected
        assert texts.num_run == len(PROMPT)


def test_capacity_doubles_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = history.choose_decoder

    def choose(loaded: Any, capacity: int, **options: Any) -> Any:
        made.append(capacity)
        return real(loaded, capacity, **options)

    monkeypatch.setattr(history, "choose_decoder", choose)
    with History(as_loaded(tiny_model("llama")), min_capacity=128, max_capacity=448) as texts:
        for num_tokens in (20, 128, 129, 250, 300, 448):
            assert texts.decoder_for(num_tokens).capacity >= num_tokens
    assert made == [128, 256, 448]
    made.clear()
    with History(as_loaded(tiny_model("llama"))) as texts:
        texts.decoder_for(100)
    assert made == [100]
