"""One model on several GPUs: what each of them holds.

"pipeline" gives each GPU whole layers, one after the other (transformers' device_map, vLLM's
pipeline parallelism): the first also holds the embedding, the last the norm and the output head.
"tensor" cuts every matrix and every attention head count; what cannot be cut each GPU holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from qtool.architecture import AttentionCache, CacheLayer, RecurrentState
from qtool.planner.inventory import AFTER, BEFORE, Place
from qtool.planner.kv_cache import CacheLayers

Split = Literal["pipeline", "tensor"]


class Share(NamedTuple):
    """What one GPU holds: bytes of weights, layers' caches, and its part of all layers."""

    weights_bytes: int
    cache_layers: CacheLayers
    part: float = 1.0


def pipeline_shares(
    place_bytes: Mapping[Place, int],
    cache_layers: Sequence[CacheLayer],
    num_layers: int,
    num_gpus: int,
) -> tuple[Share, ...]:
    """Layers in order, so that the largest share of weights is as small as it can be.

    Where fewer layers than all keep a cache, those are taken to be spread evenly.
    """
    layer_bytes = [place_bytes.get(layer, 0) for layer in range(num_layers)]
    layer_bytes[0] += place_bytes.get(BEFORE, 0)
    layer_bytes[-1] += place_bytes.get(AFTER, 0)
    shares = []
    for start, end in _bounds(layer_bytes, num_gpus):
        first, last = (len(cache_layers) * layer // num_layers for layer in (start, end))
        layers = Counter(cache_layers[first:last])
        shares.append(Share(sum(layer_bytes[start:end]), layers, (end - start) / num_layers))
    return tuple(shares)


def tensor_share(
    device_bytes: int, split_bytes: int, cache_layers: CacheLayers, num_gpus: int
) -> Share:
    """Every GPU holds the same. Key heads that are too few are repeated; a latent is not cut."""
    layers: Counter[CacheLayer] = Counter()
    for layer, count in cache_layers.items():
        layers[_cut(layer, num_gpus)] += count
    kept_bytes = device_bytes - split_bytes
    return Share(kept_bytes + -(-split_bytes // num_gpus), layers, 1 / num_gpus)


def _cut(layer: CacheLayer, num_gpus: int) -> CacheLayer:
    if isinstance(layer, AttentionCache):
        return replace(layer, num_kv_heads=-(-layer.num_kv_heads // num_gpus))
    if isinstance(layer, RecurrentState):
        return replace(
            layer,
            conv_elements=-(-layer.conv_elements // num_gpus),
            state_elements=-(-layer.state_elements // num_gpus),
        )
    return layer


def _bounds(layer_bytes: Sequence[int], num_gpus: int) -> list[tuple[int, int]]:
    """First and last layer (excluded) of each stage: the least largest stage, by bisection."""
    low, high = max(layer_bytes, default=0), sum(layer_bytes)
    while low < high:
        middle = (low + high) // 2
        if len(_stages(layer_bytes, middle)) <= num_gpus:
            high = middle
        else:
            low = middle + 1
    starts = _stages(layer_bytes, low)
    ends = [*starts[1:], len(layer_bytes)]
    bounds = list(zip(starts, ends, strict=True))
    return bounds + [(len(layer_bytes),) * 2] * (num_gpus - len(bounds))


def _stages(layer_bytes: Sequence[int], room_bytes: int) -> list[int]:
    """Where stages start if each takes layers for as long as they fit."""
    starts, used_bytes = [0], 0
    for index, num_bytes in enumerate(layer_bytes):
        if used_bytes + num_bytes > room_bytes and used_bytes:
            starts.append(index)
            used_bytes = 0
        used_bytes += num_bytes
    return starts
