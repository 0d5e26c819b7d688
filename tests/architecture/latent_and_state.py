"""Tiny configs and variations, as in `families`, of the types with multi-head latent attention or
a recurrent state."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

_LATENT = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_INDEXED = {**_LATENT, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
_STATE = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 3, "state_size": 8}

TINY: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _INDEXED,
    "deepseek_v4": {
        "vocab_size": 48,
        "hidden_size": 32,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": 16,
        "q_lora_rank": 12,
        "o_groups": 2,
        "o_lora_rank": 6,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "hc_mult": 2,
        "sliding_window": 4,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 2,
        "partial_rotary_factor": 0.25,
        "compress_ratios": [0, 4, 128, 4, 0],
        "compress_rate_csa": 3,
        "compress_rate_hca": 5,
    },
    "falcon_mamba": _STATE,
    "glm_moe_dsa": {**_INDEXED, "index_topk_freq": 2},
    "jamba": {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
    },
    "kimi_k2": _LATENT,
    "kimi_k25": {
        "text_config": {**_LATENT, "model_type": "kimi_k2"},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
            "merge_kernel_size": [2, 1],
        },
        "projection_hidden_size": 16,
    },
    "mamba": _STATE,
    "nemotron_h": {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 40,
        "hybrid_override_pattern": "MEM*-E",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "n_routed_experts": 4,
        "moe_intermediate_size": 12,
        "moe_shared_expert_intermediate_size": 20,
    },
}

_FLAG = st.booleans()
_LATENT_VARIATIONS: dict[str, SearchStrategy[Any]] = {
    "num_hidden_layers": st.integers(1, 5),
    "num_attention_heads": st.sampled_from([1, 4, 8]),
    "num_key_value_heads": st.sampled_from([None, 1]),
    "kv_lora_rank": st.integers(1, 20),
    "qk_rope_head_dim": st.sampled_from([2, 6]),
    "v_head_dim": st.integers(1, 9),
    "n_shared_experts": st.integers(1, 3),
    "first_k_dense_replace": st.integers(0, 6),
    "moe_layer_freq": st.integers(1, 2),
    "attention_bias": _FLAG,
    "mlp_bias": _FLAG,
    "tie_word_embeddings": _FLAG,
}
_ANY_RANK = {**_LATENT_VARIATIONS, "q_lora_rank": st.sampled_from([None, 6])}
_MLP_KINDS = st.lists(st.sampled_from(["dense", "sparse"]), min_size=3, max_size=3)
_LISTED = {
    **_LATENT_VARIATIONS,
    "num_key_value_heads": st.just(1),
    "num_hidden_layers": st.just(3),
    "num_experts": st.integers(2, 6),
    "mlp_layer_types": _MLP_KINDS,
    "layer_types": st.just(["deepseek_sparse_attention"] * 3),
    "index_n_heads": st.integers(1, 3),
}
_MIXERS = st.sampled_from(
    ["mamba", "attention", "full_attention", "linear_attention", "moe", "mlp"]
)

VARIATIONS: dict[str, dict[str, SearchStrategy[Any]]] = {
    "deepseek_v2": {
        **_ANY_RANK,
        "num_experts": st.integers(2, 6),
        "num_labels": st.integers(2, 5),
    },
    "deepseek_v3": {**_ANY_RANK, "num_local_experts": st.integers(2, 6)},
    "deepseek_v32": _LISTED,
    "deepseek_v4": {
        "compress_ratios": st.sampled_from([None, [128, 0, 0, 4, 4, 4]]),
        "layer_types": st.sampled_from([None, ["sliding_attention"] * 4]),
        "compress_rates": st.just(
            {"compressed_sparse_attention": 2, "heavily_compressed_attention": 7}
        ),
        "compress_rate_hca": st.sampled_from([None, 9]),
        "intermediate_size": st.integers(1, 9),
        "num_hash_layers": st.integers(0, 5),
        "hc_mult": st.integers(1, 4),
        "num_key_value_heads": st.integers(1, 2),
        "o_groups": st.sampled_from([1, 8]),
        "num_local_experts": st.integers(2, 6),
        "mlp_bias": _FLAG,
        "tie_word_embeddings": _FLAG,
    },
    "falcon_mamba": {"time_step_rank": st.sampled_from(["auto", 3]), "use_bias": _FLAG},
    "glm_moe_dsa": {
        **_LISTED,
        "index_topk_freq": st.integers(1, 3),
        "index_skip_topk_offset": st.integers(0, 3),
        "index_topk_pattern": st.sampled_from([None, "FSF", "FSSF", ["full", "full", "shared"]]),
        "indexer_types": st.sampled_from([None, ["full", "shared", "shared"]]),
    },
    "jamba": {
        "num_hidden_layers": st.integers(1, 6),
        "attn_layer_period": st.integers(2, 4),
        "expert_layer_period": st.integers(2, 4),
        "expert_layer_offset": st.integers(0, 1),
        "num_local_experts": st.sampled_from([1, 3]),
        "mamba_dt_rank": st.sampled_from(["auto", 3]),
        "mamba_d_conv": st.integers(2, 5),
        "mamba_expand": st.integers(1, 3),
        "mamba_conv_bias": _FLAG,
        "mamba_proj_bias": _FLAG,
        "tie_word_embeddings": _FLAG,
        "num_labels": st.integers(2, 5),
    },
    "mamba": {
        "expand": st.integers(1, 3),
        "conv_kernel": st.integers(2, 5),
        "time_step_rank": st.sampled_from(["auto", 3]),
        "use_bias": _FLAG,
        "use_conv_bias": _FLAG,
        "tie_word_embeddings": _FLAG,
    },
    "nemotron_h": {
        "hybrid_override_pattern": st.text("ME*-", min_size=1, max_size=6),
        "layers_block_type": st.sampled_from([None, ["mamba", "attention"]])
        | st.lists(_MIXERS, min_size=1, max_size=5),
        "num_hidden_layers": st.integers(1, 5),
        "moe_latent_size": st.sampled_from([None, 6]),
        "mamba_n_groups": st.sampled_from([1, 4]),
        "mamba_d_conv": st.integers(2, 5),
        "mamba_conv_bias": _FLAG,
        "use_conv_bias": _FLAG,
        "use_bias": _FLAG,
        "mlp_bias": _FLAG,
        "tie_word_embeddings": _FLAG,
    },
}
