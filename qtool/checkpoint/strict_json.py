"""JSON from files that nobody vouches for: one object, every name once, bounded size.

Python's parser alone accepts duplicate names (the last wins), NaN, and any depth or number of
values that memory holds; two readers of one file could then disagree about what it says.
"""

from __future__ import annotations

import json
from typing import Any, Final, NoReturn

from qtool.checkpoint.names import quoted
from qtool.errors import QtoolError, Words

# A million values take at most about 250 MB as Python objects. The largest published indexes
# (bitsandbytes layouts of mixtures of experts) hold some 300,000.
MAX_VALUES: Final = 1_000_000


class _Fault(ValueError):
    """What is wrong, in words that follow "expected ..., found ...": raised inside the parser."""


def parse_json_object(
    data: bytes, *, file: str, hint: Words, allow_infinity: bool = False
) -> dict[str, Any]:
    """Parse `data` as one JSON object.

    Args:
        file: how messages name the file.
        hint: the next step, for every error.
        allow_infinity: accept Infinity, which some configs need (Mamba-2's time_step_limit).

    Raises:
        QtoolError: bad_file, with what was expected and found.
    """

    def reject_constant(constant: str) -> float:
        if allow_infinity and constant != "NaN":
            return float(constant)
        raise _Fault(f"expected numbers that JSON knows, found {constant}")

    num_values = data.count(b",") + 1  # an upper bound: commas inside strings count too
    if num_values > MAX_VALUES:
        _reject(file, f"expected at most {MAX_VALUES:,} JSON values, found {num_values:,}", hint)
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object_with_unique_names,
            parse_constant=reject_constant,
        )
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        _reject(file, f"expected JSON in UTF-8, found {found}", hint)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        _reject(file, f"expected JSON, found an error at {where}: {error.msg}", hint)
    except _Fault as fault:
        _reject(file, str(fault), hint)
    except RecursionError:
        _reject(file, "expected JSON of moderate depth, found hundreds of nested levels", hint)
    except ValueError:  # Python's limit for the digits of an integer
        _reject(file, "expected numbers of sane size, found one of thousands of digits", hint)
    if not isinstance(value, dict):
        _reject(file, f"expected a JSON object, found {json_type(value)}", hint)
    return value


def json_type(value: object) -> str:
    """JSON's word for the type of a parsed value, with its article."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "an array" if isinstance(value, list) else "an object")


def _object_with_unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _Fault(f"expected every name once, found {quoted(twice)} twice in one object")
    return result


def _reject(file: str, what: str, hint: Words) -> NoReturn:
    raise QtoolError(f"{file}: {what}", kind="bad_file", hint=hint) from None
