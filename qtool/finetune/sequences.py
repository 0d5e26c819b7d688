"""Rows as token ids and labels, cut to the longest length that is trained.

    sequences = encode(rows, tokenizer, max_length=1024, completion_only=True)

Labels are the ids, or -100 where nothing is to be learned: prompts, and what others than the
assistant say. A running text is cut into pieces of `max_length` tokens and loses none.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from typing import Any, Final, NamedTuple

from qtool.errors import Option, QtoolError, Words
from qtool.finetune.rows import COMPLETION, MESSAGES, PROMPT, TEXT, TOOLS, Row, Rows
from qtool.finetune.turns import ASSISTANT, Conversation, Message, Render, common_length

IGNORED_LABEL: Final = -100  # PyTorch's and transformers' label for what no loss is taken of
BATCH_ROWS: Final = 256
SHORTEST: Final = 2  # tokens; a single one has nothing to predict
# What a template may put around the words that the assistant makes.
GENERATION: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What templates say where roles are others than they want, or in another order.
ROLES: Final = re.compile(r"\brole|alternat|system message", re.IGNORECASE)
SHOWN_HINT: Final = (
    "take the turn out, or end the row before it; ",
    Option("completion_only", False),
    " learns all that is shown of rows",
)

Span = tuple[int, int]


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


def _template_hint(error: Exception, first_line: str) -> str:
    """What to change where a chat template fails: what it asks for itself it says of the row, and
    all else is about values that it met, or about itself."""
    from jinja2 import TemplateError, TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):
        return "the template is at fault, not the row: fetch the model's tokenizer files again"
    if type(error) is not TemplateError:
        return (
            "a message has another form than the template reads: a key is missing, or there is a "
            "list or an object where it wants text"
        )
    if ROLES.search(first_line):
        return "roles, and who begins, are as the model's chat template wants them"
    return "these are the template's own words: change the messages as they say"


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
            start = common_length(prompt_ids, ids) if self.completion_only else 0
            yield _learn(ids, [(start, len(ids))])

    # -- messages ---------------------------------------------------------------------------------

    def _of_messages(self, row: Row, messages: list[Any], num_prompt: int | None) -> Tokens:
        """A conversation; what is learned is the assistant's, or all from `num_prompt` on."""
        messages = [_without_nulls(message) for message in messages]
        try:
            ids = self._template(row, messages)
        except Exception as error:  # templates raise what they like
            first_line = str(error).strip().partition("\n")[0]
            raise self.rows.error(
                row,
                f"the chat template refuses it: {first_line or type(error).__name__}",
                _template_hint(error, first_line),
            ) from error
        if not self.completion_only:
            return Tokens(ids, ids)
        return _learn(ids, self._spans(row, messages, ids, num_prompt))

    def _spans(
        self, row: Row, messages: list[Any], ids: list[int], num_prompt: int | None
    ) -> list[Span]:
        """Where to learn."""
        conversation = Conversation(messages, ids, self._renderer(row))
        if num_prompt is not None:
            start = conversation.start(num_prompt)
            return [self._shown(row, messages, num_prompt, start, len(ids))]
        turns = [place for place, it in enumerate(messages) if it["role"] == ASSISTANT]
        if self._has_marks:
            ends = [end for place in turns if (end := conversation.end(place)) is not None]
            return list(_to_ends(self._marked_spans(row, messages), ends))
        return [
            self._shown(row, messages, place, conversation.start(place), conversation.end(place))
            for place in turns
        ]

    def _shown(
        self, row: Row, messages: list[Any], place: int, start: int | None, end: int | None
    ) -> Span:
        """A span, unless there is nothing in it."""
        if start is None or end is None or start >= end:
            raise self.rows.error(
                row,
                f"message {place + 1} ({messages[place]['role']}) is not found in what the chat "
                "template makes of the row",
                SHOWN_HINT,
            )
        return start, end

    @property
    def _has_marks(self) -> bool:
        template = self.tokenizer.chat_template  # several, by name, of some old models
        is_marked = isinstance(template, str) and GENERATION.search(template) is not None
        return is_marked and self.tokenizer.is_fast  # others do not know which token is where

    def _marked_spans(self, row: Row, messages: list[Any]) -> list[Span]:
        """What the template marks."""
        made = self._apply(row, messages, return_dict=True, return_assistant_tokens_mask=True)
        spans, place = [], 0
        for is_said, group in groupby(made["assistant_masks"]):
            end = place + len(list(group))
            if is_said:
                spans.append((place, end))
            place = end
        roles = [role for role, _ in groupby(message["role"] for message in messages)]
        if len(spans) < roles.count(ASSISTANT):
            raise self.rows.error(
                row,
                f"the chat template marks {len(spans)} of {roles.count(ASSISTANT)} turns of the "
                "assistant as its own words",
                SHOWN_HINT,
            )
        return spans

    def _renderer(self, row: Row) -> Render:
        def render(messages: Sequence[Message], asks: bool) -> list[int] | None:
            try:
                return self._template(row, list(messages), asks=asks)
            except Exception:  # it may want what comes later
                return None

        return render

    def _template(self, row: Row, messages: list[Any], *, asks: bool = False) -> list[int]:
        ids: list[int] = self._apply(row, messages, add_generation_prompt=asks, return_dict=False)
        return ids

    def _apply(self, row: Row, messages: list[Any], **options: bool) -> Any:
        tools = row.fields.get(TOOLS) or None
        return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, **options)

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


def _learn(ids: list[int], spans: Iterable[Span]) -> Tokens:
    labels = [IGNORED_LABEL] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return Tokens(ids, labels)


def _to_ends(spans: Sequence[Span], ends: Sequence[int]) -> Iterator[Span]:
    """What is marked, on to the end of its turn, lest the model never stop; not past what is marked
    next."""
    limits = [*(start for start, _ in spans[1:]), None]
    for (start, end), limit in zip(spans, limits, strict=True):
        turn_end = min((place for place in ends if place >= end), default=end)
        yield start, turn_end if limit is None or turn_end <= limit else end


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    """Datasets fill in every key that any message has."""
    return {key: value for key, value in message.items() if value is not None}


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, BATCH_ROWS)):
        yield batch
