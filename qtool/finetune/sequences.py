"""Rows as token ids and labels, cut to the longest length that is trained.

    sequences = encode(rows, tokenizer, max_length=1024, completion_only=True)

Labels are the ids, or -100 where nothing is to be learned: prompts, and what others than the
assistant say. A running text is cut into pieces of `max_length` tokens and loses none.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Final, NamedTuple

from qtool.errors import Option, QtoolError, Words
from qtool.finetune.rows import COMPLETION, MESSAGES, PROMPT, TEXT, Row, Rows

IGNORED_LABEL: Final = -100  # PyTorch's and transformers' label for what no loss is taken of
BATCH_ROWS: Final = 256
SHORTEST: Final = 2  # tokens; a single one has nothing to predict
ASSISTANT: Final = "assistant"


class Tokens(NamedTuple):
    """Token ids and labels of one row, of the same length."""

    ids: list[int]
    labels: list[int]


@dataclass(slots=True)
class Sequences:
    """What is trained: sequences of `max_length` tokens at most, and what was lost on the way.

    Args:
        num_cut: sequences that were longer.
        num_without_labels: rows left out because cutting left nothing to learn.
        num_empty: rows left out because they have no two tokens.
    """

    max_length: int
    items: list[Tokens] = field(default_factory=list)
    num_cut: int = 0
    num_without_labels: int = 0
    num_empty: int = 0

    @property
    def num_tokens(self) -> int:
        """Of all sequences."""
        return sum(len(item.ids) for item in self.items)

    def add(self, item: Tokens) -> None:
        """Cut, count and keep it, or leave it out."""
        if len(item.ids) < SHORTEST:
            self.num_empty += 1
            return
        self.num_cut += len(item.ids) > self.max_length
        item = Tokens(item.ids[: self.max_length], item.labels[: self.max_length])
        if any(label != IGNORED_LABEL for label in item.labels[1:]):  # the first is never predicted
            self.items.append(item)
        else:
            self.num_without_labels += 1

    def warnings(self) -> Iterator[Words]:
        """What was lost, in words."""
        total = len(self.items) + self.num_without_labels
        if self.num_cut:
            is_, was = ("is", "was") if self.num_cut == 1 else ("are", "were")
            yield (
                f"{self.num_cut:,} of {total:,} sequences {is_} longer than ",
                Option("max_length", self.max_length),
                f" and {was} cut",
            )
        if self.num_without_labels:
            yield (
                f"left out: {_rows(self.num_without_labels)} with nothing to learn in the first "
                f"{self.max_length:,} tokens"
            )
        if self.num_empty:
            yield f"left out: {_rows(self.num_empty)} of less than two tokens"

    def sha256(self) -> str:
        """Of all ids and labels: equal sums are equal data for this tokenizer."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(array("q", [len(item.ids), *item.ids, *item.labels]).tobytes())
        return digest.hexdigest()

    def hold_out(self, share: float, seed: int, *, is_running: bool) -> Sequences:
        """Take `share` of the sequences away and return them: the last of a running text, else
        random ones."""
        import random

        count = min(max(round(len(self.items) * share), 1), len(self.items) - 1)
        if count < 1:
            raise QtoolError(
                (Option("eval_split", share), ": there is one sequence, and it is to be learned"),
                kind="usage",
                hint=("give more data, or a file as ", Option("eval_split")),
            )
        order = list(range(len(self.items)))
        if not is_running:
            random.Random(seed).shuffle(order)
        held_out = set(order[-count:])
        parts: tuple[list[Tokens], list[Tokens]] = ([], [])
        for number, item in enumerate(self.items):
            parts[number in held_out].append(item)
        self.items = parts[0]
        return Sequences(self.max_length, parts[1])

    def as_dataset(self) -> Any:
        """For SFTTrainer, which takes data with these columns as prepared."""
        import datasets

        columns = {
            "input_ids": [item.ids for item in self.items],
            "labels": [item.labels for item in self.items],
        }
        return datasets.Dataset.from_dict(columns)


def encode(rows: Rows, tokenizer: Any, *, max_length: int, completion_only: bool) -> Sequences:
    """All rows as sequences.

    Raises:
        QtoolError: a row is not as `Rows.check` wants it, the chat template refuses it or there is
            none, or nothing is left to learn.
    """
    encoder = _Encoder(rows, tokenizer, completion_only)
    sequences = Sequences(max_length)
    if rows.kind == "running text":
        for item in encoder.pieces(max_length):
            sequences.add(item)
    else:
        for item in encoder.rows_one_by_one():
            sequences.add(item)
    if not sequences.items and not sequences.num_without_labels:
        raise QtoolError(
            f"{rows.source}: no row has two tokens, so there is nothing to learn",
            kind="bad_file",
            hint="write the text to learn into it",
        )
    if not sequences.items:
        raise QtoolError(
            f"{rows.source}: no row has anything to learn within {max_length:,} tokens",
            kind="bad_file",
            hint=("raise ", Option("max_length"), " or look at the rows"),
        )
    return sequences


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def no_chat_template(source: str) -> QtoolError:
    """Messages cannot become a text."""
    return QtoolError(
        f"{source} holds messages, and the model has no chat template",
        kind="unsupported",
        hint='take the model\'s instruct version, or rows of "prompt" and "completion"',
    )


@dataclass(frozen=True, slots=True)
class _Encoder:
    rows: Rows
    tokenizer: Any
    completion_only: bool

    def pieces(self, length: int) -> Iterator[Tokens]:
        """A running text, `length` tokens at a time, with the end token behind the last."""
        blocks = (self._ids([row.fields[TEXT]], special=False)[0] for row in self.rows)
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        ids = chain(chain.from_iterable(blocks), end)
        while piece := list(islice(ids, length)):
            yield Tokens(piece, piece)

    def rows_one_by_one(self) -> Iterator[Tokens]:
        """A sequence per row; plain text goes through the tokenizer in batches."""
        if self.rows.kind == "text":
            for batch in _batches(self.rows):
                texts = [self._ended(row.fields[self.rows.text_column]) for row in batch]
                yield from (Tokens(ids, ids) for ids in self._ids(texts))
        elif self.rows.kind == "messages":
            self._require_template()
            yield from (self._of_messages(row, row.fields[MESSAGES], None) for row in self.rows)
        else:
            for batch in _batches(self.rows):
                yield from self._of_pairs(batch)

    # -- prompt and completion --------------------------------------------------------------------

    def _of_pairs(self, batch: list[Row]) -> Iterator[Tokens]:
        if not isinstance(batch[0].fields[PROMPT], str):
            self._require_template()
            for row in batch:
                prompt = row.fields[PROMPT]
                yield self._of_messages(row, [*prompt, *row.fields[COMPLETION]], len(prompt))
            return
        prompts = [row.fields[PROMPT] for row in batch]
        # "" begins nothing; its ids would be special tokens alone, as those of the whole begin.
        wholes = [self._ended(row.fields[PROMPT] + row.fields[COMPLETION]) for row in batch]
        for prompt_ids, ids in zip(self._ids(prompts), self._ids(wholes), strict=True):
            start = _common(prompt_ids, ids) if self.completion_only else 0
            yield _learn(ids, [(start, len(ids))])

    # -- messages ---------------------------------------------------------------------------------

    def _of_messages(self, row: Row, messages: list[Any], num_prompt: int | None) -> Tokens:
        """A conversation; what is learned is the assistant's, or all from `num_prompt` on."""
        messages = [_without_nulls(message) for message in messages]
        ids = self._template(row, messages)
        if not self.completion_only:
            return Tokens(ids, ids)
        if num_prompt is not None:
            prompt_ids = self._template(row, messages[:num_prompt], asks=True)
            return _learn(ids, [(_common(prompt_ids, ids), len(ids))])
        spans = []
        for place, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                before = self._template(row, messages[:place], asks=True) if place else []
                after = self._template(row, messages[: place + 1])
                is_last = place == len(messages) - 1
                end = len(ids) if is_last else _common(after, ids)
                spans.append((_common(before, ids), end))
        if not spans:
            raise self.rows.error(
                row,
                "no message of the assistant",
                'completions are learned from messages of the role "assistant"',
            )
        return _learn(ids, spans)

    def _template(self, row: Row, messages: list[Any], *, asks: bool = False) -> list[int]:
        tools = row.fields.get("tools") or None
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=True, add_generation_prompt=asks, return_dict=False
            )
        except Exception as error:  # templates raise what they like
            first_line = str(error).strip().partition("\n")[0]
            raise self.rows.error(
                row,
                f"the chat template refuses it: {first_line or type(error).__name__}",
                "roles, and who begins, are as the model's chat template wants them",
            ) from error
        return ids

    def _require_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise no_chat_template(self.rows.source)

    # -- text -------------------------------------------------------------------------------------

    def _ended(self, text: str) -> str:
        """With the end token, so that the model learns where to stop; an empty text stays so."""
        end = self.tokenizer.eos_token or ""
        return text if not text or text.endswith(end) else text + end

    def _ids(self, texts: list[str], *, special: bool = True) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=special)["input_ids"]
        return found


def _learn(ids: list[int], spans: Iterable[tuple[int, int]]) -> Tokens:
    labels = [IGNORED_LABEL] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return Tokens(ids, labels)


def _common(first: list[int], second: list[int]) -> int:
    """How many ids both begin with: tokens may merge where a prompt ends."""
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return min(len(first), len(second))


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    """Datasets fill in every key that any message has."""
    return {key: value for key, value in message.items() if value is not None}


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, BATCH_ROWS)):
        yield batch
