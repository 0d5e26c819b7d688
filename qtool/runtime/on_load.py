"""Quantizing while loading: the bytes that `qtool quantize` would write, made tensor by tensor.

The same plan and the same pipeline do the work; only the file is an anonymous one in memory.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import cast

import numpy as np
import torch
from torch import Tensor

from qtool.architecture import build_architecture
from qtool.backends import choose_backend
from qtool.checkpoint.records import Checkpoint, TensorInfo
from qtool.events import OnEvent
from qtool.formats.bitsandbytes import QuantState, find_quantized
from qtool.formats.precisions import NESTED_BLOCKSIZE, QuantFormat
from qtool.formats.tensors import TORCH_NAMES, SourceDtype, TensorLayout
from qtool.quantize.growing_file import GrowingFile
from qtool.quantize.pipeline import PipelineSettings, ShardPipeline
from qtool.quantize.plan import (
    Recipe,
    ShardPlan,
    TensorPlan,
    plan_tensors,
    refuse_quantized_source,
)
from qtool.quantize.workers import TileWorkers, open_workers
from qtool.runtime.linear import PackedLayer
from qtool.runtime.read_ahead import ByteArray, Verify
from qtool.runtime.weights import (
    LazyTensor,
    LoadBytes,
    PackedParts,
    StoredTensors,
    WeightSource,
    plain_tensor,
)


def quantize_on_load(checkpoint: Checkpoint, fmt: QuantFormat, on_event: OnEvent) -> WeightSource:
    """The weights of a full-precision checkpoint, packed when they are asked for.

    Raises:
        QtoolError: what `qtool quantize` raises for this checkpoint; for NaN and Inf when the
            tensor is loaded.
    """
    refuse_quantized_source(checkpoint)
    architecture = build_architecture(checkpoint.config)
    plans = plan_tensors(checkpoint.tensors.values(), architecture, Recipe(format=fmt))
    closing = ExitStack()
    stored = StoredTensors(checkpoint, closing)
    packer = _Packer(checkpoint, plans, fmt, closing, on_event)
    layers: dict[str, PackedLayer] = {}
    tensors: dict[str, LazyTensor] = {}
    for plan in plans:
        tensor = cast(TensorInfo, plan.source)
        if plan.action == "copy":
            tensors[tensor.name] = plain_tensor(tensor, stored)
            continue
        quantized = find_quantized({part.name: part for part in plan.outputs})[tensor.name]
        packed = _PackedTensor(packer, plan)
        place = f"{tensor.shard}: {tensor.name}"
        parts = PackedParts(quantized, place, packed.prepare, packed.read_bytes)
        parts.add_to(layers, tensors, None if fmt.is_int8 else _expected_state(plan, fmt))
    return WeightSource(layers, tensors, checkpoint.weights_bytes, stored, closing)


def _expected_state(plan: TensorPlan, fmt: QuantFormat) -> QuantState:
    shape = plan.source.shape[::-1] if plan.transposed else plan.source.shape
    return QuantState(
        quant_type=fmt.quant_type,
        blocksize=fmt.blocksize,
        dtype=TORCH_NAMES[cast(SourceDtype, plan.source.dtype)],
        shape=shape,
        nested_blocksize=NESTED_BLOCKSIZE if fmt.double_quant else None,
        nested_offset=0.0 if fmt.double_quant else None,
    )


class _PackedTensor:
    """One tensor's packed parts: made when the first is read, dropped when each was read once.

    A layer's parts are read one after the other, so about one tensor is held at a time.
    """

    def __init__(self, packer: _Packer, plan: TensorPlan) -> None:
        self._packer = packer
        self._plan = plan
        self._lock = threading.Lock()
        self._parts: dict[str, ByteArray] = {}

    def prepare(self, name: str, verify: Verify | None) -> LoadBytes:
        """What returns the bytes of one of the plan's outputs, uint8 (num_bytes,)."""

        def load() -> Tensor:
            data = self.read_bytes(name)
            if verify is not None:
                verify(data)
            return torch.from_numpy(data)

        return load

    def read_bytes(self, name: str) -> ByteArray:
        """The bytes themselves."""
        with self._lock:
            if name not in self._parts:
                self._parts = self._packer.pack(self._plan)
            return self._parts.pop(name)


class _Packer:
    """Packs tensors; its workers start with the first one and end with `closing`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plans: Sequence[TensorPlan],
        fmt: QuantFormat,
        closing: ExitStack,
        on_event: OnEvent,
    ) -> None:
        self._checkpoint = checkpoint
        self._plans = [plan for plan in plans if plan.action == "quantize"]
        self._format = fmt
        self._closing = closing
        self._on_event = on_event
        self._lock = threading.Lock()
        self._started: TileWorkers | None = None

    def pack(self, plan: TensorPlan) -> dict[str, ByteArray]:
        """The bytes of the plan's outputs, by name."""
        workers = self._workers()
        shard = ShardPlan("", (plan,))
        offsets, total_bytes = _place_outputs(shard.outputs())
        fd = os.memfd_create("qtool")
        try:
            os.ftruncate(fd, total_bytes)
            file = GrowingFile(fd, total_bytes)
            pipeline = ShardPipeline(
                self._checkpoint, shard, output=file, offsets=offsets, context=workers.context
            )
            with pipeline, workers.carrying(pipeline):
                file.wait_for(total_bytes)
            workers.report(self._on_event)
            data = np.frombuffer(mmap.mmap(fd, total_bytes), np.uint8)
        finally:
            os.close(fd)
        parts = {
            part.name: data[offsets[part.name] : offsets[part.name] + part.num_bytes]
            for part in plan.outputs
        }
        # The weight stays in the file's own pages, which go when it goes; the rest is small.
        weight = plan.outputs[0].name
        return {name: part if name == weight else part.copy() for name, part in parts.items()}

    def _workers(self) -> TileWorkers:
        with self._lock:
            if self._started is None:
                backend = choose_backend().backend
                self._started = self._closing.enter_context(
                    open_workers(
                        backend, self._plans, self._format, PipelineSettings(), self._on_event
                    )
                )
            return self._started


def _place_outputs(outputs: list[TensorLayout]) -> tuple[dict[str, int], int]:
    offsets, total_bytes = {}, 0
    for part in outputs:
        offsets[part.name] = total_bytes
        total_bytes += part.num_bytes
    return offsets, total_bytes
