"""Attention of one token over the cache: operators of a step, see `cpu_records`.

An item is a strip of the tokens that a key head's queries see. Scores, weights and sums are
float32; rounded is only what goes into the cache, and what comes out.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np

from qtool.backends import cpu_records as at
from qtool.backends.cpu_dots import TOKENS, add_weighted, dot_rows, most_sums
from qtool.backends.cpu_kernels import helper
from qtool.backends.cpu_numbers import as_kind, exponential, float_of, hyperbolic_tangent, rounded
from qtool.backends.cpu_step import take_norm
from qtool.backends.cpu_threads import POSITION, operator
from qtool.backends.cpu_vectors import array_at, full, halving_sum, load, maximum, store

MOST_LANES: Final = 64  # of a head, that are summed up at a time
_STRIDE: Final = at.STRIP + TOKENS  # of scores, from query to query

u64, u16, f32 = np.uint64, np.uint16, np.float32


def attention_floats(group_size: int, head_dim: int) -> int:
    """What ATTENTION_PLACE needs: queries twice, a key or the sums of four queries, and scores."""
    return group_size * (2 * head_dim + _STRIDE) + 4 * head_dim


@cache
def attention_operator(kept: Any, head_dim: int, group_size: int) -> Any:
    """A strip of a key head's queries; the last strip takes up the new token.

    Args:
        kept: the dtype of the cache, np.float32, or np.uint16 for bfloat16.
        head_dim: a multiple of 8.
        group_size: how many queries share a key head.
    """
    x = np.uint16 if kept is np.uint16 and head_dim % 32 == 0 else np.float32
    # So many queries share a read of the values.
    together = 1 if group_size == 1 else 2 if group_size in (2, 3, 6) else 4
    lanes = min(head_dim & -head_dim, MOST_LANES, most_sums() // together)
    in_sums = lanes * together

    @operator
    def attend(control: int, record: int, item: int, scratch: int) -> None:
        fields, places = array_at(record, np.int64), array_at(scratch, np.int64)
        position = array_at(control, np.int64)[u64(POSITION)]
        head, strip = divmod(item, fields[u64(at.NUM_STRIPS)])
        window = fields[u64(at.WINDOW)]
        begin = strip * at.STRIP + (max(position + 1 - window, 0) if window > 0 else 0)
        num = u64(min(begin + at.STRIP, position + 1) - begin)
        keys = array_at(fields[u64(at.KEYS)], kept)
        values = array_at(fields[u64(at.VALUES)], kept)
        floats = array_at(places[u64(at.ATTENTION_PLACE)], np.float32)
        _rotate_queries(fields, head, position, floats)
        sums = u64(group_size * head_dim)  # behind the queries; a key stands there first
        if strip == fields[u64(at.NUM_STRIPS)] - 1:
            _keep(fields, head, position, floats, sums, keys, values)
        scores = sums + u64(4 * head_dim)
        words = scores + u64(group_size * _STRIDE)
        # The queries in the dtype of the cache: their products with keys are exact then.
        queries = array_at(places[u64(at.ATTENTION_PLACE)] + 4 * np.int64(words), x)
        for i in range(u64(group_size * head_dim)):
            queries[i] = as_kind(floats[i], queries)
        first = u64(head * fields[u64(at.HEAD_STRIDE)] + begin * head_dim)
        last = first + (num - u64(1)) * u64(head_dim)
        scale, cap = float_of(fields[u64(at.SCALE)]), float_of(fields[u64(at.SCORE_SOFTCAP)])
        for query in range(u64(group_size)):
            row = scores + query * u64(_STRIDE)
            for token in range(u64(0), num, u64(TOKENS)):
                begin_at, query_at = first + token * u64(head_dim), query * u64(head_dim)
                dots = dot_rows(keys, begin_at, last, head_dim, queries, query_at)
                store(floats, row + token, dots * scale)
            _weigh(floats, row, num, cap)
        for leader in range(u64(0), u64(group_size), u64(together)):
            # Where too few are left, some are summed up again.
            lead: Any = min(leader, u64(group_size - together))
            row = scores + lead * u64(_STRIDE)
            for part in range(u64(0), u64(head_dim), u64(lanes)):
                total = full(in_sums, 0, np.float32)
                for token in range(num):
                    value = first + token * u64(head_dim) + part
                    total = add_weighted(
                        total, values, value, floats, row + token, u64(_STRIDE), together
                    )
                store(floats, sums, total)
                number = u64(head * group_size) + lead
                for other in range(u64(together)):
                    source = sums + other * u64(lanes), row + other * u64(_STRIDE)
                    _put(fields, number + other, u64(strip), floats, source, part, u64(lanes))

    return attend


@cache
def merge_operator() -> Any:
    """The strips of a key head's queries, added up."""

    @operator
    def merge(control: int, record: int, item: int, scratch: int) -> None:
        fields = array_at(record, np.int64)
        size, num_strips = u64(fields[u64(at.HEAD_DIM)]), u64(fields[u64(at.NUM_STRIPS)])
        out = array_at(fields[u64(at.ATTENDED)], np.float32)
        partials = array_at(fields[u64(at.PARTIALS)], np.float32)
        rounds, stride = fields[u64(at.ROUNDS)] != 0, size + u64(at.PARTIAL_EXTRA)
        num_queries = u64(fields[u64(at.GROUP_SIZE)])
        for number in range(u64(item) * num_queries, u64(item + 1) * num_queries):
            first, to = number * num_strips * stride, number * size
            highest = partials[first]
            for strip in range(u64(1), num_strips):
                highest = max(highest, partials[first + strip * stride])
            total = f32(0)
            for i in range(size):
                out[to + i] = f32(0)
            for strip in range(num_strips):
                source = first + strip * stride
                weight = exponential(partials[source] - highest)
                total += partials[source + u64(1)] * weight
                for i in range(size):
                    out[to + i] += partials[source + u64(at.PARTIAL_EXTRA) + i] * weight
            for i in range(size):
                out[to + i] = rounded(out[to + i] / total, rounds)

    return merge


# ---- The new token ----------------------------------------------------------------------------


@helper
def _rotate_queries(fields: Any, head: int, position: int, out: Any) -> None:
    size, num_queries = u64(fields[u64(at.HEAD_DIM)]), u64(fields[u64(at.GROUP_SIZE)])
    source, norm = array_at(fields[u64(at.QUERY_KEY_VALUE)], np.float32), fields[u64(at.QUERY_NORM)]
    for query in range(num_queries):
        first = (u64(head) * num_queries + query) * size
        _rotate(fields, source, first, out, query * size, norm, position)


@helper
def _keep(
    fields: Any, head: int, position: int, floats: Any, free: Any, keys: Any, values: Any
) -> None:
    """Put the new token's key and value into the cache, by way of floats[free:]."""
    size, num_kv_heads = u64(fields[u64(at.HEAD_DIM)]), u64(fields[u64(at.KV_HEADS)])
    source, norm = array_at(fields[u64(at.QUERY_KEY_VALUE)], np.float32), fields[u64(at.KEY_NORM)]
    key = (num_kv_heads * u64(fields[u64(at.GROUP_SIZE)]) + u64(head)) * size
    value = key + num_kv_heads * size
    _rotate(fields, source, key, floats, free, norm, position)
    to = u64(head * fields[u64(at.HEAD_STRIDE)]) + u64(position) * size
    for i in range(size):
        keys[to + i] = as_kind(floats[free + i], keys)
        values[to + i] = as_kind(source[value + i], values)


@helper
def _rotate(
    fields: Any, source: Any, first: Any, out: Any, to: Any, norm: int, position: int
) -> None:
    """The rotary embedding of source[first:], normed before if there is a norm, to out[to:]."""
    size, half = u64(fields[u64(at.HEAD_DIM)]), u64(fields[u64(at.ROTARY_DIM)]) >> u64(1)
    rounds = fields[u64(at.ROUNDS)] != 0
    if norm != 0:
        once = fields[u64(at.HEAD_NORM_ROUNDS_ONCE)] != 0
        epsilon = float_of(fields[u64(at.HEAD_EPSILON)])
        take_norm(source, first, out, to, size, norm, epsilon, rounds, once)
    else:
        for i in range(size):
            out[to + i] = source[first + i]
    cosines = array_at(fields[u64(at.COSINES)], np.float32)
    sines = array_at(fields[u64(at.SINES)], np.float32)
    angle = u64(position) * half
    for i in range(half):
        a, b = out[to + i], out[to + half + i]
        c, s = cosines[angle + i], sines[angle + i]
        out[to + i] = rounded(rounded(a * c, rounds) + rounded(-b * s, rounds), rounds)
        out[to + half + i] = rounded(rounded(b * c, rounds) + rounded(a * s, rounds), rounds)


# ---- Weights ----------------------------------------------------------------------------------


@helper
def _weigh(floats: Any, row: Any, num: Any, cap: Any) -> None:
    """Make the scores of a row weights; behind them come the highest score and their sum.

    Scores are filled up to a multiple of TOKENS, with one of them.
    """
    end = row + (num + u64(TOKENS - 1)) // u64(TOKENS) * u64(TOKENS)
    if cap != f32(0):
        for i in range(row, end):
            floats[i] = cap * hyperbolic_tangent(floats[i] / cap)
    tops = load(floats, row, TOKENS)
    for i in range(row, end, u64(TOKENS)):
        tops = maximum(tops, load(floats, i, TOKENS))
    spare = row + u64(at.STRIP)
    store(floats, spare, tops)
    highest = floats[spare]
    for i in range(spare, spare + u64(TOKENS)):
        highest = max(highest, floats[i])
    for i in range(row + num, end):
        floats[i] = f32(-np.inf)
    for i in range(row, end):
        floats[i] = exponential(floats[i] - highest)
    sums = full(TOKENS, 0, np.float32)
    for i in range(row, end, u64(TOKENS)):
        sums = sums + load(floats, i, TOKENS)
    floats[spare] = highest
    floats[spare + u64(1)] = halving_sum(sums)


@helper
def _put(
    fields: Any, number: Any, strip: Any, floats: Any, source: Any, part: Any, lanes: Any
) -> None:
    """Sums of a query from floats[source[0]:] on to where they go, from lane `part` of the head
    on; floats[source[1]:] is the row of its weights."""
    size, num_strips = u64(fields[u64(at.HEAD_DIM)]), u64(fields[u64(at.NUM_STRIPS)])
    first, spare = source[0], source[1] + u64(at.STRIP)
    highest, total = floats[spare], floats[spare + u64(1)]
    if num_strips == u64(1):
        out, rounds = array_at(fields[u64(at.ATTENDED)], np.float32), fields[u64(at.ROUNDS)] != 0
        for i in range(lanes):
            out[number * size + part + i] = rounded(floats[first + i] / total, rounds)
        return
    partials = array_at(fields[u64(at.PARTIALS)], np.float32)
    to = (number * num_strips + strip) * (size + u64(at.PARTIAL_EXTRA))
    partials[to] = highest
    partials[to + u64(1)] = total
    for i in range(lanes):
        partials[to + u64(at.PARTIAL_EXTRA) + part + i] = floats[first + i]
