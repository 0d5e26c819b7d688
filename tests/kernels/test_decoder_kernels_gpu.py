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
from cupy_kernels.embed import EmbedTensors, embed
from cupy_kernels.linear_few import NormWeight
from cupy_kernels.next_token import NextTokenTensors, next_token
from cupy_kernels.next_token import workspace_bytes as next_token_workspace_bytes
from cupy_kernels.prompt_rows import Rows, gated_rows, norm_rows, rotary_rows

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


def attention_of(query, keys, values, *, scale, softcap):
    """query: (head_dim,); keys, values: (tokens, head_dim); float64."""
    scores = keys.double() @ query.double() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.softmax(0) @ values.double()


@dataclass(frozen=True)
class Options:
    scale: float = 0.11
    softcap: float = 0.0
    window: int = 0


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
@pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 8])
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
    for change in ({"heads": 9}, {"heads": 34}, {"rotary_dim": 129}):
        with pytest.raises(ValueError, match="decode_attention does not take"):
            Case.launch(_Bare(replace(SHAPE, **change)))


class _Bare(Case):
    """Without tensors."""

    def __init__(self, shape):
        self.shape, self.options, self.norms = shape, Options(), []
        self.qkv = self.cosines = self.sines = self.position = torch.zeros(1, 8)
        self.keys = self.values = self.out = self.workspace = self.qkv


# -- the next token -------------------------------------------------------------------------------


class Chooser:
    """The launch over given logits, with its state."""

    def __init__(self, logits, dtype, ring_size=3):
        batch, vocabulary = logits.shape
        self.ring = torch.full((ring_size, batch), -1, device=DEVICE)
        self.tokens = torch.full((batch,), -1, device=DEVICE)
        self.position, self.step = (torch.tensor(n, device=DEVICE) for n in (40, 0))
        self.workspace = torch.zeros(
            next_token_workspace_bytes(vocabulary, batch), dtype=torch.uint8, device=DEVICE
        )
        self.logits = logits
        tensors = NextTokenTensors(
            logits=logits.data_ptr(),
            logits_stride=logits.stride(0),
            ring=self.ring.data_ptr(),
            next_token=self.tokens.data_ptr(),
            position=self.position.data_ptr(),
            step=self.step.data_ptr(),
            workspace=self.workspace.data_ptr(),
        )
        self.launch = next_token(
            tensors, vocabulary=vocabulary, batch=batch, ring_size=ring_size, dtype=dtype
        )

    def __call__(self):
        self.launch(stream())
        return self.tokens.tolist()


def padded_logits(batch, vocabulary, dtype):
    """Rows of a multiple of eight, with the largest values where nobody may look."""
    stride = -(-vocabulary // 8) * 8
    logits = torch.full((batch, stride), torch.inf, dtype=dtype, device=DEVICE)[:, :vocabulary]
    logits.copy_(torch.randn(batch, vocabulary, device=DEVICE))
    return logits


@pytest.mark.parametrize("vocabulary", [1, 7, 8, 2048, 2049, 32003])
@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("dtype", [*DTYPES, "F32"])
def test_the_likeliest_token_wins_and_the_lowest_of_equals(dtype, batch, vocabulary):
    logits = padded_logits(batch, vocabulary, DTYPES.get(dtype, torch.float32))
    choose = Chooser(logits, dtype)
    for _ in range(3):
        logits.copy_(torch.randn(batch, vocabulary, device=DEVICE))
        expected = [int((row == row.max()).nonzero()[0]) for row in logits]
        assert choose() == expected


def test_a_nan_never_wins_over_a_number():
    logits = torch.full((4, 5000), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    logits[0, 4000] = -torch.inf
    logits[1, 17] = logits[1, 3000] = -3.0
    logits[2] = -0.0
    logits[2, 77] = 0.0  # no larger than -0
    assert Chooser(logits, "BF16")() == [4000, 17, 0, 0]


def test_steps_fill_the_ring_and_move_the_position():
    logits = torch.zeros(2, 3000, dtype=torch.float16, device=DEVICE)
    choose = Chooser(logits, "F16")
    for step in range(7):
        logits.zero_()
        logits[0, 2 * step], logits[1, 2999 - step] = 1.0, 1.0
        assert choose() == [2 * step, 2999 - step]
        assert choose.ring[step % 3].tolist() == [2 * step, 2999 - step]
    assert int(choose.step) == 7 and int(choose.position) == 47


@pytest.mark.parametrize("hidden_size", [8, 1152, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_rows_are_scaled_as_the_dtype_does(dtype, hidden_size):
    embedding = random(50, hidden_size, dtype=DTYPES[dtype])
    tokens = torch.tensor([49, 0, 7], device=DEVICE)
    for scale in (1.0, float(torch.tensor(33.94).to(DTYPES[dtype]))):
        hidden = poisoned(3, hidden_size + 8, dtype=DTYPES[dtype])
        tensors = EmbedTensors(
            embedding.data_ptr(), tokens.data_ptr(), hidden.data_ptr(), hidden.stride(0)
        )
        embed(tensors, hidden_size=hidden_size, batch=3, dtype=dtype, scale=scale)(stream())
        factor = torch.tensor(scale, dtype=DTYPES[dtype], device=DEVICE)
        assert torch.equal(hidden[:, :hidden_size], embedding[tokens] * factor)
        assert hidden[:, hidden_size:].isnan().all()


# -- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_norm", ["none", "rms", "rms_plus_one"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(80, 32), (128, 128), (256, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_is_turned_and_put_into_the_cache(dtype, head_dim, rotary_dim, head_norm):
    batch, num_tokens, start, tolerance = 2, 19, 5, 4 * ROUNDING[dtype]
    shape = replace(
        SHAPE, dtype=dtype, head_dim=head_dim, rotary_dim=rotary_dim, head_norm=head_norm,
        batch=batch * num_tokens, capacity=32,
    )  # fmt: skip
    case = Case(shape)
    case.qkv = case.qkv.contiguous()
    positions = torch.arange(start, start + num_tokens, device=DEVICE).repeat(batch)[:, None]
    # each (batch, heads, tokens, head_dim)
    new = [t.unflatten(0, (batch, -1)).transpose(1, 2) for t in case.new_heads(positions)]
    queries = poisoned(*new[0].shape, dtype=DTYPES[dtype])
    keys, values = (
        poisoned(batch, shape.kv_heads, 32, head_dim, dtype=DTYPES[dtype]) for _ in range(2)
    )
    has_norm = head_norm != "none"
    tensors = AttentionTensors(
        qkv=case.qkv.data_ptr(),
        qkv_stride=case.qkv.stride(0),
        cosines=case.cosines.data_ptr(),
        sines=case.sines.data_ptr(),
        position=0,
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        out=queries.data_ptr(),
        out_stride=0,
        workspace=0,
        query_norm=case.norms[0].data_ptr() if has_norm else 0,
        key_norm=case.norms[1].data_ptr() if has_norm else 0,
    )
    rotary_rows(
        replace(shape, batch=batch),
        tensors,
        num_tokens=num_tokens,
        start=start,
        epsilon=EPSILON,
        stream=stream(),
    )
    limits = {"rtol": tolerance if has_norm else 0, "atol": tolerance if has_norm else 0}
    written = slice(start, start + num_tokens)
    torch.testing.assert_close(queries, new[0], **limits)
    torch.testing.assert_close(keys[:, :, written], new[1], **limits)
    assert torch.equal(values[:, :, written], new[2])
    for cache in (keys, values):
        assert cache[:, :, :start].isnan().all()
        assert cache[:, :, start + num_tokens :].isnan().all()


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("columns", [8, 72, 2048, 5376, 16384, 20480])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_normalized(dtype, columns, plus_one):
    num_tokens, tolerance = 5, 2 * ROUNDING[dtype]
    x = random(num_tokens, columns, dtype=DTYPES[dtype], scale=3.0)
    weight = random(columns, dtype=DTYPES[dtype])
    out = poisoned(num_tokens, columns, dtype=DTYPES[dtype])
    norm_rows(
        Rows(num_tokens, columns, dtype),
        "rms_plus_one" if plus_one else "rms",
        NormWeight(weight.data_ptr(), EPSILON),
        x.data_ptr(),
        out.data_ptr(),
        stream(),
    )
    expected = normalized(x, weight, plus_one=plus_one)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=3 * tolerance)
    # The sum may differ in its last bit, which few values show.
    assert (out != expected).float().mean() < 0.05


def gelu_tanh(x):
    return torch.nn.functional.gelu(x, approximate="tanh")


ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": gelu_tanh,
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("columns", [8, 1408, 14336])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_are_rounded_before_they_multiply(dtype, columns, kind):
    gate, up = (random(3, columns, dtype=DTYPES[dtype], scale=2.0) for _ in range(2))
    expected = ACTIVATIONS[kind](gate.double()).to(gate.dtype) * up
    is_near = gate > -3  # far below zero little is left of GELU, and of its exact bits less
    gated_rows(
        Rows(3, columns, dtype), kind, gate.data_ptr(), up.data_ptr(), gate.data_ptr(), stream()
    )
    torch.testing.assert_close(gate, expected, rtol=2 * ROUNDING[dtype], atol=1e-4)
    assert (gate != expected)[is_near].float().mean() < 0.01
