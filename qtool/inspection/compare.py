"""A quantized checkpoint beside its original: the error of every layer, the rest byte for byte,
and the error of what of it was changed.

Memory is bounded by the tile (see `weights`), sums are float64. Names are matched as they are, and
where that fails as the model that config.json describes knows them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from qtool.backends.protocol import Backend
from qtool.checkpoint.records import Checkpoint, TensorInfo
from qtool.errors import Option, QtoolError
from qtool.events import Advanced, Finished, OnEvent, Started, ignore_events
from qtool.formats.bitsandbytes import QuantizedWeight, find_quantized, stray_statistics
from qtool.formats.floats import widen
from qtool.formats.tensors import TORCH_NAMES, SourceDtype
from qtool.inspection.records import Comparison, Difference, LayerError
from qtool.inspection.summary import PRECISION_OF_DTYPE, known_architecture
from qtool.inspection.weights import (
    TILE_ELEMENTS,
    TensorFiles,
    dequantized_tiles,
    read_quant_state,
)

# The error of a packed weight, why a tensor differs, or None for a faithful copy.
Result = LayerError | Difference | None

MAX_WORKERS: Final = 8  # each holds some 30 MB: tiles of both sides
CHUNK_BYTES: Final = 8 << 20  # of each of two files, when bytes are compared
GIVE_ORIGINAL: Final = (
    "give the full-precision model that it was made from after ",
    Option("against", verb="inspect"),
)
SUM_ELEMENTS: Final = 1 << 14  # float64 temporaries of this length stay in the cache


def compare_checkpoints(
    quantized: Checkpoint,
    original: Checkpoint,
    backend: Backend,
    on_event: OnEvent = ignore_events,
) -> Comparison:
    """Measure every quantized layer of `quantized` against `original`; compare all other tensors.

    Both must have been opened with need="files".

    Raises:
        QtoolError: `original` is quantized itself, or nothing can be compared: no name is in both,
            or none of its tensors has there the shape it has here.
    """
    weights = find_quantized(quantized.tensors)
    pairs = _Pairs(quantized, original)
    copied = _copied_tensors(quantized, weights)
    _refuse_unrelated(quantized, original, pairs)
    to_read = (*(weight.weight for weight in weights.values()), *copied)
    on_event(Started("compare", sum(tensor.num_bytes for tensor in to_read)))
    with _open_files(quantized) as ours, _open_files(original) as theirs:
        reader = _PairReader(ours, theirs, backend, on_event)
        tasks: list[Callable[[], Result]] = [
            *(partial(_compare_layer, weight, pairs, reader) for weight in weights.values()),
            *(partial(_compare_copy, tensor, pairs, reader) for tensor in copied),
        ]
        results = _in_parallel(tasks)
    on_event(Finished("compare"))
    errors = tuple(result for result in results if isinstance(result, LayerError))
    differences = tuple(result for result in results if isinstance(result, Difference))
    is_alike = not weights and any(_is_alike(tensor, pairs) for tensor in copied)
    if differences and not (errors or is_alike):  # with layers, equal norms alone tell nothing
        raise _nothing_to_compare(quantized, original, differences[0])
    missing = (Difference(name, "in the original only") for name in pairs.missing_here())
    return Comparison(errors, results.count(None), (*differences, *missing))


def _in_parallel(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """The tasks' results in their order; NumPy and the kernels release the interpreter's lock."""
    workers = min(MAX_WORKERS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def layer_kind(weight_name: str) -> str:
    """What a layer is, without where: "layers.3.self_attn.q_proj.weight" -> "self_attn.q_proj"."""
    parts = [part for part in weight_name.removesuffix(".weight").split(".") if not part.isdigit()]
    return ".".join(parts[-2:])


@dataclass(slots=True)
class ErrorSums:
    """Running float64 sums over the elements of one layer."""

    num_elements: int = 0
    squared_error: float = 0.0
    squared_original: float = 0.0
    max_abs_error: float = 0.0

    def add(self, dequantized: NDArray[np.float32], original: NDArray[np.float32]) -> None:
        """Take in float32 (n,) values of both sides."""
        for start in range(0, original.size, SUM_ELEMENTS):
            exact = original[start : start + SUM_ELEMENTS].astype(np.float64)
            with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf show in the result
                error = dequantized[start : start + SUM_ELEMENTS] - exact
                # not a dot product: BLAS would spin up threads for it, and round as it likes
                self.squared_error += float(np.square(error).sum())
                self.squared_original += float(np.square(exact).sum())
                largest = float(np.abs(error).max())
            # max() would drop a NaN that comes second
            self.max_abs_error = float(np.maximum(self.max_abs_error, largest))
        self.num_elements += original.size

    def as_layer_error(self, name: str, precision: str) -> LayerError:
        """The four measures; 0/0 counts as no error."""
        error, original = self.squared_error, self.squared_original
        return LayerError(
            name=name,
            kind=layer_kind(name),
            precision=precision,
            num_parameters=self.num_elements,
            mse=error / self.num_elements if self.num_elements else 0.0,
            relative_error=math.sqrt(_ratio(error, original)),
            max_abs_error=self.max_abs_error,
            sqnr_db=_decibels(_ratio(original, error)) if error else math.inf,
        )


def _ratio(numerator: float, denominator: float) -> float:
    if denominator:
        return numerator / denominator
    return math.inf if numerator else 0.0


def _decibels(ratio: float) -> float:
    return 10 * math.log10(ratio) if ratio > 0 else (math.nan if math.isnan(ratio) else -math.inf)


class _Pairs:
    """Which tensor of the original belongs to which of ours."""

    def __init__(self, quantized: Checkpoint, original: Checkpoint) -> None:
        self._quantized, self._original = quantized, original
        self.architecture = known_architecture(original.config or quantized.config)
        self._by_parameter = {
            self._parameter_name(name): tensor for name, tensor in original.tensors.items()
        }

    def original_of(self, name: str) -> TensorInfo | None:
        """The original of our tensor `name`; None if there is none."""
        return self._original.tensors.get(name) or self._by_parameter.get(
            self._parameter_name(name)
        )

    def is_transposed(self, original: TensorInfo, shape: tuple[int, ...]) -> bool:
        """Whether the original is a Conv1D weight, [in, out], of a layer of `shape` [out, in]."""
        parameter = self.architecture.find(original.name) if self.architecture else None
        if parameter is not None:
            return parameter.kind == "conv1d"
        return original.shape != shape and original.shape == shape[::-1]

    def missing_here(self) -> Iterator[str]:
        """Tensors of the original that we lack, unless they are tied or no parameters at all."""
        ours = {self._parameter_name(name) for name in self._quantized.tensors}
        for name in self._original.tensors:
            if self._parameter_name(name) not in ours and not self._may_be_dropped(name):
                yield name

    def _may_be_dropped(self, name: str) -> bool:
        if self.architecture is None:
            return False
        parameter = self.architecture.find(name)
        if parameter is None:
            return self.architecture.stored_names.why_ignored(name) is not None
        return parameter.tied_to is not None

    def _parameter_name(self, name: str) -> str:
        """The name in the model; of tied parameters the one that owns the storage."""
        parameter = self.architecture.find(name) if self.architecture else None
        return (parameter.tied_to or parameter.name) if parameter else name


class _PairReader:
    """Reads the same piece of both sides."""

    def __init__(
        self, ours: TensorFiles, theirs: TensorFiles, backend: Backend, on_event: OnEvent
    ) -> None:
        self.ours, self.theirs = ours, theirs
        self.backend, self.on_event = backend, on_event

    def layer_error(
        self, weight: QuantizedWeight, original: TensorInfo, *, transposed: bool
    ) -> LayerError:
        """The error of a packed weight; `original` has its number of elements."""
        sums = ErrorSums()
        for start, values in dequantized_tiles(weight, self.ours, self.backend):
            stop = start + values.size
            sums.add(values, self._original_tile(original, start, stop, transposed=transposed))
            share = weight.weight.num_bytes * values.size // max(1, original.num_elements)
            self.on_event(Advanced(share, weight.name))
        return sums.as_layer_error(weight.name, weight.precision)

    def num_differing_bytes(self, tensor: TensorInfo, original: TensorInfo) -> int:
        """Of two tensors of one dtype and shape."""
        return sum(self._differing_bytes(tensor, original))

    def copy_error(self, tensor: TensorInfo, original: TensorInfo) -> LayerError | None:
        """How far their values are; None if they are no floats that can be compared."""
        if tensor.dtype not in TORCH_NAMES:
            return None
        dtype = tensor.dtype
        sums = ErrorSums()
        for start in range(0, tensor.num_elements, TILE_ELEMENTS):
            stop = min(start + TILE_ELEMENTS, tensor.num_elements)
            values = widen(self.ours.read_values(tensor, start, stop), dtype)
            sums.add(values, self._original_tile(original, start, stop, transposed=False))
        return sums.as_layer_error(tensor.name, PRECISION_OF_DTYPE[tensor.dtype])

    def _differing_bytes(self, tensor: TensorInfo, original: TensorInfo) -> Iterator[int]:
        for start in range(0, tensor.num_bytes, CHUNK_BYTES):
            stop = min(start + CHUNK_BYTES, tensor.num_bytes)
            ours = self.ours.read_bytes(tensor, start, stop)
            yield int(np.count_nonzero(ours != self.theirs.read_bytes(original, start, stop)))
            self.on_event(Advanced(stop - start, tensor.name))

    def _original_tile(
        self, original: TensorInfo, start: int, stop: int, *, transposed: bool
    ) -> NDArray[np.float32]:
        """Elements [start, stop) of the layer's [out, in] order, float32."""
        values: Any
        if transposed:  # stored [in, out]: one column per row of ours
            num_inputs = original.shape[0]
            first, last = start // num_inputs, -(-stop // num_inputs)
            rows = self.theirs.read_columns(original, first, last).T.reshape(-1)
            values = rows[start - first * num_inputs : stop - first * num_inputs]
        else:
            values = self.theirs.read_values(original, start, stop)
        return widen(values, cast(SourceDtype, original.dtype))


def _compare_layer(
    weight: QuantizedWeight, pairs: _Pairs, reader: _PairReader
) -> LayerError | Difference:
    original = pairs.original_of(weight.name)
    if original is None:
        return Difference(weight.name, "not in the original")
    if original.dtype not in TORCH_NAMES:
        return Difference(weight.name, f"dtype {original.dtype} in the original cannot be compared")
    shape = _shape_of(weight, reader.ours)
    transposed = pairs.is_transposed(original, shape)
    if (original.shape[::-1] if transposed else original.shape) != shape:
        found = f"shape {list(shape)}, in the original {list(original.shape)}"
        return Difference(weight.name, found)
    return reader.layer_error(weight, original, transposed=transposed)


def _compare_copy(tensor: TensorInfo, pairs: _Pairs, reader: _PairReader) -> Difference | None:
    original = pairs.original_of(tensor.name)
    if original is None:
        return Difference(tensor.name, "not in the original")
    if (reason := _other_format(tensor, original)) is not None:
        return Difference(tensor.name, reason)
    num_different = reader.num_differing_bytes(tensor, original)
    if not num_different:
        return None
    reason = f"{num_different:,} of {tensor.num_bytes:,} bytes differ"
    return Difference(tensor.name, reason, reader.copy_error(tensor, original))


def _is_alike(tensor: TensorInfo, pairs: _Pairs) -> bool:
    """Whether the original has bytes to compare the tensor's with."""
    original = pairs.original_of(tensor.name)
    return original is not None and _other_format(tensor, original) is None


def _other_format(tensor: TensorInfo, original: TensorInfo) -> str | None:
    """What keeps their bytes from being compared."""
    for what, found, expected in (
        ("dtype", tensor.dtype, original.dtype),
        ("shape", list(tensor.shape), list(original.shape)),
    ):
        if found != expected:
            return f"{what} {found}, in the original {expected}"
    return None


def _shape_of(weight: QuantizedWeight, files: TensorFiles) -> tuple[int, ...]:
    is_int8 = weight.precision == "int8"
    return weight.weight.shape if is_int8 else read_quant_state(weight, files).shape


def _copied_tensors(
    checkpoint: Checkpoint, weights: Mapping[str, QuantizedWeight]
) -> list[TensorInfo]:
    statistics = {s.name for weight in weights.values() for s in weight.statistics.values()}
    apart = statistics | set(stray_statistics(checkpoint.tensors)) | set(weights)
    return [tensor for name, tensor in checkpoint.tensors.items() if name not in apart]


def _refuse_unrelated(quantized: Checkpoint, original: Checkpoint, pairs: _Pairs) -> None:
    if packed := find_quantized(original.tensors):
        raise QtoolError(
            f"{original.id} is quantized itself ({next(iter(packed))} is packed)",
            kind="usage",
            hint=GIVE_ORIGINAL,
        )
    if not any(pairs.original_of(name) for name in quantized.tensors):
        raise QtoolError(
            f"{original.id} and {quantized.id} have no tensor in common",
            kind="usage",
            hint=GIVE_ORIGINAL,
        )


def _nothing_to_compare(
    quantized: Checkpoint, original: Checkpoint, first: Difference
) -> QtoolError:
    return QtoolError(
        f"nothing in {quantized.id} can be compared with {original.id}: "
        f"{first.name}: {first.reason}",
        kind="usage",
        hint=GIVE_ORIGINAL,
    )


def _open_files(checkpoint: Checkpoint) -> TensorFiles:
    if checkpoint.folder is None:
        raise ValueError(f"{checkpoint.id}: open it with need='files'")
    return TensorFiles(checkpoint.folder)
