"""The header of a safetensors file: a strict reader and the writer's counterpart.

    0        8                    8 + N                              file end
    | N (u64) | JSON, N bytes      | tensor data, without holes       |
              {"__metadata__": {...}, NAME: {"dtype", "shape", "data_offsets": [begin, end]}, ...}

The reader accepts less than the reference parser: no name twice, no hostile names, no unknown
fields, no more dimensions than any model has. What it accepts, every other reader understands in
the same way. It reads headers only and imports no NumPy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

from qtool.checkpoint.local_folder import LocalFolder
from qtool.checkpoint.names import fault_of_tensor_name, quoted
from qtool.checkpoint.records import TensorInfo
from qtool.checkpoint.strict_json import json_type, parse_json_object
from qtool.errors import QtoolError
from qtool.formats.tensors import DTYPE_BITS, TensorLayout

LENGTH_BYTES: Final = 8
MAX_JSON_BYTES: Final = 100_000_000  # the format's own limit
MAX_DIMENSIONS: Final = 8
MAX_ELEMENTS: Final = 2**63 - 1
DATA_ALIGNMENT: Final = 16  # where written data begins: a multiple of every dtype's size
# One read of this size holds most headers (about 130 bytes per tensor); from the Hub it comes in
# the first packets of a new connection.
FIRST_READ_BYTES: Final = 16 * 1024

METADATA_KEY: Final = "__metadata__"
TENSOR_FIELDS: Final = frozenset({"dtype", "shape", "data_offsets"})
DAMAGED: Final = "the file is damaged or no safetensors file; download or save it again"
HOSTILE: Final = "no tool that saves models writes this; do not trust the file's origin"

ReadRange = Callable[[int, int], bytes]  # (offset, num_bytes) -> the bytes there


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header; `tensors` in the header's order, `data_start` where their bytes begin."""

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    data_start: int


class EncodedHeader(NamedTuple):
    """The first bytes of a file to be written, and where each tensor's bytes belong in it."""

    data: bytes
    offsets: tuple[int, ...]  # absolute, one per layout
    file_bytes: int


# -- reading ------------------------------------------------------------------------------------


def read_header(path: Path) -> Header:
    """Read and check the header of the safetensors file at `path`.

    Raises:
        QtoolError: bad_file, naming file, tensor, expected and found.
    """
    folder = LocalFolder(path.parent)
    return fetch_header(
        lambda offset, num_bytes: folder.read(path.name, offset, num_bytes),
        shard=path.name,
        file=folder.describe(path.name),
        file_bytes=folder.status_of(path.name).num_bytes,
    )


def fetch_header(
    read_range: ReadRange,
    *,
    shard: str,
    file: str,
    file_bytes: int,
    first_read_bytes: int = FIRST_READ_BYTES,
) -> Header:
    """Read and check a header through `read_range`, with one read where it is of usual size.

    Args:
        shard: the file's name in its checkpoint, for the records.
        file: how messages name it.
        file_bytes: its size.
        first_read_bytes: how much to read at once; a second read fetches the rest of the header.
    """
    start = read_range(0, min(first_read_bytes, file_bytes))
    json_bytes = _check_start(start, file=file, file_bytes=file_bytes)
    missing = LENGTH_BYTES + json_bytes - len(start)
    if missing > 0:
        start += read_range(len(start), missing)
    data = start[LENGTH_BYTES : LENGTH_BYTES + json_bytes]
    return parse_header(data, shard=shard, file=file, file_bytes=file_bytes)


def parse_header(data: bytes, *, shard: str, file: str, file_bytes: int) -> Header:
    """Check the JSON part `data` of a header against the format and the size of its file."""
    entries = parse_json_object(data, file=f"{file} (header)", hint=DAMAGED)
    metadata = _check_metadata(entries.pop(METADATA_KEY, {}), file)
    data_start = LENGTH_BYTES + len(data)
    tensors = tuple(
        _parse_tensor(name, entry, shard=shard, file=file, data_start=data_start)
        for name, entry in entries.items()
    )
    _check_contiguous(tensors, file=file, data_start=data_start, file_bytes=file_bytes)
    return Header(tensors, metadata, data_start)


def _check_start(start: bytes, *, file: str, file_bytes: int) -> int:
    if start.startswith(b"version https://git-lfs"):
        _reject(
            file,
            "expected a safetensors file, found a Git LFS pointer to one",
            "fetch the weights with `git lfs pull`, or download the model with `hf download`",
        )
    if file_bytes < LENGTH_BYTES + 2:
        _reject(file, f"expected at least 10 bytes, found {file_bytes}")
    json_bytes = int.from_bytes(start[:LENGTH_BYTES], "little")
    if json_bytes > MAX_JSON_BYTES:
        expected = f"expected a header of at most {MAX_JSON_BYTES:,} bytes"
        begins = quoted(start[:LENGTH_BYTES].decode("latin-1"))
        _reject(file, f"{expected}, found a length of {json_bytes:,} (it begins with {begins})")
    if LENGTH_BYTES + json_bytes > file_bytes:
        expected = f"expected a header of {json_bytes:,} bytes"
        _reject(file, f"{expected}, found a file of {file_bytes:,}: it is truncated")
    if start[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
        found = quoted(start[LENGTH_BYTES : LENGTH_BYTES + 8].decode("latin-1"))
        _reject(file, f"expected a header that begins with '{{', found {found}")
    return json_bytes


def _check_metadata(metadata: Any, file: str) -> Mapping[str, str]:
    if not isinstance(metadata, dict):
        _reject(file, f"expected {METADATA_KEY} to be an object, found {json_type(metadata)}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            where = f"expected {METADATA_KEY} {quoted(key)} to be a string"
            _reject(file, f"{where}, found {json_type(value)}")
    return metadata


def _parse_tensor(name: str, entry: Any, *, shard: str, file: str, data_start: int) -> TensorInfo:
    fault = fault_of_tensor_name(name)
    if fault is not None:
        expected = "expected tensor names of 1 to 512 printable bytes that are no paths"
        _reject(file, f"{expected}, found {fault}", HOSTILE)
    if not isinstance(entry, dict):
        _reject(file, f"expected an object, found {json_type(entry)}", tensor=name)
    if entry.keys() != TENSOR_FIELDS:
        fields = ", ".join(sorted(TENSOR_FIELDS))
        found = ", ".join(sorted(map(quoted, entry))[:5]) or "none"
        _reject(file, f"expected the fields {fields}, found {found}", tensor=name)
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        known = ", ".join(DTYPE_BITS)
        raise QtoolError(
            f"{file}: tensor {quoted(name)}: expected a dtype among {known}, found {quoted(dtype)}",
            kind="unsupported",
            hint="save the model in bfloat16, float16 or float32",
        )
    shape = _check_shape(entry["shape"], file, name)
    begin, end = _check_offsets(entry["data_offsets"], file, name)
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if (end - begin) * 8 != bits:
        num_bytes = bits / 8 if bits % 8 else bits // 8
        expected = f"expected {num_bytes:,} bytes ({dtype} {list(shape)})"
        found = f"data_offsets that span {end - begin:,}"
        _reject(file, f"{expected}, found {found}", tensor=name)
    return TensorInfo(name, dtype, shape, shard, data_start + begin)


def _check_shape(shape: Any, file: str, tensor: str) -> tuple[int, ...]:
    if not _is_list_of_counts(shape):
        expected = "expected a shape of sizes from 0 to 2^63 - 1"
        _reject(file, f"{expected}, found {quoted(shape)}", tensor=tensor)
    if len(shape) > MAX_DIMENSIONS:
        expected = f"expected at most {MAX_DIMENSIONS} dimensions"
        _reject(file, f"{expected}, found {len(shape)}", HOSTILE, tensor=tensor)
    if math.prod(filter(None, shape)) > MAX_ELEMENTS:
        expected = "expected fewer than 2^63 elements"
        _reject(file, f"{expected}, found shape {shape}", HOSTILE, tensor=tensor)
    return tuple(shape)


def _check_offsets(offsets: Any, file: str, tensor: str) -> tuple[int, int]:
    if not _is_list_of_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        expected = "expected data_offsets [begin, end] with 0 <= begin <= end"
        _reject(file, f"{expected}, found {quoted(offsets)}", tensor=tensor)
    return offsets[0], offsets[1]


def _is_list_of_counts(values: Any) -> bool:
    if not isinstance(values, list) or not {int}.issuperset(map(type, values)):  # bool is no count
        return False
    return not values or (min(values) >= 0 and max(values) <= MAX_ELEMENTS)


def _check_contiguous(
    tensors: Sequence[TensorInfo], *, file: str, data_start: int, file_bytes: int
) -> None:
    """The tensors fill the data part: no hole, no overlap, nothing before or after."""
    expected = data_start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.num_bytes)):
        if tensor.offset != expected:
            fault = "a hole" if tensor.offset > expected else "an overlap"
            _reject(
                file,
                f"expected its data to begin at offset {expected - data_start:,}, found "
                f"{tensor.offset - data_start:,} ({fault})",
                tensor=tensor.name,
            )
        expected += tensor.num_bytes
    if expected != file_bytes:
        fault = "it is truncated" if file_bytes < expected else "it carries bytes of no tensor"
        _reject(file, f"expected {expected:,} bytes, found {file_bytes:,}: {fault}")


def _reject(file: str, what: str, hint: str = DAMAGED, *, tensor: str | None = None) -> NoReturn:
    where = file if tensor is None else f"{file}: tensor {quoted(tensor)}"
    raise QtoolError(f"{where}: {what}", kind="bad_file", hint=hint)


# -- writing ------------------------------------------------------------------------------------


def encode_header(
    layouts: Sequence[TensorLayout], metadata: Mapping[str, str] | None = None
) -> EncodedHeader:
    """The header of a file that holds `layouts` in this order, without holes.

    The same layouts and metadata give the same bytes; the JSON is padded with spaces so that the
    data begins at a multiple of 16. `metadata` defaults to {"format": "pt"}, which transformers
    asks for.

    Raises:
        ValueError: two layouts of one name.
    """
    entries: dict[str, Any] = {METADATA_KEY: dict(sorted((metadata or {"format": "pt"}).items()))}
    begins: list[int] = []
    end = 0
    for layout in layouts:
        if layout.name in entries:
            raise ValueError(f"two tensors are named {layout.name!r}")
        begins.append(end)
        end += layout.num_bytes
        entries[layout.name] = {
            "dtype": layout.dtype,
            "shape": list(layout.shape),
            "data_offsets": [begins[-1], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % DATA_ALIGNMENT)
    data = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return EncodedHeader(data, tuple(len(data) + begin for begin in begins), len(data) + end)
