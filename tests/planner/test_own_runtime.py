"""The plan of qtool's own runtime against its code, run and counted on the meta device."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from qtool.architecture import KNOWN_MODEL_TYPES
from qtool.checkpoint import Checkpoint
from qtool.exact.peak import exact_peak
from qtool.exact.records import ExactRequest
from qtool.exact.storages import LiveStorages
from qtool.planner import activations, own_runtime, rounded_products
from qtool.planner.memory import MemoryBudget
from qtool.planner.model import describe_model
from qtool.planner.records import Workload
from qtool.planner.reference_models import reference_models
from qtool.runtime import products
from qtool.runtime.decoders import caches
from qtool.runtime.decoders.network import LENGTH_DEPENDENT_ROTARY, Network
from qtool.runtime.linear import LinearInt8
from qtool.runtime.model_config import find_model_class, parse_config
from tests.architecture import families
from tests.planner.plans import plan_of
from tests.planner.storages import allocated_peak_bytes

# Of fused types, with more sequences than the kernels take.
MANY = {
    "meta-llama--Meta-Llama-3.1-8B": 0.005,
    "mlc--gemma2_2b": 0.02,  # scores in memory
    "mlc--gemma3_1b_it": 0.06,  # windows, of two kinds of layers the masks of one
}
NUM_LAYERS = 4
NOT_IN_TRANSFORMERS = {"kimi_k2"}
FUSED = ["meta-llama--Meta-Llama-3.1-8B", "Qwen--Qwen3-8B", "mirror--medgemma-27b-it"]
GRAPH = {
    "mlc--phi-3_5": 0.005,  # rotary frequencies that change with the length
    "mlc--starcoder2": 0.04,  # a copy of a chunk's hidden state is left out
    "mlc--deepseek_v2_lite": 0.08,  # latents, made into keys and values of the whole cache
    "Qwen--Qwen3-30B-A3B": 0.01,
}
# Whether heads share keys and values.
FLOAT32 = {
    "meta-llama--Meta-Llama-3.1-8B": True,
    "mlc--smollm2_135m": True,
    "mlc--llama2_7b": False,
}


def few_layers(test_data, name):
    config = json.loads((test_data / "configs" / name / "config.json").read_text())
    config = {**config, "num_hidden_layers": NUM_LAYERS, "dtype": "bfloat16"}
    config.pop("quantization_config", None)
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = config["layer_types"][:NUM_LAYERS]
    return config


def path_and_bytes(config, quant, workload):
    """The planned path; planned and counted bytes beside the weights."""
    model = describe_model(Checkpoint.of_config("bare", config))
    budget = MemoryBudget.of(model, quant, workload)
    plan = budget.plan(workload)
    beside = ("weights", "workspace", "runtime_overhead", "allocator")
    planned = sum(part.bytes for name, part in plan.components.items() if name not in beside)
    request = ExactRequest(
        quant=quant,
        runtime=workload.runtime,
        context=workload.context,
        batch=workload.batch,
        prefill_chunk=workload.prefill_chunk,
    )
    peak = exact_peak(config, request)
    own = budget._own_runtime(workload)
    return own and own.path, planned, peak.allocated_peak_bytes - peak.weights_bytes


@pytest.mark.skipif(find_spec("cupy") is None, reason="the fused path needs CuPy")
@pytest.mark.parametrize(
    "workload",
    [
        Workload(300, 2),
        Workload(3000),
        Workload(3000, 3, prefill_chunk=128),
        Workload(131_072, prefill_chunk=8192),
    ],
)
@pytest.mark.parametrize("quant", ["bf16", "int8", "nf4-dq"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_prompts_allocate_what_is_planned(test_data, name, quant, workload):
    path, planned, found = path_and_bytes(few_layers(test_data, name), quant, workload)
    assert path == "fused"
    assert planned == pytest.approx(found, rel=0.01)


@pytest.mark.skipif(find_spec("cupy") is None, reason="the fused path needs CuPy")
@pytest.mark.parametrize("quant", ["int8", "nf4-dq"])
def test_chunks_of_few_tokens_are_not_dequantized(test_data, quant):
    """What is left are angles, which the count leaves out, and the cache."""
    config = few_layers(test_data, "meta-llama--Meta-Llama-3.1-8B")
    few, more = Workload(3000, 2, prefill_chunk=32), Workload(3000, 2, prefill_chunk=33)
    path, planned, found = path_and_bytes(config, quant, few)
    assert path == "fused" and planned == pytest.approx(found, rel=0.03)
    weight_bytes = 4096 * 14336 * 2  # of the largest layer, in floating point
    assert path_and_bytes(config, quant, more)[1] - planned > 0.9 * weight_bytes


@pytest.fixture
def rounding(monkeypatch):
    """INT8 layers round activations, and the kernels for it do nothing: what is left are their
    buffers, made by the runtime's own code."""
    pytest.importorskip("cupy")
    from cupy_kernels import int8_products as kernels
    from qtool.exact import own_runtime as exact
    from qtool.runtime import int8_products
    from qtool.runtime.decoders.fused_prompt import PromptLaunches

    class Launches(exact._NoLaunches):
        multiply_rounded = PromptLaunches.multiply_rounded

    def multiply(x, codes, scb, bias=None, *, threshold=None):
        if exact.reads_packed(x):
            return x.new_empty(*x.shape[:-1], codes.shape[0])
        return int8_products.multiply_rounded(x, codes, scb, bias, threshold)

    for name in ("find_outliers", "round_activations", "finish_product"):
        monkeypatch.setattr(kernels, name, lambda *arguments, **named: None)
    monkeypatch.setattr(int8_products, "_stream", lambda x: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(exact, "_NoLaunches", Launches)
    monkeypatch.setattr(exact, "_linear_int8", multiply)

    def begin(threshold):
        monkeypatch.setattr(LinearInt8, "threshold", threshold)

    return begin


@pytest.mark.parametrize("threshold", [0, 6.0])
@pytest.mark.parametrize(
    "workload",
    [Workload(300, 2), Workload(3000), Workload(40_000, prefill_chunk=4096), Workload(400, 9)],
)
def test_rounded_activations_take_what_is_planned(test_data, rounding, workload, threshold):
    """The last goes the graph path, where the count leaves least out."""
    rounding(threshold)
    config = few_layers(test_data, "meta-llama--Meta-Llama-3.1-8B")
    asked = replace(workload, int8_threshold=threshold)
    path, planned, found = path_and_bytes(config, "int8", asked)
    assert path == ("graph" if workload.batch == 9 else "fused")
    assert planned == pytest.approx(found, rel=0.02)
    rounded, plain = (plan_of_config(config, "int8", it) for it in (asked, workload))
    assert rounded["dequant_buffer"] == 0 or path == "graph"
    assert rounded != plain


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("threshold", [0, 6.0])
@pytest.mark.parametrize(
    ("tokens", "columns", "rows"),
    [(300, 4096, 14336), (5000, 14336, 4096), (5000, 1024, 65536), (2048, 4096, 4096)],
)
def test_one_product_takes_what_is_planned(tokens, columns, rows, threshold):
    from qtool.runtime import int8_products

    x = torch.empty(tokens, columns, dtype=torch.bfloat16, device="meta")
    codes = torch.empty(rows, columns, dtype=torch.int8, device="meta")
    scb = torch.empty(rows, device="meta")
    storages = LiveStorages()
    with storages:
        int8_products.multiply_rounded(x, codes, scb, None, threshold)
    planned = rounded_products.RoundedProducts(threshold != 0)
    beside = planned.bytes_in_pieces(tokens, columns, rows)
    there_bytes = x.nbytes + codes.nbytes + 2 * tokens * rows  # and the result
    assert storages.peak_bytes - there_bytes == pytest.approx(beside, rel=0.01)


def plan_of_config(config, quant, workload):
    """Bytes of the components."""
    model = describe_model(Checkpoint.of_config("bare", config))
    plan = MemoryBudget.of(model, quant, workload).plan(workload)
    return {name: part.bytes for name, part in plan.components.items()}


def test_the_threshold_is_the_config_s_where_that_is_asked_for(test_data):
    config = few_layers(test_data, "meta-llama--Meta-Llama-3.1-8B")
    none_left = {**config, "quantization_config": {"llm_int8_threshold": 0.0}}

    def sizes(of, threshold, quant="int8"):
        return plan_of_config(of, quant, Workload(3000, int8_threshold=threshold))

    assert sizes(config, "config") == sizes(config, 6.0) != sizes(config, 0)
    assert sizes(none_left, "config") == sizes(config, 0)
    assert sizes(config, 6.0, "nf4") == sizes(config, None, "nf4")
    wide = {**config, "dtype": "float32"}
    assert sizes(wide, 6.0) == sizes(wide, None)  # a GPU rounds 16 bit only


@pytest.mark.parametrize("quant", ["bf16", "nf4-dq"])
@pytest.mark.parametrize("name", GRAPH)
def test_other_prompts_allocate_what_is_planned(test_data, name, quant):
    config = few_layers(test_data, name)
    for workload in (Workload(300, 2), Workload(3000, 12), Workload(5000)):
        path, planned, found = path_and_bytes(config, quant, workload)
        assert path == "graph"
        assert planned == pytest.approx(found, rel=GRAPH[name]), workload


@pytest.mark.parametrize("name", MANY)
def test_many_sequences_go_another_path(test_data, name):
    config = few_layers(test_data, name)
    path, planned, found = path_and_bytes(config, "nf4", Workload(3000, 9))
    assert path == "graph" and planned == pytest.approx(found, rel=MANY[name])


@pytest.mark.skipif(find_spec("cupy") is None, reason="the fused path needs CuPy")
@pytest.mark.parametrize("quant", ["bf16", "nf4-dq"])
def test_prompts_of_capped_scores_go_through_operations(test_data, quant):
    """The rest of the fused path is there, its angles above all, which the count leaves out."""
    config = few_layers(test_data, "mlc--gemma2_2b")
    for workload in (Workload(300, 2), Workload(5000)):
        path, planned, found = path_and_bytes(config, quant, workload)
        assert path == "fused"
        assert planned == pytest.approx(found, rel=0.02)
    uncapped = {**config, "attn_logit_softcapping": None}
    path, planned, found = path_and_bytes(uncapped, quant, Workload(5000))
    assert path == "fused"
    assert planned == pytest.approx(found, rel=0.02)
    assert planned < 0.7 * path_and_bytes(config, quant, Workload(5000))[1]


# -- float32 --------------------------------------------------------------------------------------

NARROW = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "vocab_size": 512,
    "dtype": "float32",
}


@pytest.mark.parametrize("runtime", ["qtool", "transformers"])
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", FLOAT32)
def test_prompts_in_float32_allocate_what_is_planned(test_data, name, batch, runtime):
    """Heads in groups are spelled out, others fused."""
    config = few_layers(test_data, name)
    for context, chunk in ((300, 1024), (3000, 1024), (3000, 128)):
        asked = Workload(context, batch, runtime=runtime, prefill_chunk=chunk)
        path, planned, found = path_and_bytes(config, "fp32", asked)
        assert path == ("graph" if runtime == "qtool" else None)
        assert planned == pytest.approx(found, rel=0.02), (context, chunk)


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_prompts_in_float32_take_what_pytorch_hands_out(tmp_path, kv_heads, batch):
    """The runtime's own code on the processor, where PyTorch is told to spell attention out as it
    has to on a GPU."""
    raw = {**NARROW, "num_key_value_heads": kv_heads}
    config = parse_config(raw, "narrow")
    model = find_model_class(config)._from_config(config, dtype=torch.float32).eval()
    ids = torch.zeros(batch, 500, dtype=torch.int64)

    def prefill():
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
            cache = caches.fixed_cache(model.config, 512)
            Network(model, 512).prefill(ids, 0, cache, in_chunks=True)

    planned = plan_of_config(raw, "fp32", Workload(500, batch))
    beside = ("kv_cache", "activations", "logits", "dequant_buffer")
    found = allocated_peak_bytes(prefill, tmp_path)
    assert sum(planned[name] for name in beside) == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("name", FLOAT32)
def test_only_float32_heads_in_groups_are_spelled_out(test_data, monkeypatch, name):
    config = few_layers(test_data, name)
    workloads = [Workload(3000, 12), Workload(3000, 12, runtime="transformers")]

    def sizes(quant):
        return [plan_of_config(config, quant, workload) for workload in workloads]

    quants = ("fp32", "bf16", "int8", "nf4-dq")
    before = {quant: sizes(quant) for quant in quants}
    monkeypatch.setattr(activations, "_grouped_heads", lambda architecture: ())
    for quant in quants:
        is_same = not (FLOAT32[name] and quant == "fp32")
        assert (sizes(quant) == before[quant]) == is_same, quant


def test_a_decoded_token_on_several_gpus_repeats_the_cache(test_data):
    """Keys and values once per head, and scaled keys; nothing is spelled out in 16 bit."""
    config = few_layers(test_data, "meta-llama--Meta-Llama-3.1-8B")
    asked = Workload(32_768, gpus=2)
    planned = plan_of_config(config, "fp32", asked)["activations"]
    repeated_bytes = 3 * 32_768 * 4096 * 4
    assert planned == pytest.approx(repeated_bytes, rel=0.01)
    assert plan_of_config(config, "bf16", asked)["activations"] < 0.45 * planned


def test_more_tokens_than_a_window_take_no_less():
    raw = {**NARROW, "model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 200}
    for runtime in ("qtool", "transformers"):
        sizes = [
            sum(plan_of_config(raw, "fp32", Workload(context, runtime=runtime)).values())
            for context in (1, 100, 199, 200, 201, 256, 257, 500, 5000)
        ]
        assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("changes", "num_angles"),
    [({}, 2), ({"no_rope_layers": [1] * 8}, 1), ({"no_rope_layer_interval": 9}, 1)],
)
def test_layers_that_turn_nothing_have_angles_of_their_own(changes, num_angles):
    config = {"model_type": "smollm3", "num_hidden_layers": 8, "dtype": "bfloat16"} | changes
    model = describe_model(Checkpoint.of_config("bare", config))
    weights = MemoryBudget.of(model, "nf4", Workload(100)).weights
    block = own_runtime.FusedBlock.of(model.architecture, config, weights)
    assert block is not None and block.num_angles == num_angles


def test_the_limits_are_the_runtime_s():
    from qtool.runtime.decoders import blocks

    assert own_runtime.CAPACITY_STEP == caches.CAPACITY_STEP
    assert own_runtime.FEW_TOKENS == products.MAX_PACKED_TOKENS
    assert own_runtime.FUSED_TYPES == blocks.MODEL_TYPES
    assert set(LENGTH_DEPENDENT_ROTARY) == own_runtime.LENGTH_DEPENDENT_ROTARY
    pytest.importorskip("cupy")
    from cupy_kernels import decode_attention, linear_few
    from qtool.runtime import int8_products
    from qtool.runtime.decoders import fused_attention

    assert rounded_products.MAX_SUMS == int8_products.MAX_SUMS
    assert rounded_products.MAX_ROUNDED_ROWS == int8_products.MAX_ROUNDED_ROWS
    assert own_runtime.FUSED_BATCH == linear_few.MAX_TOKENS
    assert own_runtime.FUSED_ROTARY == fused_attention.STATIC_ROTARY
    assert own_runtime.ANGLE_POSITIONS == fused_attention.ANGLE_POSITIONS
    assert own_runtime.LARGEST_GROUP == decode_attention.LARGEST_GROUP
    assert own_runtime.LARGEST_HEAD_DIM == decode_attention.LARGEST_HEAD_DIM
    kind = linear_few.LinearKind("nf4", own_runtime.LARGEST_FUSED_HIDDEN, "BF16", norm="rms")
    h200 = linear_few.SharedMemory(232_448, 233_472, 132)
    linear_few.specialise(kind, 3, 1, h200)
    with pytest.raises(ValueError, match="shared memory"):
        linear_few.specialise(replace(kind, columns=kind.columns + 2048), 3, 1, h200)


@pytest.mark.parametrize("model_type", sorted(set(KNOWN_MODEL_TYPES) - NOT_IN_TRANSFORMERS))
def test_caches_are_of_the_kind_that_is_planned(model_type):
    config = parse_config({"model_type": model_type, **families.TINY[model_type]}, "tiny")
    with torch.device("meta"):
        model = find_model_class(config)._from_config(config)
    fixed = caches.fixed_cache(model.config, 64) if model._can_compile_fullgraph else None
    assert (fixed is None) == (model_type in own_runtime.EAGER_TYPES)
    cache = fixed or caches.growing_cache(model.config)
    takes_chunks = caches.takes_chunks(cache, model.config.model_type)
    assert takes_chunks == (model_type not in own_runtime.WHOLE_TYPES)


def test_a_growing_cache_is_as_long_as_planned():
    for chunk in (1, 100, 512):
        layer, length = caches.GrowingLayer(), 0
        for tokens in (chunk,) * 7:
            length += tokens
            layer.update(*(torch.empty(1, 1, tokens, 8, device="meta"),) * 2)
            room = layer.keys.untyped_storage().nbytes() // (8 * 4)
            assert room == own_runtime.grown_tokens(length, chunk)


def test_a_smaller_chunk_takes_less():
    model = reference_models()[2].describe()
    sizes = [
        plan_of(model, "nf4-dq", context=8192, prefill_chunk=chunk).components["activations"].bytes
        for chunk in (64, 512, 4096)
    ]
    assert sizes == sorted(sizes) and 4 * sizes[0] < sizes[2]
    others = {plan_of(model, "bf16", runtime="vllm", prefill_chunk=n).peak_bytes for n in (64, 512)}
    assert len(others) == 1


def test_the_cache_is_whole_from_the_start():
    model = reference_models()[2].describe()
    sizes = {
        context: plan_of(model, "nf4", context=context).components["kv_cache"].bytes
        for context in (1, 64, 65)
    }
    assert sizes[1] == sizes[64] == 64 * 131_072 and sizes[65] == 2 * sizes[64]
