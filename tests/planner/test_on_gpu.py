"""Prompts through transformers' and qtool's runtime on a GPU: what is handed out was planned.

Published widths, few layers, random weights; attention and experts as transformers chooses them.
"""

from __future__ import annotations

import gc
import json
from dataclasses import replace

import pytest

from qtool.checkpoint import Checkpoint
from qtool.planner.memory import MemoryBudget
from qtool.planner.model import describe_model
from qtool.planner.own_runtime import FEW_TOKENS, FusedBlock
from qtool.planner.records import Workload
from tests.architecture.oracle import build_model

pytestmark = pytest.mark.gpu

NUM_LAYERS = 4
# Relative to all that was handed out. Experts: grouped products sort their rows within kernels.
# Gemma 2 is not among them: transformers 5.17 fuses its attention, 5.23 does not.
CASES = {
    "mlc--llama3_2_3b": 0.005,
    "Qwen--Qwen3-8B": 0.005,
    "mlc--phi-3_5": 0.005,
    "mistralai--Mixtral-8x7B-v0.1": 0.02,
    "Qwen--Qwen3-30B-A3B": 0.02,
    "mlc--deepseek_v2_lite": 0.02,
    "openai--gpt-oss-120b": 0.03,
}


@pytest.mark.parametrize(("batch", "context"), [(1, 2048), (8, 256)])
@pytest.mark.parametrize("name", CASES)
def test_prompts_take_what_was_planned(test_data, name, batch, context):
    import torch
    from transformers import DynamicCache

    config = json.loads((test_data / "configs" / name / "config.json").read_text())
    config = {**config, "num_hidden_layers": NUM_LAYERS, "dtype": "bfloat16"}
    for key in ("quantization_config", "layer_types"):
        value = config.pop(key, None)
        if isinstance(value, list):
            config[key] = value[:NUM_LAYERS]
    asked = Workload(context, batch, runtime="transformers")
    planned = MemoryBudget.of(
        describe_model(Checkpoint.of_config("bare", config)), "bf16", asked
    ).plan(asked)

    torch.manual_seed(0)
    before = allocated_before()
    model = build_model(config, config["architectures"][0], device="cuda").to(torch.bfloat16).eval()
    ids = torch.randint(0, config["vocab_size"], (batch, context), device="cuda")

    def prefill():
        cache = DynamicCache(config=model.config.get_text_config())
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits.float(), cache

    with torch.no_grad():
        prefill()  # kernels are loaded and workspaces made
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        prefill()
        found = torch.cuda.max_memory_allocated() - before
    assert planned.allocated_peak_bytes == pytest.approx(found, rel=CASES[name])


def allocated_before() -> int:
    """What other tests left: not PyTorch's workspaces, which a plan counts."""
    import torch

    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def _moments_on_hopper(block, tokens, rounding, plan=FusedBlock.moments):
    """A plan is for any GPU. There packed layers are dequantized only when a few tokens through
    them are compared, before the first prompt.
    """
    for moment in plan(block, tokens, rounding):
        yield replace(moment, dequant_buffer_bytes=0)
    yield from plan(block, FEW_TOKENS + 1, rounding)


@pytest.mark.parametrize("context", [128, 4096, 32_768])
@pytest.mark.parametrize("quant", ["bf16", "int8", "nf4-dq"])
@pytest.mark.parametrize("name", ["meta-llama--Meta-Llama-3.1-8B", "mlc--phi-3_5"])
def test_qtool_s_own_runtime_takes_what_was_planned(test_data, monkeypatch, name, quant, context):
    """Weights, cache, prompt in chunks and a few tokens, within 1 %."""
    import torch

    from cupy_kernels.loader import compiles_for
    from qtool.planner.own_runtime import OwnRuntime
    from qtool.runtime.decoders.choose import choose_decoder
    from qtool.runtime.decoders.protocol import Sampling
    from qtool.runtime.random_model import build_random_model

    config = json.loads((test_data / "configs" / name / "config.json").read_text())
    config = {**config, "num_hidden_layers": NUM_LAYERS, "dtype": "bfloat16"}
    config.pop("quantization_config", None)
    asked = Workload(context)
    planned_model = describe_model(Checkpoint.of_config("bare", config))
    budget = MemoryBudget.of(planned_model, quant, asked)
    own = OwnRuntime.of(planned_model.architecture, config, budget.weights, asked)

    if quant != "bf16" and compiles_for("sm_90"):
        monkeypatch.setattr(FusedBlock, "moments", _moments_on_hopper)

    before = allocated_before()
    with build_random_model(config, quant, device="cuda") as loaded:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        decoder = choose_decoder(loaded, context)
        if "no graph of" in decoder.path_reason:  # depends on the version of transformers
            pytest.skip(decoder.path_reason)
        assert decoder.path == own.path
        ids = torch.randint(0, config["vocab_size"], (1, context - 8))
        decoder.prefill(ids, 0)
        list(decoder.decode(Sampling(), 8))
        found = torch.cuda.max_memory_allocated() - before
        decoder.close()
    assert budget.plan(asked).allocated_peak_bytes == pytest.approx(found, rel=0.01)
