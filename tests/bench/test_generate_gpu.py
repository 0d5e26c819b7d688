"""`qtool bench generate` on an NVIDIA GPU: random models made there, and everybody's speed."""

from __future__ import annotations

import pytest
import torch

from qtool.bench.generate import GenerateBenchRequest, bench_generate
from qtool.bench.model_shapes import MODEL_SHAPES
from qtool.runtime.random_model import build_random_model

pytestmark = pytest.mark.gpu


def test_a_model_of_a_billion_parameters_generates_at_a_share_of_the_bandwidth():
    pytest.importorskip("bitsandbytes")
    request = GenerateBenchRequest(
        shape="llama-3.2-1b",
        prompts=(64,),
        new_tokens=64,
        batches=(1, 4),
        repeats=2,
        against="bitsandbytes",
        device="cuda",
    )
    result = bench_generate(request)
    assert result.warnings == ()
    assert [run.engine for run in result.runs] == ["qtool", "transformers+bitsandbytes"] * 2
    for run in result.runs:
        assert 0 < run.bandwidth_share < 1.1
        # 1 GB of packed weights, embedding and head, which both engines share.
        assert 0.7e9 < run.allocated_peak_bytes < 4e9
    assert all(run.path in ("fused", "graph", "eager") for run in result.runs[::2])


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp4", "nf4-dq"])
def test_random_models_are_made_on_the_device(precision):
    config = MODEL_SHAPES["llama-3.2-1b"] | {"num_hidden_layers": 2}
    loaded = build_random_model(config, precision, device="cuda")
    tensors = [*loaded.model.parameters(), *loaded.model.buffers()]
    assert all(tensor.device.type == "cuda" for tensor in tensors)
    with torch.inference_mode():
        logits = loaded.model(torch.arange(9, device="cuda")[None]).logits
    assert bool(logits.isfinite().all()) and logits.std() > 0.05


def test_few_layers_of_seventy_billion_parameters_tell_of_all():
    request = GenerateBenchRequest(
        shape="llama-3.1-70b-4layers", prompts=(16,), new_tokens=32, repeats=2, device="cuda"
    )
    # Where other tests use the GPU at the same time, more layers may take no more time.
    runs = (run for _ in range(5) for run in bench_generate(request).runs)
    scaled = next(run.scaled for run in runs if run.scaled is not None)
    assert (scaled.layers, scaled.measured_layers) == (80, (2, 4))
    assert scaled.decode_tok_s > 0 and scaled.bandwidth_share > 0
