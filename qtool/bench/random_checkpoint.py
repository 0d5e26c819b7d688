"""A checkpoint of random bf16 weights, written as fast as the cores make random numbers."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from qtool.architecture import build_architecture
from qtool.bench.random_weights import fill_with_gaussians
from qtool.checkpoint.records import Checkpoint, TensorInfo
from qtool.checkpoint.safetensors_header import EncodedHeader, encode_header
from qtool.events import Advanced, Finished, OnEvent, Started
from qtool.formats.tensors import TensorLayout

MAX_SHARD_BYTES: Final = 5_000_000_000  # as transformers' models on the Hub are cut
_BLOCK_BYTES: Final = 16 << 20  # what a thread makes and writes at once

Layouts = tuple[TensorLayout, ...]


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """What a checkpoint of `config` consists of; nothing is written yet."""

    config: Mapping[str, Any]
    shards: Mapping[str, Layouts]  # by file name

    @property
    def layouts(self) -> list[TensorLayout]:
        """All tensors."""
        return [layout for shard in self.shards.values() for layout in shard]

    @property
    def file_bytes(self) -> int:
        """Of all shards, headers included."""
        return sum(encode_header(shard).file_bytes for shard in self.shards.values())

    def as_checkpoint(self) -> Checkpoint:
        """The checkpoint that it will be, to be planned; its bytes cannot be read."""
        return Checkpoint(
            id="random weights",
            location="local",
            revision=None,
            folder=None,
            config=self.config,
            shards=(),
            tensors={
                layout.name: TensorInfo(layout.name, layout.dtype, layout.shape, shard, 0)
                for shard, layouts in self.shards.items()
                for layout in layouts
            },
            other_files=(),
        )


@dataclass(frozen=True, slots=True)
class _Block:
    """Bytes of a file that one thread fills, in one go; `seed` makes them its own."""

    descriptor: int
    offset: int
    num_bytes: int
    seed: tuple[int, int, int]


def plan_checkpoint(
    config: Mapping[str, Any], max_shard_bytes: int = MAX_SHARD_BYTES
) -> CheckpointFiles:
    """The files of a bf16 checkpoint of the model that `config` describes.

    Raises:
        QtoolError: its architecture is not known, or the config is broken.
    """
    tensors = build_architecture(config).tensors.values()
    layouts = [TensorLayout(t.name, "BF16", t.shape) for t in tensors if t.tied_to is None]
    groups = list(_split(layouts, max_shard_bytes))
    names = [
        f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        for number in range(1, len(groups) + 1)
    ]
    if len(groups) == 1:
        names = ["model.safetensors"]
    return CheckpointFiles(config, dict(zip(names, groups, strict=True)))


def _split(layouts: Iterable[TensorLayout], max_bytes: int) -> Iterator[Layouts]:
    group: list[TensorLayout] = []
    for layout in layouts:
        if group and sum(t.num_bytes for t in group) + layout.num_bytes > max_bytes:
            yield tuple(group)
            group = []
        group.append(layout)
    yield tuple(group)


def write_checkpoint(
    files: CheckpointFiles, folder: Path, num_threads: int, on_event: OnEvent
) -> None:
    """Write `files` into the new folder `folder`; no two blocks of bytes in it are alike."""
    folder.mkdir()
    stage, seed = "write random weights", secrets.randbits(63)
    on_event(Started(stage, sum(layout.num_bytes for layout in files.layouts)))
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for number, (name, layouts) in enumerate(files.shards.items()):
                header = encode_header(layouts)
                with (folder / name).open("xb") as file:
                    file.write(header.data)
                    file.flush()
                    blocks = _cut(file.fileno(), header, (seed, number))
                    for num_bytes in pool.map(_fill, blocks):
                        on_event(Advanced(num_bytes, name))
        finally:
            pool.shutdown(cancel_futures=True)
    if len(files.shards) > 1:
        _write_json(folder / "model.safetensors.index.json", _index(files))
    _write_json(folder / "config.json", files.config)
    on_event(Finished(stage))


def _cut(descriptor: int, header: EncodedHeader, seed: tuple[int, int]) -> list[_Block]:
    """The data of one file, whatever tensors it is made of."""
    starts = range(len(header.data), header.file_bytes, _BLOCK_BYTES)
    return [
        _Block(descriptor, start, min(_BLOCK_BYTES, header.file_bytes - start), (*seed, number))
        for number, start in enumerate(starts)
    ]


def _fill(block: _Block) -> int:
    values = np.empty(block.num_bytes // 2, np.uint16)
    fill_with_gaussians(values, "BF16", block.seed)
    view, offset = values.view(np.uint8).data, block.offset
    while view:
        written = os.pwrite(block.descriptor, view, offset)
        view, offset = view[written:], offset + written
    return block.num_bytes


def _index(files: CheckpointFiles) -> dict[str, Any]:
    weight_map = {t.name: name for name, layouts in files.shards.items() for t in layouts}
    total_size = sum(layout.num_bytes for layout in files.layouts)
    return {"metadata": {"total_size": total_size}, "weight_map": weight_map}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
