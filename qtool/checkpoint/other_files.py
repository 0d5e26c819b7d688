"""Which files of a model are neither weights nor config: what a new checkpoint carries along."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Final

from qtool.checkpoint.config_json import CONFIG_NAME
from qtool.checkpoint.file_source import FileSource
from qtool.checkpoint.weight_files import FOREIGN_WEIGHTS, INDEX, SAFETENSORS

# The largest tokenizers are about 35 MB. What is larger and no tokenizer is data, not the model's.
MAX_OTHER_BYTES: Final = 100_000_000
MANIFEST: Final = "qtool_manifest.json"  # of the folders that qtool writes
MAX_DEPTH: Final = 3


def list_other_files(source: FileSource, *, are_needed: bool) -> tuple[str, ...]:
    """The small files: tokenizer, generation config, templates, licence, README, code, images.

    Left out are weights of any format, a subfolder that holds weights of its own (onnx/,
    original/, checkpoint-500/: other models), and everything hidden.

    Args:
        are_needed: they will be read; else nothing is asked of them but names and sizes.

    Raises:
        QtoolError: bad_file, if a needed one is a link that leaves the folder, or no regular file.
    """
    weight_folders = {_top_folder(name) for name in source.files if _is_weights(name)}
    names = tuple(
        name
        for name, num_bytes in source.files.items()
        if not _is_weights(name)
        and (_top_folder(name) == "" or _top_folder(name) not in weight_folders)
        and name not in (CONFIG_NAME, MANIFEST)
        and num_bytes <= MAX_OTHER_BYTES
        and len(PurePosixPath(name).parts) <= MAX_DEPTH
    )
    for name in names if are_needed else ():
        source.status_of(name)
    return names


def _is_weights(name: str) -> bool:
    return name.lower().endswith((SAFETENSORS, INDEX, *FOREIGN_WEIGHTS, ".bin.index.json"))


def _top_folder(name: str) -> str:
    folder, slash, _ = name.partition("/")
    return folder if slash else ""
