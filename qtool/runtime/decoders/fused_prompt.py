"""A prompt through the common decoder block: PyTorch's products and attention, our kernels between.

Up to 64 tokens are multiplied straight from the packed bytes, and so are more where that is faster
(on Hopper); else each packed layer is dequantized into one scratch buffer, out of which PyTorch
multiplies at once, while the second-level cache still holds most of it, or with INT8 layers as
integers, if that is asked for. What adapters add comes from products of its own.
Nothing waits for the device, and the host stays ahead of a block's launches: how products are made
is decided once for a chunk, launches are made once, and told only of addresses that changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from cupy_kernels import linear_many
from cupy_kernels.dequantize_4bit import Dequantize4bit, NestedAbsmax
from cupy_kernels.dequantize_int8_rows import DequantizeInt8Rows
from cupy_kernels.linear_few import LinearKind, NormWeight, Tokens
from cupy_kernels.prompt_rows import GatedRows, NormRows
from qtool.formats.pieces import rows_at_a_time
from qtool.formats.precisions import NESTED_BLOCKSIZE
from qtool.runtime.decoders.blocks import Block, FusableNetwork, Norm, NotFusable, PackedRows
from qtool.runtime.decoders.fused_adapters import AdapterGroup, BlockAdapters, adapters_of
from qtool.runtime.decoders.fused_attention import AttentionLaunches
from qtool.runtime.dequantize_host import KERNEL_DTYPES
from qtool.runtime.int8_products import add_product, find_outliers, round_activations
from qtool.runtime.packed_products import (
    ManyProducts,
    PackedProduct,
    counters_of,
    many_shape,
    takes_many,
    tokens_of_kernel,
)
from qtool.runtime.products import MAX_PACKED_TOKENS, row_pieces

# How layers are multiplied: packed ones by the kernels for few or for many tokens, or as integers;
# others, and what is dequantized, by PyTorch.
Way = Literal["few", "many", "rounded", "dequantized"]


class Launches(Protocol):
    """What runs between PyTorch's operators."""

    def begin(self) -> None:
        """Before all others of a chunk, which go to the stream that is the current one now."""
        ...

    def norm(self, x: Tensor, norm: Norm, out: Tensor) -> None:
        """The RMS norm of the rows of x, to `out`."""
        ...

    def add_norm(self, x: Tensor, norm: Norm, hidden: Tensor) -> None:
        """The RMS norm of the rows of x, added to `hidden`."""
        ...

    def gate(self, gate: Tensor, up: Tensor) -> None:
        """act(gate) * up, to `gate`."""
        ...

    def take_up(self, block: int, query_key_value: Tensor, queries: Tensor, start: int) -> None:
        """See `AttentionLaunches.take_up`."""
        ...

    def dequantize(self, piece: Piece, target: int) -> None:
        """The rows of `piece`, to the address `target`."""
        ...

    def multiply(self, product: Product, x: Tensor, outs: Sequence[Tensor]) -> None:
        """Few tokens' products with packed layers, and their biases, to `outs`.

        Args:
            x: contiguous.
            outs: one for each layer, or one with the rows of all side by side; contiguous.
        """
        ...

    def fits_many(self, kind: LinearKind) -> bool:
        """Whether `multiply_many` takes such layers."""
        ...

    def takes_many(self, layers: Sequence[PackedRows], num_tokens: int) -> bool:
        """Whether it does, and is faster than to dequantize; layers are of one kind."""
        ...

    def multiply_many(
        self, product: Product, x: Tensor, outs: Sequence[Tensor], *, added: bool
    ) -> None:
        """The same of many tokens.

        Args:
            added: to what is there, of one layer.
        """
        ...

    def multiply_rounded(
        self, layers: Sequence[PackedRows], x: Tensor, out: Tensor, *, added: bool
    ) -> None:
        """Many tokens' INT8 products with layers side by side, and their biases, to `out`."""
        ...


@dataclass(slots=True)
class Piece:
    """Rows [start, stop) of a layer that are dequantized at a time, and the launch that does it."""

    layer: PackedRows
    start: int
    stop: int
    launch: Dequantize4bit | DequantizeInt8Rows | None = None

    @property
    def num_rows(self) -> int:
        """How many rows it has."""
        return self.stop - self.start


@dataclass(slots=True)
class Product:
    """Layers of the same input, and launches for all their tokens.

    Args:
        num_rows: of all layers.
        groups: pieces that are dequantized together; none of layers that never are.
        bias: of all layers that may be dequantized, or None.
        sort: a number that products of the same kinds and shapes share.
        few: a launch for each layer, by how many tokens they take; made when they are first needed.
        many: a launch for all, by the shape of its tiles.
    """

    layers: tuple[PackedRows, ...]
    num_rows: int
    groups: tuple[tuple[Piece, ...], ...] = ()
    bias: Tensor | None = None
    sort: int = 0
    few: dict[int, tuple[PackedProduct, ...]] = field(default_factory=dict)
    many: dict[linear_many.Shape, ManyProducts] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _BlockProducts:
    """Those of a block; gate and up also together, where packed bytes are read."""

    query_key_value: Product
    output: Product
    gate_up: Product
    gate: Product
    up: Product
    down: Product

    def __iter__(self) -> Iterator[Product]:
        yield from (self.query_key_value, self.output, self.gate_up, self.gate, self.up, self.down)


class FusedPrompt:
    """Runs prompts over a cache of `FixedLayer`s.

    Args:
        adapters: those of the network, `adapters_of` it; made here if None.

    Attributes:
        max_packed_tokens: up to how many are few, and multiplied without dequantizing.
        multiplies_many: whether more are, where there is a kernel; None where that is faster.

    Raises:
        NotFusable: attention that PyTorch's fused one does not do, or a layer that cannot be
            dequantized piece by piece.
    """

    def __init__(
        self,
        network: FusableNetwork,
        launches: Launches,
        cache: Any,
        capacity: int,
        *,
        adapters: Sequence[BlockAdapters] | None = None,
    ) -> None:
        self._network = network
        self._adapters = adapters_of(network) if adapters is None else adapters
        self._launches = launches
        self._layers = cache.layers
        if any(block.attention.softcap for block in network.blocks):
            raise NotFusable("PyTorch's flash attention caps no scores")
        # Windows that the cache does not exceed hide nothing.
        windows = [block.attention.window for block in network.blocks]
        self._windows = [window if window < capacity else 0 for window in windows]
        self._products = [_products_of(block) for block in network.blocks]
        self._sorts = _number_sorts(product for block in self._products for product in block)
        self._ways: list[Way] = []  # by sort, of the present chunk
        self.max_packed_tokens = MAX_PACKED_TOKENS
        self.multiplies_many: bool | None = None

    def can_multiply_many(self) -> bool:
        """Whether there is a kernel for more than few tokens, and any layer."""
        blocks = self._network.blocks
        layers = [layer for block in blocks for layer in _layers_of(block)]
        kinds = {layer.kind for layer in layers if layer.plain is None}
        return any(self._launches.fits_many(kind) for kind in kinds)

    def run(self, input_ids: Tensor, start: int) -> Tensor:
        """Take up tokens int64 (batch, n) at positions from `start` on.

        Returns:
            The hidden state of each sequence's last token, before the final norm (batch, hidden).
        """
        network, launches = self._network, self._launches
        batch, num_tokens = input_ids.shape
        self._ways = [self._way(product.layers, batch * num_tokens) for product in self._sorts]
        launches.begin()
        hidden = torch.embedding(network.embedding, input_ids.reshape(-1))
        if network.embedding_scale is not None:
            hidden *= network.embedding_scale
        normed = torch.empty_like(hidden)
        for index, (block, products) in enumerate(zip(network.blocks, self._products, strict=True)):
            launches.norm(hidden, block.attention_norm, normed)
            self._add_attention(index, products, normed, hidden, start)
            launches.norm(hidden, block.mlp_norm, normed)
            self._add_mlp(index, products, normed, hidden)
        # A copy: nothing of the other tokens lives on.
        return hidden.view(batch, num_tokens, -1)[:, -1].clone()

    def _add_attention(
        self, index: int, products: _BlockProducts, normed: Tensor, hidden: Tensor, start: int
    ) -> None:
        adapters, norm = self._adapters[index], self._network.blocks[index].output_norm
        query_key_value = self._product(products.query_key_value, normed)
        if adapters.query_key_value is not None:
            rows = [layer.weight.rows for layer in products.query_key_value.layers]
            adapters.query_key_value.add(normed, torch.split(query_key_value, rows, dim=1))
        attended = self._attend(index, query_key_value, start)
        self._add_product(products.output, attended, hidden, norm, normed, adapters.output)

    def _add_mlp(
        self, index: int, products: _BlockProducts, normed: Tensor, hidden: Tensor
    ) -> None:
        adapters, norm = self._adapters[index], self._network.blocks[index].down_norm
        gate, up = self._gate_and_up(products, normed)
        if adapters.gate_up is not None:
            adapters.gate_up.add(normed, (gate, up))
        self._launches.gate(gate, up)
        del up
        self._add_product(products.down, gate, hidden, norm, normed, adapters.down)

    def _gate_and_up(self, products: _BlockProducts, normed: Tensor) -> tuple[Tensor, Tensor]:
        both = products.gate_up
        if self._ways[both.sort] in ("few", "many"):
            gate, up = (normed.new_empty(normed.shape[0], it.weight.rows) for it in both.layers)
            self._multiply(both, normed, (gate, up))
            return gate, up
        return self._product(products.gate, normed), self._product(products.up, normed)

    def _attend(self, index: int, query_key_value: Tensor, start: int) -> Tensor:
        """Attention of all tokens (batch * n, heads * head_dim)."""
        network, layer = self._network, self._layers[index]
        batch = layer.keys.shape[0]
        num_tokens = query_key_value.shape[0] // batch
        queries = query_key_value.new_empty(batch, num_tokens, network.num_heads, network.head_dim)
        self._launches.take_up(index, query_key_value, queries, start)
        stop = start + num_tokens
        attended = flash_attention(
            queries,
            layer.keys.narrow(2, 0, stop).transpose(1, 2),
            layer.values.narrow(2, 0, stop).transpose(1, 2),
            scale=network.blocks[index].attention.scale,
            window=self._windows[index],
        )
        return attended.reshape(batch * num_tokens, -1)

    # -- products ---------------------------------------------------------------------------------

    def _way(self, layers: Sequence[PackedRows], num_tokens: int) -> Way:
        is_packed = all(layer.plain is None for layer in layers)
        if is_packed and num_tokens <= self.max_packed_tokens:
            return "few"
        is_rounded = all(layer.rounded is not None for layer in layers)
        if is_rounded and num_tokens > MAX_PACKED_TOKENS:
            return "rounded"
        if is_packed and self._is_many(layers, num_tokens):
            return "many"
        return "dequantized"

    def _is_many(self, layers: Sequence[PackedRows], num_tokens: int) -> bool:
        """Whether the packed bytes of these layers are read at once, for more than a few tokens."""
        kind = layers[0].kind
        if self.multiplies_many is False or any(layer.kind != kind for layer in layers):
            return False
        if any(layer.rounded is not None for layer in layers):
            return False
        if self.multiplies_many:
            return self._launches.fits_many(kind)
        return self._launches.takes_many(layers, num_tokens)

    def _multiply(
        self, product: Product, x: Tensor, outs: Sequence[Tensor], *, added: bool = False
    ) -> None:
        """Read packed bytes of few or many tokens; only these can be added."""
        if self._ways[product.sort] == "few":
            self._launches.multiply(product, x, outs)
        else:
            self._launches.multiply_many(product, x, outs, added=added)

    def _product(self, product: Product, x: Tensor) -> Tensor:
        """x @ weight.T + bias (n, rows of all layers)."""
        if self._ways[product.sort] == "dequantized" and len(product.groups) == 1:
            out = x.mm(self._dequantize(product.groups[0], x).t())
            return out if product.bias is None else out.add_(product.bias)
        return self._product_to(product, x, x.new_empty(x.shape[0], product.num_rows))

    def _product_to(self, product: Product, x: Tensor, out: Tensor) -> Tensor:
        way = self._ways[product.sort]
        if way == "rounded":
            self._launches.multiply_rounded(product.layers, x, out, added=False)
        elif way != "dequantized":
            self._multiply(product, x, (out,))
        else:
            for pieces, place in _places(product, out):
                torch.mm(x, self._dequantize(pieces, x).t(), out=place)
            if product.bias is not None:
                out += product.bias
        return out

    def _add_product(
        self,
        product: Product,
        x: Tensor,
        hidden: Tensor,
        norm: Norm | None,
        scratch: Tensor,
        adapters: AdapterGroup | None,
    ) -> None:
        """Add it, or the norm of it, to `hidden`; `scratch` is as large."""
        if norm is not None:
            made = self._product_to(product, x, scratch)
            if adapters is not None:
                adapters.add(x, (made,))
            self._launches.add_norm(made, norm, hidden)
            return
        if adapters is not None:
            adapters.add(x, (hidden,))
        way = self._ways[product.sort]
        if way == "few":
            hidden += self._product_to(product, x, scratch)
        elif way == "many":
            self._multiply(product, x, (hidden,), added=True)
        elif way == "rounded":
            self._launches.multiply_rounded(product.layers, x, hidden, added=True)
        else:
            for pieces, place in _places(product, hidden):
                place.addmm_(x, self._dequantize(pieces, x).t())
            if product.bias is not None:
                hidden += product.bias

    def _dequantize(self, pieces: Sequence[Piece], x: Tensor) -> Tensor:
        """The rows of all pieces, one after the other, in the dtype of `x`."""
        first = pieces[0]
        if first.layer.plain is not None and len(pieces) == 1:
            return first.layer.plain[first.start : first.stop]
        columns = x.shape[1]
        weight = x.new_empty(sum(piece.num_rows for piece in pieces), columns)
        start = 0
        for piece in pieces:
            if piece.layer.plain is not None:
                target = weight[start : start + piece.num_rows]
                target.copy_(piece.layer.plain[piece.start : piece.stop])
            else:
                target_bytes = start * columns * weight.itemsize
                self._launches.dequantize(piece, weight.data_ptr() + target_bytes)
            start += piece.num_rows
        return weight


def flash_attention(
    queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int
) -> Tensor:
    """Causal attention with the last query at the last key: PyTorch's kernel.

    The operator's public face takes neither fewer queries than keys nor a window.

    Args:
        queries: (batch, n, heads, head_dim).
        keys: (batch, m, kv_heads, head_dim), and `values`; m >= n.
        window: tokens that are visible, a query's own among them; 0 for all.

    Returns:
        (batch, n, heads, head_dim).
    """
    attended: Tensor = torch.ops.aten._flash_attention_forward.default(
        queries,
        keys,
        values,
        None,
        None,
        queries.shape[1],
        keys.shape[1],
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=window - 1 if window else None,
        window_size_right=0 if window else None,
    )[0]
    return attended


def check_windows(network: FusableNetwork, capacity: int) -> None:
    """See that `flash_attention` has windows, if one is shorter than a cache of `capacity` tokens.

    The few tokens that a network is compared over do not show it.

    Raises:
        NotFusable: it looks beyond them, as a build of PyTorch without windows does.
    """
    if not any(0 < block.attention.window < capacity for block in network.blocks):
        return
    size, window, num_keys, num_queries = network.head_dim, 2, 8, 4
    positions = torch.arange(num_keys, dtype=network.dtype, device=network.embedding.device)
    values = positions[:, None, None].expand(1, -1, 1, size).contiguous()
    keys = torch.zeros_like(values)
    found = flash_attention(keys[:, :num_queries], keys, values, scale=1.0, window=window)
    # Equal scores: the mean of a token's own position and the one before.
    expected = (positions[-num_queries:] - 0.5)[:, None, None]
    if not torch.allclose(found, expected.expand_as(found), atol=0.1):
        raise NotFusable("PyTorch's flash attention knows no windows here")


@dataclass(frozen=True, slots=True)
class _Placed:
    """Where products of a sort last read and wrote, in every block of a chunk the same.

    Args:
        at: tokens and addresses.
        key: of its launches in `Product.few` or `Product.many`.
        tokens: what its launches are told.
    """

    at: tuple[int, ...]
    key: Any
    tokens: tuple[Tokens, ...]


class PromptLaunches:
    """`Launches` on the GPU. All are made when they are first needed, and used by one thread."""

    def __init__(self, network: FusableNetwork, attention: AttentionLaunches) -> None:
        self._dtype = KERNEL_DTYPES[network.dtype]
        self._device = network.embedding.device
        kind, size = network.final_norm.kind, network.hidden_size
        self._norm = NormRows(size, self._dtype, kind)
        has_added = any(block.has_added_norms for block in network.blocks)
        self._added_norm = NormRows(size, self._dtype, kind, added=True) if has_added else None
        self._gate = GatedRows(self._dtype, network.gate)
        self._attention = attention
        self._few: dict[int, _Placed] = {}  # by sort
        self._many: dict[int, _Placed] = {}
        self._stream = 0
        self._counters: Tensor | None = None  # held: a graph's own are nobody else's

    def begin(self) -> None:
        """See `Launches.begin`."""
        self._stream = torch.cuda.current_stream(self._device).cuda_stream
        self._counters = None

    def norm(self, x: Tensor, norm: Norm, out: Tensor) -> None:
        """See `Launches.norm`."""
        weight = NormWeight(norm.weight.data_ptr(), norm.epsilon)
        self._norm.queue(x.shape[0], weight, x.data_ptr(), out.data_ptr(), self._stream)

    def add_norm(self, x: Tensor, norm: Norm, hidden: Tensor) -> None:
        """See `Launches.add_norm`."""
        assert self._added_norm is not None
        weight = NormWeight(norm.weight.data_ptr(), norm.epsilon)
        self._added_norm.queue(x.shape[0], weight, x.data_ptr(), hidden.data_ptr(), self._stream)

    def gate(self, gate: Tensor, up: Tensor) -> None:
        """See `Launches.gate`."""
        address = gate.data_ptr()
        self._gate.queue(gate.numel(), address, up.data_ptr(), address, self._stream)

    def take_up(self, block: int, query_key_value: Tensor, queries: Tensor, start: int) -> None:
        """See `Launches.take_up`."""
        self._attention.take_up(block, query_key_value, queries, start, self._stream)

    def dequantize(self, piece: Piece, target: int) -> None:
        """See `Launches.dequantize`."""
        if piece.launch is None:
            piece.launch = _dequantize_launch(piece, self._dtype)
        piece.launch.queue(target, self._stream)

    def multiply(self, product: Product, x: Tensor, outs: Sequence[Tensor]) -> None:
        """See `Launches.multiply`."""
        at = x.shape[0], x.data_ptr(), *[out.data_ptr() for out in outs]
        placed = self._few.get(product.sort)
        if placed is None or placed.at != at:
            places = _outs_of(product, outs)
            tokens = tuple(_tokens_of(x, (place,)) for place in places)
            placed = self._few[product.sort] = _Placed(at, tokens_of_kernel(x.shape[0]), tokens)
        launches = product.few.get(placed.key)
        if launches is None:
            launches = product.few[placed.key] = tuple(
                PackedProduct(layer.kind, layer.weight, x.shape[0]) for layer in product.layers
            )
        if self._counters is None:
            self._counters = counters_of(self._device, self._stream)
        # One after the other, and with what comes behind on the stream, they can share it.
        sums = x.new_empty(max([it.sum_bytes for it in launches]), dtype=torch.uint8)
        buffers = {"counters": self._counters.data_ptr(), "sums": sums.data_ptr()}
        for launch, own in zip(launches, placed.tokens, strict=True):
            launch.queue_at(own, self._stream, **buffers)

    def fits_many(self, kind: LinearKind) -> bool:
        """See `Launches.fits_many`."""
        return linear_many.fits(kind)

    def takes_many(self, layers: Sequence[PackedRows], num_tokens: int) -> bool:
        """See `Launches.takes_many`."""
        rows = [layer.weight.rows for layer in layers]
        return takes_many(layers[0].kind, rows, num_tokens)

    def multiply_many(
        self, product: Product, x: Tensor, outs: Sequence[Tensor], *, added: bool
    ) -> None:
        """See `Launches.multiply_many`."""
        at = added, x.shape[0], x.data_ptr(), *[out.data_ptr() for out in outs]
        placed = self._many.get(product.sort)
        if placed is None or placed.at != at:
            tokens = _tokens_of(x, _outs_of(product, outs), added=added)
            rows = [layer.weight.rows for layer in product.layers]
            shape = many_shape(product.layers[0].kind, rows, x.shape[0])
            placed = self._many[product.sort] = _Placed(at, shape, (tokens,))
        launch = product.many.get(placed.key)
        if launch is None:
            weights = [layer.weight for layer in product.layers]
            launch = ManyProducts(product.layers[0].kind, weights, x.shape[0])
            product.many[placed.key] = launch
        launch.queue_at(placed.tokens[0], self._stream)

    def multiply_rounded(
        self, layers: Sequence[PackedRows], x: Tensor, out: Tensor, *, added: bool
    ) -> None:
        """See `Launches.multiply_rounded`."""
        weights = [layer.rounded for layer in layers if layer.rounded is not None]
        rounded = round_activations(x, find_outliers(x, weights[0].threshold))
        start = 0
        for layer, weight in zip(layers, weights, strict=True):
            stop = start + layer.weight.rows
            place = out[:, start:stop]
            add_product(rounded, weight.codes, weight.scb, layer.bias, place, added=added)
            start = stop


def _tokens_of(x: Tensor, outs: Sequence[Tensor], *, added: bool = False) -> Tokens:
    """Where a launch reads and writes; what is `added` to is the output itself."""
    return Tokens(
        x.shape[0],
        x.data_ptr(),
        x.stride(0),
        tuple(out.data_ptr() for out in outs),
        tuple(out.stride(0) for out in outs),
        residual=outs[0].data_ptr() if added else 0,
        residual_stride=outs[0].stride(0) if added else 0,
    )


def _outs_of(product: Product, outs: Sequence[Tensor]) -> Sequence[Tensor]:
    """One for each layer."""
    if len(outs) == len(product.layers):
        return outs
    return torch.split(outs[0], [layer.weight.rows for layer in product.layers], dim=1)


def _dequantize_launch(piece: Piece, dtype: str) -> Dequantize4bit | DequantizeInt8Rows:
    kind, weight = piece.layer.kind, piece.layer.weight
    first = piece.start * kind.columns
    if kind.format == "int8":
        codes, scb = weight.weight + first, weight.absmax + piece.start * 4
        return DequantizeInt8Rows(codes, piece.num_rows, kind.columns, scb, dtype)
    block = first // kind.blocksize
    absmax: int | NestedAbsmax = weight.absmax + block * 4
    if kind.nested:
        absmax = NestedAbsmax(
            weight.absmax_codes + block,
            weight.nested_absmax + block // NESTED_BLOCKSIZE * 4,
            weight.nested_quant_map,
            weight.nested_offset,
        )
    return Dequantize4bit(
        weight.weight + first // 2,
        piece.num_rows * kind.columns,
        absmax,
        kind.format,
        kind.blocksize,
        dtype,
    )


def _products_of(block: Block) -> _BlockProducts:
    gate, up = block.gate_up
    return _BlockProducts(
        query_key_value=_product_of(block.query_key_value),
        output=_product_of([block.output]),
        gate_up=Product(block.gate_up, gate.weight.rows + up.weight.rows),
        gate=_product_of([gate]),
        up=_product_of([up]),
        down=_product_of([block.down]),
    )


def _product_of(layers: Sequence[PackedRows]) -> Product:
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return Product(
        layers=tuple(layers),
        num_rows=sum(layer.weight.rows for layer in layers),
        groups=tuple(tuple(group) for group in _groups(layers)),
        bias=torch.cat(biases) if len(biases) > 1 else biases[0] if biases else None,
    )


def _number_sorts(products: Iterable[Product]) -> list[Product]:
    """Set their sorts.

    Returns:
        One of each, in the order of the numbers.
    """
    firsts: dict[Any, Product] = {}
    for product in products:
        traits = tuple(
            (it.kind, it.weight.rows, it.plain is None, it.rounded is None) for it in product.layers
        )
        if traits not in firsts:
            product.sort = len(firsts)
            firsts[traits] = product
        product.sort = firsts[traits].sort
    return list(firsts.values())


def _places(product: Product, out: Tensor) -> Iterator[tuple[tuple[Piece, ...], Tensor]]:
    """What is dequantized together, with the columns of `out` that are its own."""
    start = 0
    for pieces in product.groups:
        stop = start + sum(piece.num_rows for piece in pieces)
        yield pieces, out[:, start:stop]
        start = stop


def _groups(layers: Sequence[PackedRows]) -> Iterator[list[Piece]]:
    """Pieces that are dequantized together, in order: no more rows than are at a time."""
    columns = layers[0].kind.columns
    most = rows_at_a_time(columns)
    group: list[Piece] = []
    for layer in layers:
        for rows in row_pieces(layer.weight.rows, columns):
            piece = Piece(layer, rows.start, rows.stop)
            _check_start(piece)
            if sum(p.num_rows for p in group) + piece.num_rows > most:
                yield group
                group = []
            group.append(piece)
    yield group


def _check_start(piece: Piece) -> None:
    """A launch counts blocks, and groups of nested absmax, from its first element on."""
    kind = piece.layer.kind
    group = kind.blocksize * (NESTED_BLOCKSIZE if kind.nested else 1)
    if piece.start * kind.columns % group:
        raise NotFusable("a large layer whose pieces share blocks or groups of absmax")


def _layers_of(block: Block) -> tuple[PackedRows, ...]:
    return (*block.query_key_value, block.output, *block.gate_up, block.down)
