"""The output head in host memory: the plain layer's logits, its ties, its adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qtool.runtime import host_head
from qtool.runtime.host_head import HostLinear, multiply_head_on_host
from qtool.runtime.loading import LoadOptions, load_model
from tests.runtime.test_adapters import save_adapter

MODELS = {"tied": "TinyStories-656K-hf", "untied": "tinylm-19m"}
TOKEN = torch.tensor([[7]])
# Both heads sum up in float32 and round once, which is half of bfloat16's last place each; an
# adapter's part is added to that and rounded again.
ROUNDING = 2.0**-8


def load(folder: Path, **options: Any) -> Any:
    options = {"compute_dtype": "bfloat16"} | options
    return load_model(str(folder), LoadOptions(device="cpu", **options)).model


def with_plain_head(model: Any) -> Any:
    head = model.get_output_embeddings()
    plain = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    plain.weight = head.weight
    model.set_output_embeddings(plain)
    return model


def logits(model: Any, tokens: torch.Tensor = TOKEN) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens).logits.float()


def assert_rounded_alike(
    found: torch.Tensor, expected: torch.Tensor, *, roundings: int = 1
) -> None:
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= roundings * ROUNDING, f"{float(error):.4f} of the largest logit"


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each product that goes our way."""
    found: list[int] = []
    multiply = host_head.linear_bfloat16_host

    def watched(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found.append(x[..., 0].numel())
        return multiply(x, *args, **kwargs)

    monkeypatch.setattr(host_head, "linear_bfloat16_host", watched)
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_the_plain_head(models: Path, products: list[int], kind: str) -> None:
    model = load(models / MODELS[kind])
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, HostLinear)
    assert (head.weight is embedding.weight) == (kind == "tied")
    many = torch.arange(40)[None]
    found, found_many = logits(model), logits(model, many)
    assert products == [1, 40]
    with_plain_head(model)
    assert_rounded_alike(found, logits(model))
    assert torch.equal(found_many, logits(model, many))


def test_packed_layers_beside_it(models: Path) -> None:
    model = load(models / MODELS["untied"], quant="nf4")
    assert isinstance(model.get_output_embeddings(), HostLinear)
    found = logits(model)
    assert_rounded_alike(found, logits(with_plain_head(model)))


def test_gradients_go_the_plain_way(models: Path, products: list[int]) -> None:
    model = load(models / MODELS["untied"])
    model(input_ids=TOKEN).logits.sum().backward()
    assert model.get_output_embeddings().weight.grad is not None
    assert not products


def test_adapters_wrap_it(models: Path, tmp_path: Path, products: list[int]) -> None:
    pytest.importorskip("peft")
    folder = models / MODELS["untied"]
    plain = with_plain_head(load(folder))
    adapter = save_adapter(plain, tmp_path, target_modules=["lm_head", "q_proj"])
    model = load(folder, adapter=adapter)
    found = logits(model)
    assert products == [1]
    plain.load_adapter(str(adapter))
    assert_rounded_alike(found, logits(plain), roundings=2)
    without = logits(load(folder))
    assert (found - without).abs().max() > 8 * ROUNDING * without.abs().max()


def test_saved_weights_keep_their_names(models: Path) -> None:
    model = load(models / MODELS["tied"])
    names = set(model.state_dict())
    assert names == set(with_plain_head(model).state_dict())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_heads_in_other_dtypes_stay(models: Path, dtype: str) -> None:
    head = load(models / MODELS["untied"], compute_dtype=dtype).get_output_embeddings()
    assert type(head) is nn.Linear


def test_models_without_a_head_and_moved_heads_stay() -> None:
    class Model(nn.Module):
        def __init__(self, head: nn.Module | None) -> None:
            super().__init__()
            self.head = head

        def get_output_embeddings(self) -> nn.Module | None:
            return self.head

        def set_output_embeddings(self, head: nn.Module) -> None:
            raise AssertionError("a head was replaced")

    multiply_head_on_host(Model(None))
    moved = nn.Linear(64, 8, dtype=torch.bfloat16)
    moved._hf_hook = object()
    multiply_head_on_host(Model(moved))
    multiply_head_on_host(Model(nn.Linear(64, 8, dtype=torch.bfloat16, device="meta")))
