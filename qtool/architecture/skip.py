"""Which linear layers stay in 16 bit: transformers' own matching, so that the sets agree.

transformers keeps a module when one of `llm_int8_skip_modules` matches its name
(quantizers/quantizers_utils.py, should_convert_module), and without such a list when its own
default rule names it (quantizers/base.py, get_keys_to_not_convert). A given list replaces the
default rule, therefore qtool always writes the default names out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from qtool.errors import QtoolError

# A match must end at a dot: before one, behind one, or at the end of the name.
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


def first_match(module_name: str, patterns: Sequence[str]) -> str | None:
    """The first pattern that matches `module_name`, or None.

    A pattern matches as a regular expression from the start of the name up to a boundary
    ("model.layers.1" matches "model.layers.1.mlp", not "model.layers.11"), or as a plain suffix
    ("fc1" matches "model.decoder.layers.23.fc1").
    """
    for pattern in patterns:
        try:
            if re.match(f"(?:{pattern}){_BOUNDARY}", module_name) or module_name.endswith(pattern):
                return pattern
        except re.error as error:
            raise QtoolError(
                f"skip pattern {pattern!r} is not a regular expression: {error.msg}",
                kind="usage",
                hint="write a module name such as lm_head or model.layers.0, or escape the "
                "special characters with a backslash",
            ) from error
    return None


def is_skipped(module_name: str, patterns: Sequence[str]) -> bool:
    """Whether transformers would leave the module `module_name` alone, given `patterns`."""
    return first_match(module_name, patterns) is not None


def default_skips(
    tied: Iterable[tuple[str, str]], last_parameter: str, output_head: str | None
) -> tuple[str, ...]:
    """What transformers keeps without being asked: both ends of tied weights, whatever holds the
    last parameter, and the output embeddings. Sorted names, ".weight" removed.

    The last parameter may be a bias, whose full name then stands in the list and matches no
    module; transformers' own list has it too.
    """
    names = {last_parameter} | {end for pair in tied for end in pair}
    if output_head is not None:
        names.add(output_head)
    return tuple(sorted(name.removesuffix(".weight") for name in names))
