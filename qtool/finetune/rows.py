"""DATA as rows: text, prompt and completion, or messages; what is wrong with one is said by line.

    rows = open_rows(DataOptions(source="chats.jsonl"))
    rows.check()
    for row in rows: ...

A .txt file is one running text. JSONL is read here, so that errors can name the line; Parquet files
and Hub datasets through `datasets`. Nothing here knows tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from qtool.errors import Option, QtoolError, Words
from qtool.finetune.data_place import JSON_SUFFIXES, asked_once, find_file
from qtool.finetune.records import DataFile, DataOptions
from qtool.finetune.turns import ASSISTANT

Kind = Literal["running text", "text", "prompt and completion", "messages"]
Fields = Mapping[str, Any]

PROMPT, COMPLETION, MESSAGES, TEXT = "prompt", "completion", "messages", "text"
TOOLS: Final = "tools"
COLUMNS_HINT: Final = (
    'rows hold "text", or "prompt" and "completion", or "messages" (a list of {"role", "content"})'
)
PAIRS_HINT: Final = "pairs are all of texts or all of messages, as the first row is"
ANSWER_HINT: Final = (
    'what is learned are messages of the role "assistant"; ',
    Option("completion_only", False),
    " learns all of a row",
)
HALF_HINT: Final = (
    'JSON writes a character beyond U+FFFF as two halves, an emoji as "\\ud83d\\ude00", say: '
    "write the other half too, or take this one out"
)
BLOCK_CHARACTERS: Final = 1 << 16  # of a running text at once


class Row(NamedTuple):
    """One row; `number` counts lines of a file or rows of a dataset, from 1."""

    number: int
    fields: Fields


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that can be gone through more than once.

    Args:
        source: what errors call it.
        unit: "line" or "row", for errors.
        columns: what the rows have; found with the first one.
        text_column: which of them is plain text.
    """

    source: str
    unit: str
    columns: tuple[str, ...]
    kind: Kind
    text_column: str
    revision: str | None
    _iterate: Callable[[], Iterator[Row]]
    _path: Path | None = None

    def __iter__(self) -> Iterator[Row]:
        return self._iterate()

    @property
    def is_file(self) -> bool:
        """Not a dataset on the Hub."""
        return self._path is not None

    def check(self, *, completion_only: bool = True) -> DataFile:
        """Look at every row; returns what it came from.

        Args:
            completion_only: of messages only the assistant's are learned.

        Raises:
            QtoolError: bad_file, with the line or row.
        """
        count = 0
        has_messages = self.has_messages
        for row in self:
            self._check_row(row, has_messages=has_messages)
            if self.kind == "messages" and completion_only:
                self._check_answer(row)
            count += 1
        if not count:
            raise no_rows(self.source, self.kind)
        sha256 = None if self._path is None else _sha256(self._path)
        return DataFile(self.source, sha256, count, self.revision)

    @property
    def has_messages(self) -> bool:
        """Whether a chat template will be needed, by the first row."""
        if self.kind == "messages":
            return True
        first = next(iter(self), None) if self.kind == "prompt and completion" else None
        return first is not None and not isinstance(first.fields.get(PROMPT), str)

    def error(self, row: Row, what: str, hint: Words = COLUMNS_HINT) -> QtoolError:
        """Something is wrong with a row."""
        return QtoolError(
            f"{self.source}, {self.unit} {row.number}: {what}", kind="bad_file", hint=hint
        )

    def _check_row(self, row: Row, *, has_messages: bool) -> None:
        columns: tuple[str, ...] = (self.text_column,)
        hint = COLUMNS_HINT
        if self.kind == "messages":
            columns = (MESSAGES,)
        elif self.kind == "prompt and completion":
            columns, hint = (PROMPT, COMPLETION), f"{COLUMNS_HINT}; {PAIRS_HINT}"
        for column in columns:
            if has_messages:
                self._check_messages(row, column, hint)
            else:
                self._check_text(row, column, hint)
        if has_messages:
            self._check_characters(row, row.fields.get(TOOLS), f'"{TOOLS}"')

    def _check_text(self, row: Row, column: str, hint: str) -> None:
        value = row.fields.get(column)
        if not isinstance(value, str):
            found = _found(row.fields, column)
            raise self.error(row, f'"{column}": expected text, found {found}', hint)
        self._check_characters(row, value, f'"{column}"')

    def _check_messages(self, row: Row, column: str, hint: str) -> None:
        messages = row.fields.get(column)
        if not isinstance(messages, list | tuple) or not messages:
            found = "an empty list" if messages == [] else _found(row.fields, column)
            raise self.error(row, f'"{column}": expected a list of messages, found {found}', hint)
        for place, message in enumerate(messages, start=1):
            where = f'"{column}", message {place}'
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise self.error(row, f'{where}: expected {{"role", "content"}}')
            self._check_characters(row, message, where)

    def _check_answer(self, row: Row) -> None:
        if all(message["role"] != ASSISTANT for message in row.fields[MESSAGES]):
            raise self.error(row, "no message of the assistant", ANSWER_HINT)

    def _check_characters(self, row: Row, value: object, where: str) -> None:
        """Refuse halves of characters, which JSON can spell and no tokenizer takes."""
        for text in _texts(value):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                half = f"half a character (U+{ord(text[error.start]):04X})"
                place = f"at character {error.start + 1} of the text"
                raise self.error(row, f"{where}: {half} {place}", HALF_HINT) from error


def open_rows(options: DataOptions, source: str | None = None) -> Rows:
    """The rows of `options.source`, or of `source` with the same options; the first is looked at.

    Raises:
        QtoolError: not_found, unsupported, bad_file, network or auth; usage for a column of text
            that is not there.
    """
    source = options.source if source is None else source
    path = find_file(source)
    if path is None:
        return _hub_rows(source, options)
    suffix = path.suffix.lower()
    if suffix in JSON_SUFFIXES:
        return _of_kind(source, "line", lambda: _json_lines(path), options, path=path)
    if suffix == ".parquet":
        return _parquet_rows(path, source, options)
    return Rows(
        source, "block", (TEXT,), "running text", TEXT, None, lambda: _text_blocks(path), path
    )


def no_rows(source: str, kind: Kind = "text") -> QtoolError:
    """There is nothing to learn from."""
    if kind == "running text":
        hint = "write the text to learn into it"
        return QtoolError(f"{source} is empty", kind="bad_file", hint=hint)
    return QtoolError(f"{source} holds no rows", kind="bad_file", hint=COLUMNS_HINT)


def _of_kind(
    source: str,
    unit: str,
    iterate: Callable[[], Iterator[Row]],
    options: DataOptions,
    *,
    columns: Sequence[str] | None = None,
    path: Path | None = None,
    revision: str | None = None,
) -> Rows:
    """Rows of the kind that their columns say."""
    first = next(iterate(), None)
    if first is None:
        raise no_rows(source)
    names = tuple(first.fields) if columns is None else tuple(columns)
    column = options.text_column or TEXT
    rows = Rows(source, unit, names, "text", column, revision, iterate, path)
    if options.text_column is not None:
        if column not in names:
            raise QtoolError(
                (Option("text_column", column), f": {source} has {_listed(names)}"),
                kind="usage",
                hint="name one of these columns",
            )
        return rows
    if PROMPT in names and COMPLETION in names:
        return replace(rows, kind="prompt and completion")
    if MESSAGES in names:
        return replace(rows, kind="messages")
    if TEXT in names:
        return rows
    lacking = [name for name in (PROMPT, COMPLETION) if name not in names]
    what = f"no {lacking[0]} beside" if len(lacking) == 1 else "none of the known columns, found"
    raise QtoolError(
        f"{source}: {what} {_listed(names)}",
        kind="bad_file",
        hint=(f"{COLUMNS_HINT}; ", Option("text_column", "NAME"), " names another column of text"),
    )


# -- files ----------------------------------------------------------------------------------------


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line.rstrip().decode("utf-8-sig"))
            except ValueError as error:
                raise _not_json(path, number, line, error) from error
            if not isinstance(fields, dict):
                raise QtoolError(
                    f"{path}, line {number}: expected a JSON object, found {_kind_of(fields)}",
                    kind="bad_file",
                    hint=COLUMNS_HINT,
                )
            yield Row(number, fields)


def _not_utf8(path: Path) -> QtoolError:
    """The error for the first line of a text that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                what = f"line {number}: not UTF-8 at byte {error.start}"
                break
        else:
            what = "not UTF-8"
    return QtoolError(f"{path}, {what}", kind="bad_file", hint="convert the file to UTF-8")


def _not_json(path: Path, number: int, line: bytes, error: ValueError) -> QtoolError:
    if isinstance(error, UnicodeDecodeError):
        what, hint = f"not UTF-8 at byte {error.start}", "convert the file to UTF-8"
    else:
        what = f"not JSON: {error}"
        if isinstance(error, json.JSONDecodeError):  # the line that it would name is its own
            what = f"not JSON: {error.msg} at column {error.pos + 1}"
        hint = "every line is one JSON object"
        if line.lstrip()[:1] == b"[":
            hint += f"; `jq -c '.[]' {path}` makes lines of a JSON array"
    return QtoolError(f"{path}, line {number}: {what}", kind="bad_file", hint=hint)


def _text_blocks(path: Path) -> Iterator[Row]:
    """Blocks of whole lines, so that no tokenizer has to take the file at once."""
    block: list[str] = []
    number, length = 0, 0
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for line in file:
                block.append(line)
                length += len(line)
                if length >= BLOCK_CHARACTERS:
                    number += 1
                    yield Row(number, {TEXT: "".join(block)})
                    block, length = [], 0
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    if block:
        yield Row(number + 1, {TEXT: "".join(block)})


def _parquet_rows(path: Path, source: str, options: DataOptions) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _bad_parquet(path, error) from error

    def iterate() -> Iterator[Row]:
        number = 0
        try:
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(number, fields)
        except (pyarrow.ArrowException, OSError) as error:
            raise _bad_parquet(path, error) from error

    names = file.schema_arrow.names
    return _of_kind(source, "row", iterate, options, columns=names, path=path)


def _bad_parquet(path: Path, error: Exception) -> QtoolError:
    first_line = str(error).partition("\n")[0]
    return QtoolError(
        f"{path}: not a readable Parquet file: {first_line}",
        kind="bad_file",
        hint="fetch or write it again",
    )


# -- the Hub --------------------------------------------------------------------------------------


def _hub_rows(source: str, options: DataOptions) -> Rows:
    name, _, revision = source.partition("@")
    dataset = _load_from_hub(name, revision or None, options)

    def iterate() -> Iterator[Row]:
        for number, fields in enumerate(dataset, start=1):
            yield Row(number, fields)

    return _of_kind(
        source, "row", iterate, options, columns=dataset.column_names, revision=revision or None
    )


def _load_from_hub(name: str, revision: str | None, options: DataOptions) -> Any:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        with asked_once(name):
            return datasets.load_dataset(
                name, options.subset, split=options.split, revision=revision
            )
    except DatasetNotFoundError as error:
        gated = "gated" in str(error).lower()
        raise QtoolError(
            f"{name}: no such file, and "
            + (
                "the Hub gives it only to accounts that were granted access"
                if gated
                else "no such dataset on the Hub, or it is private"
            ),
            kind="auth" if gated else "not_found",
            hint="check the name; for a private one log in with `hf auth login` or set HF_TOKEN",
        ) from error
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise QtoolError(
            f"{name}: {_first_line(error)}",
            kind="usage" if isinstance(error, ValueError) else "bad_file",
            hint=(Option("subset"), " and ", Option("split"), " choose a part of a dataset"),
        ) from error
    except (ConnectionError, OSError) as error:  # it answered, and then no more
        raise QtoolError(
            f"{name}: {_first_line(error)}",
            kind="network",
            hint="check the connection and run the command again",
        ) from error


# -- words ----------------------------------------------------------------------------------------


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f'"{name}"' for name in names[:8])
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "no column"


def _texts(value: object) -> Iterator[str]:
    """All texts in what JSON gave, names too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _texts(name)
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _found(fields: Fields, column: str) -> str:
    return _kind_of(fields[column]) if column in fields else "nothing"


def _kind_of(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
