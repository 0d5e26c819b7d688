"""The closed forms of a prefill's peak against what transformers' and qtool's modules allocate."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations import sdpa_attention

from qtool.architecture import build_architecture
from qtool.exact.models import tensors
from qtool.exact.own_runtime import products_of_a_gpu
from qtool.exact.peak import exact_peak
from qtool.exact.records import ExactRequest
from qtool.exact.storages import LiveStorages
from qtool.planner import weights
from qtool.planner.activations import (
    ATTENTION_MATRIX_BYTES,
    LARGEST_GROUPED_HEAD,
    NO_BUFFER,
    DequantBuffer,
    GroupedHeads,
    LayerShape,
    prefill_peak,
)
from qtool.planner.kv_cache import kv_cache_bytes
from qtool.runtime import dequantize, linear, products
from tests.architecture import families
from tests.architecture.oracle import build_model
from tests.planner.storages import allocated_peak_bytes

MIB = 1 << 20
CONTEXT = 2048

# Widths apart from each other, so that no term stands in for another.
SIZES = {
    "hidden_size": 640,
    "intermediate_size": 3000,
    "num_hidden_layers": 3,
    "num_attention_heads": 10,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}
GROUPED = {**SIZES, "num_key_value_heads": 5}
ROUTED = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 304}
LATENT = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 304,
    "first_k_dense_replace": 1,
    "q_lora_rank": 128,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "head_dim": 32,
}
GEMMA = {**GROUPED, "head_dim": 64, "query_pre_attn_scalar": 64}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "llama, narrow MLP": ("LlamaForCausalLM", {**GROUPED, "intermediate_size": 64}),
    "llama, wide cache": (
        "LlamaForCausalLM",
        {**SIZES, "num_key_value_heads": 10, "intermediate_size": 64},
    ),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": None}),
    "mistral, sliding": ("MistralForCausalLM", {**GROUPED, "sliding_window": 512}),
    "mistral, sliding, narrow MLP": (
        "MistralForCausalLM",
        {**GROUPED, "sliding_window": 512, "intermediate_size": 64},
    ),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 64}),
    "granite": ("GraniteForCausalLM", GROUPED),
    "cohere": ("CohereForCausalLM", GROUPED),
    "olmo": ("OlmoForCausalLM", GROUPED),
    "olmo2": ("Olmo2ForCausalLM", GROUPED),
    "olmo3": ("Olmo3ForCausalLM", {**GROUPED, "sliding_window": 512}),
    "phi": ("PhiForCausalLM", GROUPED),
    "smollm3": ("SmolLM3ForCausalLM", {**GROUPED, "pad_token_id": 0}),
    "phi3": ("Phi3ForCausalLM", {**GROUPED, "pad_token_id": 0}),
    "stablelm": ("StableLmForCausalLM", GROUPED),
    "starcoder2": ("Starcoder2ForCausalLM", {**GROUPED, "sliding_window": None}),
    "gemma": ("GemmaForCausalLM", {**GROUPED, "head_dim": 64}),
    "gemma2": ("Gemma2ForCausalLM", {**GEMMA, "sliding_window": 512}),
    "gemma3_text": ("Gemma3ForCausalLM", {**GEMMA, "sliding_window": 512}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 640, "n_head": 10, "n_inner": 3000, "n_layer": 3, "vocab_size": 1000}
        | {"n_positions": 4096},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES),
    "bloom": (
        "BloomForCausalLM",
        {"hidden_size": 640, "n_head": 10, "n_layer": 3, "vocab_size": 1000},
    ),
    "falcon": (
        "FalconForCausalLM",
        {"hidden_size": 640, "num_attention_heads": 10, "num_hidden_layers": 3}
        | {"vocab_size": 1000, "ffn_hidden_size": 3000},
    ),
    "falcon, two norms": (
        "FalconForCausalLM",
        {"hidden_size": 640, "num_attention_heads": 10, "num_hidden_layers": 3}
        | {"vocab_size": 1000, "ffn_hidden_size": 3000}
        | {"new_decoder_architecture": True, "num_kv_heads": 5},
    ),
    "stablelm, parallel": ("StableLmForCausalLM", {**GROUPED, "use_parallel_residual": True}),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 8}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {**GROUPED, **ROUTED, "shared_expert_intermediate_size": 304},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**GROUPED, **ROUTED, "head_dim": 64}),
    "qwen3_moe, wide experts": (
        "Qwen3MoeForCausalLM",
        {**GROUPED, **ROUTED, "head_dim": 64, "moe_intermediate_size": 2000},
    ),
    "olmoe": ("OlmoeForCausalLM", {**GROUPED, "num_experts": 16, "num_experts_per_tok": 4}),
    "gpt_oss": (
        "GptOssForCausalLM",
        {**GROUPED, "head_dim": 64, "num_local_experts": 16, "num_experts_per_tok": 4}
        | {"sliding_window": 512},
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**SIZES, **LATENT}),
    "deepseek_v3, many heads": (
        "DeepseekV3ForCausalLM",
        {**SIZES, **LATENT, "num_attention_heads": 40, "intermediate_size": 100},
    ),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        {**SIZES, **LATENT, "topk_method": "greedy", "n_group": None},
    ),
    "opt": (
        "OPTForCausalLM",
        {"hidden_size": 640, "num_attention_heads": 10, "num_hidden_layers": 3}
        | {"vocab_size": 1000, "ffn_dim": 3000, "word_embed_proj_dim": 640}
        | {"max_position_embeddings": 4096},
    ),
}


# The others' shapes scaled up from the tiny ones that the architecture tests use.
SCALED = ["ernie4_5_moe", "gemma4_text", "glm4", "glm4_moe", "granitemoe", "llama4_text"]
SCALED += ["minimax_m2"]
SCALED_SIZES = {**SIZES, "num_hidden_layers": 4, "intermediate_size": 1504}
PER_HEAD = {"num_key_value_heads": 5, "head_dim": 64, "moe_intermediate_size": 304}
# Masks that eager attention shares or not between the sequences of a batch.
TOLERANCES = {"gemma2": 0.02, "gpt_oss": 0.02}
# transformers calls it deepseek_v3; no fused attention, so compared at its published shape.
NOT_SCALED = frozenset({"kimi_k2", "mimo_v2_flash"})
BEHIND_A_TOWER = frozenset(
    {"qwen2_vl", "qwen2_5_vl", "gemma3", "gemma4", "kimi_k25", "llama4", "qwen3_vl", "qwen3_vl_moe"}
)


def planned_bytes(config, *, context, batch, element_bytes=2):
    architecture = build_architecture(config)
    layer = LayerShape.of(architecture)
    sizes = {"context": context, "batch": batch, "element_bytes": element_bytes}
    cache = kv_cache_bytes(layer.cache_layers, **sizes)
    return cache + prefill_peak(layer, **sizes).total_bytes


def allocated_bytes(config, *, context, batch):
    """What transformers allocates beside the weights."""
    request = ExactRequest(quant="bf16", runtime="transformers", context=context, batch=batch)
    peak = exact_peak(config, request)
    return peak.allocated_peak_bytes - peak.weights_bytes


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_peak_is_what_transformers_allocates(name, batch):
    class_name, sizes = CONFIGS[name]
    config = {"model_type": name.partition(",")[0], "architectures": [class_name], **sizes}
    found = allocated_bytes(config, context=CONTEXT, batch=batch)
    planned = planned_bytes(config, context=CONTEXT, batch=batch)
    assert planned == pytest.approx(found, rel=TOLERANCES.get(name, 0.011))


@pytest.mark.parametrize("name", SCALED)
def test_peak_is_what_transformers_allocates_for_scaled_models(name):
    config = {"model_type": name, **families.TINY[name], **SCALED_SIZES}
    config |= {key: value for key, value in PER_HEAD.items() if key in config}
    for key in ("layer_types", "mlp_layer_types"):
        config.pop(key, None)
    found = allocated_bytes(config, context=CONTEXT, batch=1)
    assert planned_bytes(config, context=CONTEXT, batch=1) == pytest.approx(found, rel=0.015)


PUBLISHED = [
    "Qwen--Qwen3-8B",
    "Qwen--Qwen3-30B-A3B",
    "XiaomiMiMo--MiMo-V2-Flash",
    "deepseek-ai--DeepSeek-V3",
    "google--gemma-4-26B-A4B",
    "meta-llama--Llama-4-Scout-17B-16E-Instruct",
    "meta-llama--Meta-Llama-3.1-8B",
    "mirror--bloom-176b",
    "mistralai--Mixtral-8x7B-v0.1",
    "mlc--deepseek_v2_lite",
    "mlc--gemma2_2b",
    "mlc--gemma3_1b_it",
    "mlc--phi-3_5",
    "mlc--starcoder2",
    "openai--gpt-oss-120b",
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_need_what_the_closed_form_says(test_data, name):
    """Within 3 %; one long prompt where windows slide and matrices are large, and many short."""
    config = json.loads((test_data / "configs" / name / "config.json").read_text())
    for context, batch in ((2048, 1), (256, 8)):
        planned = planned_bytes(config, context=context, batch=batch)
        found = allocated_bytes(config, context=context, batch=batch)
        assert planned == pytest.approx(found, rel=0.03), (context, batch)


@pytest.mark.parametrize("name", sorted({name.partition(",")[0] for name in CONFIGS}))
def test_models_without_fused_attention_are_the_listed_ones(name):
    class_name, sizes = CONFIGS[name]
    model = build_model({"model_type": name, **sizes}, class_name)
    is_fused = model.config._attn_implementation == "sdpa"
    assert is_fused == (name not in ATTENTION_MATRIX_BYTES)


def test_every_known_decoder_is_compared_or_flagged():
    from qtool.architecture import KNOWN_MODEL_TYPES

    compared = {name.partition(",")[0] for name in CONFIGS}
    missing = []
    compared |= {*SCALED, *BEHIND_A_TOWER, *NOT_SCALED}
    for name in sorted(set(KNOWN_MODEL_TYPES) - compared):
        config = {"model_type": name, **families.TINY[name]}
        if LayerShape.of(build_architecture(config)).basis == "formula":
            missing.append(name)
    assert not missing


# -- attention in float32 -------------------------------------------------------------------------

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 40


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("tokens", "keys"), [(300, 300), (17, 17), (1, 500)])
def test_attention_without_a_kernel_takes_what_is_planned(tmp_path, tokens, keys, batch):
    """PyTorch's own, on the processor: queries as they come from their product, a part of a cache.
    Its input is there already, but the plan counts queries."""
    query = torch.randn(batch, tokens, HEADS, HEAD_DIM).transpose(1, 2)
    cached = torch.randn(2, batch, KV_HEADS, keys + 20, HEAD_DIM)[..., :keys, :]

    def attend():
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            functional.scaled_dot_product_attention(
                query, *cached, is_causal=tokens > 1, enable_gqa=True
            )

    found = allocated_peak_bytes(attend, tmp_path) + query.nbytes
    heads = GroupedHeads(HEADS, HEADS * HEAD_DIM, None)
    planned = heads.spelled_out_bytes(tokens=tokens, keys=keys, batch=batch)
    assert planned == pytest.approx(found, rel=0.02)


def test_a_window_hides_what_is_longer():
    heads, windowed = (GroupedHeads(8, 128, window) for window in (None, 65))
    for tokens in (63, 64):
        sizes = {"tokens": tokens, "keys": tokens, "batch": 2}
        assert windowed.spelled_out_bytes(**sizes) == heads.spelled_out_bytes(**sizes)
    longer = {"tokens": 500, "keys": 500, "batch": 2}
    assert windowed.spelled_out_bytes(**longer) == windowed.spelled_out_bytes(**sizes)


def test_wide_heads_are_repeated_by_transformers():
    def is_grouped(width, value_width):
        keys, values = (torch.empty(1, 1, 1, size) for size in (width, value_width))
        return sdpa_attention.use_gqa_in_sdpa(None, keys, values)

    assert is_grouped(LARGEST_GROUPED_HEAD, LARGEST_GROUPED_HEAD)
    assert not is_grouped(LARGEST_GROUPED_HEAD + 8, LARGEST_GROUPED_HEAD + 8)
    assert not is_grouped(64, 128)


@pytest.mark.parametrize(
    ("name", "is_spelled_out"),
    [("llama", True), ("llama, wide cache", False), ("gemma2", False), ("qwen2_moe", False)],
)
def test_heads_that_are_spelled_out_in_float32(name, is_spelled_out):
    class_name, sizes = CONFIGS[name]
    config = {"model_type": name.partition(",")[0], "architectures": [class_name], **sizes}
    layer = LayerShape.of(build_architecture(config))
    assert bool(layer.grouped) == is_spelled_out
    assert not layer.always_fused().grouped
    assert [it.heads for it in layer.cut(5).grouped] == [2] * is_spelled_out


# -- qtool's own packed layers --------------------------------------------------------------------

OUT_FEATURES, IN_FEATURES, MANY_TOKENS = 1280, 512, 65


def test_dequantizing_in_the_pieces_that_the_plan_assumes():
    assert dequantize.CHUNK_ELEMENTS["cuda"] == weights.CHUNK_ELEMENTS
    for num_rows, columns in ((1280, 512), (28_672, 8192), (8192, 28_672), (3, 1 << 27), (700, 3)):
        found = [rows.stop - rows.start for rows in products.row_pieces(num_rows, columns)]
        planned = weights.piece_rows(num_rows, columns)
        assert planned[:2] == found[:2] and planned[-1] == found[-1]


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("precision", ["int8", "nf4", "nf4-dq"])
def test_packed_product_allocates_its_buffer(monkeypatch, precision, compute_dtype, pieces):
    """One product of many tokens on the meta device: the planned buffer, the outputs of the
    pieces, and nothing else."""
    num_elements = OUT_FEATURES * IN_FEATURES
    monkeypatch.setattr("qtool.formats.pieces.MAX_DEQUANTIZED_ELEMENTS", num_elements // pieces)
    monkeypatch.setattr("qtool.formats.pieces.PIECE_ROWS", 64)
    if precision == "int8":
        layer: Any = linear.Int8Layer(OUT_FEATURES, IN_FEATURES)
    else:
        layer = linear.FourBitLayer(
            out_features=OUT_FEATURES,
            in_features=IN_FEATURES,
            quant_type="nf4",
            blocksize=64,
            dtype=torch.bfloat16,
            double_quant=precision == "nf4-dq",
        )
    with torch.device("meta"):
        packed = linear.build_linear(layer, bias=None, compute_dtype=None)
        inputs = torch.empty(MANY_TOKENS, IN_FEATURES, dtype=compute_dtype)
    storages = LiveStorages()
    existing_bytes = storages.add([*tensors(packed), inputs], "weights")
    with torch.no_grad(), storages, products_of_a_gpu():
        packed(inputs)
    found = storages.peak_bytes - existing_bytes
    planned = weights._buffer(
        weights._PackedWeight((OUT_FEATURES, IN_FEATURES), 2, precision, 64), compute_dtype.itemsize
    )
    output_bytes = MANY_TOKENS * OUT_FEATURES * compute_dtype.itemsize + pieces * 512  # rounded up
    assert planned.product_bytes <= found <= planned.product_bytes + output_bytes


# -- measured on a GPU ----------------------------------------------------------------------------


def bitsandbytes_buffer(quant, layer):
    """bitsandbytes dequantizes a whole weight, and absmax twice with double quantization."""
    if quant == "bf16":
        return NO_BUFFER
    num_elements = layer.mlp * layer.hidden
    num_bytes = 2 * num_elements + (2 * 4 * num_elements // 64 if quant == "nf4-dq" else 0)
    return DequantBuffer(num_bytes, num_bytes)


@pytest.mark.parametrize("quant", ["bf16", "nf4", "nf4-dq"])
def test_peak_agrees_with_transformers_and_bitsandbytes_on_a_gpu(test_data, quant):
    """Allocated beyond weights and workspace: 0.5 % from 2,048 tokens on, 1 MiB at 128 tokens.

    bitsandbytes' layers dequantize as qtool's do, only its buffer differs.
    """
    folders = {"llama-3.2-3b": "mlc--llama3_2_3b", "llama-3.1-8b": "meta-llama--Meta-Llama-3.1-8B"}
    lines = (test_data / "measured" / "h200_transformers_bitsandbytes.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    rows = [row for row in rows if row["kind"] == "generate" and row["quant"] == quant]
    assert len(rows) == 10
    for row in rows:
        config = json.loads(
            (test_data / "configs" / folders[row["model"]] / "config.json").read_text()
        )
        layer = LayerShape.of(build_architecture(config))
        sizes = {"context": row["context"], "batch": row["batch"], "element_bytes": 2}
        peak = prefill_peak(layer, **sizes, buffer=bitsandbytes_buffer(quant, layer))
        planned_mib = (kv_cache_bytes(layer.cache_layers, **sizes) + peak.total_bytes) / MIB
        found_mib = row["peak"] - row["alloc"]
        assert planned_mib == pytest.approx(found_mib, rel=0.005, abs=1.1), row


# -- properties -----------------------------------------------------------------------------------

ARCHITECTURES = {
    name: build_architecture(
        {"model_type": name.partition(",")[0], "architectures": [class_name], **sizes}
    )
    for name, (class_name, sizes) in CONFIGS.items()
}


@given(
    name=st.sampled_from(sorted(ARCHITECTURES)),
    context=st.integers(1, 1 << 20),
    batch=st.integers(1, 512),
    buffer_bytes=st.integers(0, 1 << 30),
)
def test_peak_grows_with_context_batch_and_buffer(name, context, batch, buffer_bytes):
    layer = LayerShape.of(ARCHITECTURES[name])

    def peak(context, batch, buffer_bytes):
        sizes = {"context": context, "batch": batch, "element_bytes": 2}
        buffer = DequantBuffer(2 * buffer_bytes, buffer_bytes)
        found = prefill_peak(layer, **sizes, buffer=buffer)
        return found.total_bytes + kv_cache_bytes(layer.cache_layers, **sizes)

    least = peak(context, batch, buffer_bytes)
    assert 0 < least <= peak(context, batch, buffer_bytes + 1)
    assert least < peak(context + 1, batch, buffer_bytes)
    assert least < peak(context, batch + 1, buffer_bytes)
