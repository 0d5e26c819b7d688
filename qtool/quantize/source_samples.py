"""Tells weights from others of the same shapes by a sample of them: no hash of the whole.

    samples = sample_weights(checkpoint)        # {"model.safetensors": "9f86d0..."}

To hash every byte would cost a whole read where a folder is complete already, and a core's time
where it is not. What is hashed is each shard's header and four pages of every tensor, at places
that its size decides. Another model, or this one after more training, differs there in practice; a
file in which only a few values were changed may not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final

import numpy as np

from qtool.checkpoint.reading import open_shard
from qtool.checkpoint.records import Checkpoint, Shard, TensorInfo

_PAGE_BYTES: Final = 4096
_NUM_PAGES: Final = 4


def sample_weights(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of each shard's sample, in hexadecimal; {} where a Hub commit says more.

    Raises:
        QtoolError: bad_file, if a shard is not the file any more whose header was read.
    """
    if checkpoint.folder is None or checkpoint.revision is not None:
        return {}
    tensors: dict[str, list[TensorInfo]] = {shard.file_name: [] for shard in checkpoint.shards}
    for tensor in checkpoint.tensors.values():
        tensors[tensor.shard].append(tensor)
    return {
        shard.file_name: _sample_shard(checkpoint, shard, tensors[shard.file_name])
        for shard in checkpoint.shards
    }


def _sample_shard(checkpoint: Checkpoint, shard: Shard, tensors: list[TensorInfo]) -> str:
    header_bytes = min((tensor.offset for tensor in tensors), default=shard.file_bytes)
    digest = hashlib.sha256()
    with open_shard(checkpoint, shard.file_name) as reader:
        for offset, num_bytes in ((0, header_bytes), *(p for t in tensors for p in _pages_of(t))):
            data = np.empty(num_bytes, np.uint8)
            reader.read_into(data, offset)
            digest.update(data.data)
    return digest.hexdigest()


def _pages_of(tensor: TensorInfo) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of the parts of a tensor that are read: all of a small one."""
    last = tensor.num_bytes - _PAGE_BYTES
    if tensor.num_bytes <= _NUM_PAGES * _PAGE_BYTES:
        yield tensor.offset, tensor.num_bytes
        return
    for number in range(_NUM_PAGES):  # the first at the start, the last at the end
        yield tensor.offset + last * number // (_NUM_PAGES - 1), _PAGE_BYTES
