"""The attention launches of the fused step: one per block, over the cache of the graph path."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from cupy_kernels.decode_attention import (
    AttentionShape,
    AttentionTensors,
    decode_attention,
    why_not,
    workspace_bytes,
)
from cupy_kernels.prompt_rows import RotaryRows
from qtool.runtime.decoders.blocks import (
    UNTURNED,
    Attention,
    FusableNetwork,
    NotFusable,
    text_decoder,
)
from qtool.runtime.dequantize_host import KERNEL_DTYPES

# Positions whose angles are made at a time: transformers makes them several times over.
ANGLE_POSITIONS: Final = 8192
# Rotary embeddings whose angles depend on the position alone.
STATIC_ROTARY: Final = frozenset({"default", "linear", "llama3", "yarn"})


class AttentionLaunches:
    """Makes attention launches that share angles, workspace and position.

    Args:
        cache: of `FixedLayer`s that hold keys and values.

    Attributes:
        position: int64 (1,) on the device: where the next token goes.
    """

    def __init__(
        self, model: Any, network: FusableNetwork, cache: Any, batch: int, capacity: int
    ) -> None:
        device = network.embedding.device
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self._network = network
        self._layers = cache.layers
        self._shape = attention_shape(network, model, batch, capacity)
        self._angles = {
            kind: _angles(model, kind, capacity, network.dtype)
            for kind in {block.attention.layer_type for block in network.blocks}
        }
        self._workspace = torch.zeros(
            workspace_bytes(self._shape), dtype=torch.uint8, device=device
        )
        self._rotary: dict[int, RotaryRows] = {}  # by block, made when it is first needed

    def launch(self, index: int, query_key_value: Tensor, out: Tensor) -> Callable[[int], None]:
        """A launch of block `index` for one token, (batch, size) each."""
        attention = self._network.blocks[index].attention
        return decode_attention(
            self._shape,
            self._tensors(index, query_key_value, out),
            scale=attention.scale,
            softcap=attention.softcap,
            window=attention.window,
            epsilon=_epsilon(attention),
        )

    def take_up(
        self, index: int, query_key_value: Tensor, queries: Tensor, start: int, stream: int
    ) -> None:
        """Queue what comes before the attention of a prompt in block `index` on `stream`.

        Args:
            query_key_value: (batch * n, size), contiguous.
            queries: (batch, n, heads, head_dim), filled; keys and values go to the cache, at
                positions from `start` on.
        """
        launch = self._rotary.get(index)
        if launch is None:
            launch = self._rotary[index] = RotaryRows(
                self._shape,
                self._tensors(index, query_key_value, queries),
                epsilon=_epsilon(self._network.blocks[index].attention),
            )
        launch.queue(
            query_key_value.data_ptr(),
            queries.data_ptr(),
            num_tokens=queries.shape[1],
            start=start,
            stream=stream,
        )

    def _tensors(self, index: int, query_key_value: Tensor, out: Tensor) -> AttentionTensors:
        attention = self._network.blocks[index].attention
        cosines, sines = self._angles[attention.layer_type]
        query_norm, key_norm = attention.query_norm, attention.key_norm
        return AttentionTensors(
            qkv=query_key_value.data_ptr(),
            qkv_stride=query_key_value.stride(0),
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            position=self.position.data_ptr(),
            keys=self._layers[index].keys.data_ptr(),
            values=self._layers[index].values.data_ptr(),
            out=out.data_ptr(),
            out_stride=out.stride(0),
            workspace=self._workspace.data_ptr(),
            query_norm=0 if query_norm is None else query_norm.weight.data_ptr(),
            key_norm=0 if key_norm is None else key_norm.weight.data_ptr(),
        )


def attention_shape(
    network: FusableNetwork, model: Any, batch: int, capacity: int
) -> AttentionShape:
    """The shape of all attention launches.

    Raises:
        NotFusable: what the kernel does not do, or blocks that differ where it wants them equal.
    """
    attention = network.blocks[0].attention
    if len({_traits(block.attention) for block in network.blocks}) > 1:
        raise NotFusable("its blocks differ in their attention")
    shape = AttentionShape(
        heads=network.num_heads,
        kv_heads=network.num_kv_heads,
        head_dim=network.head_dim,
        rotary_dim=_rotary_dim(model, attention.layer_type),
        head_norm=_traits(attention)[0],
        has_softcap=attention.softcap > 0,
        batch=batch,
        capacity=capacity,
        dtype=KERNEL_DTYPES[network.dtype],
    )
    reason = why_not(shape)
    if reason is not None:
        raise NotFusable(reason)
    return shape


def check_rotary(model: Any) -> None:
    """Raise NotFusable if angles depend on more than the position."""
    kinds = text_decoder(model).rotary_emb.rope_type
    for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
        if kind not in STATIC_ROTARY:
            raise NotFusable(f"{kind} rotary embedding changes with the length of the text")


def _traits(attention: Attention) -> tuple[str, bool]:
    norms = (attention.query_norm, attention.key_norm)
    if norms == (None, None):
        return "none", attention.softcap > 0
    if None in norms:
        raise NotFusable("a norm of queries or keys alone")
    plus_one = attention.query_norm is not None and attention.query_norm.plus_one
    return "rms_plus_one" if plus_one else "rms", attention.softcap > 0


def _epsilon(attention: Attention) -> float:
    return 0.0 if attention.query_norm is None else attention.query_norm.epsilon


def _rotary_dim(model: Any, layer_type: str) -> int:
    return _call_rotary(model, layer_type, torch.zeros(1, 1, dtype=torch.int64))[0].shape[-1]


def _angles(
    model: Any, layer_type: str, capacity: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines float32 (capacity, rotary_dim / 2), rounded as the model rounds them.

    Of layers that are not turned, those of no angle: what they turn stays as it is.
    """
    device = model.get_input_embeddings().weight.device
    half = _rotary_dim(model, layer_type) // 2
    angles = torch.empty(2, capacity, half, device=device)
    if layer_type == UNTURNED:
        angles[0], angles[1] = 1, 0
        return angles[0], angles[1]
    for start in range(0, capacity, ANGLE_POSITIONS):
        positions = torch.arange(start, min(start + ANGLE_POSITIONS, capacity))[None]
        found = _call_rotary(model, layer_type, positions, dtype)
        for kept, made in zip(angles, found, strict=True):
            kept[start : start + ANGLE_POSITIONS].copy_(made[0, :, :half])
    return angles[0], angles[1]


def _call_rotary(
    model: Any, layer_type: str, positions: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    rotary = text_decoder(model).rotary_emb
    device = model.get_input_embeddings().weight.device
    like = torch.empty(0, dtype=dtype, device=device)
    call: Any = partial(rotary, like, positions.to(device))
    found: tuple[Tensor, Tensor] = (
        call(layer_type) if isinstance(rotary.rope_type, dict) else call()
    )
    return found
