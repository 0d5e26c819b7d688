"""On an NVIDIA GPU: the CPU's values and tokens, memory figures, offload to the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qtool.formats.precisions import QuantizedPrecision
from qtool.resources import demo_model_path
from qtool.runtime.generate import Limits, Sampling, generate
from qtool.runtime.linear import FourBitLayer, Linear4bit, LinearInt8
from qtool.runtime.loading import LoadedModel, LoadOptions, load_model

pytestmark = pytest.mark.gpu

PROMPT = list(range(5, 25))


def load(device: str, quant: QuantizedPrecision | None, **options: Any) -> LoadedModel:
    chosen = LoadOptions(quant, device=device, **{"compute_dtype": "float32"} | options)
    return load_model(str(demo_model_path()), chosen)


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq", "fp4-dq", "int8", None])
def test_same_values_and_tokens_as_on_the_cpu(quant: QuantizedPrecision | None) -> None:
    on_cpu, on_gpu = load("cpu", quant), load("cuda", quant)
    layers = dict(on_gpu.model.named_modules())
    for name, layer in on_cpu.model.named_modules():
        if isinstance(layer, (Linear4bit, LinearInt8)):
            assert layers[name].weight.is_cuda
            assert torch.equal(layers[name].dequantize().cpu(), layer.dequantize()), name
    expected = generate(on_cpu, PROMPT, Sampling(), Limits(48))
    found = generate(on_gpu, PROMPT, Sampling(), Limits(48))
    assert found.token_ids == expected.token_ids
    assert found.text == expected.text


def test_memory_is_reported() -> None:
    with load("cuda", "nf4-dq", compute_dtype="bfloat16") as loaded:
        generate(loaded, PROMPT, Sampling(), Limits(4))
        tensors = {t.data_ptr(): t for t in loaded.model.state_dict().values()}
        weights_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        allocated = loaded.memory.allocated_peak_bytes()
        assert weights_bytes < allocated < weights_bytes + (256 << 20)
        peak = loaded.memory.device_peak()
        assert peak.num_bytes >= torch.cuda.max_memory_reserved()
        assert peak.basis is not None


@pytest.mark.parametrize("quant", ["nf4-dq", "int8", None])
def test_layers_in_host_memory_give_the_same_tokens(quant: QuantizedPrecision | None) -> None:
    whole = load("cuda", quant)
    expected = generate(whole, PROMPT, Sampling(), Limits(16)).token_ids
    total_bytes = sum(t.numel() * t.element_size() for t in whole.model.state_dict().values())
    limits = f"0={int(total_bytes * 0.7)},cpu=8GiB"
    with load("cuda", quant, max_memory=limits) as spread:
        assert spread.devices == "cuda:0 + cpu"
        assert generate(spread, PROMPT, Sampling(), Limits(16)).token_ids == expected


def test_large_layers_need_little_memory_beside_the_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qtool.formats.pieces.MAX_DEQUANTIZED_ELEMENTS", 1 << 24)
    with torch.device("cuda"):
        layer = Linear4bit(FourBitLayer(28672, 8192, "nf4", 64, torch.bfloat16, True))
        x = torch.randn(1, 8192, dtype=torch.bfloat16)
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.zero_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    layer(x)
    # absmax in float32 (14 MiB), one piece in bfloat16 (32 MiB), its unpacking in float32, cuBLAS
    assert torch.cuda.max_memory_allocated() - before < 320 << 20
