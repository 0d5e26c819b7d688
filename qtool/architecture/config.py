"""Checked reading of a config.json: every value that reaches the planner came through here.

A key that is absent means transformers' default for the model type, which the caller passes; a
value of the wrong kind or size is a QtoolError that names the key, what was expected and what was
found. Nothing is allocated in proportion to a value before it was checked.

    config = Config({"hidden_size": 4096})
    config.count("hidden_size", 2048)        # 4096
    config.flag("attention_bias", False)     # False: absent
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from qtool.errors import QtoolError

# The deepest published transformers have about 1,000 layers; the number bounds the plan's length.
MAX_LAYERS: Final = 1_024
# A bound for parts that are counted by a product of two values.
MAX_TENSORS: Final = 1_000_000
# Widths and vocabularies beyond this do not fit the 32-bit dimensions that kernels use.
MAX_WIDTH: Final = 2**31 - 1


class Config:
    """One level of a config.json; `section` steps into a nested one (`text_config`)."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path

    def count(
        self, key: str, default: int, *, alias: str | None = None, maximum: int = MAX_WIDTH
    ) -> int:
        """A whole number of at least 1. `alias`, transformers' other name for it, wins."""
        value = self.optional_count(key, default, alias=alias, maximum=maximum)
        if value is None:
            self.reject(key, None, f"a whole number from 1 to {maximum:,}")
        return value

    def optional_count(
        self,
        key: str,
        default: int | None = None,
        *,
        alias: str | None = None,
        maximum: int = MAX_WIDTH,
    ) -> int | None:
        """Like `count`, where null is a value of its own (mostly: derive it from others)."""
        if alias is not None and self._values.get(alias) is not None:
            key = alias
        value = self._values.get(key, default)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= maximum:
            self.reject(key, value, f"a whole number from 1 to {maximum:,}")
        return value

    def count_or_auto(self, key: str) -> int | None:
        """A `count`, or None where it is "auto" or absent: derive it from others."""
        return None if self._values.get(key, "auto") == "auto" else self.count(key, 1)

    def whole(self, key: str, default: int, *, minimum: int = 0) -> int:
        """A whole number that may be 0, or `minimum`: an index."""
        value = self._values.get(key, default)
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or not minimum <= value <= MAX_WIDTH
        ):
            self.reject(key, value, f"a whole number from {minimum} to {MAX_WIDTH:,}")
        return value

    def num_layers(self, key: str, default: int, *, alias: str | None = None) -> int:
        """A `count` of layers, which bounds the size of the plan."""
        return self.count(key, default, alias=alias, maximum=MAX_LAYERS)

    def flag(self, key: str, default: bool) -> bool:
        """true or false; null counts as false, as it does in transformers."""
        value = self._values.get(key, default)
        if value is None:
            return False
        if not isinstance(value, bool):
            self.reject(key, value, "true or false")
        return value

    def text(self, key: str) -> str | None:
        """A string, or None where it is absent or null."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, str):
            self.reject(key, value, "a string")
        return value

    def items(self, key: str, *, maximum: int = MAX_LAYERS) -> Sequence[Any] | None:
        """A list of at most `maximum` entries, or None where it is absent or null."""
        value = self._values.get(key)
        if value is not None and (not isinstance(value, list | tuple) or len(value) > maximum):
            self.reject(key, value, f"a list of at most {maximum:,} entries")
        return value

    def pattern(self, key: str, words: Mapping[str, str]) -> Sequence[Any] | None:
        """One word per layer: a list of them, or a string of the letters that stand for `words`."""
        value = self._values.get(key)
        if not isinstance(value, str):
            return self.items(key)
        if len(value) > MAX_LAYERS or not set(value) <= set(words):
            self.reject(key, value, f"at most {MAX_LAYERS:,} of the letters {' '.join(words)}")
        return [words[letter] for letter in value]

    def section(self, key: str) -> Config:
        """The nested object `key`; empty where it is absent or null."""
        return self.optional_section(key) or Config({}, f"{self._path}{key}.")

    def optional_section(self, key: str) -> Config | None:
        """The nested object `key`, or None where it is absent or null."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.reject(key, value, "an object")
        return Config(value, f"{self._path}{key}.")

    def num_labels(self) -> int:
        """How many classes a classifier tells apart: the length of `id2label`, 2 by default."""
        labels = self._values.get("id2label")
        if labels is None:
            return self.count("num_labels", 2)
        if not isinstance(labels, Mapping) or not labels:
            self.reject("id2label", labels, "an object with one entry per class")
        return len(labels)

    def require_divisible(self, key: str, width: int, parts: int, parts_key: str) -> int:
        """`width` // `parts`, where transformers refuses a remainder."""
        if width % parts:
            self.reject(key, width, f"a multiple of {parts_key} ({parts})")
        return width // parts

    def reject(self, key: str, found: object, expected: str) -> NoReturn:
        """Raise the error for a broken value."""
        shown = "null" if found is None else repr(found)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise QtoolError(
            f"config.json: {self._path}{key}: expected {expected}, found {shown}",
            kind="bad_file",
            hint="correct that value in config.json, or take the file from the original model",
        )
