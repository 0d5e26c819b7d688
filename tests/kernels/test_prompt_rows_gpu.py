"""On an NVIDIA GPU: what a prompt has beside its products, against PyTorch's operations."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional

from cupy_kernels.decode_attention import AttentionTensors
from cupy_kernels.linear_few import NormWeight
from cupy_kernels.prompt_rows import GatedRows, NormRows, RotaryRows
from tests.kernels.test_decoder_kernels_gpu import (
    DEVICE,
    DTYPES,
    EPSILON,
    ROUNDING,
    SHAPE,
    normalized,
    poisoned,
    random,
    stream,
    turned,
)

pytestmark = pytest.mark.gpu


class RotaryCase:
    """Random heads of a prompt's tokens, and empty caches."""

    def __init__(self, shape, num_tokens):
        self.shape = shape
        dtype, size = DTYPES[shape.dtype], shape.head_dim
        num_heads = shape.heads + 2 * shape.kv_heads
        self.heads = random(shape.batch, num_tokens, num_heads, size, dtype=dtype)
        angles = torch.rand(shape.capacity, shape.rotary_dim // 2, device=DEVICE) * 6
        self.cosines, self.sines = (t.to(dtype).float() for t in (angles.cos(), angles.sin()))
        self.norms = [random(size, dtype=dtype) for _ in range(2)]
        cache = shape.batch, shape.kv_heads, shape.capacity, size
        self.keys, self.values = (poisoned(*cache, dtype=dtype) for _ in range(2))
        self.queries = poisoned(shape.batch, num_tokens, shape.heads, size, dtype=dtype)
        self.launch = self._make_launch()

    def _make_launch(self):
        has_norm = self.shape.head_norm != "none"
        tensors = AttentionTensors(
            qkv=0,
            qkv_stride=0,
            cosines=self.cosines.data_ptr(),
            sines=self.sines.data_ptr(),
            position=0,
            keys=self.keys.data_ptr(),
            values=self.values.data_ptr(),
            out=0,
            out_stride=0,
            workspace=0,
            query_norm=self.norms[0].data_ptr() if has_norm else 0,
            key_norm=self.norms[1].data_ptr() if has_norm else 0,
        )
        return RotaryRows(self.shape, tensors, epsilon=EPSILON)

    def queue(self, start):
        self.launch.queue(
            self.heads.data_ptr(),
            self.queries.data_ptr(),
            num_tokens=self.queries.shape[1],
            start=start,
            stream=stream(),
        )

    def expected(self, start):
        """Queries, keys and values (batch, tokens, heads, head_dim)."""
        shape = self.shape
        counts = shape.heads, shape.kv_heads, shape.kv_heads
        queries, keys, values = self.heads.split(counts, dim=2)
        if shape.head_norm != "none":
            plus_one = shape.head_norm == "rms_plus_one"
            queries = normalized(queries, self.norms[0], plus_one=plus_one)
            keys = normalized(keys, self.norms[1], plus_one=plus_one)
        some = slice(start, start + self.heads.shape[1])
        cosines, sines = (t[some, None].to(queries.dtype) for t in (self.cosines, self.sines))
        return turned(queries, cosines, sines), turned(keys, cosines, sines), values

    def check(self, start):
        self.queue(start)
        queries, keys, values = self.expected(start)
        end = start + self.heads.shape[1]
        # A norm's sum may round otherwise, and one unit of a value with it.
        room = 0 if self.shape.head_norm == "none" else 4 * ROUNDING[self.shape.dtype]
        torch.testing.assert_close(self.queries, queries, rtol=room, atol=room)
        found = self.keys[:, :, start:end].transpose(1, 2)
        torch.testing.assert_close(found, keys, rtol=room, atol=room)
        assert torch.equal(self.values[:, :, start:end].transpose(1, 2), values)
        for cache in (self.keys, self.values):
            assert cache[:, :, :start].isnan().all() and cache[:, :, end:].isnan().all()


@pytest.mark.parametrize("num_tokens", [1, 7, 300])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_turned_and_cached(dtype, batch, num_tokens):
    shape = replace(SHAPE, dtype=dtype, batch=batch)
    for start in (0, 40, shape.capacity - num_tokens):
        RotaryCase(shape, num_tokens).check(start)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (5, 1), (14, 2), (32, 8)])
def test_any_number_of_heads(heads, kv_heads):
    RotaryCase(replace(SHAPE, heads=heads, kv_heads=kv_heads), 20).check(5)


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (80, 32), (96, 96), (256, 64)])
def test_heads_of_any_size_are_turned_in_part(head_dim, rotary_dim):
    RotaryCase(replace(SHAPE, head_dim=head_dim, rotary_dim=rotary_dim), 20).check(5)


@pytest.mark.parametrize("head_norm", ["rms", "rms_plus_one"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_have_norms(dtype, head_norm):
    RotaryCase(replace(SHAPE, dtype=dtype, head_norm=head_norm), 20).check(5)


ACTIVATIONS = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu": functional.gelu,
}


@pytest.mark.parametrize("count", [8, 4096, 512 * 14_336])
@pytest.mark.parametrize("gate", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_are_activated(dtype, gate, count):
    gates, ups = (random(count, dtype=DTYPES[dtype], scale=3) for _ in range(2))
    expected = ACTIVATIONS[gate](gates.double()) * ups.double()
    GatedRows(dtype, gate).queue(count, *[t.data_ptr() for t in (gates, ups, gates)], stream())
    # It is rounded twice; of tails that all but vanish little is left in float32.
    torch.testing.assert_close(gates.double(), expected, rtol=2 * ROUNDING[dtype], atol=1e-5)


@pytest.mark.parametrize("kind", ["rms", "rms_plus_one"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [64, 1152, 4096, 28_672])
def test_rows_have_norms(columns, dtype, kind):
    x, weight = (random(count, columns, dtype=DTYPES[dtype]) for count in (300, 1))
    out = poisoned(300, columns, dtype=x.dtype)
    norm = NormWeight(weight.data_ptr(), EPSILON)
    NormRows(columns, dtype, kind).queue(300, norm, x.data_ptr(), out.data_ptr(), stream())
    expected = normalized(x, weight, plus_one=kind == "rms_plus_one")
    room = 4 * ROUNDING[dtype]
    torch.testing.assert_close(out, expected, rtol=room, atol=room * 1e-2)


class Chain:
    """Launches of each kernel, each of which reads what the one before writes.

    Of few rows, all of which run at once.
    """

    NUM_ROWS = 128

    def __init__(self):
        self.case = RotaryCase(replace(SHAPE, heads=32, kv_heads=8), self.NUM_ROWS)
        columns = 48 * SHAPE.head_dim
        self.first, self.up = (
            random(self.NUM_ROWS, columns, dtype=torch.bfloat16) for _ in range(2)
        )
        self.weight = random(columns, dtype=torch.bfloat16)
        self.norms, self.added = (
            NormRows(columns, "BF16", "rms", added=added) for added in (False, True)
        )
        self.gates = GatedRows("BF16", "silu")

    def run(self, *, waits):
        """What is left after a few rounds; the host waits for each launch, or for none."""
        case, x = self.case, self.first.clone()
        normed, case.heads = (torch.full_like(x, torch.nan) for _ in range(2))
        case.queries.fill_(torch.nan)
        norm = NormWeight(self.weight.data_ptr(), EPSILON)
        gate_at = normed.data_ptr(), self.up.data_ptr(), case.heads.data_ptr()
        launches = (
            partial(self.norms.queue, self.NUM_ROWS, norm, x.data_ptr(), normed.data_ptr()),
            partial(self.gates.queue, x.numel(), *gate_at),
            lambda stream: case.queue(0),
            partial(self.added.queue, self.NUM_ROWS, norm, case.heads.data_ptr(), x.data_ptr()),
        )
        if not waits:
            torch.cuda._sleep(20_000_000)  # so that launches pile up
        for launch in launches * 8:
            launch(stream())
            if waits:
                torch.cuda.synchronize()
        return x, case.queries.clone(), case.keys.clone(), case.values.clone()


def test_launches_in_a_chain_wait_for_each_other():
    chain = Chain()
    for one, other in zip(chain.run(waits=True), chain.run(waits=False), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)
