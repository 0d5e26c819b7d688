"""A step of `qtool finetune` on a GPU: what is handed out was planned, and the loss is right there.

Published widths, few layers, random weights.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from qtool.checkpoint import Checkpoint
from qtool.planner.memory import MemoryBudget
from qtool.planner.model import describe_model
from qtool.planner.records import Tuning, Workload
from tests.planner.test_on_gpu import allocated_before

pytestmark = pytest.mark.gpu

NUM_LAYERS = 4
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "8B": ("meta-llama--Meta-Llama-3.1-8B", "nf4-dq", {}),
    "INT8": ("meta-llama--Meta-Llama-3.1-8B", "int8", {}),
    "no dropout": ("meta-llama--Meta-Llama-3.1-8B", "nf4-dq", {"lora_dropout": 0.0}),
    "all kept": ("meta-llama--Meta-Llama-3.1-8B", "nf4-dq", {"gradient_checkpointing": False}),
    "norms of queries and keys": ("Qwen--Qwen3-8B", "nf4", {}),
    "the loss is the peak": ("Qwen--Qwen3-0.6B", "nf4-dq", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_takes_what_was_planned(test_data, case):
    import torch
    from peft import LoraConfig

    from qtool.finetune.head_loss import use_chunked_loss
    from qtool.finetune.lora_layers import wrap_with_lora
    from qtool.optim import AdamW8bit
    from qtool.runtime.random_model import build_random_model

    name, quant, changes = CASES[case]
    config = json.loads((test_data / "configs" / name / "config.json").read_text())
    config = {**config, "num_hidden_layers": NUM_LAYERS, "dtype": "bfloat16"}
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:NUM_LAYERS]
    tuning = Tuning(optimizer="adamw-8bit", **changes)
    asked = Workload(context=2048, batch=2, mode="qlora", tuning=tuning)
    planned = MemoryBudget.of(
        describe_model(Checkpoint.of_config("bare", config)), quant, asked
    ).plan(asked)

    before = allocated_before()
    with build_random_model(config, quant, device="cuda") as loaded:
        network = loaded.model.requires_grad_(False)
        network.config.use_cache = False
        lora = LoraConfig(
            r=tuning.lora_r, lora_dropout=tuning.lora_dropout, target_modules="all-linear"
        )
        model = wrap_with_lora(network, lora)
        assert use_chunked_loss(model)
        if tuning.gradient_checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = AdamW8bit(trained, lr=1e-4)
        ids = torch.randint(0, config["vocab_size"], (2, 2048), device="cuda")
        for _ in range(2):  # states and workspaces are there in the second
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        found = torch.cuda.max_memory_allocated() - before
    assert planned.allocated_peak_bytes == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_loss_and_its_gradients(dtype, softcap, trained):
    """Several chunks, one of them short, against float64."""
    import torch
    from torch.nn import functional

    from qtool.finetune.loss import LogitRule, chunked_causal_loss

    generator = torch.Generator().manual_seed(3)
    words, width = 128_256, 256
    hidden = torch.randn(2, 700, width, generator=generator)
    weight = torch.randn(words, width, generator=generator) * 0.1
    labels = torch.randint(0, words, (2, 700), generator=generator).cuda()
    labels[0, :90] = -100
    hidden, weight = (t.to("cuda", getattr(torch, dtype)) for t in (hidden, weight))
    hidden.requires_grad_(), weight.requires_grad_(trained)
    loss = chunked_causal_loss(hidden, weight, labels, rule=LogitRule(0.5, softcap))
    loss.backward()

    wide = hidden.detach().double().requires_grad_()
    wide_weight = weight.detach().double().requires_grad_(trained)
    logits = 0.5 * wide @ wide_weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[dtype]
    pairs = [(loss.detach(), expected.detach()), (hidden.grad, wide.grad)]
    if trained:
        pairs.append((weight.grad, wide_weight.grad))
    for found, exact in pairs:
        assert ((found.double() - exact).norm() / exact.norm()).item() < tolerance
