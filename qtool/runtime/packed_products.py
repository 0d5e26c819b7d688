"""Products with packed layers on a GPU, by the kernels that read packed bytes.

launch = PackedProduct(kind, weight, num_tokens)  # up to 64 tokens
launch.queue(x, out)

if takes_many(kind, rows, num_tokens):  # more, where that is faster than to dequantize
    launch = ManyProducts(kind, weights, num_tokens)
    launch.queue(x, outs)
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from cupy_kernels import linear_many
from cupy_kernels.capture import capture_id
from cupy_kernels.linear_few import MAX_TOKENS as MAX_FEW_TOKENS
from cupy_kernels.linear_few import (
    LinearFew,
    LinearKind,
    LinearWeight,
    Tokens,
    holds_activations,
    holds_all_columns,
)
from cupy_kernels.linear_many import LinearMany
from cupy_kernels.linear_some import COUNTER_BYTES, LinearSome, fills_in_clusters

# Below, each weight is looked up for so few products that warps of one row each do as well.
MIN_SOME_TOKENS: Final = 3
# Of layers whose activations go through shared memory: more rows are faster with `linear_some`.
MAX_FEW_ROWS: Final = 16_384
NUM_COUNTERS: Final = 64  # that a device has ready, for streams and for graphs


class PackedProduct:
    """A launch for up to `max_tokens` tokens and layers of one shape, for one thread at a time.

    `linear_few` multiplies up to two tokens, and up to eight where a thread block has their
    activations at once and clusters are no faster; `linear_some` the others.

    Args:
        num_tokens: up to 64; the kernel takes up to the next power of two.

    Raises:
        ValueError: more, or layers that do not fit the kernels.
    """

    def __init__(self, kind: LinearKind, weight: LinearWeight, num_tokens: int) -> None:
        self.max_tokens = tokens_of_kernel(num_tokens)
        self._few: LinearFew | None = None
        self._some: LinearSome | None = None
        if takes_few(kind, weight.rows, self.max_tokens):
            self._few = LinearFew(kind, [weight], max_tokens=self.max_tokens)
        else:
            self._some = LinearSome(kind, weight, max_tokens=self.max_tokens)

    def set_weight(self, weight: LinearWeight) -> None:
        """Take another layer of the same shape."""
        if self._few is not None:
            self._few.set_weights([weight])
        elif self._some is not None:
            self._some.set_weight(weight)

    @property
    def sum_bytes(self) -> int:
        """What `queue_at` wants for sums."""
        return 0 if self._some is None else self._some.sum_bytes

    def queue(self, x: Tensor, out: Tensor) -> None:
        """Queue the product on the current stream of x's device, which is the current one.

        Args:
            x: (tokens, columns), rows 16-byte aligned.
            out: (tokens, rows), which may lie apart.
        """
        stream: int = torch.cuda.current_stream(x.device).cuda_stream
        x = _in_rows(x)
        tokens = Tokens(x.shape[0], x.data_ptr(), x.stride(0), (out.data_ptr(),), (out.stride(0),))
        if self._few is not None:
            self._few.queue(tokens, stream)
        elif self._some is not None:
            # What is freed here is handed out again only behind this launch, in the stream's order.
            sums = torch.empty(self._some.sum_bytes, dtype=torch.uint8, device=x.device)
            counters = counters_of(x.device, stream)
            self._some.queue(tokens, stream, counters=counters.data_ptr(), sums=sums.data_ptr())

    def queue_at(self, tokens: Tokens, stream: int, *, counters: int, sums: int) -> None:
        """The same with addresses, `counters_of` the stream and `sum_bytes` bytes among them."""
        if self._few is not None:
            self._few.queue(tokens, stream)
        elif self._some is not None:
            self._some.queue(tokens, stream, counters=counters, sums=sums)


def tokens_of_kernel(num_tokens: int) -> int:
    """For how many tokens the kernel is made that takes so many: the next power of two."""
    return 1 << (num_tokens - 1).bit_length()


def takes_few(kind: LinearKind, rows: int, max_tokens: int) -> bool:
    """Whether `linear_few` is the faster one, on the current GPU."""
    if max_tokens < MIN_SOME_TOKENS:
        return True
    if max_tokens > MAX_FEW_TOKENS:
        return False
    if fills_in_clusters(kind, rows, max_tokens):
        return False
    if holds_activations(kind, max_tokens):
        return True
    return rows <= MAX_FEW_ROWS and holds_all_columns(kind, max_tokens)


# -- more tokens ----------------------------------------------------------------------------------


def takes_many(kind: LinearKind, rows: Sequence[int], num_tokens: int) -> bool:
    """Whether `ManyProducts` runs for layers of so many rows on the current GPU, and is faster than
    to dequantize them.
    """
    return _takes_many(kind, tuple(rows), num_tokens, torch.cuda.current_device())


@lru_cache(maxsize=4096)
def _takes_many(kind: LinearKind, rows: tuple[int, ...], num_tokens: int, device: int) -> bool:
    return linear_many.fits(kind) and linear_many.is_faster(kind, rows, num_tokens)


class ManyProducts:
    """A launch for one to three layers and about `num_tokens` tokens, for one thread at a time."""

    def __init__(self, kind: LinearKind, weights: Sequence[LinearWeight], num_tokens: int) -> None:
        self._launch = LinearMany(kind, weights, num_tokens)

    def set_weights(self, weights: Sequence[LinearWeight]) -> None:
        """Take other layers of the same shapes."""
        self._launch.set_weights(weights)

    def queue(self, x: Tensor, outs: Sequence[Tensor], residual: Tensor | None = None) -> None:
        """Queue the products on the current stream of x's device, which is the current one.

        Args:
            x: (tokens, columns), rows 16-byte aligned.
            outs: (tokens, rows) each, which may lie apart.
            residual: added to each, (tokens, rows); of one layer it may be the output itself.
        """
        stream: int = torch.cuda.current_stream(x.device).cuda_stream
        x = _in_rows(x)
        tokens = Tokens(
            x.shape[0],
            x.data_ptr(),
            x.stride(0),
            tuple(out.data_ptr() for out in outs),
            tuple(out.stride(0) for out in outs),
            residual=0 if residual is None else residual.data_ptr(),
            residual_stride=0 if residual is None else residual.stride(0),
        )
        self._launch.queue(tokens, stream)

    def queue_at(self, tokens: Tokens, stream: int) -> None:
        """The same with addresses."""
        self._launch.queue(tokens, stream)


def many_shape(kind: LinearKind, rows: Sequence[int], num_tokens: int) -> linear_many.Shape:
    """What tells launches of `ManyProducts` for the same layers apart."""
    return linear_many.shape_on(tuple(rows), kind.columns, num_tokens)


def _in_rows(x: Tensor) -> Tensor:
    """Without rows that overlap, such as one repeated, which the copy engine refuses."""
    return x.contiguous() if x.stride(0) < x.shape[1] else x


# -- counters -------------------------------------------------------------------------------------

_lock = threading.Lock()
_free: dict[int, list[Tensor]] = {}  # by device
_taken: dict[tuple[int, int, int], Tensor] = {}  # by device, stream and capture


def counters_of(device: torch.device, stream: int) -> Tensor:
    """COUNTER_BYTES zeros that launches on `stream` share, since they run one after the other.

    A graph has its own, as it may run beside its stream. They are taken from zeros made before:
    memory of a graph's pool would have to be cleared in each run.
    """
    capture = capture_id(stream) if torch.cuda.is_current_stream_capturing() else 0
    index = torch.cuda.current_device() if device.index is None else device.index
    key = index, stream, capture
    with _lock:
        found = _taken.get(key)
        if found is not None:
            return found
        if index not in _free and not capture:
            _free[index] = list(_zeros(NUM_COUNTERS, device))
            # Others than the current stream will use them.
            torch.cuda.current_stream(device).synchronize()
        if _free.get(index):
            return _taken.setdefault(key, _free[index].pop())
        if capture:  # never more than one product's
            return _zeros(1, device)[0]
        return _taken.setdefault(key, _zeros(1, device)[0])


def _zeros(count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, COUNTER_BYTES, dtype=torch.uint8, device=device)
