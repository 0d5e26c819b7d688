"""What is known of a checkpoint once its headers were read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from qtool.formats.tensors import TensorLayout


@dataclass(frozen=True, slots=True)
class TensorInfo(TensorLayout):
    """A tensor and where its bytes lie: `offset` is absolute in the file `shard` names."""

    shard: str
    offset: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file. `metadata` is the header's `__metadata__`.

    `modified_ns` is the time of the last write when the header was read; None on the Hub.
    """

    file_name: str
    file_bytes: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    modified_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder, local or on the Hub, with validated headers.

    `folder` is None when only headers were fetched from the Hub. `tensors` keeps the order of the
    shards and of the headers. Both are empty for a folder that holds only a config.json.
    """

    id: str  # as the user wrote it, without the revision
    location: Literal["local", "hub"]
    revision: str | None  # the Hub commit; None for a local folder
    folder: Path | None
    config: Mapping[str, Any]  # {} where there is none
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorInfo]
    other_files: tuple[str, ...]  # small files to carry along, relative names, sorted

    @classmethod
    def of_config(cls, id: str, config: Mapping[str, Any]) -> Self:
        """A model of which nothing but the config.json is known."""
        return cls(
            id=id,
            location="local",
            revision=None,
            folder=None,
            config=config,
            shards=(),
            tensors={},
            other_files=(),
        )

    @property
    def weights_bytes(self) -> int:
        """The sum of the tensors' bytes, without headers."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def num_parameters(self) -> int:
        """Elements as stored (packed tensors count as they lie)."""
        return sum(tensor.num_elements for tensor in self.tensors.values())

    def path_of(self, shard: str) -> Path:
        """Where the shard's bytes can be read; only for checkpoints whose files are local."""
        if self.folder is None:
            raise ValueError(f"{self.id}: only headers were fetched; open it with need='files'")
        return self.folder / shard
