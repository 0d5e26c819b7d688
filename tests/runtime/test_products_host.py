"""Products over packed weights in host memory: against the dequantized weight, and whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtool.formats.precisions import QuantType
from qtool.runtime import products_host
from qtool.runtime.dequantize import dequantize_4bit, dequantize_int8
from qtool.runtime.generate import Limits, Sampling, generate
from qtool.runtime.linear import FourBitLayer, Linear4bit, LinearInt8
from qtool.runtime.loading import LoadOptions, load_model
from qtool.runtime.products_host import (
    NestedAbsmax,
    linear_4bit_host,
    linear_bfloat16_host,
    linear_int8_host,
)
from tests.runtime.packed_layers import make_layer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OUT = 37


class FourBit:
    """A random weight and how it is stored."""

    def __init__(
        self,
        size: int,
        *,
        quant_type: QuantType = "nf4",
        blocksize: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        out: int = OUT,
    ) -> None:
        torch.manual_seed(size)
        num_blocks = -(-out * size // blocksize)
        self.packed = torch.randint(0, 256, (-(-out * size // 2), 1), dtype=torch.uint8)
        self.nested = NestedAbsmax(
            torch.randint(0, 256, (num_blocks,), dtype=torch.uint8),
            torch.rand(-(-num_blocks // 256)) + 0.1,
            torch.linspace(-1, 1, 256),
            torch.tensor(1.5),
        )
        self.absmax = self.nested.dequantize()
        self.options: dict[str, Any] = {"quant_type": quant_type, "blocksize": blocksize}
        self.size, self.out, self.dtype = size, out, dtype

    def weight(self) -> Tensor:
        stop = self.out * self.size
        values = dequantize_4bit(
            self.packed, self.absmax, **self.options, start=0, stop=stop, dtype=self.dtype
        )
        return values.view(self.out, self.size)

    def multiply(self, x: Tensor, *, nested: bool = False, bias: Tensor | None = None) -> Tensor:
        return linear_4bit_host(
            x,
            self.packed,
            self.nested if nested else self.absmax,
            **self.options,
            out_features=self.out,
            weight_dtype=self.dtype,
            bias=bias,
        )


def check(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Off by the rounding to y's dtype and, less, by that of sums in float32."""
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    sizes = x.double().abs() @ weight.double().abs().T
    rounding = torch.finfo(y.dtype).eps / 2 * exact.abs()
    allowed = 1.01 * rounding + x.shape[-1] * 2.0**-24 * sizes
    error = (y.double() - exact).abs()
    assert bool((error <= allowed).all()), f"off by {float((error / allowed).max()):.2f}"
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], weight.shape[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 3, 8, 13, 32, 33])
def test_any_number_of_tokens_in_any_dtype(
    dtype: torch.dtype, weight_dtype: torch.dtype, num_tokens: int
) -> None:
    stored, bias = FourBit(256, dtype=weight_dtype), torch.randn(OUT)
    x = torch.randn(num_tokens, 256).to(dtype)
    check(stored.multiply(x), x, stored.weight())
    check(stored.multiply(x, nested=True), x, stored.weight())
    with_bias = stored.multiply(x, bias=bias.to(dtype))
    if num_tokens <= products_host.MAX_HOST_PACKED_TOKENS or dtype == torch.float32:
        check(with_bias, x, stored.weight(), bias.to(dtype))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize("size", [1, 33, 64, 96, 172, 192, 320])
def test_any_shape_and_block_size(quant_type: QuantType, blocksize: int, size: int) -> None:
    stored = FourBit(size, quant_type=quant_type, blocksize=blocksize, dtype=torch.float32)
    for x in (torch.randn(size), torch.randn(2, 3, size)):
        check(stored.multiply(x, nested=True), x, stored.weight())


def test_no_rows_make_no_rows() -> None:
    assert FourBit(64).multiply(torch.randn(2, 0, 64)).shape == (2, 0, OUT)


def test_rows_of_x_need_not_be_contiguous() -> None:
    stored, x = FourBit(64), torch.randn(64, 5).T
    check(stored.multiply(x), x, stored.weight())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 172, 192])
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_int8_products(dtype: torch.dtype, size: int, num_tokens: int) -> None:
    codes = torch.randint(-127, 128, (OUT, size), dtype=torch.int8)
    scb, bias = torch.rand(OUT) + 0.1, torch.randn(OUT).to(dtype)
    x = torch.randn(num_tokens, size).to(dtype)
    y = linear_int8_host(x, codes, scb, bias=bias)
    check(y, x, dequantize_int8(codes, scb, torch.float32), bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [128, 192])
@pytest.mark.parametrize("num_tokens", [1, 5, 9])
def test_weights_that_are_not_packed(dtype: torch.dtype, size: int, num_tokens: int) -> None:
    weight, bias = torch.randn(OUT, size).to(dtype), torch.randn(OUT).to(dtype)
    x = torch.randn(2, num_tokens, size).to(dtype)[:1]
    check(linear_bfloat16_host(x, weight), x, weight)
    if dtype == torch.float32:
        check(linear_bfloat16_host(x, weight, bias=bias), x, weight, bias)


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dequantizing a weight is an error."""

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("a weight was dequantized")

    for name in ("dequantize_4bit", "dequantize_int8"):
        monkeypatch.setattr(products_host, name, refuse)


@pytest.mark.usefixtures("forbidden")
@pytest.mark.parametrize("num_tokens", [1, products_host.MAX_HOST_PACKED_TOKENS])
def test_few_tokens_leave_the_weight_packed(num_tokens: int) -> None:
    x = torch.randn(num_tokens, 128)
    FourBit(128).multiply(x, nested=True)
    linear_int8_host(x, torch.zeros(OUT, 128, dtype=torch.int8), torch.ones(OUT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    stored, x = FourBit(256, out=101), torch.randn(3, 256).to(dtype)
    alone = stored.multiply(x)
    monkeypatch.setattr(products_host, "MIN_ELEMENTS_PER_THREAD", 1)
    for num_threads in (2, 3, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=num_threads: count)
        assert torch.equal(stored.multiply(x), alone), num_threads


def test_an_error_in_a_thread_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_host, "MIN_ELEMENTS_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def fail(first: int, last: int) -> None:
        raise ArithmeticError(first)

    with pytest.raises(ArithmeticError):
        products_host._share_rows(64, 64, fail)


@pytest.mark.usefixtures("forbidden")
def test_layers_leave_their_weight_packed() -> None:
    layer = Linear4bit(FourBitLayer(OUT, 128, "nf4", 64, torch.bfloat16, False))
    layer.weight.data.random_(0, 256)
    layer.absmax.uniform_(0.1, 1)
    with torch.inference_mode():
        assert layer(torch.randn(2, 128)).shape == (2, OUT)


# ---- Whole models -----------------------------------------------------------------------------

MODELS = ["TinyStories-656K-hf", "slm4096-gpt2-hf", "stories260K-hf", "tinylm-19m"]


@pytest.mark.parametrize("precision", ["nf4", "nf4-dq", "fp4", "int8"])
@pytest.mark.parametrize(
    "model",
    [
        *MODELS,
        pytest.param("tinymoe-6m", marks=pytest.mark.skip("experts are no linear layers: refused")),
    ],
)
def test_greedy_tokens_equal_those_of_the_dequantized_model(
    models: Any, model: str, precision: Any
) -> None:
    options = LoadOptions(quant=precision, compute_dtype="float32", device="cpu")
    with load_model(str(models / model), options) as loaded:
        assert loaded.num_packed_layers > 0
        packed = greedy(loaded)
        unpack(loaded.model)
        assert greedy(loaded) == packed
        assert len(packed) == 64


def greedy(loaded: Any) -> tuple[int, ...]:
    limits = Limits(max_new_tokens=64, ignore_eos=True)
    return generate(loaded, [5, 17, 30, 42, 8], Sampling(), limits).token_ids


def unpack(model: nn.Module) -> None:
    """Replace packed layers by nn.Linear over the dequantized weight."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear4bit | LinearInt8):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
                plain.weight = nn.Parameter(layer.dequantize().float())
                plain.bias = layer.bias
                setattr(parent, name, plain)
    assert not any(isinstance(m, Linear4bit | LinearInt8) for m in model.modules())


def test_products_keep_their_threads_while_pytorch_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    pool = products_host.pool_of_threads

    def watched(num_threads: int) -> Any:
        asked.append(num_threads)
        return pool(num_threads)

    monkeypatch.setattr(products_host, "pool_of_threads", watched)
    monkeypatch.setattr(products_host, "MIN_ELEMENTS_PER_THREAD", 1)
    layer = make_layer("nf4", 64, 128)
    x = torch.randn(1, 128, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            expected = layer(x)
            with products_host.threads_for_products():
                assert torch.get_num_threads() == 1
                assert torch.equal(layer(x), expected)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert asked == [1, 1]  # one thread beside the caller's, both times
