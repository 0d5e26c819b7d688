"""Folders that transformers + bitsandbytes wrote run here, and ours run there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.runtime.linear import Linear4bit, LinearInt8
from qtool.runtime.loading import LoadedModel, LoadOptions, load_model
from tests.runtime.folders import PackedFolders, is_avx512_bf16_cpu, load_stock

bnb = pytest.importorskip("bitsandbytes")

MODELS = ("stories260K-hf", "TinyStories-656K-hf", "slm4096-gpt2-hf", "tinylm-19m")
PRECISIONS = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")
PROMPT = torch.arange(3, 27)[None]
MAX_LOGIT_ERROR_SD = 0.05  # in standard deviations of the logits


def packed_layers(model: Any) -> dict[str, Any]:
    kinds = (Linear4bit, LinearInt8)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def stock_layers(model: Any) -> dict[str, torch.Tensor]:
    """What bitsandbytes dequantizes each of its layers to."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = module.weight
            found[name] = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weight = module.weight
            found[name] = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return found


def assert_same_weights(ours: Any, stock: Any) -> None:
    expected, found = stock_layers(stock), packed_layers(ours)
    assert set(found) == set(expected)
    for name, module in found.items():
        assert torch.equal(module.dequantize(), expected[name]), name


def assert_same_tensors_beside(ours: Any, stock: Any) -> None:
    """Embeddings, norms, biases and the output head."""
    packed = {f"{name}.weight" for name in packed_layers(ours)}
    expected = {k: v for k, v in stock.named_parameters() if k not in packed}
    found = {k: v for k, v in ours.named_parameters() if k not in packed}
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def assert_close_logits(ours: Any, stock: Any, *, rounds_activations: bool) -> None:
    """LLM.int8() rounds activations to 8 bit in each layer, we do not: there the root mean square
    of the error is bounded, else its maximum."""
    with torch.inference_mode():
        found, expected = ours(PROMPT).logits.float(), stock(PROMPT).logits.float()
    errors = (found - expected).abs() / expected.std()
    error = errors.square().mean().sqrt() if rounds_activations else errors.max()
    assert error < MAX_LOGIT_ERROR_SD, f"{error:.4f} standard deviations"


def load_ours(folder: Path) -> LoadedModel:
    return load_model(str(folder), LoadOptions(device="cpu"))


def check_both_ways(folder: Path, *, compare_logits: bool) -> None:
    stock = load_stock(folder)
    ours = load_ours(folder).model
    assert packed_layers(ours)
    assert_same_weights(ours, stock)
    assert_same_tensors_beside(ours, stock)
    if compare_logits:
        rounds_activations = any(isinstance(m, LinearInt8) for m in ours.modules())
        assert_close_logits(ours, stock, rounds_activations=rounds_activations)


def runs_in_stock(precision: str) -> bool:
    """bitsandbytes' 4-bit CPU forward asserts on these widths where the CPU has avx512_bf16."""
    return precision == "int8" or not is_avx512_bf16_cpu()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", MODELS)
def test_bitsandbytes_folder_runs_here(
    packed_folders: PackedFolders, model: str, precision: str
) -> None:
    folder = packed_folders.by_bitsandbytes(model, precision)
    check_both_ways(folder, compare_logits=runs_in_stock(precision))


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_bitsandbytes_folder_with_other_storage_runs_here(
    packed_folders: PackedFolders, storage: str
) -> None:
    folder = packed_folders.by_bitsandbytes("tinylm-19m", "nf4-dq", storage=storage)
    check_both_ways(folder, compare_logits=runs_in_stock("nf4-dq"))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", MODELS)
def test_qtool_folder_runs_in_bitsandbytes(
    packed_folders: PackedFolders, model: str, precision: str
) -> None:
    folder = packed_folders.by_qtool(model, precision)
    check_both_ways(folder, compare_logits=runs_in_stock(precision))


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_any_blocksize_runs_in_both(packed_folders: PackedFolders, blocksize: int) -> None:
    folder = packed_folders.by_qtool("tinylm-19m", "fp4-dq", blocksize=blocksize)
    # bitsandbytes' fused CPU product wants whole blocks in each row
    check_both_ways(folder, compare_logits=False)


def test_qtool_folder_with_bfloat16_storage_runs_in_both(packed_folders: PackedFolders) -> None:
    folder = packed_folders.by_qtool("tinylm-19m", "nf4-dq", storage="bfloat16")
    check_both_ways(folder, compare_logits=runs_in_stock("nf4-dq"))


@pytest.mark.parametrize("model", ["stories260K-hf", "TinyStories-656K-hf"])
def test_tied_embeddings_share_one_tensor(packed_folders: PackedFolders, model: str) -> None:
    ours = load_ours(packed_folders.by_qtool(model, "nf4-dq")).model
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight


@pytest.mark.parametrize("precision", ["nf4-dq", "int8"])
def test_experts_that_stayed_in_16_bit_run_beside_packed_attention(
    packed_folders: PackedFolders, precision: str
) -> None:
    folder = packed_folders.by_bitsandbytes("tinymoe-6m", precision)
    check_both_ways(folder, compare_logits=runs_in_stock(precision))
