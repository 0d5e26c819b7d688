"""What an adapter's config says was trained, by PEFT's rules: which of a model's modules it names.

A module that is named and of which the file holds nothing was lost on the way here. PEFT goes on
with a new, untrained one in its place; a merge that does would be another model without a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from qtool.planner.lora import ALL_LINEAR, HEADS

_STACK: Final = re.compile(r"(.*?)\.\d+\.")
_FIRST_INDEX: Final = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")


def is_target(config: Mapping[str, Any], module: str, *, is_linear: bool) -> bool:
    """Whether `target_modules` names the module, a linear layer or an embedding.

    Raises:
        re.error: a pattern of the config is none.
    """
    if is_saved_whole(config, module) or _names(config.get("exclude_modules"), module):
        return False
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return is_linear and module.rpartition(".")[2] not in HEADS
    if not _names(targets, module):
        return False
    is_pattern = not isinstance(targets, list) or module in targets
    return is_pattern or _is_in_layers(config, module)


def is_saved_whole(config: Mapping[str, Any], module: str) -> bool:
    """Whether `modules_to_save` names the module or one that it is a part of."""
    named = config.get("modules_to_save") or ()
    return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in named)


def stack_of(name: str) -> str | None:
    """The list of blocks that a module or a tensor is in, "model.layers"; None outside of any."""
    match = _STACK.match(name)
    return match[1] if match else None


def _names(names: Any, module: str) -> bool:
    """A pattern for the whole name, or a list of names or their ends."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    if not isinstance(names, list):
        return False
    return any(module == name or module.endswith(f".{name}") for name in names)


def _is_in_layers(config: Mapping[str, Any], module: str) -> bool:
    """Whether `layers_to_transform` leaves the module's layer in."""
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    found = _layer_index(config.get("layers_pattern"), module)
    return found is not None and found in ([wanted] if isinstance(wanted, int) else wanted)


def _layer_index(patterns: Any, module: str) -> int | None:
    if not patterns:
        match = _FIRST_INDEX.match(module)
        return int(match["index"]) if match else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", module):
            return int(match["index"])
    return None
