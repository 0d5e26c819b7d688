"""The operators of a step: products against float64 sums, functions, norms, attention."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest

from qtool.backends import cpu_numbers, cpu_step, cpu_threads
from qtool.backends import cpu_records as at
from qtool.backends.cpu import BIT_DTYPES
from qtool.backends.cpu_attention import attention_floats, attention_operator, merge_operator
from qtool.backends.cpu_kernels import kernel
from qtool.backends.cpu_step import product_floats, products_operator
from qtool.formats import floats, int8
from qtool.formats.codebooks import CODES
from tests.backends.test_cpu_products import PROCESSORS, ROWS, FourBitWeight, activations, address

OPERATOR = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)


class Place:
    """Records, control and a thread's scratch, as a step has them."""

    def __init__(self, floats_of_places):
        self.control = np.zeros(cpu_threads.CONTROL_SIZE, np.int64)
        self.kept = [np.full(num, np.nan, np.float32) for num in floats_of_places]
        self.scratch = np.zeros(at.SCRATCH_FIELDS, np.int64)
        self.scratch[1 : 1 + len(self.kept)] = [address(a) for a in self.kept]

    def run(self, operator, record, num_items):
        fields = np.zeros(at.RECORD_FIELDS, np.int64)
        fields[list(record)] = list(record.values())
        self.control[cpu_threads.STEP] += 1
        for item in range(num_items):
            OPERATOR(operator.address)(
                address(self.control), address(fields), item, address(self.scratch)
            )


def bits_of(value):
    return int(np.float32(value).view(np.uint32))


def as_bfloat16(values):
    return floats.widen(floats.narrow(values.reshape(-1), "BF16"), "BF16").reshape(values.shape)


# ---- Products ---------------------------------------------------------------------------------


def multiply(
    x,
    stored,
    weight,
    *,
    item_rows=4,
    num_runs=1,
    pairs=False,
    like="BF16",
    bfloat16_adapter=False,
    **record,
):
    """y float32 (ROWS,) of an operator whose record has `weight` at FIRST_WEIGHT."""
    out = np.full(ROWS, 77, np.float32)
    fields = {
        at.INPUT: 1,
        at.X: address(x),
        at.WIDTH: x.size,
        at.NUM_ROWS: ROWS,
        at.ITEM_ROWS: item_rows,
        at.NUM_RUNS: num_runs,
        at.OUT: address(out),
    }
    fields |= {at.FIRST_WEIGHT + place: value for place, value in weight.items()}
    fields |= {getattr(at, name): value for name, value in record.items()}
    absmax = np.uint8 if weight.get(at.NESTED_MAP) else np.float32
    x_kind, kept = (np.uint16 if it else np.float32 for it in (pairs, bfloat16_adapter or pairs))
    operator = products_operator(stored, absmax, BIT_DTYPES[like], x_kind, kept)
    place = Place(product_floats(x.size, item_rows))
    place.run(operator, fields, -(-ROWS // item_rows))
    return out


def fields_of(weight):
    """The record's part of a FourBitWeight, which is kept by its owner."""
    weight.code = CODES[weight.quant_type]
    fields = {}
    if weight.stored.dtype == np.uint8:
        places = at.NESTED_ABSMAX, at.NESTED_MAP, at.NESTED_OFFSET
        fields = dict(zip(places, map(address, weight.nested), strict=True))
    return fields | {
        at.WEIGHT: address(weight.packed),
        at.ABSMAX: address(weight.stored),
        at.CODE: address(weight.code),
        at.SHIFT: (weight.blocksize // 64).bit_length() - 1,
    }


def check_rows(y, x, weights):
    """Each of 16 lanes adds up a sixteenth of the products, rounding each time."""
    exact = weights.astype(np.float64) @ x.astype(np.float64)
    bound = (x.size / 16 + 8) * 2.0**-24 * (np.abs(weights) @ np.abs(x))
    np.testing.assert_array_less(np.abs(y - exact), bound + 1e-30)
    assert np.abs(exact).max() > 1000 * bound.max(), "the bound would hide mistakes"


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("size", "blocksize"), [(64, 64), (192, 64), (320, 256), (1472, 4096), (3648, 64)]
)
def test_four_bit_rows(dtype, nested, size, blocksize):
    """Blocks may cross rows, and the last rows are fewer than are multiplied at once."""
    weight = FourBitWeight(size, blocksize, dtype=dtype, nested=nested)
    x = activations(1, size)[0]
    check_rows(multiply(x, np.uint8, fields_of(weight), like=dtype), x, weight.weights())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("size", "blocksize"), [(128, 64), (640, 128), (3584, 64), (1408, 512)])
def test_four_bit_rows_in_pairs_of_bfloat16(nested, size, blocksize):
    weight = FourBitWeight(size, blocksize, quant_type="fp4", nested=nested)
    x = as_bfloat16(activations(1, size)[0])
    check_rows(multiply(x, np.uint8, fields_of(weight), pairs=True), x, weight.weights())


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("absmax", [1e-42, 1e-38, 2e30, np.inf, np.nan, 0.0])
def test_blocks_out_of_the_ordinary(pairs, absmax):
    """Their weights are flushed and rounded as dequantizing does, those of other rows stay."""
    weight = FourBitWeight(256, 64)
    weight.absmax[4:8] = absmax  # of the second row
    x = as_bfloat16(activations(1, 256)[0])
    y = multiply(x, np.uint8, fields_of(weight), pairs=pairs)
    with np.errstate(invalid="ignore"):
        exact = weight.weights().astype(np.float64) @ x.astype(np.float64)
    ordinary = np.arange(ROWS) != 1
    np.testing.assert_allclose(y[ordinary], exact[ordinary], rtol=1e-4)
    assert np.isfinite(y[1]) == np.isfinite(exact[1])
    if np.isfinite(exact[1]):
        np.testing.assert_allclose(y[1], exact[1], rtol=1e-4)


def test_rows_are_the_same_however_they_are_shared_out():
    weight = FourBitWeight(256, 64, nested=True)
    x = activations(1, 256)[0]
    whole = multiply(x, np.uint8, fields_of(weight), item_rows=8)
    assert np.array_equal(multiply(x, np.uint8, fields_of(weight), item_rows=4), whole)


@kernel
def items_in_turns(fields, items):
    for drawn in range(items.size):
        items[drawn] = cpu_step._in_turns(fields, np.uint64(drawn))


@pytest.mark.parametrize("num_runs", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("num_items", [1, 2, 5, 16, 33])
def test_every_item_is_drawn_once_and_runs_go_on(num_items, num_runs):
    fields = np.zeros(at.RECORD_FIELDS, np.int64)
    fields[[at.NUM_ROWS, at.ITEM_ROWS, at.NUM_RUNS]] = 8 * num_items - 3, 8, num_runs
    items = np.zeros(num_items, np.int64)
    items_in_turns(fields, items)
    assert sorted(items) == list(range(num_items))
    assert np.all(items[num_runs:] == items[:-num_runs] + 1)


def test_int8_rows():
    rng = np.random.default_rng(1)
    codes = rng.integers(-127, 128, (ROWS, 192), np.int8)
    scb = rng.uniform(0.1, 3, ROWS).astype(np.float32)
    x = activations(1, 192)[0]
    y = multiply(x, np.int8, {at.WEIGHT: address(codes), at.ABSMAX: address(scb)})
    check_rows(y, x, int8.dequantize_int8(codes, scb))


@pytest.mark.parametrize(("stored", "pairs"), [("BF16", True), ("BF16", False), ("F32", False)])
def test_plain_rows_and_their_bias(stored, pairs):
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((ROWS, 384)).astype(np.float32)
    kept = weights
    if stored == "BF16":
        weights = as_bfloat16(weights)
        kept = floats.narrow(weights.reshape(-1), "BF16").reshape(weights.shape)
    bias = np.arange(ROWS, dtype=np.float32)
    x = as_bfloat16(activations(1, 384)[0])
    fields = {at.WEIGHT: address(kept), at.BIAS: address(bias)}
    y = multiply(x, kept.dtype.type, fields, pairs=pairs)
    check_rows(y - bias, x, weights)


def test_what_becomes_of_a_product():
    """Added to what was there; shrunk below a cap; rounded where the model rounds."""
    weights = np.eye(ROWS, 64, dtype=np.float32)
    x = np.linspace(-3, 3, 64).astype(np.float32)
    fields = {at.WEIGHT: address(weights)}
    added = multiply(x, np.float32, fields, EPILOGUE=at.ADDED)
    np.testing.assert_array_equal(added, 77 + x[:ROWS])
    capped = multiply(x, np.float32, fields, SOFTCAP=bits_of(2))
    np.testing.assert_allclose(capped, 2 * np.tanh(x[:ROWS] / 2), rtol=1e-6)
    rounded = multiply(x, np.float32, fields, EPILOGUE=at.ADDED, ROUNDS=1)
    np.testing.assert_array_equal(rounded, as_bfloat16(77 + as_bfloat16(x[:ROWS])))


GATES = {
    at.SILU: lambda x: x / (1 + np.exp(-x)),
    at.GELU_TANH: lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    at.GELU: np.vectorize(lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2)))),
}


@pytest.mark.parametrize("gate", GATES)
def test_gates(gate):
    """Of x[0:ROWS], times twice x[ROWS:2 * ROWS]."""
    x = np.array([-9, -2, -0.1, 0.7, 5, 1, 2, 3, -4, 0.5] + 54 * [0], np.float32)
    gates = np.eye(ROWS, 64, dtype=np.float32)
    ups = 2 * np.eye(ROWS, 64, k=ROWS, dtype=np.float32)
    other = at.SECOND_WEIGHT - at.FIRST_WEIGHT
    fields = {at.WEIGHT: address(gates), other + at.WEIGHT: address(ups)}
    y = multiply(x, np.float32, fields, EPILOGUE=gate)
    expected = GATES[gate](x[:ROWS].astype(np.float64)) * 2 * x[ROWS : 2 * ROWS]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("once", [0, 1])
@pytest.mark.parametrize("rounds", [0, 1])
def test_the_norm_before(once, rounds):
    weights, norm = np.eye(ROWS, 64, dtype=np.float32), np.linspace(0.5, 2, 64, dtype=np.float32)
    x, norm = as_bfloat16(activations(1, 64)[0]), as_bfloat16(norm)
    y = multiply(
        x,
        np.float32,
        {at.WEIGHT: address(weights)},
        NORM=address(norm),
        EPSILON=bits_of(0.25),
        NORM_ROUNDS_ONCE=once,
        ROUNDS=rounds,
    )
    normed = x / np.sqrt(np.mean(np.square(x, dtype=np.float64)) + 0.25)
    if rounds and not once:
        normed = as_bfloat16(normed.astype(np.float32))
    expected = (normed * norm)[:ROWS].astype(np.float32)
    if rounds:
        np.testing.assert_array_equal(y, as_bfloat16(expected))
    else:
        np.testing.assert_allclose(y, expected, rtol=1e-6)


# ---- Adapters ---------------------------------------------------------------------------------


class LowRank:
    """B (rank, stride) and inner values of an adapter, as a record has them."""

    def __init__(self, rank, *, bfloat16=False, seed=5):
        rng = np.random.default_rng(seed)
        self.b = np.full((rank, 48), np.nan, np.float32)
        self.b[:, :ROWS] = as_bfloat16(rng.standard_normal((rank, ROWS)).astype(np.float32))
        self.inner = rng.standard_normal(rank).astype(np.float32)
        self.kept = floats.narrow(self.b.reshape(-1), "BF16") if bfloat16 else self.b

    def fields(self, place=at.FIRST_ADAPTER):
        addresses = address(self.kept), self.b.shape[1], address(self.inner), len(self.inner)
        places = (
            place + it - at.FIRST_WEIGHT for it in (at.B, at.STRIDE, at.INNER_VALUES, at.RANK)
        )
        return dict(zip(places, addresses, strict=True))

    def sums(self):
        return self.inner.astype(np.float64) @ self.b[:, :ROWS]


@pytest.mark.parametrize("rank", [1, 8, 24])
@pytest.mark.parametrize("item_rows", [4, 20])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_an_adapter_is_added(bfloat16, item_rows, rank):
    """With items that end between vectors of B, and what lies behind its rows is not seen."""
    adapter, x = LowRank(rank, bfloat16=bfloat16), np.linspace(-3, 3, 64).astype(np.float32)
    weights = np.eye(ROWS, 64, dtype=np.float32)
    fields = {at.WEIGHT: address(weights)} | adapter.fields()
    how = {"item_rows": item_rows, "bfloat16_adapter": bfloat16}
    y = multiply(x, np.float32, fields, EPILOGUE=at.ADDED, INNER_DONE=-1, **how)
    np.testing.assert_allclose(y, 77 + x[:ROWS] + adapter.sums(), rtol=1e-5)


def test_what_an_adapter_adds_is_rounded_once():
    adapter, x = LowRank(8), np.linspace(-3, 3, 64).astype(np.float32)
    weights = np.eye(ROWS, 64, dtype=np.float32)
    fields = {at.WEIGHT: address(weights)} | adapter.fields()
    y = multiply(x, np.float32, fields, INNER_DONE=-1, ROUNDS=1)
    exact = as_bfloat16(x[:ROWS]) + adapter.sums()
    np.testing.assert_array_equal(y, as_bfloat16(exact.astype(np.float32)))


def test_gates_have_an_adapter_for_each_of_both():
    first, second = LowRank(8), LowRank(3, seed=6)
    x = np.zeros(64, np.float32)
    weights = np.zeros((ROWS, 64), np.float32)
    other = at.SECOND_WEIGHT - at.FIRST_WEIGHT
    fields = {at.WEIGHT: address(weights), other + at.WEIGHT: address(weights)}
    fields |= first.fields() | second.fields(at.SECOND_ADAPTER)
    for item_rows in (4, 8, 20):
        y = multiply(x, np.float32, fields, item_rows=item_rows, EPILOGUE=at.SILU, INNER_DONE=-1)
        expected = GATES[at.SILU](first.sums()) * second.sums()
        np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_inner_values_are_scaled_and_not_rounded():
    weights = np.eye(ROWS, 64, dtype=np.float32) / 3
    x = as_bfloat16(activations(1, 64)[0])
    scales = np.linspace(0.1, 2, ROWS, dtype=np.float32)
    fields = {at.WEIGHT: address(weights)}
    y = multiply(x, np.float32, fields, EPILOGUE=at.INNER, SCALES=address(scales), ROUNDS=1)
    np.testing.assert_allclose(y, x[:ROWS] / 3 * scales, rtol=1e-6)


@pytest.mark.parametrize("adapted", [True, False])
def test_who_needs_inner_values_waits_for_them(adapted):
    """And who is beside those as well, since what is done is only counted."""
    adapter, out = LowRank(8), np.full(ROWS, 77, np.float32)
    expected = adapter.sums() if adapted else np.zeros(ROWS)
    inner, adapter.inner[:] = adapter.inner.copy(), np.nan
    weights, x = np.zeros((ROWS, 64), np.float32), np.zeros(64, np.float32)
    fields = {at.WEIGHT: address(weights)} | (adapter.fields() if adapted else {})
    fields = {at.FIRST_WEIGHT + place: value for place, value in fields.items()} | {
        at.INPUT: 1,
        at.X: address(x),
        at.WIDTH: 64,
        at.NUM_ROWS: ROWS,
        at.ITEM_ROWS: 20,
        at.NUM_RUNS: 1,
        at.OUT: address(out),
        at.INNER_DONE: 3,
    }
    place = Place(product_floats(64, 20))
    place.control[cpu_threads.DONE] = 2
    operator = products_operator(np.float32, np.float32, np.uint16, np.float32, np.float32)
    with ThreadPoolExecutor(1) as pool:
        product = pool.submit(place.run, operator, fields, 1)
        assert wait([product], timeout=0.1).not_done
        assert np.all(out == 77)
        adapter.inner[:] = inner
        place.control[cpu_threads.DONE] = 3
        product.result()
    np.testing.assert_allclose(out, expected, rtol=1e-5)


# ---- Attention --------------------------------------------------------------------------------


class Cache:
    """Keys and values of random tokens before the new one, and its query, key and value."""

    def __init__(self, position, *, head_dim, group_size, kv_heads=2, bfloat16=False):
        self.position, self.head_dim, self.group_size = position, head_dim, group_size
        self.kv_heads = kv_heads
        rng = np.random.default_rng(position)
        self.keys, self.values = (
            rng.standard_normal(self.kept_shape(position + 3)).astype(np.float32) for _ in "kv"
        )
        num_new = (group_size + 2) * kv_heads * head_dim
        self.new = rng.standard_normal(num_new).astype(np.float32)
        angles = rng.uniform(-3, 3, (position + 1, head_dim // 2))
        self.cosines = np.cos(angles).astype(np.float32)
        self.sines = np.sin(angles).astype(np.float32)
        self.bfloat16 = bfloat16
        if bfloat16:
            for name in ("keys", "values", "new", "cosines", "sines"):
                setattr(self, name, as_bfloat16(getattr(self, name)))

    def kept_shape(self, room):
        return self.kv_heads, room, self.head_dim

    def attend(self, *, window=0, softcap=0.0):
        """float32 (heads, head_dim), and the cache afterwards."""
        heads = self.kv_heads * self.group_size
        num_seen = min(window or self.position + 1, self.position + 1)
        num_strips = -(-num_seen // at.STRIP)
        keys, values = self.keys, self.values
        kept = np.float32
        if self.bfloat16:
            keys, values = (
                floats.narrow(a.reshape(-1), "BF16").reshape(a.shape) for a in (keys, values)
            )
            kept = np.uint16
        out = np.full((heads, self.head_dim), 77, np.float32)
        partials = np.zeros((heads, num_strips, self.head_dim + at.PARTIAL_EXTRA), np.float32)
        record = {
            at.ROUNDS: int(self.bfloat16),
            at.QUERY_KEY_VALUE: address(self.new),
            at.ATTENDED: address(out),
            at.GROUP_SIZE: self.group_size,
            at.KV_HEADS: self.kv_heads,
            at.HEAD_DIM: self.head_dim,
            at.ROTARY_DIM: self.head_dim,
            at.KEYS: address(keys),
            at.VALUES: address(values),
            at.HEAD_STRIDE: keys.shape[1] * self.head_dim,
            at.COSINES: address(self.cosines),
            at.SINES: address(self.sines),
            at.SCALE: bits_of(self.head_dim**-0.5),
            at.SCORE_SOFTCAP: bits_of(softcap),
            at.WINDOW: window,
            at.NUM_STRIPS: num_strips,
            at.PARTIALS: address(partials),
        }
        place = Place([0, 0, 0, 0, attention_floats(self.group_size, self.head_dim)])
        place.control[cpu_threads.POSITION] = self.position
        operator = attention_operator(kept, self.head_dim, self.group_size)
        place.run(operator, record, self.kv_heads * num_strips)
        if num_strips > 1:
            place.run(merge_operator(), record, self.kv_heads)
        return out, keys, values

    def expected(self, *, window=0, softcap=0.0):
        """The same in float64, but for what is rounded before."""
        queries, key, value = np.split(
            self.new.reshape(-1, self.head_dim),
            [self.kv_heads * self.group_size, self.kv_heads * (self.group_size + 1)],
        )
        keys, values = self.keys.copy(), self.values.copy()
        keys[:, self.position], values[:, self.position] = self.turn(key), value
        first = max(self.position + 1 - window, 0) if window else 0
        seen = slice(first, self.position + 1)
        out = []
        for head, query in enumerate(self.turn(queries).astype(np.float64)):
            kv = head // self.group_size
            scores = keys[kv, seen].astype(np.float64) @ query * self.head_dim**-0.5
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out.append(weights @ values[kv, seen] / weights.sum())
        return np.array(out), keys, values

    def turn(self, x):
        half = self.head_dim // 2
        cosines, sines = (np.tile(a[self.position], 2) for a in (self.cosines, self.sines))
        turned = np.concatenate([-x[:, half:], x[:, :half]], axis=1)
        round_ = as_bfloat16 if self.bfloat16 else np.asarray
        return round_(round_(x * cosines) + round_(turned * sines))


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "group_size"), [(8, 2), (64, 1), (64, 4), (80, 3), (96, 7), (128, 5), (256, 8)]
)
def test_attention(bfloat16, head_dim, group_size):
    cache = Cache(37, head_dim=head_dim, group_size=group_size, bfloat16=bfloat16)
    check_attention(cache)


@pytest.mark.parametrize("position", [0, 15, 16, at.STRIP - 1, at.STRIP, 3 * at.STRIP + 5])
def test_attention_at_the_edges(position):
    check_attention(Cache(position, head_dim=64, group_size=2))


@pytest.mark.parametrize("window", [1, 24, 600])
def test_attention_through_a_window(window):
    check_attention(Cache(700, head_dim=32, group_size=2), window=window)


def test_attention_with_capped_scores():
    check_attention(Cache(40, head_dim=64, group_size=2), softcap=0.5)


def check_attention(cache, **how):
    out, keys, values = cache.attend(**how)
    expected, expected_keys, expected_values = cache.expected(**how)
    tolerance = 2.0**-8 if cache.bfloat16 else 2e-6
    np.testing.assert_allclose(out, expected, atol=tolerance * np.abs(expected).max())
    kept = ((keys, expected_keys), (values, expected_values))
    for found, wanted in kept:
        if cache.bfloat16:
            found = floats.widen(found.reshape(-1), "BF16").reshape(found.shape)
        np.testing.assert_array_equal(found, wanted)


# ---- Functions --------------------------------------------------------------------------------


@kernel
def exponentials(x, out):
    for i in range(x.size):
        out[i] = cpu_numbers.exponential(x[i])


def test_exponentials():
    x = np.concatenate([np.linspace(-86, 88, 200_001), np.linspace(-1, 1, 200_001)])
    x = x.astype(np.float32)
    out = np.empty_like(x)
    exponentials(x, out)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(out - exact) / exact).max() < 2 * 2.0**-23
    special = np.array([-np.inf, -200, 0, 200, np.inf, np.nan], np.float32)
    out = np.empty_like(special)
    exponentials(special, out)
    np.testing.assert_array_equal(out, np.array([0, 0, 1, np.inf, np.inf, np.nan], np.float32))


# ---- Other processors -------------------------------------------------------------------------


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86 processors")
def test_a_processor_with_fewer_instructions():
    """Code for one without AVX-512 runs here too; it is compiled in a process of its own."""
    script = (
        "import sys; sys.path.insert(0, '.')\n"
        "import tests.backends.test_cpu_step as t\n"
        "t.test_four_bit_rows('BF16', True, 192, 64)\n"
        "t.test_four_bit_rows_in_pairs_of_bfloat16(True, 640, 128)\n"
        "t.test_an_adapter_is_added(True, 20, 8)\n"
        "t.test_attention(True, 64, 4)\n"
        "t.test_attention(False, 80, 3)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": PROCESSORS["haswell"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
