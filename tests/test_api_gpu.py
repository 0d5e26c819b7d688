"""`qtool.stream` on a GPU: what is kept between calls, and that it goes."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import qtool
from qtool.resources import demo_model_path
from qtool.runtime.decoders import history

pytestmark = pytest.mark.gpu

PROMPT = "ROMEO:"
PATHS = ("fused", "graph", "eager")


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every decoder that is made, by its path."""
    made: list[Any] = []
    real = history.choose_decoder

    def choose(*arguments: Any, **options: Any) -> Any:
        decoder = real(*arguments, **options)
        made.append(decoder.path)
        return decoder

    monkeypatch.setattr(history, "choose_decoder", choose)
    return made


def load() -> Any:
    return qtool.load(demo_model_path(), quant="nf4-dq", device="cuda")


def text(model: Any, **options: Any) -> str:
    return "".join(qtool.stream(model, PROMPT, **{"max_new_tokens": 24} | options))


@pytest.mark.parametrize("path", PATHS)
def test_a_kept_decoder_makes_the_same_text_again(path: str, decoders: list[Any]) -> None:
    if path == "fused":
        pytest.importorskip("cupy")
    model = load()
    first = text(model, path=path)
    text(model, path=path, temperature=1.0, seed=1)
    begun = qtool.stream(model, PROMPT, max_new_tokens=24, path=path)
    next(begun)
    begun.close()  # type: ignore[attr-defined]
    assert text(model, path=path) == first
    assert decoders == [path]
    sampled = {text(model, path=path, temperature=1.0, seed=7) for _ in range(3)}
    assert len(sampled) == 1
    assert decoders == [path]


def test_texts_overlap(decoders: list[Any]) -> None:
    model = load()
    expected = text(model)
    pieces = [qtool.stream(model, PROMPT, max_new_tokens=24) for _ in range(2)]
    texts = ["".join(parts) for parts in zip(*zip(*pieces, strict=True), strict=True)]
    assert texts == [expected] * 2
    assert len(decoders) == 2


@pytest.mark.parametrize("path", PATHS)
def test_threads_begin_at_once(path: str, decoders: list[Any]) -> None:
    """Each with a decoder of its own, whose graph is recorded while the other makes its own."""
    if path == "fused":
        pytest.importorskip("cupy")
    model = load()
    expected = text(model, path=path)
    rounds = 3
    for _ in range(rounds):
        qtool.release(model)
        begin = threading.Barrier(2)

        def make_text(_: int, begin: threading.Barrier = begin) -> str:
            begin.wait()
            return text(model, path=path)

        with ThreadPoolExecutor(2) as threads:
            assert list(threads.map(make_text, range(2))) == [expected] * 2
    assert set(decoders) == {path}
    assert len(decoders) > rounds + 1, "no two overlapped"


@pytest.mark.parametrize("path", ("fused", "graph"))
def test_another_stream_waits_for_steps_that_nobody_reads(path: str, decoders: list[Any]) -> None:
    if path == "fused":
        pytest.importorskip("cupy")
    model = load()
    expected = text(model, path=path)
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(one):
        begun = qtool.stream(model, "Once", max_new_tokens=24, path=path)
        for _ in range(3):
            next(begun)
        torch.cuda._sleep(1 << 30)  # half a second or so, many times what a text takes
        next(begun)  # launches steps behind it
        begun.close()  # type: ignore[attr-defined]
        late = one.record_event()
    assert not late.query(), "the steps are through already"
    with torch.cuda.stream(other):
        assert text(model, path=path) == expected
    assert late.query(), "it did not wait"
    assert decoders == [path]


@pytest.mark.parametrize("path", PATHS)
def test_weights_that_moved_are_not_read_where_they_were(path: str, decoders: list[Any]) -> None:
    if path == "fused":
        pytest.importorskip("cupy")
    model = load()
    before = text(model, path=path)
    head = model.lm_head
    head.weight = torch.nn.Parameter(-head.weight.detach(), requires_grad=False)
    assert text(model, path=path) != before
    head.weight = torch.nn.Parameter(-head.weight.detach(), requires_grad=False)
    assert text(model, path=path) == before
    assert len(decoders) >= 2


@pytest.mark.parametrize("path", PATHS)
def test_memory_comes_back(path: str) -> None:
    if path == "fused":
        pytest.importorskip("cupy")
    text(load(), path=path)  # workspaces of libraries stay
    gc.collect()
    empty = torch.cuda.memory_allocated()
    model = load()
    loaded = torch.cuda.memory_allocated()
    text(model, path=path, max_new_tokens=400)
    assert torch.cuda.memory_allocated() > loaded
    qtool.release(model)
    assert torch.cuda.memory_allocated() == loaded
    text(model, path=path)
    del model
    assert torch.cuda.memory_allocated() == empty
