"""Generation: the text, why it stops, sampling, limits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.errors import QtoolError
from qtool.runtime.answers import Request, answer, open_history, uses_chat
from qtool.runtime.decoders.history import CHAT_CAPACITY, History
from qtool.runtime.generate import Generation, Limits, Sampling, generate, process_age_s
from qtool.runtime.loading import LoadedModel, LoadOptions, load_model
from qtool.runtime.prompts import Conversation, encode_text

# What llama2.c's README and tests give for stories260K at temperature 0.
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\""
)
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def stories(test_data: Path) -> LoadedModel:
    folder = test_data / "models" / "stories260K-hf"
    return load_model(str(folder), LoadOptions(device="cpu"))


@pytest.fixture(scope="module")
def chatty(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The same model with a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(test_data / "models" / "stories260K-hf", folder, copy_function=shutil.copyfile)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return load_model(str(folder), LoadOptions(device="cpu"))


def run(loaded: LoadedModel, prompt: str, sampling: Sampling | None = None, **limits: Any) -> Any:
    ids = encode_text(loaded.tokenizer, prompt)
    chosen = Limits(**{"max_new_tokens": 12} | limits)
    return generate(loaded, ids, sampling or Sampling(), chosen)


def request(**changes: Any) -> Request:
    fields = {"model": "m", "chat": None, "system": None, "sampling": Sampling()}
    return Request(**fields | {"limits": Limits(8)} | changes)


def test_greedy_text_is_the_published_one(stories: LoadedModel) -> None:
    pieces: list[str] = []
    ids = encode_text(stories.tokenizer, "Once upon a time")
    result = generate(stories, ids, Sampling(), Limits(99), write=pieces.append)
    assert ("Once upon a time" + result.text).startswith(STORY)
    assert "".join(pieces) == result.text
    assert len(pieces) > 50, "the text must come in pieces, not at the end"
    assert result.prompt_tokens == len(ids)
    assert len(result.token_ids) == 99
    assert result.stop_reason == "length"


def test_greedy_tokens_are_the_argmax_of_each_step(stories: LoadedModel) -> None:
    ids = encode_text(stories.tokenizer, "Tim had a")
    result = generate(stories, ids, Sampling(), Limits(16))
    with torch.inference_mode():
        for token_id in result.token_ids:
            logits = stories.model(torch.tensor([ids])).logits[0, -1]
            assert int(logits.argmax()) == token_id
            ids = [*ids, token_id]


def test_text_is_written_while_tokens_are_made(stories: LoadedModel) -> None:
    """Each piece arrives before the model computes the next token."""
    events: list[str] = []
    hook = stories.model.register_forward_pre_hook(lambda *_: events.append("forward"))
    ids = encode_text(stories.tokenizer, "Once upon a time")
    generate(stories, ids, Sampling(), Limits(6), write=lambda piece: events.append("text"))
    hook.remove()
    first_text = events.index("text")
    assert events[first_text:].count("forward") >= 4, events


def test_the_models_own_sampling_defaults_are_not_used(stories: LoadedModel) -> None:
    before = run(stories, "Once upon a time")
    stories.model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=9.0)
    assert run(stories, "Once upon a time").token_ids == before.token_ids


def test_times_add_up(stories: LoadedModel) -> None:
    result = run(stories, "Once upon a time", max_new_tokens=5)
    assert result.prefill_s > 0
    assert result.decode_s > 0
    assert result.prefill_tok_s == pytest.approx(result.prompt_tokens / result.prefill_s)
    assert result.decode_tok_s == pytest.approx(4 / result.decode_s)
    assert 0 < result.first_token_s <= process_age_s()
    one = run(stories, "Once upon a time", max_new_tokens=1)
    assert one.decode_tok_s is None


def test_stops_at_eos_unless_ignored(stories: LoadedModel) -> None:
    expected = run(stories, "Once upon a time", max_new_tokens=10)
    eos = expected.token_ids[4]
    stopping = object.__new__(LoadedModel)
    for name in LoadedModel.__dataclass_fields__:
        object.__setattr__(stopping, name, getattr(stories, name))
    object.__setattr__(stopping, "eos_token_ids", (0, eos))
    result = run(stopping, "Once upon a time", max_new_tokens=10)
    assert result.stop_reason == "eos"
    assert result.token_ids == expected.token_ids[:5]
    ignoring = run(stopping, "Once upon a time", max_new_tokens=10, ignore_eos=True)
    assert ignoring.token_ids == expected.token_ids
    assert ignoring.stop_reason == "length"


def test_eos_tokens_come_from_the_generation_config(stories: LoadedModel) -> None:
    assert stories.eos_token_ids == (1, 2)


def test_stop_string_ends_the_text_before_it(stories: LoadedModel) -> None:
    result = run(stories, "Once upon a time", max_new_tokens=60, stop_strings=("Lily", "park"))
    assert result.text == ", there was a little girl named "
    assert result.stop_reason == "stop_string"
    assert len(result.token_ids) < 60


def test_seeded_sampling_repeats_itself(stories: LoadedModel) -> None:
    warm = Sampling(temperature=1.0, seed=7)
    first, again = (run(stories, "Once upon a time", warm) for _ in range(2))
    other = run(stories, "Once upon a time", Sampling(temperature=1.0, seed=8))
    assert first.token_ids == again.token_ids
    assert first.token_ids != other.token_ids


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_narrowest_choice_is_greedy(stories: LoadedModel, narrow: dict[str, Any]) -> None:
    sampled = run(stories, "Once upon a time", Sampling(temperature=1.5, seed=1, **narrow))
    assert sampled.token_ids == run(stories, "Once upon a time").token_ids


def test_without_top_k_all_tokens_may_come(stories: LoadedModel) -> None:
    """transformers' silent default of 50 must not apply."""
    ids = encode_text(stories.tokenizer, "Once upon a time")
    with torch.inference_mode():
        likely = set(stories.model(torch.tensor([ids])).logits[0, -1].topk(50).indices.tolist())
    hot = (Sampling(temperature=100.0, seed=seed) for seed in range(12))
    drawn = {run(stories, "Once upon a time", s, max_new_tokens=1).token_ids[0] for s in hot}
    assert drawn - likely


def test_context_bounds_prompt_and_answer(stories: LoadedModel) -> None:
    result = run(stories, "Once upon a time", max_new_tokens=50, max_context=9)
    assert result.prompt_tokens + len(result.token_ids) == 9
    assert (result.stop_reason, result.length_limit) == ("length", "context")


def test_a_full_context_is_another_end_than_enough_tokens(stories: LoadedModel) -> None:
    prompt = "Once upon a time"  # 5 tokens
    for limits, expected in (
        ({"max_new_tokens": 4, "max_context": 9}, "max_new_tokens"),
        ({"max_new_tokens": 5, "max_context": 9}, "context"),
        ({"max_new_tokens": 600, "ignore_eos": True}, "context"),  # the model's own
        ({"max_new_tokens": 20, "stop_strings": ("there",)}, None),
    ):
        assert run(stories, prompt, **limits).length_limit == expected, limits


def test_a_prompt_longer_than_the_context_is_refused(stories: LoadedModel) -> None:
    with pytest.raises(QtoolError, match="the prompt has 5 tokens, the context only 5") as caught:
        run(stories, "Once upon a time", max_context=5)
    assert "raise max_context" in caught.value.hint
    with pytest.raises(QtoolError, match=r"tokens, the context only 512"):
        run(stories, "Once upon a time " * 300)


def test_a_context_beyond_the_models_is_refused(stories: LoadedModel) -> None:
    with pytest.raises(QtoolError, match="made for 512 tokens"):
        run(stories, "Once", max_context=513)


def test_ctrl_c_ends_the_text_and_is_told(stories: LoadedModel) -> None:
    pieces: list[str] = []

    def interrupt(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    ids = encode_text(stories.tokenizer, "Once upon a time")
    result = generate(stories, ids, Sampling(), Limits(50), write=interrupt)
    assert result.stop_reason == "interrupted"
    assert 3 <= len(result.token_ids) < 10
    assert result.text == "".join(pieces)


def test_a_text_goes_on_after_ctrl_c_from_the_cache(stories: LoadedModel) -> None:
    ids = encode_text(stories.tokenizer, "Once upon a time")
    expected = generate(stories, ids, Sampling(), Limits(20)).token_ids

    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    with History(stories) as history:
        begun = generate(stories, ids, Sampling(), Limits(20), write=interrupt, history=history)
        assert begun.stop_reason == "interrupted"
        made = list(begun.token_ids)
        rest = generate(stories, [*ids, *made], Sampling(), Limits(20 - len(made)), history=history)
    assert (*made, *rest.token_ids) == expected
    assert rest.reused_tokens == len(ids) + len(made) - 1


def test_speed_counts_the_tokens_that_ran(stories: LoadedModel) -> None:
    ids = encode_text(stories.tokenizer, "Once upon a time")
    with History(stories) as history:
        first, again = (
            generate(stories, ids, Sampling(), Limits(4), history=history) for _ in range(2)
        )
    assert (first.reused_tokens, again.reused_tokens) == (0, len(ids) - 1)
    assert first.prefill_tok_s == pytest.approx(len(ids) / first.prefill_s)
    assert again.prefill_tok_s == pytest.approx(1 / again.prefill_s)


def test_a_generation_can_be_read_piece_by_piece(stories: LoadedModel) -> None:
    ids = encode_text(stories.tokenizer, "Once upon a time")
    expected = generate(stories, ids, Sampling(), Limits(12))
    generation = Generation(stories, ids, Sampling(), Limits(12))
    text = "".join(generation.pieces()) + generation.end()
    result = generation.result()
    generation.close()
    assert text == result.text == expected.text
    assert result.token_ids == expected.token_ids
    assert result.path == "eager"


def test_a_model_without_eos_and_pad_token_runs_to_the_limit(test_data: Path) -> None:
    loaded = load_model(str(test_data / "models" / "slm4096-gpt2-hf"), LoadOptions(device="cpu"))
    assert loaded.eos_token_ids == ()
    result = run(loaded, "Once", max_new_tokens=8)
    assert len(result.token_ids) == 8


def test_memory_errors_become_sentences(
    stories: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(stories.model, "forward", fail)
    with pytest.raises(QtoolError, match="out of GPU memory while generating") as caught:
        run(stories, "Once")
    assert caught.value.kind == "memory"
    assert "qtool estimate" in caught.value.hint


# ---- Chat -------------------------------------------------------------------------------------


def test_the_chat_template_is_used_where_there_is_one(
    stories: LoadedModel, chatty: LoadedModel
) -> None:
    assert uses_chat(chatty, request())
    assert not uses_chat(stories, request())
    assert not uses_chat(chatty, request(chat=False))


def test_a_conversation_goes_through_the_template(chatty: LoadedModel) -> None:
    conversation = Conversation("Be brief.")
    result = answer(chatty, request(), "Hi", write=lambda piece: None, conversation=conversation)
    assert conversation.messages == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": result.text},
    ]
    conversation.ask("More")
    text = chatty.tokenizer.decode(conversation.encode(chatty.tokenizer))
    expected = f"<system>Be brief.\n<user>Hi\n<assistant>{result.text}\n<user>More\n<assistant>"
    assert text.replace(" ", "").endswith(expected.replace(" ", ""))


def test_turns_of_a_conversation_run_only_what_is_new(chatty: LoadedModel) -> None:
    conversation = Conversation()
    asked = request()
    with open_history(chatty, asked) as history:
        for text in ("Hi", "More"):
            result = answer(
                chatty,
                asked,
                text,
                write=lambda piece: None,
                conversation=conversation,
                history=history,
            )
        assert history.decoder_for(1).capacity == min(CHAT_CAPACITY, 512)
    assert 0 < result.reused_tokens < result.prompt_tokens
    fresh = Conversation(messages=conversation.messages[:2])
    answer(chatty, asked, "More", write=lambda piece: None, conversation=fresh)
    assert fresh.messages == conversation.messages


def test_a_failed_turn_leaves_the_conversation_as_it_was(chatty: LoadedModel) -> None:
    conversation = Conversation()
    tight = request(limits=Limits(8, max_context=4))
    with pytest.raises(QtoolError, match="the context only 4"):
        answer(chatty, tight, "Hi", write=lambda piece: None, conversation=conversation)
    assert conversation.messages == []


@pytest.mark.parametrize("chat", [True, None])
def test_chat_without_a_template_is_refused(stories: LoadedModel, chat: bool | None) -> None:
    with pytest.raises(QtoolError, match="no chat template"):
        asked = request(chat=chat, system="Be brief.")
        answer(stories, asked, "Hi", write=lambda piece: None)


def test_system_with_no_chat_is_refused(chatty: LoadedModel) -> None:
    with pytest.raises(QtoolError, match="chat=False was given"):
        uses_chat(chatty, request(chat=False, system="x"))


def test_a_chat_without_a_template_is_refused_before_it_begins(stories: LoadedModel) -> None:
    with pytest.raises(QtoolError, match="no chat template"):
        uses_chat(stories, request(chat=True))


def test_a_template_that_refuses_says_so(chatty: LoadedModel, monkeypatch: Any) -> None:
    template = "{{ raise_exception('only one message') }}"
    monkeypatch.setattr(chatty.tokenizer, "chat_template", template)
    with pytest.raises(QtoolError, match="refuses this conversation: only one message"):
        answer(chatty, request(), "Hi", write=lambda piece: None)


def test_an_empty_prompt_is_refused(test_data: Path) -> None:
    class Mute:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": []}

    with pytest.raises(QtoolError, match="the prompt is empty"):
        encode_text(Mute(), "")


def test_what_is_no_text_is_refused_with_its_place(stories: LoadedModel) -> None:
    """Bytes that are not UTF-8 come as half of a surrogate pair from the command line and pipes."""
    bad = "naïve \udcff"
    with pytest.raises(QtoolError, match="the prompt is not UTF-8 at byte 7") as refused:
        encode_text(stories.tokenizer, bad)
    assert refused.value.kind == "usage"
    conversation = Conversation()
    with pytest.raises(QtoolError, match="the prompt is not UTF-8"):
        conversation.ask(bad)
    assert conversation.messages == []
    with pytest.raises(QtoolError, match="the system message is not UTF-8"):
        Conversation(bad)
