"""The one step of autograd for a packed layer and its adapter, against float64 autograd."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qtool.finetune.lora_function import lora_linear
from tests.runtime.packed_layers import QUANTS, make_layer, relative_error

SCALING = 0.7
# Of results with the same operands: float32 sums, or one or two roundings to the dtype.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
RANK = 3
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make_inputs(
    layer: Any,
    tokens: int,
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
    seed: int = 5,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, tokens, layer.in_features), (RANK, layer.in_features), (layer.out_features, RANK)
    dtypes = dtype, adapter_dtype, adapter_dtype
    return tuple(  # type: ignore[return-value]
        torch.randn(shape, generator=generator).to(kind).to(layer.weight.device).requires_grad_()
        for shape, kind in zip(shapes, dtypes, strict=True)
    )


def exact(
    layer: Any, x: Tensor, a: Tensor, b: Tensor, *, mask: Tensor | None = None, dropout: float = 0
) -> tuple[Tensor, list[Tensor]]:
    """Output and leaves in float64; the weight is what dequantizing gives."""
    leaves = [t.detach().double().requires_grad_() for t in (x, a, b)]
    wide_x, wide_a, wide_b = leaves
    dropped = wide_x if mask is None else wide_x * mask.view(x.shape) / (1 - dropout)
    out = wide_x @ layer.dequantize().double().T
    if layer.bias is not None:
        out = out + layer.bias.double()
    return out + SCALING * (dropped @ wide_a.T @ wide_b.T), leaves


def errors_against(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [relative_error(f.detach(), e.detach()) for f, e in zip(found, expected, strict=True)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "tokens", "bias"),
    [((37, 22), 3, True), ((37, 22), 50, False), ((96, 128), 3, False), ((96, 128), 50, True)],
)
def test_gradients_are_those_of_the_dequantized_weight(
    device: str,
    quant: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    tokens: int,
    bias: bool,
) -> None:
    layer = make_layer(quant, *shape, bias=bias, device=device)
    inputs = make_inputs(layer, tokens, dtype=dtype)
    out = lora_linear(*inputs, layer, scaling=SCALING)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out)
    out.backward(gradient)
    expected, leaves = exact(layer, *inputs)
    expected.backward(gradient.double())
    assert out.dtype == dtype
    assert inputs[0].grad.dtype == dtype
    assert inputs[1].grad.dtype == inputs[2].grad.dtype == torch.float32
    errors = errors_against([out, *(t.grad for t in inputs)], [expected, *(t.grad for t in leaves)])
    assert max(errors) < TOLERANCE[dtype], errors
    assert layer.weight.grad is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inside", [True, False])
def test_under_autocast_products_are_in_16_bit_and_gradients_as_the_leaves(
    device: str, x_dtype: torch.dtype, adapter_dtype: torch.dtype, inside: bool
) -> None:
    """`inside`: the backward pass runs under autocast too, which must change nothing."""
    layer = make_layer("nf4-dq", 96, 128, bias=True, device=device)
    inputs = make_inputs(layer, 40, dtype=x_dtype, adapter_dtype=adapter_dtype)
    expected, leaves = exact(layer, *inputs)
    expected.sum().backward()
    with torch.autocast(device, torch.bfloat16):
        out = lora_linear(*inputs, layer, scaling=SCALING)
        if inside:
            out.float().sum().backward()
    if not inside:
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert [t.grad.dtype for t in inputs] == [x_dtype, adapter_dtype, adapter_dtype]
    errors = errors_against([out, *(t.grad for t in inputs)], [expected, *(t.grad for t in leaves)])
    assert max(errors) < TOLERANCE[torch.bfloat16], errors


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.05, 0.5])
def test_dropout_has_one_mask_for_both_passes(
    device: str, dtype: torch.dtype, dropout: float
) -> None:
    layer = make_layer("nf4", 96, 128, device=device)
    inputs = make_inputs(layer, 50, dtype=dtype)
    torch.manual_seed(7)
    out = lora_linear(*inputs, layer, scaling=SCALING, dropout=dropout)
    torch.manual_seed(7)
    _, mask = torch.native_dropout(inputs[0].detach().reshape(-1, 128), dropout, True)
    assert 0 < (~mask).sum() < mask.numel()
    expected, leaves = exact(layer, *inputs, mask=mask, dropout=dropout)
    out.float().sum().backward()
    expected.sum().backward()
    errors = errors_against([out, *(t.grad for t in inputs)], [expected, *(t.grad for t in leaves)])
    assert max(errors) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_makes_the_same_mask_again(device: str, use_reentrant: bool) -> None:
    layers = [make_layer("nf4-dq", 64, 64, device=device, seed=i) for i in range(2)]

    def run(x: Tensor, *adapters: Tensor) -> Tensor:
        for layer, a, b in zip(layers, adapters[::2], adapters[1::2], strict=True):
            x = lora_linear(torch.tanh(x), a, b, layer, scaling=SCALING, dropout=0.3)
        return x

    def gradients(*, checkpointed: bool) -> list[Tensor]:
        inputs = [*make_inputs(layers[0], 9), *make_inputs(layers[1], 9, seed=6)[1:]]
        torch.manual_seed(3)
        if checkpointed:
            out = checkpoint(run, *inputs, use_reentrant=use_reentrant)
        else:
            out = run(*inputs)
        torch.rand(5, device=device)  # the generator goes on before the backward pass
        out.sum().backward()
        return [out.detach(), *(t.grad for t in inputs)]  # type: ignore[misc]

    for found, expected in zip(
        gradients(checkpointed=True), gradients(checkpointed=False), strict=True
    ):
        assert torch.equal(found, expected)


def test_the_graph_may_be_run_twice() -> None:
    layer = make_layer("nf4", 37, 22)
    inputs = make_inputs(layer, 5)
    out = lora_linear(*inputs, layer, scaling=SCALING, dropout=0.3)
    once = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    twice = torch.autograd.grad(out.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("needs", [(False, True, True), (True, False, False), (False, True, False)])
def test_only_the_gradients_asked_for_are_made(
    monkeypatch: pytest.MonkeyPatch, needs: tuple[bool, bool, bool]
) -> None:
    layer = make_layer("nf4", 37, 22)
    inputs = make_inputs(layer, 5)
    expected, leaves = exact(layer, *inputs)
    expected.sum().backward()
    for tensor, is_needed in zip(inputs, needs, strict=True):
        tensor.requires_grad_(is_needed)
    calls = []
    add = type(layer).add_input_gradient
    monkeypatch.setattr(
        type(layer), "add_input_gradient", lambda *args: calls.append(1) or add(*args)
    )
    lora_linear(*inputs, layer, scaling=SCALING).sum().backward()
    assert len(calls) == needs[0]  # a first layer's input needs none
    for tensor, leaf, is_needed in zip(inputs, leaves, needs, strict=True):
        assert (tensor.grad is not None) == is_needed
        if tensor.grad is not None:
            assert relative_error(tensor.grad, leaf.grad) < 1e-6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    layer = make_layer("int8", 37, 22, bias=True)
    inputs = make_inputs(layer, 5)
    expected, _ = exact(layer, *inputs)
    with mode():
        x = inputs[0].clone()
        found = lora_linear(x, *inputs[1:], layer, scaling=SCALING)
        assert relative_error(found, expected.detach()) < 1e-6
        with torch.autocast("cpu", torch.bfloat16):
            found = lora_linear(x, *inputs[1:], layer, scaling=SCALING)
    assert relative_error(found, expected.detach()) < 1e-2


def saved_bytes(x: Tensor, layers: list[Any], adapters: list[tuple[Tensor, Tensor]]) -> int:
    """Of all tensors that the layers keep for the backward pass, each storage once."""
    storages: dict[int, int] = {}
    kept = []  # alive, so that no address comes twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for layer, (a, b) in zip(layers, adapters, strict=True):
            kept.append(lora_linear(x, a, b, layer, scaling=SCALING, dropout=0.1))
    return sum(storages.values())


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("is_cast", [False, True])
def test_only_x_a_mask_and_what_is_narrow_are_kept(quant: str, is_cast: bool) -> None:
    """No weight in any form, and x once for layers that read the same, cast or not."""
    tokens, width, num_layers = 2 * 50, 128, 3
    layers = [make_layer(quant, 96, width, seed=i) for i in range(num_layers)]
    x, a, b = make_inputs(layers[0], 50, dtype=torch.float32 if is_cast else torch.bfloat16)
    context: AbstractContextManager[Any] = (
        torch.autocast("cpu", torch.bfloat16) if is_cast else nullcontext()
    )
    with context:
        found = saved_bytes(x, layers, [(a, b)] * num_layers)
    once = 2 * tokens * width
    each = tokens * width + 2 * RANK * (tokens + width + 96)
    assert found == once + num_layers * each


def test_a_cast_copy_is_made_again_when_its_source_changes() -> None:
    layer = make_layer("nf4", 37, 22)
    x, a, b = (t.detach() for t in make_inputs(layer, 5))
    with torch.autocast("cpu", torch.bfloat16):
        lora_linear(x, a, b, layer, scaling=SCALING)
        x.mul_(3)
        found = lora_linear(x, a, b, layer, scaling=SCALING)
        assert torch.equal(found, lora_linear(x.clone(), a, b, layer, scaling=SCALING))


def test_a_weight_changed_in_between_is_noticed() -> None:
    layer = make_layer("nf4", 37, 22)
    inputs = make_inputs(layer, 5)
    out = lora_linear(*inputs, layer, scaling=SCALING)
    layer.requantize(torch.randn(37, 22))
    with pytest.raises(RuntimeError, match="changed between"):
        out.sum().backward()


def test_an_input_changed_in_between_is_noticed() -> None:
    layer = make_layer("nf4", 37, 22)
    inputs = make_inputs(layer, 5)
    x = inputs[0] * 1
    out = lora_linear(x, *inputs[1:], layer, scaling=SCALING)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quant", ["nf4-dq", "int8"])
def test_weights_in_pieces(device: str, quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from qtool.runtime import linear

    layer = make_layer(quant, 600, 128, bias=True, device=device)
    inputs = make_inputs(layer, 50)
    monkeypatch.setattr(linear, "MAX_HOST_ELEMENTS", 256 * 128)
    monkeypatch.setattr("qtool.formats.pieces.MAX_DEQUANTIZED_ELEMENTS", 256 * 128)
    out = lora_linear(*inputs, layer, scaling=SCALING)
    out.sum().backward()
    expected, leaves = exact(layer, *inputs)
    expected.sum().backward()
    errors = errors_against([out, *(t.grad for t in inputs)], [expected, *(t.grad for t in leaves)])
    assert max(errors) < 2e-6, errors


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    layer = make_layer("nf4-dq", 256, 512, bias=True, device="cuda")
    inputs = make_inputs(layer, 200, dtype=torch.bfloat16)
    lora_linear(*inputs, layer, scaling=SCALING, dropout=0.1).sum().backward()  # compiles kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        lora_linear(*inputs, layer, scaling=SCALING, dropout=0.1).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
