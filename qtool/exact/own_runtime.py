"""A prompt as qtool's own runtime takes it up: its decoders' code, with kernels that only allocate.

The fused path is `FusedPrompt` itself between launches that do nothing; the others are the model's
own operations over qtool's caches, whose packed layers make what they make on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from qtool.exact.generate import watched
from qtool.exact.gpu_functions import GpuFunctions
from qtool.exact.moments import Moments
from qtool.exact.records import ExactRequest
from qtool.exact.storages import LiveStorages
from qtool.formats.precisions import QuantType
from qtool.planner.own_runtime import FUSED_BATCH
from qtool.runtime import linear, products
from qtool.runtime.decoders.caches import (
    CAPACITY_STEP,
    FixedLayer,
    fixed_cache,
    growing_cache,
    takes_chunks,
)
from qtool.runtime.decoders.network import Network
from qtool.runtime.dequantize_host import KERNEL_DTYPES
from qtool.runtime.products_host import NestedAbsmax


def run_own_runtime(
    model: Any, storages: LiveStorages, moments: Moments, request: ExactRequest
) -> None:
    """Take up `batch` prompts of `context` tokens chunk by chunk, on the path that a GPU goes."""
    capacity = -(-request.context // CAPACITY_STEP) * CAPACITY_STEP
    fixed = fixed_cache(model.config, capacity) if model._can_compile_fullgraph else None
    if fixed is not None:
        fixed.layers = [_counted(layer) for layer in fixed.layers]
    with (
        storages,
        torch.no_grad(),
        GpuFunctions().running(),
        moments.followed(),
        products_of_a_gpu(),
    ):
        moments.phase = "prefill"
        ids = torch.zeros(request.batch, request.context, dtype=torch.long, device="meta")
        moments.filling_cache = True
        held = None if fixed is None else _fused_path(model, fixed, request.batch, capacity)
        moments.filling_cache = False
        prompt, _attention, buffers = held or (None, None, None)
        if prompt is not None and ids.numel() > products.MAX_PACKED_TOKENS:
            _run_fused(prompt, buffers, ids, request.prefill_chunk)
        else:
            _run_operations(model, fixed, ids, moments, request.prefill_chunk)
        del held, prompt, _attention, buffers


def _run_operations(
    model: Any, fixed: Any | None, ids: Tensor, moments: Moments, chunk: int
) -> None:
    """The model's own, over the fixed cache where there is one."""
    network = Network(model, chunk, device=torch.device("meta"))
    cache = fixed or growing_cache(model.config)
    in_chunks = takes_chunks(cache, model.config.model_type)
    in_chunks = in_chunks and not network.wants_whole(ids.shape[1])
    with watched(cache, moments):
        network.prefill(ids, 0, cache, in_chunks=in_chunks)


class _CountedLayer(FixedLayer):
    """Counts its tokens on the host, where a question about them has an answer."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._length += key_states.shape[-2]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def get_seq_length(self) -> int:
        return self._length


def _counted(layer: Any) -> Any:
    return _CountedLayer(layer.max_cache_len) if type(layer) is FixedLayer else layer


# -- the fused path -------------------------------------------------------------------------------


def _fused_path(model: Any, cache: Any, batch: int, capacity: int) -> tuple[Any, ...] | None:
    """What runs prompts there, if anything does, attention and buffers of a step; None where the
    block is not fused."""
    if find_spec("cupy") is None:
        return None
    from qtool.runtime.decoders import fused_attention
    from qtool.runtime.decoders.blocks import NotFusable, describe_network
    from qtool.runtime.decoders.fused import _make_buffers
    from qtool.runtime.decoders.fused_attention import (
        AttentionLaunches,
        attention_shape,
        check_rotary,
    )
    from qtool.runtime.decoders.fused_prompt import FusedPrompt

    try:
        if batch > FUSED_BATCH:
            return None
        check_rotary(model)
        network = describe_network(model)
        attention_shape(network, model, batch, capacity)
    except (NotFusable, AttributeError):
        return None
    states = torch.empty(
        batch, network.num_kv_heads, 1, network.head_dim, dtype=network.dtype, device="meta"
    )
    for layer in cache.layers:
        layer.lazy_initialization(states, states)
    # The workspace of attention depends on the GPU, and is less than a MiB.
    with replaced(fused_attention, "workspace_bytes", _do_nothing):
        attention = AttentionLaunches(model, network, cache, batch, capacity)
    try:
        prompt = FusedPrompt(network, _NoLaunches(), cache, capacity)
    except NotFusable:
        prompt = None
    return prompt, attention, _make_buffers(network, batch)


def _run_fused(prompt: Any, buffers: Any, ids: Tensor, chunk: int) -> None:
    for start in range(0, ids.shape[1], chunk):
        hidden = prompt.run(ids[:, start : start + chunk], start)
    buffers.hidden.copy_(hidden)
    buffers.logits.clone()


class _NoLaunches:
    """In the place of `fused_prompt.Launches`: launches write into what is there already."""

    def __getattr__(self, name: str) -> Any:
        return _do_nothing


def _do_nothing(*args: Any, **kwargs: Any) -> int:
    return 0


# -- packed layers --------------------------------------------------------------------------------


@contextmanager
def products_of_a_gpu() -> Iterator[None]:
    """Products that allocate what those with packed weights do on a GPU.

    `linear` has the last two by its own names, for whole weights: no forward pass asks for those.
    """
    with (
        replaced(linear, "linear_4bit", _linear_4bit),
        replaced(linear, "linear_int8", _linear_int8),
        replaced(products, "dequantize_rows_4bit", _float_rows),
        replaced(products, "dequantize_rows_int8", _float_int8_rows),
    ):
        yield


def _linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | NestedAbsmax,
    *,
    quant_type: QuantType,
    blocksize: int,
    out_features: int,
    weight_dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    if reads_packed(x):
        return x.new_empty(*x.shape[:-1], out_features)
    dtype = str(weight_dtype).removeprefix("torch.")
    layer = (bias, quant_type, blocksize, out_features, dtype)
    return products._linear_4bit_cuda(x, packed, *(None,) * 5, *layer)


def _linear_int8(
    x: Tensor,
    codes: Tensor,
    scb: Tensor,
    bias: Tensor | None = None,
    *,
    threshold: float | None = None,
) -> Tensor:
    assert threshold is None, "plans are of models that do not round activations"
    if reads_packed(x):
        return x.new_empty(*x.shape[:-1], codes.shape[0])
    return products._linear_int8_cuda(x, codes, scb, bias)


def reads_packed(x: Tensor) -> bool:
    """Whether a GPU multiplies x (..., in_features) straight from packed weights."""
    columns = x.shape[-1]
    few = x.numel() <= products.MAX_PACKED_TOKENS * columns
    return few and columns % 64 == 0 and x.dtype in KERNEL_DTYPES


def _float_rows(
    packed: Tensor,
    statistics: Any,
    rows: slice,
    columns: int,
    quant_type: str,
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(rows.stop - rows.start, columns, dtype=dtype)


def _float_int8_rows(codes: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner` with another attribute `name`; AttributeError if it has none."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
