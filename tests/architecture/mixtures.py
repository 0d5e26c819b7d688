"""Tiny configs of the mixtures of experts and hybrids with ordinary attention, and their keys."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

_BASE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_LOCAL = {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {**_BASE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_SHARED = {**_ROUTED, "shared_expert_intermediate_size": 20}
_GROUPED = {
    **_BASE,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "head_dim": 8,
}
_LINEAR = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 4,
}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
_GEMMA4 = {
    **_BASE,
    "num_hidden_layers": 6,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 48,
}
_GEMMA4_MOE = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 12,
}
_GEMMA4_VISION = {
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "patch_size": 4,
    "position_embedding_size": 16,
}
_GEMMA4_AUDIO = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [16, 8],
    "output_proj_dims": 20,
}
_LLAMA4 = {**_LOCAL, "num_hidden_layers": 4, "head_dim": 8, "intermediate_size_mlp": 24} | {
    "attention_chunk_size": 4
}

TINY: dict[str, dict[str, Any]] = {
    "ernie4_5_moe": {
        **_BASE,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 12,
    },
    "gemma4": {
        "text_config": {**_GEMMA4, **_GEMMA4_MOE, "num_kv_shared_layers": 0},
        "vision_config": _GEMMA4_VISION,
        "audio_config": _GEMMA4_AUDIO,
    },
    "gemma4_text": {**_GEMMA4, **_GEMMA4_MOE, "enable_moe_block": False},
    "glm4_moe": _GROUPED,
    "gpt_oss": {**_LOCAL, "head_dim": 8, "sliding_window": 4},
    "granitemoe": _LOCAL,
    "llama4": {
        "text_config": _LLAMA4,
        "vision_config": {
            "hidden_size": 24,
            "intermediate_size": 28,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "vision_output_dim": 20,
            "projector_input_dim": 20,
            "projector_output_dim": 20,
        },
    },
    "llama4_text": _LLAMA4,
    "mimo_v2_flash": {**_GROUPED, "v_head_dim": 4, "sliding_window": 4},
    "minimax_m2": {**_LOCAL, "head_dim": 8},
    "mixtral": _LOCAL,
    "olmoe": {**_BASE, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _SHARED,
    "qwen3_5_moe": {"text_config": {**_SHARED, **_LINEAR}, "vision_config": _QWEN_VISION},
    "qwen3_5_moe_text": {**_SHARED, **_LINEAR},
    "qwen3_moe": _ROUTED,
    "qwen3_next": {**_SHARED, **_LINEAR},
    "qwen3_vl_moe": {
        "text_config": {**_ROUTED, "head_dim": 8},
        "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0]},
    },
}

_FLAG = st.booleans()
_SIZES: dict[str, SearchStrategy[Any]] = {
    "vocab_size": st.integers(40, 90),
    "hidden_size": st.sampled_from([8, 16, 24]),
    "intermediate_size": st.integers(1, 50),
    "num_hidden_layers": st.integers(1, 5),
    "num_attention_heads": st.sampled_from([1, 2, 4, 8]),
    "num_key_value_heads": st.sampled_from([1, 2, 4]),
    "head_dim": st.sampled_from([4, 8]),
    "tie_word_embeddings": _FLAG,
    "num_experts_per_tok": st.integers(1, 3),
}
_BIAS = {"attention_bias": _FLAG}
_WINDOW = {"sliding_window": st.sampled_from([None, 3, 8])}
_EXPERT_WIDTH = {"moe_intermediate_size": st.integers(1, 20)}
_LOCAL_EXPERTS = {"num_local_experts": st.integers(3, 5), "num_experts": st.integers(3, 5)}
_SPARSITY: dict[str, SearchStrategy[Any]] = {
    **_EXPERT_WIDTH,
    "num_experts": st.integers(3, 5),
    "decoder_sparse_step": st.integers(1, 3),
    "mlp_only_layers": st.sampled_from([None, [], [0], [1, 2, 7], [-1]]),
}
_SHARED_WIDTH = {"shared_expert_intermediate_size": st.integers(1, 20)}
_HYBRID: dict[str, SearchStrategy[Any]] = {
    **_BIAS,
    **_SHARED_WIDTH,
    "full_attention_interval": st.integers(1, 3),
    "linear_conv_kernel_dim": st.integers(2, 5),
}

VARIATIONS: dict[str, dict[str, SearchStrategy[Any]]] = {
    "ernie4_5_moe": {
        **_SIZES,
        **_EXPERT_WIDTH,
        "use_bias": _FLAG,
        "moe_k": st.integers(1, 4),
        "moe_num_shared_experts": st.integers(0, 2),
        "moe_layer_start_index": st.integers(0, 3),
        "moe_layer_end_index": st.integers(-1, 4),
        "moe_layer_interval": st.integers(1, 3),
    },
    "gemma4_text": {
        **_SIZES,
        **_BIAS,
        "num_hidden_layers": st.integers(2, 7),
        "global_head_dim": st.sampled_from([8, 12]),
        "num_global_key_value_heads": st.sampled_from([None, 1]),
        "attention_k_eq_v": _FLAG,
        "hidden_size_per_layer_input": st.sampled_from([0, 4]),
        "sliding_window": st.integers(2, 8),
        "use_bidirectional_attention": st.sampled_from([None, "all", "vision"]),
        "enable_moe_block": _FLAG,
        "num_experts": st.integers(2, 4),
        "top_k_experts": st.integers(1, 2),
        "moe_intermediate_size": st.integers(1, 20),
    },
    "glm4_moe": {
        **_SIZES,
        **_BIAS,
        **_EXPERT_WIDTH,
        "use_qk_norm": _FLAG,
        "n_shared_experts": st.integers(1, 3),
        "first_k_dense_replace": st.integers(0, 4),
        "n_routed_experts": st.integers(3, 5),
        "num_local_experts": st.integers(3, 5),
    },
    "gpt_oss": {**_SIZES, **_BIAS, **_WINDOW, **_LOCAL_EXPERTS},
    "granitemoe": {**_SIZES, **_BIAS, "num_local_experts": st.integers(3, 5)},
    "llama4_text": {
        **_SIZES,
        **_BIAS,
        "num_hidden_layers": st.just(4),
        "no_rope_layers": st.sampled_from([None, [], [1, 0, 0, 1]]),
        "num_local_experts": st.integers(3, 5),
        "intermediate_size_mlp": st.integers(1, 50),
        "interleave_moe_layer_step": st.integers(1, 3),
        "moe_layers": st.sampled_from([None, [], [0, 2], [9]]),
        "no_rope_layer_interval": st.integers(1, 3),
        "attention_chunk_size": st.sampled_from([3, 8]),
    },
    "mimo_v2_flash": {
        **_SIZES,
        **_BIAS,
        **_EXPERT_WIDTH,
        "v_head_dim": st.sampled_from([4, 8]),
        "sliding_window": st.integers(2, 8),
        "sliding_window_size": st.sampled_from([None, 3, 8]),
    },
    "minimax_m2": {**_SIZES, **_WINDOW, **_LOCAL_EXPERTS},
    "mixtral": {**_SIZES, **_WINDOW, **_LOCAL_EXPERTS, "num_labels": st.integers(2, 5)},
    "olmoe": {**_SIZES, **_BIAS, "num_experts": st.integers(3, 5)},
    "qwen2_moe": {
        **_SIZES,
        **_SPARSITY,
        **_SHARED_WIDTH,
        "qkv_bias": _FLAG,
        "use_sliding_window": _FLAG,
        "sliding_window": st.sampled_from([3, 8]),
        "max_window_layers": st.integers(0, 4),
    },
    "qwen3_5_moe_text": {**_SIZES, **_HYBRID, **_EXPERT_WIDTH},
    "qwen3_moe": {
        **_SIZES,
        **_BIAS,
        **_SPARSITY,
        "use_sliding_window": _FLAG,
        "sliding_window": st.sampled_from([None, 3, 8]),
    },
    "qwen3_next": {**_SIZES, **_HYBRID, **_SPARSITY},
}
