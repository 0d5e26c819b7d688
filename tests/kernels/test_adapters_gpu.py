"""On an NVIDIA GPU: inner values of adapters, and products that add them, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from cupy_kernels.adapter_inner import AdapterInner, InnerKind
from cupy_kernels.linear_few import AdapterWeight, LinearFew, NormWeight, Tokens
from qtool.runtime.decoders.blocks import _packed_rows
from tests.runtime.packed_layers import exact_weight, make_layer, relative_error

pytestmark = pytest.mark.gpu

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
# Half a unit in the last place, of each rounding: two of the norm, one of the result, and with a
# gate or a residual one more.
LARGEST_ERROR = {"BF16": 6e-3, "F16": 1e-3}
EPSILON = 1e-5


def draw(*shape, dtype, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def stream():
    return torch.cuda.current_stream().cuda_stream


def normed(x, weight, kind):
    """As models write it, in float64 behind the last rounding."""
    if kind == "none":
        return x.double()
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPSILON)
    if kind == "rms_plus_one":
        return (wide * (1 + weight.float())).to(x.dtype).double()
    return (wide.to(x.dtype) * weight).double()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["none", "rms", "rms_plus_one"])
def test_inner_values(norm, dtype, num_tokens, overlap):
    for columns, rows in ((64, 8), (1408, 24), (4096, 48), (14336, 16), (28672, 8), (4096, 768)):
        x = draw(num_tokens, columns + 64, dtype=DTYPES[dtype])[:, :columns]
        a, weight = (draw(n, columns, dtype=DTYPES[dtype], scale=0.1) for n in (rows, 1))
        scales = torch.rand(rows, device="cuda")
        out = torch.full((num_tokens, rows), torch.nan, device="cuda")
        launch = AdapterInner(
            InnerKind(columns, rows, dtype, norm),
            a=a.data_ptr(),
            scales=scales.data_ptr(),
            max_tokens=num_tokens,
            norm=None if norm == "none" else NormWeight(weight.data_ptr(), EPSILON),
            overlap=overlap,
        )
        tokens = Tokens(num_tokens, x.data_ptr(), x.stride(0), (), (), inner=out.data_ptr())
        launch.queue(tokens, stream())
        expected = normed(x, weight, norm) @ a.double().T * scales.double()
        assert relative_error(out, expected) < (1e-5 if norm == "none" else 2e-3), (columns, rows)


class Adapted:
    """A launch of inner values and the product behind it, over random layers."""

    def __init__(self, quant, dtype, epilogue, num_tokens, said, number, columns=512):
        torch_dtype = DTYPES[dtype]
        count = {"bias": 3, "residual": 1, "gated": 2}[epilogue]
        rows, self.ranks = (1000, 256, 131)[:count], (16, 0, 64)[:count]
        if epilogue == "gated":
            rows, self.ranks = (504, 504), (8, 40)
        self.epilogue, self.num_tokens = epilogue, num_tokens
        how = {"dtype": torch_dtype, "bias": True, "device": "cuda"}
        self.layers = [
            make_layer(quant, n, columns, seed=i, **how)
            if quant != "plain"
            else torch.nn.Linear(columns, n, dtype=torch_dtype, device="cuda").requires_grad_(False)
            for i, n in enumerate(rows)
        ]
        self.norm = "none" if epilogue == "residual" else "rms"
        self.x = draw(num_tokens, columns, dtype=torch_dtype)
        self.weight = draw(columns, dtype=torch_dtype)
        self.residual = draw(num_tokens, rows[0], dtype=torch_dtype)
        self.a = draw(sum(self.ranks), columns, dtype=torch_dtype, scale=0.05)
        self.b = [draw(n, r, dtype=torch_dtype) for n, r in zip(rows, self.ranks, strict=True)]
        self.scales = torch.rand(sum(self.ranks), device="cuda") + 0.5
        self.inner = torch.full((num_tokens, sum(self.ranks)), torch.nan, device="cuda")
        self.outs = [
            torch.full((num_tokens, n), torch.nan, dtype=torch_dtype, device="cuda") for n in rows
        ]
        self._make(dtype, said, number)

    def _make(self, dtype, said, number):
        packed = [_packed_rows(it, DTYPES[dtype], 0, it.out_features) for it in self.layers]
        kind = replace(packed[0].kind, norm=self.norm, epilogue=self.epilogue, adapted=True)
        norm = None if self.norm == "none" else NormWeight(self.weight.data_ptr(), EPSILON)
        x_is_there = 0 if said is None else said[number].data_ptr()
        self._tokens = Tokens(
            self.num_tokens,
            self.x.data_ptr(),
            self.x.stride(0),
            tuple(out.data_ptr() for out in self.outs),
            tuple(out.stride(0) for out in self.outs),
            residual=self.residual.data_ptr(),
            residual_stride=self.residual.stride(0),
            inner=self.inner.data_ptr(),
            inner_stride=self.inner.stride(0),
            x_is_there=x_is_there,
        )
        self._inner = AdapterInner(
            InnerKind(kind.columns, len(self.scales), dtype, self.norm),
            a=self.a.data_ptr(),
            scales=self.scales.data_ptr(),
            max_tokens=self.num_tokens,
            norm=norm,
            x_is_there=x_is_there,
        )
        firsts = [sum(self.ranks[:i]) for i in range(len(self.ranks))]
        self._product = LinearFew(
            kind,
            [it.weight for it in packed],
            max_tokens=self.num_tokens,
            norm=norm,
            adapters=[
                AdapterWeight(b.data_ptr() if rank else 0, rank, first)
                for b, rank, first in zip(self.b, self.ranks, firsts, strict=True)
            ],
        )

    def queue(self):
        self._inner.queue(self._tokens, stream())
        self._product.queue(self._tokens, stream())

    def expected(self):
        x = normed(self.x, self.weight, self.norm).cpu()
        inner = (x @ self.a.cpu().double().T * self.scales.cpu().double()).split(self.ranks, dim=1)
        sums = []
        for layer, b, z in zip(self.layers, self.b, inner, strict=True):
            is_plain = type(layer) is torch.nn.Linear
            weight = layer.weight.cpu().double() if is_plain else exact_weight(layer)
            sums.append(x @ weight.T + layer.bias.cpu().double() + z @ b.cpu().double().T)
        if self.epilogue == "gated":
            return [functional.silu(sums[0]) * sums[1]]
        if self.epilogue == "residual":
            return [sums[0] + self.residual.cpu().double()]
        return sums

    def check(self, largest_error):
        for out, expected in zip(self.outs, self.expected(), strict=False):
            assert relative_error(out, expected) < largest_error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 3, 8])
@pytest.mark.parametrize("epilogue", ["bias", "residual", "gated"])
@pytest.mark.parametrize("quant", ["nf4-dq", "fp4", "int8", "plain"])
def test_products_with_adapters(quant, epilogue, num_tokens, dtype):
    case = Adapted(quant, dtype, epilogue, num_tokens, None, 0)
    case.queue()
    case.check(LARGEST_ERROR[dtype])


def test_activations_in_several_slices():
    case = Adapted("nf4-dq", "BF16", "residual", 8, None, 0, columns=14336)
    case.queue()
    case.check(LARGEST_ERROR["BF16"])


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_products_that_begin_before_the_inner_values_are_there(num_tokens):
    """In a graph over several of them, with other activations each time."""
    said = torch.zeros(3, dtype=torch.int32, device="cuda")
    epilogues = ("bias", "gated", "residual")
    cases = [
        Adapted("nf4-dq", "BF16", epilogue, num_tokens, said, number)
        for number, epilogue in enumerate(epilogues)
    ]
    waiting = torch.zeros(1 << 24, device="cuda")

    def step():
        said.zero_()
        for case in cases:
            waiting.add_(1)  # a launch before that takes its time
            case.x.copy_(case.x + waiting[0].to(case.x.dtype) * 0 + 0.01)
            case.queue()

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(20):
        graph.replay()
        for case in cases:
            case.check(LARGEST_ERROR["BF16"])
        assert said.tolist() == [1, 1, 1]


def test_the_same_every_time():
    case = Adapted("nf4-dq", "BF16", "bias", 1, None, 0)
    case.queue()
    first = [out.clone() for out in case.outs]
    for _ in range(50):
        case.queue()
        assert all(map(torch.equal, first, case.outs))
