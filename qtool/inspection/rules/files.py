"""Rules for the folder's files: config.json, the index, the headers, and how they fit together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Final

from qtool.checkpoint.config_json import CONFIG_NAME
from qtool.checkpoint.names import is_shard_name, quoted
from qtool.checkpoint.output_place import WORK_FOLDER
from qtool.checkpoint.safetensors_header import Header
from qtool.checkpoint.weight_files import SINGLE_FILE
from qtool.errors import QtoolError
from qtool.inspection.rules.rule import Finding, unreadable
from qtool.inspection.stored_folder import INDEX_NAME, StoredFolder

_LEFTOVERS: Final = (".partial", ".incomplete", ".tmp")


def config(folder: StoredFolder) -> Iterator[Finding]:
    """config.json is there and is one JSON object."""
    if folder.config is None:
        yield Finding(CONFIG_NAME, None, "a model's configuration", "no such file")
    elif isinstance(folder.config, QtoolError):
        yield unreadable(CONFIG_NAME, folder.config)


def header(folder: StoredFolder) -> Iterator[Finding]:
    """Every safetensors header is whole and consistent."""
    for shard, found in folder.headers.items():
        if isinstance(found, QtoolError):
            yield unreadable(shard, found)


def index(folder: StoredFolder) -> Iterator[Finding]:
    """Several shards have an index, and it is readable."""
    if isinstance(folder.index, QtoolError):
        yield unreadable(INDEX_NAME, folder.index)
    elif folder.index is not None and not folder.index_entries:
        found = quoted(folder.index.get("weight_map"))
        yield Finding(INDEX_NAME, None, "weight_map: tensor -> shard", found)
    elif folder.index is None and len(folder.headers) > 1:
        found = f"{len(folder.headers)} shards without an index"
        yield Finding(INDEX_NAME, None, "an index that names every shard", found)


def index_name(folder: StoredFolder) -> Iterator[Finding]:
    """The index names plain files of its folder."""
    for tensor, shard in folder.index_entries.items():
        if not isinstance(shard, str) or not is_shard_name(shard):
            yield Finding(INDEX_NAME, tensor, "a file name in the same folder", quoted(shard))


def missing_shard(folder: StoredFolder) -> Iterator[Finding]:
    """Every shard that the index names is there."""
    for shard, num_tensors in sorted(Counter(folder.weight_map.values()).items()):
        if is_shard_name(shard) and shard not in folder.files:
            yield Finding(
                shard, None, f"a file, for {num_tensors} entries of the index", "no such file"
            )


def index_tensor(folder: StoredFolder) -> Iterator[Finding]:
    """Every tensor of the index lies in the shard it names."""
    names = {shard: set(_names(found)) for shard, found in folder.headers.items()}
    for tensor, shard in folder.weight_map.items():
        if isinstance(folder.headers.get(shard), Header) and tensor not in names[shard]:
            place = folder.tensors[tensor].shard if tensor in folder.tensors else "no shard"
            yield Finding(INDEX_NAME, tensor, f"in {shard}", f"in {place}")


def unindexed_tensor(folder: StoredFolder) -> Iterator[Finding]:
    """Every tensor of the shards is in the index."""
    weight_map = folder.weight_map
    indexed_shards = set(weight_map.values())
    for tensor in folder.tensors.values():
        if tensor.shard in indexed_shards and tensor.name not in weight_map:
            yield Finding(tensor.shard, tensor.name, f"an entry in {INDEX_NAME}", "none")


def unindexed_shard(folder: StoredFolder) -> Iterator[Finding]:
    """The index names every shard."""
    indexed_shards = set(folder.weight_map.values())
    for shard in folder.headers if indexed_shards else ():
        if shard not in indexed_shards:
            loaded = "; transformers loads it instead" if shard == SINGLE_FILE else ""
            yield Finding(shard, None, f"named by {INDEX_NAME}", f"not named{loaded}")


def total_size(folder: StoredFolder) -> Iterator[Finding]:
    """The index's total_size is the sum of the tensors' bytes."""
    metadata = folder.index.get("metadata") if isinstance(folder.index, Mapping) else None
    stated = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    num_bytes = sum(tensor.num_bytes for tensor in folder.tensors.values())
    if stated not in (None, num_bytes) and _all_shards_readable(folder):
        yield Finding(INDEX_NAME, None, f"total_size {num_bytes}", quoted(stated))


def duplicate_tensor(folder: StoredFolder) -> Iterator[Finding]:
    """No tensor lies in two shards."""
    places: dict[str, list[str]] = defaultdict(list)
    for shard, found in folder.headers.items():
        for name in _names(found):
            places[name].append(shard)
    for name, shards in places.items():
        if len(shards) > 1:
            yield Finding(shards[0], name, "in one shard", f"in {' and '.join(shards)}")


def unfinished_run(folder: StoredFolder) -> Iterator[Finding]:
    """No interrupted run left files behind."""
    if folder.has_work_folder:
        found = "the journal of a run that did not finish"
        yield Finding(WORK_FOLDER, None, "a finished folder", found)
    for name in folder.files:
        if name.endswith(_LEFTOVERS):
            yield Finding(name, None, "finished files only", "a file in work")


def _all_shards_readable(folder: StoredFolder) -> bool:
    headers = [folder.headers.get(shard) for shard in set(folder.weight_map.values())]
    return all(isinstance(found, Header) for found in (*headers, *folder.headers.values()))


def _names(found: Header | QtoolError) -> list[str]:
    return [tensor.name for tensor in found.tensors] if isinstance(found, Header) else []


FILE_RULES: Final = (
    config,
    header,
    index,
    index_name,
    missing_shard,
    index_tensor,
    unindexed_tensor,
    unindexed_shard,
    total_size,
    duplicate_tensor,
    unfinished_run,
)
