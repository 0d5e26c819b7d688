"""What a model's files tell of its tokenizer before transformers reads them, which takes seconds to
import.

    if lacks_tokenizer(checkpoint): ...

Both functions say yes only where transformers will agree. What cannot be read here, or not yet as
on the Hub, may hold anything.
"""

from __future__ import annotations

import json
from typing import Final

from qtool.architecture import KNOWN_MODEL_TYPES
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
    config = checkpoint.config
    if config.get("model_type") not in KNOWN_MODEL_TYPES or config.get("tokenizer_class"):
        return False
    return not any(_may_hold_vocabulary(name) for name in _names(checkpoint))


def lacks_chat_template(checkpoint: Checkpoint) -> bool:
    """Whether no file has a chat template; no class of transformers' brings its own."""
    names = _names(checkpoint)
    if any(_TEMPLATE in name for name in names):
        return False
    return not any(name in names and _may_hold_template(checkpoint, name) for name in _SETTINGS)


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
