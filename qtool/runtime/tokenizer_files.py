"""What a model's files tell of its tokenizer before transformers reads them, which takes seconds to
import.

    if lacks_tokenizer(checkpoint): ...

All functions say yes only where transformers will agree. What cannot be read here, or not yet as
on the Hub, may hold anything.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Final

from qtool.architecture import KNOWN_MODEL_TYPES, Architecture
from qtool.architecture.model_types import FAMILIES
from qtool.checkpoint.config_json import CONFIG_NAME
from qtool.checkpoint.file_source import read_whole
from qtool.checkpoint.local_folder import LocalFolder
from qtool.checkpoint.other_files import MANIFEST
from qtool.checkpoint.records import Checkpoint
from qtool.checkpoint.weight_files import INDEX, SAFETENSORS
from qtool.errors import QtoolError

# What holds no vocabulary, whatever the type; each type has names of its own for what does.
_WITHOUT_VOCABULARY: Final = (CONFIG_NAME, MANIFEST, "generation_config.json")
_SUFFIXES_WITHOUT: Final = (SAFETENSORS, INDEX, ".jinja", ".md", ".py")
# Files from which a tokenizer takes its settings, a template among them. Others have it in their
# name: chat_template.jinja, additional_chat_templates/.
_SETTINGS: Final = ("tokenizer_config.json", "special_tokens_map.json")
_TEMPLATE: Final = "chat_template"
_MAX_SETTINGS_BYTES: Final = 16_000_000  # the largest list some thousand added tokens


def lacks_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether no file can be a tokenizer's, and none is made without files.

    A few types make one, of which `qtool.architecture` knows none; so may a class that the config
    names.
    """
    return _is_none_among(_names(checkpoint), checkpoint)


def passes_on_no_tokenizer(checkpoint: Checkpoint, architecture: Architecture) -> bool:
    """The same of what a packed copy gets: no file where MODEL is one itself. A classifier needs
    none to generate text."""
    is_classifier = architecture.class_name == FAMILIES[architecture.model_type].classifier
    return not is_classifier and _is_none_among(checkpoint.other_files, checkpoint)


def lacks_chat_template(checkpoint: Checkpoint) -> bool:
    """Whether no file has a chat template; no class of transformers' brings its own."""
    names = _names(checkpoint)
    if any(_TEMPLATE in name for name in names):
        return False
    return not any(name in names and _may_hold_template(checkpoint, name) for name in _SETTINGS)


def _is_none_among(names: Collection[str], checkpoint: Checkpoint) -> bool:
    config = checkpoint.config
    if config.get("model_type") not in KNOWN_MODEL_TYPES or config.get("tokenizer_class"):
        return False
    return not any(map(_may_hold_vocabulary, names))


def _names(checkpoint: Checkpoint) -> frozenset[str]:
    """Of a folder on this machine all, also where MODEL was one file of it."""
    if checkpoint.folder is None:
        return frozenset(checkpoint.other_files)
    return frozenset(path.name for path in checkpoint.folder.iterdir())


def _may_hold_vocabulary(name: str) -> bool:
    has_suffix = "." in name.removeprefix(".")  # else a licence, or a folder
    return has_suffix and name not in _WITHOUT_VOCABULARY and not name.endswith(_SUFFIXES_WITHOUT)


def _may_hold_template(checkpoint: Checkpoint, name: str) -> bool:
    if checkpoint.folder is None:
        return True
    source = LocalFolder(checkpoint.folder, only=(name,))
    try:
        data = read_whole(source, name, max_bytes=_MAX_SETTINGS_BYTES, hint="")
        settings = json.loads(data)
    except (QtoolError, ValueError, RecursionError):
        return True
    return not isinstance(settings, dict) or bool(settings.get(_TEMPLATE))
