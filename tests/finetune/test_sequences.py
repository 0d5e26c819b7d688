"""Rows as tokens: what is learned, what is cut, what is held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qtool.errors import QtoolError, in_words
from qtool.finetune.records import DataOptions
from qtool.finetune.rows import open_rows
from qtool.finetune.sequences import IGNORED_LABEL, Sequences, encode

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CHAT = [
    {"role": "user", "content": "One day a cat"},
    {"role": "assistant", "content": "sat on the mat."},
    {"role": "user", "content": "Then what?"},
    {"role": "assistant", "content": "It slept."},
]


@pytest.fixture
def tokenizer(test_data: Path) -> Any:
    return AutoTokenizer.from_pretrained(test_data / "models/stories260K-hf")


def sequences_of(
    tmp_path: Path,
    tokenizer: Any,
    *rows: Any,
    max_length: int = 1000,
    completion_only: bool = True,
) -> Sequences:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = open_rows(DataOptions(source=str(path)))
    return encode(found, tokenizer, max_length=max_length, completion_only=completion_only)


def learned(tokenizer: Any, item: Any) -> str:
    return str(tokenizer.decode([label for label in item.labels if label != IGNORED_LABEL]))


def test_text_is_learned_with_its_end(tmp_path: Path, tokenizer: Any) -> None:
    [item] = sequences_of(tmp_path, tokenizer, {"text": "Once upon a time"}).items
    assert item.ids == item.labels == tokenizer("Once upon a time</s>").input_ids
    [same] = sequences_of(tmp_path, tokenizer, {"text": "Once upon a time</s>"}).items
    assert same == item


def test_of_a_pair_only_the_completion_is_learned(tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": "Once upon a time", "completion": " there was a cat"}
    [item] = sequences_of(tmp_path, tokenizer, row).items
    whole = tokenizer("Once upon a time there was a cat</s>").input_ids
    prompt = tokenizer("Once upon a time").input_ids
    assert item.ids == whole
    assert item.labels == [IGNORED_LABEL] * len(prompt) + whole[len(prompt) :]
    [all_of_it] = sequences_of(tmp_path, tokenizer, row, completion_only=False).items
    assert all_of_it.labels == whole


def test_of_messages_every_answer_is_learned(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    [item] = sequences_of(tmp_path, tokenizer, {"messages": CHAT}).items
    assert item.ids == tokenizer.apply_chat_template(CHAT, return_dict=False)
    said = learned(tokenizer, item).replace("</s>", "|").replace(" ", "")
    assert said == "satonthemat.|Itslept.|"
    [all_of_it] = sequences_of(tmp_path, tokenizer, {"messages": CHAT}, completion_only=False).items
    assert all_of_it.labels == all_of_it.ids


def test_pairs_of_messages_learn_the_completion(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    row = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    [item] = sequences_of(tmp_path, tokenizer, row).items
    assert learned(tokenizer, item).replace(" ", "") == "Itslept.</s>"


def test_messages_want_a_template(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(QtoolError, match="no chat template"):
        sequences_of(tmp_path, tokenizer, {"messages": CHAT})


ROLES_HINT = "roles, and who begins"
FORM_HINT = "a message has another form than the template reads"


@pytest.mark.parametrize(
    ("template", "said", "hint"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate", ROLES_HINT),
        ("{{ raise_exception('System role not supported') }}", "System role not", ROLES_HINT),
        ("{{ raise_exception('No images here') }}", "No images here", "the template's own words"),
        ("{{ messages[0].name.first }}", "no attribute 'name'", FORM_HINT),
        ("{{ messages[0].content + 1 }}", "can only concatenate str", FORM_HINT),
        ("{% for m in %}", "Expected an expression", "the template is at fault, not the row"),
    ],
)
def test_what_a_template_refuses_is_said_with_what_to_change(
    tmp_path: Path, tokenizer: Any, template: str, said: str, hint: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(QtoolError, match=f"line 1: the chat template refuses it: .*{said}") as it:
        sequences_of(tmp_path, tokenizer, {"messages": CHAT})
    assert hint in it.value.hint


def test_long_and_empty_rows_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": "a", "completion": "Once upon a time there was a cat"},
        {"prompt": "Once upon a time there was a cat and a dog", "completion": "b"},
        {"prompt": "", "completion": ""},
        {"prompt": "a", "completion": "b"},
    ]
    found = sequences_of(tmp_path, tokenizer, *rows, max_length=8)
    assert (found.num_cut, found.num_without_labels, found.num_empty) == (2, 1, 1)
    assert [len(item.ids) for item in found.items] == [8, len(found.items[1].ids)]
    assert [in_words(words) for words in found.warnings()] == [
        "2 of 3 sequences are longer than max_length=8 and were cut",
        "left out: 1 row with nothing to learn in the first 8 tokens",
        "left out: 1 row of less than two tokens",
    ]
    with pytest.raises(QtoolError, match="no row has anything to learn within 8 tokens"):
        sequences_of(tmp_path, tokenizer, rows[1], max_length=8)
    with pytest.raises(QtoolError, match="no row has two tokens") as caught:
        sequences_of(tmp_path, tokenizer, rows[2], rows[2], max_length=8)
    assert "max_length" not in caught.value.hint  # which changes nothing


def test_a_running_text_is_cut_into_pieces_and_loses_nothing(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / "story.txt"
    path.write_text("Once upon a time there was a cat.\n" * 40)
    rows = open_rows(DataOptions(source=str(path)))
    found = encode(rows, tokenizer, max_length=32, completion_only=True)
    assert {len(item.ids) for item in found.items[:-1]} == {32}
    ids = [token for item in found.items for token in item.ids]
    expected = tokenizer(path.read_text(), add_special_tokens=False).input_ids
    assert ids == [*expected, tokenizer.eos_token_id]
    assert (found.num_cut, list(found.warnings())) == (0, [])


def test_holding_out(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": f"Once upon a time {number}"} for number in range(20)]
    found = [sequences_of(tmp_path, tokenizer, *rows) for _ in range(3)]
    before = list(found[0].items)
    held_out = [
        sequences.hold_out(0.2, seed, is_running=False)
        for sequences, seed in zip(found, (0, 0, 1), strict=True)
    ]
    assert [len(part.items) for part in held_out] == [4, 4, 4]
    assert held_out[0].items == held_out[1].items != held_out[2].items
    assert sorted(found[0].items + held_out[0].items) == sorted(before)
    running = sequences_of(tmp_path, tokenizer, *rows)
    assert running.hold_out(0.1, 0, is_running=True).items == before[-2:]
    single = sequences_of(tmp_path, tokenizer, rows[0])
    with pytest.raises(QtoolError, match="there is one sequence"):
        single.hold_out(0.5, 0, is_running=False)


def test_the_sum_is_of_ids_labels_and_where_rows_end(tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": "Once upon", "completion": " a time"}
    sums = {
        sequences_of(tmp_path, tokenizer, *rows, completion_only=only).sha256()
        for rows in ([row], [row, row])
        for only in (True, False)
    }
    assert len(sums) == 4
