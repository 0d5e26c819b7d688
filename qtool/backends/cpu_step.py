"""Operators of a decoder's step for one token: products, norms, the embedding.

What they are told is in `cpu_records`, who runs them in `cpu_threads`. Where a model computes in
bfloat16, every value that it would round is rounded. Sums are float32, in an order that depends on
sizes and on nothing else, so that any number of threads computes the same.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
from numba import types
from numba.extending import overload

from qtool.backends import cpu_records as at
from qtool.backends.cpu_dots import add_weighted
from qtool.backends.cpu_kernels import helper, inlined
from qtool.backends.cpu_numbers import (
    as_float,
    as_kind,
    float_of,
    gelu,
    gelu_tanh,
    hyperbolic_tangent,
    rounded,
    silu,
)
from qtool.backends.cpu_products import _ORDER, GROUP, PAIRS_GROUP
from qtool.backends.cpu_rows import most_scales, multiply_rows
from qtool.backends.cpu_threads import STEP, TOKEN, operator, wait_for
from qtool.backends.cpu_vectors import array_at, full, halving_sum, load, store

_LANES: Final = 16  # of float32 in the widest register
_ADAPTER_LANES: Final = at.ADAPTER_LANES  # a constant only as a global
_INPUT_BITS: Final = 20  # of a step's inputs; its own number stands above them

u64, f32 = np.uint64, np.float32


def product_floats(width: int, item_rows: int) -> list[int]:
    """What products need of a thread's scratch: X_PLACE, NORMED_PLACE, SCALES_PLACE, SUMS_PLACE.

    Args:
        width: the most columns of a layer.
        item_rows: the most rows of an item.
    """
    return [width, width, most_scales(width), 2 * (item_rows + at.ADAPTER_LANES)]


# ---- Products ---------------------------------------------------------------------------------


@cache
def products_operator(stored: Any, absmax: Any, like: Any, x: Any, kept: Any) -> Any:
    """Rows of a layer: the norm before; bias, adapter and epilogue behind.

    Args:
        stored, absmax, like: dtypes, see `cpu_rows.multiply_rows`.
        x: np.uint16 for pairs of bfloat16, widths a multiple of PAIRS_GROUP; or np.float32, of
            GROUP.
        kept: the dtype of adapters, np.float32, or np.uint16 for bfloat16.
    """
    reorder = stored is np.uint8

    @operator
    def multiply(control: int, record: int, item: int, scratch: int) -> None:
        fields, places = array_at(record, np.int64), array_at(scratch, np.int64)
        arranged = array_at(places[u64(at.X_PLACE)], x)
        _take_input(array_at(control, np.int64), fields, places, arranged, reorder)
        scales = array_at(places[u64(at.SCALES_PLACE)], np.float32)
        sums = array_at(places[u64(at.SUMS_PLACE)], np.float32)
        first = _in_turns(fields, u64(item)) * u64(fields[u64(at.ITEM_ROWS)])
        last = min(first + u64(fields[u64(at.ITEM_ROWS)]), u64(fields[u64(at.NUM_ROWS)]))
        dtypes = array_at(0, stored), array_at(0, absmax), array_at(0, like)
        _multiply(fields, u64(at.FIRST_WEIGHT), dtypes, arranged, first, last, scales, sums)
        behind = 4 * (fields[u64(at.ITEM_ROWS)] + at.ADAPTER_LANES)
        ups = array_at(places[u64(at.SUMS_PLACE)] + behind, np.float32)
        gated = fields[u64(at.EPILOGUE)] >= at.SILU
        if gated:
            _multiply(fields, u64(at.SECOND_WEIGHT), dtypes, arranged, first, last, scales, ups)
        if fields[u64(at.INNER_DONE)] != 0:
            # Who adds nothing waits too: else what it has done could stand for what is awaited.
            wait_for(control, fields[u64(at.INNER_DONE)])
            b = array_at(fields[u64(at.FIRST_ADAPTER + at.B)], kept)
            _add_adapter(fields, u64(at.FIRST_ADAPTER), b, first, last, sums)
            if gated:
                b = array_at(fields[u64(at.SECOND_ADAPTER + at.B)], kept)
                _add_adapter(fields, u64(at.SECOND_ADAPTER), b, first, last, ups)
        if gated:
            _put_gated(fields, sums, ups, first, last)
        else:
            _put(fields, sums, first, last)

    return multiply


@inlined
def _in_turns(fields: Any, drawn: Any) -> Any:
    """Which item the number `drawn` stands for: those of each run follow one another.

    With a run for every thread a thread mostly goes on where it was, and finds fetched ahead what
    comes next.
    """
    num_rows, item_rows = u64(fields[u64(at.NUM_ROWS)]), u64(fields[u64(at.ITEM_ROWS)])
    num_items = (num_rows + item_rows - u64(1)) // item_rows
    num_runs = u64(fields[u64(at.NUM_RUNS)])
    run = drawn % num_runs
    # The first ones have one more where runs are not all as long.
    start = run * (num_items // num_runs) + min(run, num_items % num_runs)
    return start + drawn // num_runs


@helper
def _multiply(
    fields: Any, place: Any, dtypes: Any, x: Any, first: Any, last: Any, scales: Any, sums: Any
) -> None:
    """Fill sums[: last - first] with what the weight at fields[place] makes of x, and its bias."""
    multiply_rows(fields, place, dtypes, x, first, last, scales, sums)
    bias_at, rounds = fields[place + u64(at.BIAS)], fields[u64(at.ROUNDS)] != 0
    if fields[u64(at.EPILOGUE)] == at.INNER:
        rounds = False
    if bias_at != 0:
        bias = array_at(bias_at, np.float32)
        for i in range(last - first):
            sums[i] += bias[first + i]
    for i in range(last - first):
        sums[i] = rounded(sums[i], rounds)


@helper
def _add_adapter(fields: Any, place: Any, b: Any, first: Any, last: Any, sums: Any) -> None:
    """Add what the adapter at fields[place], if there is one, makes of its inner values."""
    if fields[place + u64(at.B)] == 0:
        return
    inner = array_at(fields[place + u64(at.INNER_VALUES)], np.float32)
    rank, stride = u64(fields[place + u64(at.RANK)]), u64(fields[place + u64(at.STRIDE)])
    rounds = fields[u64(at.ROUNDS)] != 0
    for row in range(first, last, u64(_ADAPTER_LANES)):
        total = load(sums, row - first, _ADAPTER_LANES)
        for i in range(rank):
            total = add_weighted(total, b, i * stride + row, inner, i, u64(0), 1)
        store(sums, row - first, total)
    for i in range(last - first):
        sums[i] = rounded(sums[i], rounds)


@helper
def _put(fields: Any, sums: Any, first: Any, last: Any) -> None:
    """Store or add the rows from `first` on; with a cap, they are shrunk to below it."""
    out, rounds = array_at(fields[u64(at.OUT)], np.float32), fields[u64(at.ROUNDS)] != 0
    if fields[u64(at.EPILOGUE)] == at.INNER:
        factors = array_at(fields[u64(at.SCALES)], np.float32)
        for i in range(last - first):
            out[first + i] = sums[i] * factors[first + i]
        return
    if fields[u64(at.EPILOGUE)] == at.ADDED:
        for i in range(last - first):
            out[first + i] = rounded(out[first + i] + sums[i], rounds)
        return
    for i in range(last - first):
        out[first + i] = sums[i]
    cap = float_of(fields[u64(at.SOFTCAP)])
    if cap != f32(0):
        for i in range(first, last):
            shrunk = rounded(hyperbolic_tangent(rounded(out[i] / cap, rounds)), rounds)
            out[i] = rounded(shrunk * cap, rounds)


@helper
def _put_gated(fields: Any, gates: Any, ups: Any, first: Any, last: Any) -> None:
    out, rounds = array_at(fields[u64(at.OUT)], np.float32), fields[u64(at.ROUNDS)] != 0
    if fields[u64(at.EPILOGUE)] == at.SILU:
        for i in range(last - first):
            gates[i] = silu(gates[i])
    elif fields[u64(at.EPILOGUE)] == at.GELU_TANH:
        for i in range(last - first):
            gates[i] = gelu_tanh(gates[i])
    else:
        for i in range(last - first):
            gates[i] = gelu(gates[i])
    for i in range(last - first):
        out[first + i] = rounded(rounded(gates[i], rounds) * ups[i], rounds)


# ---- Their input ------------------------------------------------------------------------------


@helper
def _take_input(control: Any, fields: Any, places: Any, arranged: Any, reorder: bool) -> None:
    """Norm the input and bring it into the order of the weights, unless the thread has it so."""
    wanted = (control[u64(STEP)] << _INPUT_BITS) + fields[u64(at.INPUT)]
    if places[u64(at.ARRANGED_FOR)] == wanted:
        return
    x = array_at(fields[u64(at.X)], np.float32)
    if fields[u64(at.NORM)] != 0:
        normed = array_at(places[u64(at.NORMED_PLACE)], np.float32)
        _norm_of_record(fields, x, normed)
        x = normed
    _arrange(x, arranged, u64(fields[u64(at.WIDTH)]), reorder)
    places[u64(at.ARRANGED_FOR)] = wanted


def _arrange(x: Any, arranged: Any, size: Any, reorder: Any) -> None:
    """x[:size] in the dtype of `arranged`; in the order of `cpu_products` if `reorder`."""


@overload(_arrange)  # type: ignore[untyped-decorator]
def _overload_arrange(x: Any, arranged: Any, size: Any, reorder: Any) -> Any:
    pairs = arranged.dtype == types.uint16
    lanes = 2 * _LANES if pairs else _LANES
    columns = PAIRS_GROUP if pairs else GROUP

    def arrange(x: Any, arranged: Any, size: Any, reorder: Any) -> None:
        if not reorder:
            for i in range(size):
                arranged[i] = as_kind(x[i], arranged)
            return
        for first in range(u64(0), size, u64(columns)):
            for part in range(_ORDER.size):
                to, start = first + u64(part * lanes), first + u64(_ORDER[part])
                for lane in range(u64(lanes)):
                    arranged[to + lane] = as_kind(x[start + lane * u64(4)], arranged)

    return arrange


# ---- Norms ------------------------------------------------------------------------------------


@cache
def added_norm_operator() -> Any:
    """One item: the norm of X is added to OUT."""

    @operator
    def add(control: int, record: int, item: int, scratch: int) -> None:
        fields, places = array_at(record, np.int64), array_at(scratch, np.int64)
        normed = array_at(places[u64(at.NORMED_PLACE)], np.float32)
        _norm_of_record(fields, array_at(fields[u64(at.X)], np.float32), normed)
        out, rounds = array_at(fields[u64(at.OUT)], np.float32), fields[u64(at.ROUNDS)] != 0
        for i in range(u64(fields[u64(at.WIDTH)])):
            out[i] = rounded(out[i] + normed[i], rounds)

    return add


@helper
def _norm_of_record(fields: Any, x: Any, out: Any) -> None:
    width, weight = u64(fields[u64(at.WIDTH)]), fields[u64(at.NORM)]
    epsilon, once = float_of(fields[u64(at.EPSILON)]), fields[u64(at.NORM_ROUNDS_ONCE)] != 0
    rounds = fields[u64(at.ROUNDS)] != 0
    take_norm(x, u64(0), out, u64(0), width, weight, epsilon, rounds, once)


@helper
def take_norm(
    x: Any,
    first: Any,
    out: Any,
    to: Any,
    size: Any,
    weight_at: int,
    epsilon: Any,
    rounds: bool,
    once: bool,
) -> None:
    """The RMS norm of x[first : first + size] to out[to:].

    Rounded behind the weight, and before it too unless `once`.
    """
    squares = full(_LANES, 0, np.float32)
    whole = size - size % u64(_LANES)
    for i in range(u64(0), whole, u64(_LANES)):
        values = load(x, first + i, _LANES)
        squares = squares + values * values
    total = halving_sum(squares)
    for i in range(whole, size):
        total += x[first + i] * x[first + i]
    inverse = f32(f32(1) / np.sqrt(f32(f32(total / f32(size)) + epsilon)))
    weight, rounds_first = array_at(weight_at, np.float32), rounds and not once
    for i in range(size):
        normed = rounded(x[first + i] * inverse, rounds_first)
        out[to + i] = rounded(normed * weight[i], rounds)


# ---- The embedding ----------------------------------------------------------------------------


@cache
def embedding_operator(kept: Any) -> Any:
    """One item: the row of the token, multiplied by the scale if there is one.

    `kept` is np.float32, or np.uint16 for bfloat16.
    """

    @operator
    def embed(control: int, record: int, item: int, scratch: int) -> None:
        fields = array_at(record, np.int64)
        size = u64(fields[u64(at.HIDDEN_SIZE)])
        rows = array_at(fields[u64(at.EMBEDDING)], kept)
        hidden = array_at(fields[u64(at.HIDDEN)], np.float32)
        first = u64(array_at(control, np.int64)[u64(TOKEN)]) * size
        for i in range(size):
            hidden[i] = as_float(rows[first + i])
        scale, rounds = float_of(fields[u64(at.EMBEDDING_SCALE)]), fields[u64(at.ROUNDS)] != 0
        if scale != f32(0):
            for i in range(size):
                hidden[i] = rounded(hidden[i] * scale, rounds)

    return embed
