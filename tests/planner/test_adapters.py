"""The plan of an adapter against PEFT, the fused path's copies, and prompts that run with it."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch

from qtool.checkpoint import Checkpoint
from qtool.errors import QtoolError
from qtool.exact.peak import exact_peak
from qtool.exact.records import ExactRequest
from qtool.planner import adapters
from qtool.planner.adapters import PREFIX
from qtool.planner.memory import MemoryBudget
from qtool.planner.model import describe_model
from qtool.planner.records import Workload
from tests.planner.adapters import adapter_in, adapter_of, allocated_bytes, planned
from tests.planner.test_own_runtime import few_layers
from tests.runtime.decoders.adapted import OTHER_ADAPTERS, adapt

LLAMA = "meta-llama--Meta-Llama-3.1-8B"
NOT_IN_PLAN = ("weights", "workspace", "runtime_overhead", "allocator")
PLAIN = [
    ("llama", {}),
    ("llama", {"r": 16, "use_rslora": True}),
    ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 12}),
    ("llama", {"target_modules": ["o_proj"], "layers_to_transform": [1]}),
    ("qwen2", {"rank_pattern": {"v_proj": 24, "down_proj": 1}}),
    ("phi3", {}),
    ("gemma3_text", {"r": 8}),
]


def loaded(name, quant="nf4-dq"):
    pytest.importorskip("cupy", exc_type=ImportError)
    from tests.runtime.decoders.test_fused import load

    return load(name, quant)


# ---- What PEFT holds ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"), [*PLAIN, *(("llama", it) for it, _ in OTHER_ADAPTERS)]
)
def test_peft_holds_what_is_planned(name, settings):
    model = loaded(name)
    before = {tensor.untyped_storage()._cdata for tensor in model.state_dict().values()}
    adapt(model, **settings)
    added = [it for it in model.parameters() if it.untyped_storage()._cdata not in before]
    adapter = adapter_in(model)
    assert adapter.layers or adapter.more_elements or adapter.copied_elements
    assert adapter.held_bytes(model.dtype.itemsize) == allocated_bytes(added)


def test_trained_biases_take_the_place_of_the_base_s():
    adapter = planned(
        {"peft_type": "LORA", "bias": "all"},
        {f"{PREFIX}model.layers.0.self_attn.q_proj.bias": (64,)},
    )
    assert adapter.held_bytes(2) == 0


# ---- What the fused path has besides ------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "settings"), PLAIN)
def test_the_fused_path_copies_what_is_planned(name, settings, batch):
    model = adapt(loaded(name), **settings)
    from qtool.runtime.decoders.blocks import describe_network
    from qtool.runtime.decoders.fused_adapters import AdapterLaunches, adapters_of

    blocks = adapters_of(describe_network(model))
    launches = AdapterLaunches(blocks, batch, torch.device("cpu"))
    found = [launches._inner, launches._x_is_there]
    for group in (group for block in blocks for group in block.groups):
        found += [group.a, group.scales, *(part.b for part in group.parts if part is not None)]
    adapter = adapter_in(model)
    assert adapter.is_plain
    assert adapter.copies_bytes(batch, model.dtype.itemsize) == allocated_bytes(found)


@pytest.mark.parametrize("settings", [settings for settings, _ in OTHER_ADAPTERS])
def test_other_adapters_go_another_path(settings):
    from qtool.runtime.decoders.blocks import NotFusable, describe_network

    model = adapt(loaded("llama"), **settings)
    with pytest.raises(NotFusable):
        describe_network(model)
    adapter = adapter_in(model)
    assert not adapter.is_plain and adapter.notes()


def test_the_rank_is_filled_up_as_kernels_want_it():
    linear_few = pytest.importorskip("cupy_kernels.linear_few", exc_type=ImportError)
    assert adapters.RANK_MULTIPLE == linear_few.RANK_MULTIPLE


# ---- Prompts ------------------------------------------------------------------------------------

PROMPTS = [
    # Name, quant, workload, settings of the adapter, path.
    (LLAMA, "nf4-dq", Workload(3000), {}, "fused"),
    (LLAMA, "int8", Workload(300, 2), {"r": 64}, "fused"),
    (LLAMA, "bf16", Workload(3000, 3), {"target_modules": ["q_proj", "v_proj"], "r": 12}, "fused"),
    (LLAMA, "nf4-dq", Workload(40), {}, "fused"),
    (LLAMA, "nf4-dq", Workload(3000, 9), {}, "graph"),
    (LLAMA, "nf4-dq", Workload(3000), {"use_dora": True}, "graph"),
    (LLAMA, "bf16", Workload(3000), {"use_dora": True, "target_modules": ["up_proj"]}, "graph"),
    ("mlc--phi-3_5", "bf16", Workload(3000), {"r": 64}, "graph"),
    ("Qwen--Qwen3-30B-A3B", "nf4-dq", Workload(3000), {"target_modules": ["q_proj"]}, "graph"),
]


@pytest.mark.parametrize(("name", "quant", "workload", "settings", "path"), PROMPTS)
def test_prompts_allocate_what_is_planned(test_data, name, quant, workload, settings, path):
    """Beside the weights, all of it, counted on the meta device with PEFT's own layers."""
    if path == "fused":
        pytest.importorskip("cupy", exc_type=ImportError)
    config = few_layers(test_data, name)
    model = describe_model(Checkpoint.of_config("bare", config))
    adapter = adapter_of(model.architecture, **settings)
    asked = replace(workload, adapter=adapter)
    budget = MemoryBudget.of(model, quant, asked)
    plan = budget.plan(asked)
    request = ExactRequest(
        quant=quant, context=asked.context, batch=asked.batch, adapter=adapter.config
    )
    peak = exact_peak(config, request)
    assert budget._own_runtime(asked).path == path
    sizes = {name: part.bytes for name, part in plan.components.items() if name not in NOT_IN_PLAN}
    found = peak.allocated_peak_bytes - peak.weights_bytes
    assert sum(sizes.values()) == pytest.approx(found, rel=0.01)
    held = peak.breakdown["adapters"]
    assert held <= sizes["adapters"] and (held == sizes["adapters"]) == (path == "graph")
    without = MemoryBudget.of(model, quant, workload).plan(workload)
    more_workspace = plan.components["workspace"].bytes - without.components["workspace"].bytes
    assert plan.steady_bytes - without.steady_bytes == sizes["adapters"] + more_workspace
    assert plan.load_peak_bytes - without.load_peak_bytes == held + adapter.file_bytes


def test_several_gpus_share_it(test_data):
    model = describe_model(Checkpoint.of_config("bare", few_layers(test_data, LLAMA)))
    adapter = adapter_of(model.architecture)
    asked = Workload(3000, gpus=2, adapter=adapter)
    plan = MemoryBudget.of(model, "nf4", asked).plan(asked)
    assert plan.components["adapters"].bytes == adapter.held_bytes(2) // 2


@pytest.mark.parametrize("runtime", ["transformers", "vllm"])
def test_other_runtimes_do_not_count_it(test_data, runtime):
    model = describe_model(Checkpoint.of_config("bare", few_layers(test_data, LLAMA)))
    asked = Workload(3000, runtime=runtime, adapter=adapter_of(model.architecture))
    plan = MemoryBudget.of(model, "nf4", asked).plan(asked)
    assert "adapters" not in plan.components


# ---- An adapter of another model ----------------------------------------------------------------


def test_an_adapter_of_another_size_is_refused(test_data):
    model = describe_model(Checkpoint.of_config("bare", few_layers(test_data, LLAMA)))
    module = "model.layers.0.self_attn.k_proj"
    shapes = {
        f"{PREFIX}{module}.lora_A.weight": (8, 4096),
        f"{PREFIX}{module}.lora_B.weight": (4096, 8),
    }
    adapter = planned({"peft_type": "LORA", "r": 8}, shapes)
    with pytest.raises(QtoolError) as caught:
        MemoryBudget.of(model, "nf4", Workload(300, adapter=adapter))
    assert caught.value.kind == "bad_file" and "adapter_model.safetensors" in caught.value.message
    assert f"{module}: expected a weight [1024, 4096]" in caught.value.message
    elsewhere = {name.replace("k_proj", "kk_proj"): shape for name, shape in shapes.items()}
    adapter = planned({"peft_type": "LORA", "r": 8}, elsewhere)
    with pytest.raises(QtoolError, match="the model has no"):
        MemoryBudget.of(model, "nf4", Workload(300, adapter=adapter))
