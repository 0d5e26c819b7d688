"""Streamed text is the decoded text: whole characters, right spaces, nothing past a stop string."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qtool.runtime.text_stream import MAX_HELD_TOKENS, TextStream
from tests.conftest import data_folder

TOKENIZERS = ("tinylm-19m", "stories260K-hf", "slm4096-gpt2-hf", "TinyStories-656K-hf")


@cache
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


class ByteTokenizer:
    """One token per byte; 256 is a special token without text."""

    def decode(self, ids: list[int], **options: bool) -> str:
        assert options == {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def stream_bytes(text: bytes, **arguments: Any) -> tuple[TextStream, list[str]]:
    pieces: list[str] = []
    stream = TextStream(ByteTokenizer(), write=pieces.append, **arguments)
    for byte in text:
        stream.add(byte)
    return stream, pieces


def test_characters_come_whole_and_at_once() -> None:
    stream, pieces = stream_bytes("aé😀b".encode())
    assert pieces == ["a", "é", "😀", "b"]
    stream.end()
    assert stream.text == "aé😀b"


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    stream, pieces = stream_bytes("aé".encode()[:-1])
    assert pieces == ["a"]
    stream.end()
    assert "".join(pieces) == stream.text == "a\N{REPLACEMENT CHARACTER}"


def test_invalid_bytes_do_not_hold_the_text_back_for_ever() -> None:
    stream, pieces = stream_bytes(b"\xff" * (MAX_HELD_TOKENS + 2))
    assert len("".join(pieces)) >= MAX_HELD_TOKENS
    assert not stream.stopped


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("aaab", ["aab"], "a"),
        ("abcabd", ["abd"], "abc"),
        ("é!", ["!"], "é"),
        ("nothing", ["two"], "nothing"),
        ("tw", ["two"], "tw"),
        ("x", [""], "x"),
    ],
)
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str], expected: str) -> None:
    stream, pieces = stream_bytes(text.encode(), stop_strings=stops)
    stream.end()
    assert "".join(pieces) == stream.text == expected
    assert stream.stopped == (expected != text)


def test_nothing_of_a_stop_string_is_ever_written() -> None:
    stream, pieces = stream_bytes(b"hello <|e", stop_strings=["<|end|>"])
    assert "".join(pieces) == "hello "
    stream.end()
    assert stream.text == "hello <|e"


@given(text=st.text(max_size=30), stop=st.text(min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_any_text_and_stop_string(text: str, stop: str) -> None:
    stream, pieces = stream_bytes(text.encode(errors="replace"), stop_strings=[stop])
    stream.end()
    plain = text.encode(errors="replace").decode()
    assert stream.text == "".join(pieces) == plain.partition(stop)[0]


@pytest.mark.skipif(data_folder() is None, reason="QTOOL_TEST_DATA is not set")
@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cs"]), max_size=60))
@example(text="Once upon a time, there was\n a  double  space")
@example(text="naïve 日本語 😀😀 end")
@settings(max_examples=60, deadline=None)
def test_streamed_equals_decoded_with_real_tokenizers(name: str, text: str) -> None:
    data = data_folder()
    assert data is not None
    tok = tokenizer(data / "models" / name)
    ids = tok(text)["input_ids"]
    for start in {0, len(ids) // 2}:
        stream = TextStream(tok, prompt_ids=ids[:start])
        for token_id in ids[start:]:
            stream.add(token_id)
        stream.end()
        before = tok.decode(ids[:start], skip_special_tokens=True)
        if before.endswith("\N{REPLACEMENT CHARACTER}"):
            continue  # the prompt ends within a character: the texts do not join
        assert before + stream.text == tok.decode(ids, skip_special_tokens=True)


def test_a_special_token_does_not_eat_the_next_space(models: Path) -> None:
    tok = tokenizer(models / "stories260K-hf")
    ids = tok("Once upon")["input_ids"]
    ids = [*ids, tok.eos_token_id, *tok(" a time", add_special_tokens=False)["input_ids"]]
    stream = TextStream(tok)
    for token_id in ids:
        stream.add(token_id)
    stream.end()
    assert stream.text == tok.decode(ids, skip_special_tokens=True)


def test_tokens_without_text_do_not_make_decoding_longer() -> None:
    lengths: list[int] = []

    class Counting(ByteTokenizer):
        def decode(self, ids: list[int], **options: bool) -> str:
            lengths.append(len(ids))
            return super().decode(ids, **options)

    stream = TextStream(Counting(), prompt_ids=list(b"so "))
    for token in [*b"hi", *[256] * 100, *b" there"]:
        stream.add(token)
    stream.end()
    assert stream.text == "hi there"
    assert max(lengths) < 20


def test_a_replacement_character_of_the_prompt_is_text_like_any_other(models: Path) -> None:
    tok = tokenizer(models / "stories260K-hf")
    prompt = tok("x \N{REPLACEMENT CHARACTER}")["input_ids"]
    stream = TextStream(tok, prompt_ids=prompt)
    for token_id in tok("Once upon", add_special_tokens=False)["input_ids"]:
        stream.add(token_id)
    stream.end()
    assert stream.text == " Once upon"


def test_a_prompt_may_be_cut_within_a_character(models: Path) -> None:
    tok = tokenizer(models / "stories260K-hf")  # the rarer characters are a token a byte
    prompt = tok("a😀b")["input_ids"]
    for start in range(len(prompt)):
        stream = TextStream(tok, prompt_ids=prompt[start:])
        for token_id in tok("Once", add_special_tokens=False)["input_ids"]:
            stream.add(token_id)
        stream.end()
        assert stream.text == " Once"


def test_no_space_that_was_streamed_is_cleaned_up_later() -> None:
    vocabulary = [(piece, -1.0) for piece in ("<unk>", "▁hello", "▁,", "▁world", "▁do", "▁n't")]
    backend = Tokenizer(Unigram(vocabulary, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True)
    ids = [1, 2, 3, 4, 5]
    assert tok.decode(ids) != tok.decode(ids, clean_up_tokenization_spaces=False)
    stream = TextStream(tok)
    for token_id in ids:
        stream.add(token_id)
    stream.end()
    assert stream.text == tok.decode(ids, clean_up_tokenization_spaces=False)
