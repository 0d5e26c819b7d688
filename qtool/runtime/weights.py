"""A checkpoint's weights as transformers' loader takes them: a mapping of tensors read when needed.

Packed weights appear under the names of our layers' parameters and buffers (`P.weight`, `P.absmax`,
`P.nested_offset`, `P.SCB`, ...), everything else under its stored name. Nothing is read before the
loader asks for a tensor, and nothing is kept after.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import EllipsisType, TracebackType
from typing import Final, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qtool.checkpoint.reading import ShardReader
from qtool.checkpoint.records import Checkpoint, TensorInfo
from qtool.errors import QtoolError
from qtool.events import Advanced, OnEvent
from qtool.formats.bitsandbytes import (
    ROW_MAJOR,
    QuantizedWeight,
    QuantState,
    find_quantized,
    layout_problems,
    parse_quant_state,
    stray_statistics,
)
from qtool.formats.codebooks import CODES
from qtool.formats.tensors import TensorLayout
from qtool.runtime.linear import FourBitLayer, Int8Layer, PackedLayer

TORCH_DTYPES: Final[dict[str, torch.dtype]] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DAMAGED_HINT = "fetch or quantize the model again; `qtool inspect --verify` lists every problem"

ByteArray = NDArray[np.uint8]
ReadBytes = Callable[[str], ByteArray]


class LazyTensor:
    """A tensor that exists once it is indexed with `...`, like safetensors' own slices."""

    def __init__(
        self, dtype: torch.dtype, shape: tuple[int, ...], load: Callable[[], Tensor]
    ) -> None:
        self.dtype = dtype
        self.shape = shape
        self._load = load

    def __getitem__(self, index: EllipsisType) -> Tensor:
        return self._load()


@dataclass(slots=True)
class WeightSource:
    """What a model is filled from.

    Args:
        layers: the packed linear layers, by stored module name.
        tensors: every tensor to load.
        total_bytes: what `on_event` counts up to while they are read.
    """

    layers: dict[str, PackedLayer]
    tensors: dict[str, LazyTensor]
    total_bytes: int
    closing: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.closing.__exit__(kind, error, traceback)


class StoredTensors:
    """Reads tensors of a local checkpoint by name; safe to use from several threads."""

    def __init__(self, checkpoint: Checkpoint, closing: ExitStack, on_event: OnEvent) -> None:
        self._checkpoint = checkpoint
        self._closing = closing
        self._on_event = on_event
        self._readers: dict[str, ShardReader] = {}
        self._lock = threading.Lock()

    def peek_bytes(self, name: str) -> ByteArray:
        """The tensor's bytes, uint8 (num_bytes,)."""
        tensor = self._checkpoint.tensors[name]
        return self._reader(tensor).read_tensor(tensor)

    def read_bytes(self, name: str) -> ByteArray:
        """The same, counted as progress."""
        data = self.peek_bytes(name)
        self._on_event(Advanced(data.size, name))
        return data

    def _reader(self, tensor: TensorInfo) -> ShardReader:
        with self._lock:
            if tensor.shard not in self._readers:
                reader = ShardReader(self._checkpoint.path_of(tensor.shard))
                self._readers[tensor.shard] = self._closing.enter_context(reader)
            return self._readers[tensor.shard]


def open_stored_weights(checkpoint: Checkpoint, on_event: OnEvent) -> WeightSource:
    """The weights as they lie in the folder, packed or not.

    Raises:
        QtoolError: statistics that are missing, of a wrong size or belong to no weight.
    """
    closing = ExitStack()
    stored = StoredTensors(checkpoint, closing, on_event)
    source = WeightSource({}, {}, checkpoint.weights_bytes, closing)
    packed = find_quantized(checkpoint.tensors)
    refuse_stray_statistics(checkpoint, packed)
    taken: set[str] = set()
    for quantized in packed.values():
        place = _place(checkpoint, quantized.name)
        state = _read_state(quantized, stored.peek_bytes, place)
        add_packed(source, quantized, state, stored.read_bytes, place)
        _check_constants(quantized, stored.peek_bytes, place)
        taken.update({quantized.name, *(part.name for part in quantized.statistics.values())})
    for name, tensor in checkpoint.tensors.items():
        if name not in taken:
            source.tensors[name] = plain_tensor(tensor, stored.read_bytes)
    return source


def plain_tensor(tensor: TensorInfo, read_bytes: ReadBytes) -> LazyTensor:
    """A tensor that is loaded as it is stored."""
    dtype = TORCH_DTYPES.get(tensor.dtype)
    if dtype is None:
        raise QtoolError(
            f"{tensor.shard}: {tensor.name}: dtype {tensor.dtype} cannot be run",
            kind="unsupported",
            hint="convert the checkpoint to bfloat16 first",
        )
    shape = tensor.shape
    return LazyTensor(dtype, shape, lambda: _as_torch(read_bytes(tensor.name), dtype, shape))


def add_packed(
    source: WeightSource,
    quantized: QuantizedWeight,
    state: QuantState | None,
    read_bytes: ReadBytes,
    place: str,
) -> None:
    """Add one packed layer and its tensors to `source`.

    Args:
        state: the quant_state of a 4-bit weight (the offset's value is not used), None for INT8.
        read_bytes: reads a stored tensor by name.
        place: "file: tensor", for error messages.
    """
    problems = layout_problems(quantized, state)
    if problems:
        first = problems[0]
        raise QtoolError(
            f"{place}: {first.tensor}: {first.rule}: expected {first.expected}, "
            f"found {first.found}",
            kind="bad_file",
            hint=DAMAGED_HINT,
        )
    module = quantized.name.removesuffix(".weight")
    if state is None:
        out_features, in_features = quantized.weight.shape
        source.layers[module] = Int8Layer(out_features, in_features)
    else:
        source.layers[module] = _four_bit_layer(state, place)
    builder = _PackedTensors(quantized, read_bytes, place)
    source.tensors |= {f"{module}.{key}": value for key, value in builder.lazy(state).items()}


@dataclass(frozen=True, slots=True)
class _PackedTensors:
    """Makes the tensors of one packed layer from its stored parts."""

    quantized: QuantizedWeight
    read_bytes: ReadBytes
    place: str

    def lazy(self, state: QuantState | None) -> dict[str, LazyTensor]:
        """By the names of the layer's parameters and buffers."""
        if state is None:
            return {
                "weight": self._weight(torch.int8, self.quantized.weight.shape),
                "SCB": self._statistic("SCB"),
            }
        tensors = {
            "weight": self._weight(torch.uint8, (self.quantized.weight.num_bytes, 1)),
            "absmax": self._statistic("absmax"),
        }
        if state.nested_offset is not None:
            tensors |= {key: self._statistic(key) for key in ("nested_absmax", "nested_quant_map")}
            tensors["nested_offset"] = LazyTensor(torch.float32, (), self._nested_offset)
        return tensors

    def _weight(self, dtype: torch.dtype, shape: tuple[int, ...]) -> LazyTensor:
        # Whatever dtype the packed bytes are labelled with (quant_storage), they are bytes.
        name = self.quantized.name
        return LazyTensor(dtype, shape, lambda: _as_torch(self.read_bytes(name), dtype, shape))

    def _statistic(self, suffix: str) -> LazyTensor:
        layout = self.quantized.statistics[suffix]
        dtype, shape = TORCH_DTYPES[layout.dtype], (layout.num_elements,)

        def load() -> Tensor:
            return self._finite(_as_torch(self.read_bytes(layout.name), dtype, shape), suffix)

        return LazyTensor(dtype, shape, load)

    def _nested_offset(self) -> Tensor:
        # Read from the blob when it is needed: a layer that is quantized while loading has none
        # before.
        state = _read_state(self.quantized, self.read_bytes, self.place)
        assert state is not None
        return self._finite(torch.tensor(state.nested_offset, dtype=torch.float32), "nested_offset")

    def _finite(self, values: Tensor, suffix: str) -> Tensor:
        if values.is_floating_point() and not bool(values.isfinite().all()):
            raise QtoolError(
                f"{self.place}: {suffix} holds NaN or infinity, so the layer has no values",
                kind="bad_file",
                hint="quantize the model again from finite weights",
            )
        return values


def _check_constants(quantized: QuantizedWeight, read_bytes: ReadBytes, place: str) -> None:
    """The code table must be the format's own, INT8 rows must lie in order."""
    quant_map = quantized.statistics.get("quant_map")
    if quant_map is not None:
        found = read_bytes(quant_map.name).view(np.float32)
        if not np.array_equal(found, CODES["nf4" if "nf4" in quantized.precision else "fp4"]):
            raise QtoolError(
                f"{place}: {quant_map.name} is not the code table of {quantized.precision}",
                kind="unsupported",
                hint="bitsandbytes knows no other table either; quantize the model again",
            )
    weight_format = quantized.statistics.get("weight_format")
    if weight_format is not None and (code := int(read_bytes(weight_format.name)[0])) != ROW_MAJOR:
        raise QtoolError(
            f"{place}: weight_format is {code}, expected {ROW_MAJOR} (rows in order)",
            kind="unsupported",
            hint="it was saved in the layout of one GPU generation; quantize the model again",
        )


def refuse_stray_statistics(checkpoint: Checkpoint, packed: Mapping[str, QuantizedWeight]) -> None:
    """Raise if statistics lie about that no packed weight owns: its codes would load as numbers."""
    stray = stray_statistics(checkpoint.tensors)
    if stray:
        raise QtoolError(
            f"{_place(checkpoint, stray[0])}: statistics of a packed weight that is not there "
            f"or lacks its quant_state",
            kind="bad_file",
            hint=DAMAGED_HINT,
        )


def _read_state(quantized: QuantizedWeight, read_bytes: ReadBytes, place: str) -> QuantState | None:
    blob: TensorLayout | None = quantized.quant_state
    if blob is None:
        return None
    try:
        return parse_quant_state(read_bytes(blob.name).tobytes())
    except ValueError as error:
        raise QtoolError(f"{place}: {error}", kind="bad_file", hint=DAMAGED_HINT) from error


def _four_bit_layer(state: QuantState, place: str) -> FourBitLayer:
    if len(state.shape) != 2:
        raise QtoolError(
            f"{place}: quant_state says shape {list(state.shape)}, expected [out, in]",
            kind="unsupported",
            hint="only linear layers run in 4 bit so far",
        )
    return FourBitLayer(
        out_features=state.shape[0],
        in_features=state.shape[1],
        quant_type=state.quant_type,
        blocksize=state.blocksize,
        dtype=getattr(torch, state.dtype),
        double_quant=state.nested_offset is not None,
    )


def _as_torch(data: ByteArray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if data.size == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(data).view(dtype).reshape(shape)


def _place(checkpoint: Checkpoint, name: str) -> str:
    return f"{checkpoint.tensors[name].shard}: {name}"
