"""DATA as rows: which columns are found, and what is said of a line that is wrong."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from qtool.errors import QtoolError, name_flag
from qtool.finetune.records import DataOptions
from qtool.finetune.rows import BLOCK_CHARACTERS, open_rows

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def refused(source: str, **options: Any) -> QtoolError:
    with pytest.raises(QtoolError) as caught:
        open_rows(DataOptions(source=source, **options)).check()
    return caught.value


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "a", "id": 3}, "text"),
        ({"prompt": "a", "completion": "b", "text": "c"}, "prompt and completion"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "prompt and completion"),
        ({"messages": CHAT, "text": "a"}, "messages"),
    ],
)
def test_columns_say_what_rows_are(tmp_path: Path, row: Any, kind: str) -> None:
    source = write(tmp_path / "rows.jsonl", row, row)
    rows = open_rows(DataOptions(source=source))
    assert rows.kind == kind
    data = Path(source).read_bytes()
    assert rows.check() == (source, hashlib.sha256(data).hexdigest(), 2, None)


def test_another_column_of_text_can_be_named(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", {"body": "a", "messages": CHAT})
    rows = open_rows(DataOptions(source=source, text_column="body"))
    assert (rows.kind, rows.text_column) == ("text", "body")
    error = refused(source, text_column="boody")
    assert error.kind == "usage"
    assert '"body", "messages"' in error.message


def test_empty_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"text": "a"}\n\n{"text": 1}\n')
    error = refused(str(path))
    assert f'{path}, line 4: "text": expected text, found a number' in error.message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{text: 1}", "line 2: not JSON: Expecting property name"),
        ('{"text": "a"', "line 2: not JSON"),
        ('["a"]', "line 2: expected a JSON object, found a list"),
        ('{"other": "a"}', 'line 2: "text": expected text, found nothing'),
        ('{"text": null}', 'line 2: "text": expected text, found null'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n')
    error = refused(str(path))
    assert error.kind == "bad_file"
    assert said in error.message


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert "line 2: not UTF-8" in refused(str(path)).message
    path.write_bytes(b'\xff\xfe{\0"\0')  # which looks like UTF-16
    assert "line 1: not UTF-8 at byte 0" in refused(str(path)).message
    text = tmp_path / "rows.txt"
    text.write_bytes(b"a line\n" * 5 + b"caf\xe9\n")
    assert f"{text}, line 6: not UTF-8 at byte 3" in refused(str(text)).message


def test_a_byte_order_mark_is_no_part_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    rows = open_rows(DataOptions(source=str(path)))
    assert [row.fields for row in rows] == [{"text": "a"}]


def test_a_pair_lacks_its_other_half(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n')
    assert f'{path}: no completion beside "prompt"' in refused(str(path)).message


def test_a_model_is_no_data() -> None:
    error = refused("qtool/demo_model")
    assert "is a model, expected" in error.message and "config.json" not in error.hint


def test_a_json_array_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n{"text": "a"}\n]\n')
    assert f"jq -c '.[]' {path}" in refused(str(path)).hint


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, '"messages": expected a list of messages, found an empty list'),
        ({"messages": "Hi"}, '"messages": expected a list of messages, found text'),
        ({"messages": [CHAT[0], {"content": "a"}]}, '"messages", message 2: expected {"role"'),
        ({"prompt": "a", "completion": CHAT}, '"completion": expected text, found a list'),
        ({"prompt": CHAT, "completion": "a"}, '"completion": expected a list of messages'),
    ],
)
def test_rows_of_another_shape_are_refused(tmp_path: Path, row: Any, said: str) -> None:
    assert said in refused(write(tmp_path / "rows.jsonl", row)).message


def test_messages_without_an_answer_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", {"messages": CHAT}, {"messages": CHAT[:1]})
    error = refused(source)
    assert error.kind == "bad_file"
    assert error.message == f"{source}, line 2: no message of the assistant"
    assert "--no-completion-only learns all of a row" in error.told(name_flag)[1]
    rows = open_rows(DataOptions(source=source))
    assert rows.check(completion_only=False).rows == 2
    pair = write(tmp_path / "pair.jsonl", {"prompt": CHAT, "completion": CHAT[:1]})
    assert open_rows(DataOptions(source=pair)).check().rows == 1  # all of it is learned


def test_unknown_columns_are_listed(tmp_path: Path) -> None:
    error = refused(write(tmp_path / "rows.jsonl", {"instruction": "a", "output": "b"}))
    assert error.kind == "bad_file"
    assert 'found "instruction", "output"' in error.message


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt"])
def test_an_empty_file_holds_no_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    error = refused(str(tmp_path / name))
    is_text = name.endswith(".txt")
    assert ("is empty" if is_text else "holds no rows") in error.message
    assert ("write the text to learn" if is_text else '"completion"') in error.hint


def test_what_is_no_file_of_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n")
    assert refused(str(tmp_path / "rows.csv")).kind == "unsupported"
    (tmp_path / "notes.txt").write_text("a")
    error = refused(str(tmp_path))
    assert error.kind == "unsupported" and str(tmp_path / "notes.txt") in error.hint


@pytest.mark.parametrize(
    "name",
    ["none.jsonl", "none.TXT", "./none", "/none/rows", "~/none", "a/b/c", "none/", "", "a b", "x@"],
)
def test_a_file_that_is_not_there_is_not_looked_for_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qtool.finetune.rows._hub_rows", lambda *_: pytest.fail("asked the Hub"))
    error = refused(name)
    assert error.kind == "not_found"
    assert (name or "the empty name") in error.message and ".jsonl" in error.message


@pytest.mark.parametrize("name", ["chats", "chats.json", "cahts.jsonl", "chat", "./chats.jsnl"])
def test_a_mistyped_file_is_told_the_one_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qtool.finetune.rows._hub_rows", lambda *_: pytest.fail("asked the Hub"))
    write(tmp_path / "chats.jsonl", {"text": "a"})
    (tmp_path / "chats.py").write_text("")
    error = refused(name)
    assert error.kind == "not_found"
    assert "did you mean chats.jsonl?" in error.hint


def test_a_dataset_of_a_file_s_name_can_still_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr("qtool.finetune.rows._hub_rows", lambda name, _: asked.append(name))
    write(tmp_path / "imdb.jsonl", {"text": "a"})
    assert "imdb@main" in refused("imdb").hint
    for name in ("imdb@main", "stanfordnlp/imdb", "squad"):
        open_rows(DataOptions(source=name))
    assert asked == ["imdb@main", "stanfordnlp/imdb", "squad"]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b", None], "n": [1, 2, 3]}), path)
    rows = open_rows(DataOptions(source=str(path)))
    assert [row.fields["text"] for row in rows] == ["a", "b", None]
    assert 'row 3: "text": expected text, found null' in refused(str(path)).message
    path.write_bytes(b"PAR1 and more")
    assert "not a readable Parquet file" in refused(str(path)).message


def test_a_text_file_is_one_running_text(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    text = "".join(f"line {number}\r\n" for number in range(BLOCK_CHARACTERS // 8))
    path.write_bytes(text.encode())
    rows = open_rows(DataOptions(source=str(path)))
    assert rows.kind == "running text"
    assert rows.check().rows > 1
    assert "".join(row.fields["text"] for row in rows) == text


def test_a_dataset_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    error = refused("nobody/nothing-at-all")
    assert error.kind in ("network", "not_found")
    assert "nobody/nothing-at-all" in error.message


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.socket() as unheard:  # bound, and so nobody else's, but it never listens
        unheard.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waited to try again"))
        error = refused("nobody/nothing-at-all")
    assert error.kind == "network"
    assert "no such file, not in the cache, and the Hub cannot be reached" in error.message
    assert "HF_ENDPOINT" in error.hint
    assert constants.HF_HUB_OFFLINE is False


HALF = "half an emoji \ud83d here"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": HALF}, '"text"'),
        ({"prompt": HALF, "completion": "b"}, '"prompt"'),
        ({"prompt": "a", "completion": HALF}, '"completion"'),
        ({"prompt": CHAT[:1], "completion": [{"role": "assistant", "content": HALF}]}, "message 1"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": HALF}]}, "message 2"),
        ({"messages": [{"role": HALF, "content": "a"}]}, "message 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
            "message 1",
        ),
        (
            {"messages": [*CHAT, {"role": "assistant", "tool_calls": [{"name": {HALF: 1}}]}]},
            "message 3",
        ),
        ({"messages": CHAT, "tools": [{"type": "function", "name": HALF}]}, '"tools"'),
    ],
)
def test_half_a_character_is_named_by_its_line(tmp_path: Path, row: Any, said: str) -> None:
    """JSON can spell what UTF-8 cannot."""
    whole = {name: "a" if isinstance(value, str) else CHAT for name, value in row.items()}
    error = refused(write(tmp_path / "rows.jsonl", whole | {"tools": None}, row))
    assert error.kind == "bad_file"
    assert ", line 2: " in error.message and said in error.message
    assert "half a character (U+D83D)" in error.message
    assert 'as "\\ud83d\\ude00"' in error.hint


@pytest.mark.parametrize("kinds", [(0, 1), (1, 0)])
def test_pairs_are_all_of_texts_or_all_of_messages(tmp_path: Path, kinds: tuple[int, int]) -> None:
    pairs = [{"prompt": "a", "completion": "b"}, {"prompt": CHAT[:1], "completion": CHAT[1:]}]
    error = refused(write(tmp_path / "rows.jsonl", *(pairs[kind] for kind in (kinds[0], *kinds))))
    wanted, found = ("text", "a list") if kinds == (0, 1) else ("a list of messages", "text")
    assert error.kind == "bad_file"
    assert f'line 3: "prompt": expected {wanted}, found {found}' in error.message
    assert "all of texts or all of messages, as the first row is" in error.hint
