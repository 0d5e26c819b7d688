"""A decoder across prompts: what runs again, and how it grows."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any

import pytest
import torch

from qtool.errors import QtoolError
from qtool.runtime.decoders import history
from qtool.runtime.decoders.choose import DecoderOptions
from qtool.runtime.decoders.history import History, KeptHistory
from qtool.runtime.decoders.protocol import Sampling
from tests.runtime.decoders.tiny import (
    NUM_NEW,
    PROMPT,
    as_loaded,
    decode,
    eager_decoder,
    expected_tokens,
    graph_decoder,
    make_tiny_model,
    tiny_model,
    transformers_tokens,
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


def test_where_doubling_does_not_fit_the_text_alone_may(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = history.choose_decoder

    def choose(loaded: Any, capacity: int, **options: Any) -> Any:
        made.append(capacity)
        if capacity > limit:
            raise QtoolError("too large", kind="memory", hint="none")
        return real(loaded, capacity, **options)

    monkeypatch.setattr(history, "choose_decoder", choose)
    with History(as_loaded(tiny_model("llama"))) as texts:
        limit = 150
        texts.decoder_for(100)
        texts.decoder_for(140)
        assert made == [100, 256, 140]
        with pytest.raises(QtoolError, match="too large"):
            texts.decoder_for(200)


def test_nothing_is_reused_of_a_text_that_is_forgotten() -> None:
    with History(as_loaded(tiny_model("llama"))) as texts:
        expected = list(texts.answer(PROMPT, Sampling(), NUM_NEW))
        texts.forget()
        assert list(texts.answer(PROMPT, Sampling(), NUM_NEW)) == expected
        assert texts.num_run == len(PROMPT)


# -- kept with a model ----------------------------------------------------------------------------

OPTIONS = DecoderOptions()


class Kept:
    """A model of its own, what it keeps, and which decoders are made for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model_type: str = "llama") -> None:
        self.model = make_tiny_model(model_type)
        self.histories = KeptHistory()
        self.num_made = 0
        real = history.choose_decoder

        def choose(*arguments: Any, **options: Any) -> Any:
            self.num_made += 1
            return real(*arguments, **options)

        monkeypatch.setattr(history, "choose_decoder", choose)

    def tokens(self, num_tokens: int = NUM_NEW, options: DecoderOptions = OPTIONS) -> list[int]:
        with self.histories.borrow(as_loaded(self.model), options) as texts:
            tokens = list(texts.answer(PROMPT, Sampling(), num_tokens))
            assert texts.num_run == len(PROMPT)  # what runs never depends on what ran before
            return tokens


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    return Kept(monkeypatch)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_next"])
def test_a_kept_decoder_makes_the_same_text_again(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept(monkeypatch, model_type)
    assert kept.tokens() == kept.tokens() == transformers_tokens(kept.model)
    assert kept.num_made == 1


def test_it_is_made_again_for_more_or_for_other_options(kept: Kept) -> None:
    kept.tokens()
    kept.tokens(3 * 64)
    assert kept.num_made == 2
    kept.tokens()
    assert kept.num_made == 2
    kept.tokens(options=DecoderOptions(prefill_chunk=3))
    assert kept.num_made == 3


def test_it_follows_the_variable_for_the_path(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.tokens()
    monkeypatch.setenv("QTOOL_PATH", "eager")
    kept.tokens()
    assert kept.num_made == 2


def test_it_is_made_again_where_the_model_changed(kept: Kept) -> None:
    kept.tokens()
    weight = kept.model.lm_head.weight
    kept.model.lm_head.weight = torch.nn.Parameter(-weight.detach())
    assert kept.tokens() != expected_tokens("llama")
    assert kept.num_made == 2
    kept.model.lm_head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    kept.tokens()
    assert kept.num_made == 3


def test_texts_that_overlap_have_decoders_of_their_own(kept: Kept) -> None:
    loaded = as_loaded(kept.model)
    expected = expected_tokens("llama")
    with kept.histories.borrow(loaded, OPTIONS) as one:
        first = one.answer(PROMPT, Sampling(), NUM_NEW)
        begun = [next(first)]
        with kept.histories.borrow(loaded, OPTIONS) as other:
            assert list(other.answer(PROMPT, Sampling(), NUM_NEW)) == expected
        assert [*begun, *first] == expected
    assert kept.num_made == 2
    kept.tokens()
    assert kept.num_made == 2


def test_threads_do_not_disturb_each_other(kept: Kept) -> None:
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: kept.tokens(), range(12)))
    assert found == [expected_tokens("llama")] * 12


class Stream:
    """Stands for the current stream of a GPU, and says what is queued on it; and for an event."""

    def __init__(self, name: str, queued: list[str]) -> None:
        self.name, self.queued = name, queued

    def record_event(self) -> Stream:
        self.queued.append(f"the end on {self.name}")
        return self

    def wait_event(self, event: Stream) -> None:
        self.queued.append(f"{self.name} waits for {event.name}")

    def synchronize(self) -> None:
        self.queued.append(f"the host waits for {self.name}")


def test_a_stream_waits_for_the_one_before(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a text was broken off, steps that nobody reads still write the cache."""
    loaded, queued = as_loaded(kept.model), list[str]()
    monkeypatch.setattr(history, "choose_decoder", lambda *_, **__: eager_decoder(kept.model))
    object.__setattr__(loaded, "device", torch.device("cuda", 0))
    hook = kept.model.register_forward_pre_hook(lambda *_: queued.append("a step"))

    def enter(name: str) -> None:
        stream = Stream(name, queued)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)

    for name in "abb":
        enter(name)
        with kept.histories.borrow(loaded, OPTIONS) as texts:
            next(texts.answer(PROMPT, Sampling(), NUM_NEW))
            enter("the default")  # where a text is closed may be anywhere
    first = ["a step", "the end on a"]
    second = ["b waits for a", "a step", "the end on b"]
    assert queued == [*first, *second, "b waits for b", *second[1:]]

    queued.clear()
    with kept.histories.borrow(loaded, OPTIONS):
        kept.histories.release()  # is borrowed
    kept.histories.release()
    left = ["the default waits for b", "the end on the default", "the host waits for the default"]
    assert queued == left
    hook.remove()


def test_after_an_error_nothing_is_kept(kept: Kept) -> None:
    with (
        pytest.raises(RuntimeError),
        kept.histories.borrow(as_loaded(kept.model), OPTIONS) as texts,
    ):
        texts.decoder_for(64)
        raise RuntimeError
    assert kept.tokens() == expected_tokens("llama")
    assert kept.num_made == 2


@pytest.mark.parametrize("make", [eager_decoder, graph_decoder])
def test_what_is_kept_goes_with_the_model(
    make: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, histories = make_tiny_model("llama"), KeptHistory()
    monkeypatch.setattr(
        history, "choose_decoder", lambda loaded, *_arguments, **_options: make(loaded.model)
    )
    with histories.borrow(as_loaded(model), OPTIONS) as texts:
        list(texts.answer(PROMPT, Sampling(), NUM_NEW))
        decoder = weakref.ref(texts.decoder_for(1))
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()  # counting references has to do
    try:
        del model
        assert gone() is None
        assert decoder() is not None
        del texts, histories
        if make is eager_decoder:  # a stand-in for a graph refers to its decoder
            assert decoder() is None
    finally:
        gc.enable()


def test_a_copy_of_it_keeps_nothing(kept: Kept) -> None:
    kept.tokens()
    kept.histories = copy.deepcopy(kept.histories)
    kept.tokens()
    assert kept.num_made == 2
