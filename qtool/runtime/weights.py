"""A checkpoint's weights as transformers' loader takes them: a mapping of tensors read when needed.

Packed weights appear under the names of our layers' parameters and buffers (`P.weight`, `P.absmax`,
`P.nested_offset`, `P.SCB`, ...), everything else under its stored name. Once `read_ahead` began,
threads bring the tensors to their device in the order in which the loader asks for them; nothing is
kept that the loader has taken.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import EllipsisType, TracebackType
from typing import Final, Self

import numpy as np
import torch
from torch import Tensor
from transformers.core_model_loading import dot_natural_key

from qtool.checkpoint.reading import ShardReader
from qtool.checkpoint.records import Checkpoint, TensorInfo
from qtool.errors import QtoolError
from qtool.events import OnEvent
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
from qtool.runtime.read_ahead import ByteArray, Part, ReadAhead, Verify

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

ReadBytes = Callable[[str], ByteArray]
LoadBytes = Callable[[], Tensor]
PrepareBytes = Callable[[str, Verify | None], LoadBytes]


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


@dataclass(frozen=True, slots=True)
class WeightSource:
    """What a model is filled from.

    Args:
        layers: the packed linear layers, by stored module name.
        tensors: every tensor to load, once `read_ahead` began.
        total_bytes: what `on_event` counts up to while they are read.
        stored: reads those that are loaded as they are stored.
    """

    layers: dict[str, PackedLayer]
    tensors: dict[str, LazyTensor]
    total_bytes: int
    stored: StoredTensors
    closing: ExitStack

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

    def __init__(self, checkpoint: Checkpoint, closing: ExitStack) -> None:
        self._checkpoint = checkpoint
        self._closing = closing
        self._parts: list[Part] = []
        self._ahead: ReadAhead | None = None
        self._readers: dict[str, ShardReader] = {}
        self._lock = threading.Lock()

    @property
    def prepared_bytes(self) -> int:
        """The sum of the tensors that were prepared."""
        return sum(part.tensor.num_bytes for part in self._parts)

    def peek_bytes(self, name: str) -> ByteArray:
        """The tensor's bytes in host memory, uint8 (num_bytes,), not counted as progress."""
        tensor = self._checkpoint.tensors[name]
        return self._reader(tensor).read_tensor(tensor)

    def prepare(self, name: str, verify: Verify | None = None) -> LoadBytes:
        """What returns the tensor's bytes once, uint8 (num_bytes,), while `read_ahead` is on.

        Args:
            verify: gets all bytes, in pieces of whole elements, from several threads.
        """
        part = Part(self._checkpoint.tensors[name], verify)
        self._parts.append(part)
        return partial(self._take, part)

    @contextmanager
    def read_ahead(self, device: torch.device, on_event: OnEvent) -> Iterator[None]:
        """Bring what was prepared to `device`, in the order of transformers' loader."""
        parts = sorted(self._parts, key=lambda part: dot_natural_key(part.tensor.name))
        with ReadAhead(parts, self._fill, device=device, on_event=on_event) as self._ahead:
            yield
        self._ahead = None

    def _take(self, part: Part) -> Tensor:
        assert self._ahead is not None
        return self._ahead.take(part)

    def _fill(self, part: Part, start: int, buffer: ByteArray) -> None:
        self._reader(part.tensor).read_into(buffer, part.tensor.offset + start)
        if part.verify is not None:
            part.verify(buffer)

    def _reader(self, tensor: TensorInfo) -> ShardReader:
        with self._lock:
            if tensor.shard not in self._readers:
                reader = ShardReader(self._checkpoint.path_of(tensor.shard))
                self._readers[tensor.shard] = self._closing.enter_context(reader)
            return self._readers[tensor.shard]


def open_stored_weights(checkpoint: Checkpoint) -> WeightSource:
    """The weights as they lie in the folder, packed or not.

    Raises:
        QtoolError: statistics that are missing, of a wrong size or belong to no weight.
    """
    closing = ExitStack()
    stored = StoredTensors(checkpoint, closing)
    layers: dict[str, PackedLayer] = {}
    tensors: dict[str, LazyTensor] = {}
    packed = find_quantized(checkpoint.tensors)
    refuse_stray_statistics(checkpoint, packed)
    taken: set[str] = set()
    for quantized in packed.values():
        parts = PackedParts(
            quantized, _place(checkpoint, quantized.name), stored.prepare, stored.peek_bytes
        )
        parts.add_to(layers, tensors, parts.read_state())
        parts.check_constants()
        taken.update({quantized.name, *(part.name for part in quantized.statistics.values())})
    for name, tensor in checkpoint.tensors.items():
        if name not in taken:
            tensors[name] = plain_tensor(tensor, stored)
    return WeightSource(layers, tensors, stored.prepared_bytes, stored, closing)


def plain_tensor(tensor: TensorInfo, stored: StoredTensors) -> LazyTensor:
    """A tensor that is loaded as it is stored."""
    dtype = TORCH_DTYPES.get(tensor.dtype)
    if dtype is None:
        raise QtoolError(
            f"{tensor.shard}: {tensor.name}: dtype {tensor.dtype} cannot be run",
            kind="unsupported",
            hint="convert the checkpoint to bfloat16 first",
        )
    return _lazy(dtype, tensor.shape, stored.prepare(tensor.name))


@dataclass(frozen=True, slots=True)
class PackedParts:
    """The stored parts of one packed weight, to be made the tensors of a packed layer.

    Args:
        place: "file: tensor", for error messages.
        prepare: prepares the bytes of a part, by its stored name, for the loader.
        read_bytes: reads the bytes of a small part at once.
    """

    quantized: QuantizedWeight
    place: str
    prepare: PrepareBytes
    read_bytes: ReadBytes

    def add_to(
        self,
        layers: dict[str, PackedLayer],
        tensors: dict[str, LazyTensor],
        state: QuantState | None,
    ) -> None:
        """Add the layer and its tensors.

        Args:
            state: the quant_state of a 4-bit weight (the offset's value is not used), None for
                INT8.
        """
        problems = layout_problems(self.quantized, state)
        if problems:
            first = problems[0]
            raise QtoolError(
                f"{self.place}: {first.tensor}: {first.rule}: expected {first.expected}, "
                f"found {first.found}",
                kind="bad_file",
                hint=DAMAGED_HINT,
            )
        module = self.quantized.name.removesuffix(".weight")
        if state is None:
            out_features, in_features = self.quantized.weight.shape
            layers[module] = Int8Layer(out_features, in_features)
        else:
            layers[module] = _four_bit_layer(state, self.place)
        for key, tensor in self._tensors(state).items():
            tensors[f"{module}.{key}"] = tensor

    def read_state(self) -> QuantState | None:
        """The quant_state; None for INT8."""
        blob: TensorLayout | None = self.quantized.quant_state
        if blob is None:
            return None
        try:
            return parse_quant_state(self.read_bytes(blob.name).tobytes())
        except ValueError as error:
            raise QtoolError(
                f"{self.place}: {error}", kind="bad_file", hint=DAMAGED_HINT
            ) from error

    def check_constants(self) -> None:
        """The code table must be the format's own, INT8 rows must lie in order."""
        quantized = self.quantized
        quant_map = quantized.statistics.get("quant_map")
        if quant_map is not None:
            found = self.read_bytes(quant_map.name).view(np.float32)
            if not np.array_equal(found, CODES["nf4" if "nf4" in quantized.precision else "fp4"]):
                raise QtoolError(
                    f"{self.place}: {quant_map.name} is not the code table of "
                    f"{quantized.precision}",
                    kind="unsupported",
                    hint="bitsandbytes knows no other table either; quantize the model again",
                )
        layout = quantized.statistics.get("weight_format")
        if layout is not None and (code := int(self.read_bytes(layout.name)[0])) != ROW_MAJOR:
            raise QtoolError(
                f"{self.place}: weight_format is {code}, expected {ROW_MAJOR} (rows in order)",
                kind="unsupported",
                hint="it was saved in the layout of one GPU generation; quantize the model again",
            )

    def _tensors(self, state: QuantState | None) -> dict[str, LazyTensor]:
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
        return _lazy(dtype, shape, self.prepare(self.quantized.name, None))

    def _statistic(self, suffix: str) -> LazyTensor:
        layout = self.quantized.statistics[suffix]
        dtype = TORCH_DTYPES[layout.dtype]
        verify = partial(self._refuse_nonfinite, suffix) if dtype.is_floating_point else None
        return _lazy(dtype, (layout.num_elements,), self.prepare(layout.name, verify))

    def _nested_offset(self) -> Tensor:
        # Read from the blob when it is needed: a layer that is quantized while loading has none
        # before.
        state = self.read_state()
        assert state is not None
        assert state.nested_offset is not None
        if not math.isfinite(state.nested_offset):
            raise self._nonfinite("nested_offset")
        return torch.tensor(state.nested_offset, dtype=torch.float32, device="cpu")

    def _refuse_nonfinite(self, suffix: str, data: ByteArray) -> None:
        """`data` holds float32."""
        if not np.isfinite(data.view(np.float32)).all():
            raise self._nonfinite(suffix)

    def _nonfinite(self, suffix: str) -> QtoolError:
        return QtoolError(
            f"{self.place}: {suffix} holds NaN or infinity, so the layer has no values",
            kind="bad_file",
            hint="quantize the model again from finite weights",
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


def _lazy(dtype: torch.dtype, shape: tuple[int, ...], load: LoadBytes) -> LazyTensor:
    def load_tensor() -> Tensor:
        data = load()
        if data.numel() == 0:
            return torch.empty(shape, dtype=dtype, device=data.device)
        return data.view(dtype).reshape(shape)

    return LazyTensor(dtype, shape, load_tensor)


def _place(checkpoint: Checkpoint, name: str) -> str:
    return f"{checkpoint.tensors[name].shard}: {name}"
