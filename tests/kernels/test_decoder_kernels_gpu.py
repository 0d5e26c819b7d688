"""On an NVIDIA GPU: the small kernels of a decoder block against plain arithmetic in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from cupy_kernels.decode_attention import (
    AttentionShape,
    AttentionTensors,
    decode_attention,
    workspace_bytes,
)

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
EPSILON = 1e-6
# Half a unit in the last place of the result, and what float32 adds.
ROUNDING = {"BF16": 2**-8 * 1.1, "F16": 2**-11 * 1.1}


def stream():
    return torch.cuda.current_stream().cuda_stream


def poisoned(*shape, dtype):
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def random(*shape, dtype, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


# -- norm, rotary embedding and attention, as the models write them -------------------------------


def normalized(x, weight, *, plus_one):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
    if plus_one:
        return (wide * (1 + weight.float())).to(x.dtype)
    return weight * wide.to(x.dtype)


def turned(x, cosines, sines):
    """x: (..., head_dim); cosines, sines: (..., rotary_dim / 2), of the dtype of x."""
    half = cosines.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat(
        (first * cosines - second * sines, second * cosines + first * sines, rest), dim=-1
    )


def attention_of(query, keys, values, *, scale, softcap, sink):
    """query: (head_dim,); keys, values: (tokens, head_dim); float64."""
    scores = keys.double() @ query.double() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if sink is not None:
        scores = torch.cat((scores, sink.double()[None]))
    return scores.softmax(0)[: len(keys)] @ values.double()


@dataclass(frozen=True)
class Options:
    scale: float = 0.11
    softcap: float = 0.0
    window: int = 0
    has_sinks: bool = False


SHAPE = AttentionShape(
    heads=8,
    kv_heads=2,
    head_dim=128,
    rotary_dim=128,
    head_norm="none",
    has_softcap=False,
    batch=1,
    capacity=640,
    dtype="BF16",
)


class Case:
    """Random inputs of one shape, the launch, and what should come of it."""

    def __init__(self, shape, options=None):
        self.shape, self.options = shape, options or Options()
        dtype, size = DTYPES[shape.dtype], shape.head_dim
        row = (shape.heads + 2 * shape.kv_heads) * size
        self.qkv = random(shape.batch, row + 16, dtype=dtype)[:, :row]  # rows apart
        angles = torch.rand(shape.capacity, shape.rotary_dim // 2, device=DEVICE) * 6
        self.cosines, self.sines = (t.to(dtype).float() for t in (angles.cos(), angles.sin()))
        cache = (shape.batch, shape.kv_heads, shape.capacity, size)
        self.keys, self.values = (random(*cache, dtype=dtype) for _ in range(2))
        self.norms = [random(size, dtype=dtype) for _ in range(2)]
        self.sinks = torch.randn(shape.heads, device=DEVICE) * 3
        self.position = torch.zeros((), dtype=torch.int64, device=DEVICE)
        self.out = poisoned(shape.batch, shape.heads * size, dtype=dtype)
        self.workspace = torch.zeros(workspace_bytes(shape), dtype=torch.uint8, device=DEVICE)

    def launch(self):
        has_norm = self.shape.head_norm != "none"
        tensors = AttentionTensors(
            qkv=self.qkv.data_ptr(),
            qkv_stride=self.qkv.stride(0),
            cosines=self.cosines.data_ptr(),
            sines=self.sines.data_ptr(),
            position=self.position.data_ptr(),
            keys=self.keys.data_ptr(),
            values=self.values.data_ptr(),
            out=self.out.data_ptr(),
            out_stride=self.out.stride(0),
            workspace=self.workspace.data_ptr(),
            query_norm=self.norms[0].data_ptr() if has_norm else 0,
            key_norm=self.norms[1].data_ptr() if has_norm else 0,
            sinks=self.sinks.data_ptr() if self.options.has_sinks else 0,
        )
        return decode_attention(
            self.shape,
            tensors,
            scale=self.options.scale,
            softcap=self.options.softcap,
            window=self.options.window,
            epsilon=EPSILON,
        )

    def new_heads(self, position):
        """Queries, keys and values of the new tokens, (batch, heads, head_dim) each."""
        shape = self.shape
        heads = self.qkv.unflatten(-1, (-1, shape.head_dim))
        queries, keys, values = heads.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
        angles = [t[position].to(self.qkv.dtype) for t in (self.cosines, self.sines)]
        if shape.head_norm != "none":
            plus_one = shape.head_norm == "rms_plus_one"
            queries = normalized(queries, self.norms[0], plus_one=plus_one)
            keys = normalized(keys, self.norms[1], plus_one=plus_one)
        return turned(queries, *angles), turned(keys, *angles), values

    def expected(self, position):
        """The attention, and the caches with the new token: float64 and the dtype."""
        shape, options = self.shape, self.options
        queries, new_keys, new_values = self.new_heads(position)
        keys, values = self.keys.clone(), self.values.clone()
        keys[:, :, position], values[:, :, position] = new_keys, new_values
        first = max(0, position - options.window + 1) if options.window else 0
        visible = slice(first, position + 1)
        rows = [
            attention_of(
                queries[b, h],
                keys[b, h // shape.group, visible],
                values[b, h // shape.group, visible],
                scale=options.scale,
                softcap=options.softcap,
                sink=self.sinks[h] if options.has_sinks else None,
            )
            for b in range(shape.batch)
            for h in range(shape.heads)
        ]
        return torch.stack(rows).view(shape.batch, -1), keys, values

    def check(self, launch, position):
        """One step at `position`; everything that it leaves behind."""
        out, keys, values = self.expected(position)
        self.position.fill_(position)
        self.out.fill_(torch.nan)
        # what nobody may read: later tokens
        self.keys[:, :, position:] = torch.nan
        self.values[:, :, position:] = torch.nan
        launch(stream())
        tolerance = ROUNDING[self.shape.dtype]
        torch.testing.assert_close(
            self.out.double(), out, rtol=tolerance, atol=3 * tolerance * float(out.abs().mean())
        )
        # A norm's sum may round otherwise, and one unit of a value with it.
        exact = self.shape.head_norm == "none"
        torch.testing.assert_close(
            self.keys[:, :, : position + 1],
            keys[:, :, : position + 1],
            rtol=0 if exact else 4 * tolerance,
            atol=0 if exact else 4 * tolerance,
        )
        assert torch.equal(self.values[:, :, : position + 1], values[:, :, : position + 1])
        assert self.values[:, :, position + 1 :].isnan().all()


POSITIONS = (0, 1, 15, 16, 17, 31, 32, 33, 511, 639)


def check_positions(shape, options=None, positions=POSITIONS):
    for position in positions:
        case = Case(shape, options)
        launch = case.launch()
        case.check(launch, position)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_at_any_position(dtype, batch):
    check_positions(replace(SHAPE, dtype=dtype, batch=batch))


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 8, 16])
def test_attention_of_any_head_and_group(group, head_dim):
    shape = replace(SHAPE, heads=group * 2, head_dim=head_dim, rotary_dim=head_dim)
    check_positions(shape, positions=(0, 130, 639))


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(80, 32), (128, 32), (64, 2), (256, 64)])
def test_attention_turns_a_part_of_the_head(head_dim, rotary_dim):
    check_positions(replace(SHAPE, head_dim=head_dim, rotary_dim=rotary_dim), positions=(7, 300))


@pytest.mark.parametrize("head_norm", ["rms", "rms_plus_one"])
@pytest.mark.parametrize("head_dim", [96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_after_a_norm_of_the_heads(dtype, head_dim, head_norm):
    shape = replace(SHAPE, dtype=dtype, head_dim=head_dim, rotary_dim=head_dim, head_norm=head_norm)
    check_positions(shape, Options(scale=0.02), positions=(0, 300))


@pytest.mark.parametrize("window", [1, 2, 31, 128, 512, 1000])
def test_attention_in_a_window(window):
    check_positions(SHAPE, Options(window=window), positions=(0, 1, 30, 127, 128, 511, 639))


def test_attention_with_a_softcap():
    options = Options(scale=0.3, softcap=5.0)
    check_positions(replace(SHAPE, has_softcap=True), options, positions=(0, 100, 639))


def test_attention_with_sinks():
    check_positions(SHAPE, Options(has_sinks=True), positions=(0, 100, 639))
    check_positions(replace(SHAPE, heads=16), Options(has_sinks=True, window=128))


def test_attention_of_scores_far_from_each_other():
    """The softmax of large scores does not overflow."""
    check_positions(SHAPE, Options(scale=9.0), positions=(0, 639))


def test_attention_in_a_row_and_the_same_every_time():
    """Counters are zero again, and strips are added in one order."""
    case = Case(replace(SHAPE, batch=2))
    launch = case.launch()
    for position in (600, 601, 40, 41, 42, 3):  # what lies behind is filled before
        case.check(launch, position)
        first = case.out.clone()
        for _ in range(5):
            case.out.fill_(torch.nan)
            launch(stream())
            assert torch.equal(case.out, first)


def test_attention_in_a_graph():
    """The position is read when the graph runs."""
    case = Case(SHAPE)
    launch = case.launch()
    case.check(launch, 600)  # loaded before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(stream())

    def replay(_stream):
        graph.replay()

    for position in (500, 501, 17, 18, 19):
        case.check(replay, position)


def test_attention_refuses_what_it_does_not_take():
    for change in ({"head_dim": 72}, {"heads": 9}, {"heads": 34}, {"rotary_dim": 129}):
        with pytest.raises(ValueError, match="decode_attention does not take"):
            Case.launch(_Bare(replace(SHAPE, **change)))


class _Bare(Case):
    """Without tensors."""

    def __init__(self, shape):
        self.shape, self.options, self.norms = shape, Options(), []
        self.qkv = self.cosines = self.sines = self.position = torch.zeros(1, 8)
        self.keys = self.values = self.out = self.workspace = self.sinks = self.qkv
