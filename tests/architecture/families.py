"""For every known model type: a tiny config, and what its keys may be changed to.

Tiny means that transformers can run it in milliseconds. `VARIATIONS` are keys that a config may
leave out or set; hypothesis draws from them.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.architecture import latent_and_state, mixtures

COMMON = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
# Three shares of the rotated pairs: time, height, width.
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN2_VL_TEXT = {**GROUPED, "rope_parameters": _MROPE}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}

TINY: dict[str, dict[str, Any]] = {
    **latent_and_state.TINY,
    **mixtures.TINY,
    "bloom": {"vocab_size": 48, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "cohere": GROUPED,
    "falcon": COMMON,
    "gemma": {**GROUPED, "head_dim": 16},
    "gemma2": {**GROUPED, "head_dim": 16, "sliding_window": 4},
    "gemma3": {
        "text_config": {**GROUPED, "head_dim": 16, "sliding_window": 4},
        "vision_config": {
            "hidden_size": 24,
            "intermediate_size": 28,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        "mm_tokens_per_image": 4,
    },
    "gemma3_text": {**GROUPED, "head_dim": 16, "sliding_window": 4},
    "glm4": {**GROUPED, "head_dim": 16, "pad_token_id": 0},
    "gpt2": {"vocab_size": 48, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_neox": COMMON,
    "granite": GROUPED,
    "llama": GROUPED,
    "mamba2": {
        "vocab_size": 48,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_heads": 4,
        "head_dim": 8,
        "state_size": 8,
        "n_groups": 2,
    },
    "mistral": {**GROUPED, "sliding_window": 4},
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmo3": {**GROUPED, "num_hidden_layers": 5, "sliding_window": 4},
    "opt": {
        "vocab_size": 48,
        "hidden_size": 32,
        "ffn_dim": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
    "phi": GROUPED,
    "phi3": {**GROUPED, "sliding_window": 4, "pad_token_id": 0},
    "qwen2": GROUPED,
    "qwen2_5_vl": {
        "text_config": QWEN2_VL_TEXT,
        "vision_config": {
            "depth": 2,
            "hidden_size": 24,
            "intermediate_size": 28,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
        },
    },
    "qwen2_vl": {
        "text_config": QWEN2_VL_TEXT,
        "vision_config": {"depth": 2, "embed_dim": 24, "hidden_size": 32, "num_heads": 2},
    },
    "qwen3": {**GROUPED, "head_dim": 16},
    "qwen3_5": {
        "text_config": {
            **GROUPED,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "vision_config": QWEN_VISION,
    },
    "qwen3_5_text": {
        **GROUPED,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "qwen3_vl": {
        "text_config": {**GROUPED, "head_dim": 16},
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
    },
    "smollm3": {**GROUPED, "num_hidden_layers": 5, "pad_token_id": 0},
    "stablelm": GROUPED,
    "starcoder2": {**GROUPED, "sliding_window": 4},
}

_FLAG = st.booleans()
_WINDOW = {"sliding_window": st.sampled_from([None, 3, 8])}
_SIZES: dict[str, SearchStrategy[Any]] = {
    "vocab_size": st.integers(40, 90),
    "hidden_size": st.sampled_from([8, 16, 24]),
    "intermediate_size": st.integers(1, 50),
    "num_hidden_layers": st.integers(1, 5),
    "num_attention_heads": st.sampled_from([1, 2, 4, 8]),
    "max_position_embeddings": st.integers(8, 64),
    "tie_word_embeddings": _FLAG,
}
_HEADS: dict[str, SearchStrategy[Any]] = {
    **_SIZES,
    "num_key_value_heads": st.sampled_from([1, 2, 4]),
    "head_dim": st.sampled_from([4, 8]),
}
_ATTENTION_BIAS = {"attention_bias": _FLAG}
_QWEN = {
    **_HEADS,
    **_WINDOW,
    "use_sliding_window": _FLAG,
    "max_window_layers": st.integers(0, 4),
}
_LABELS = {"num_labels": st.integers(2, 5)}

VARIATIONS: dict[str, dict[str, SearchStrategy[Any]]] = {
    **latent_and_state.VARIATIONS,
    **mixtures.VARIATIONS,
    "bloom": {
        "n_embed": st.sampled_from([16, 32]),
        "num_attention_heads": st.sampled_from([2, 8]),
        "num_hidden_layers": st.integers(1, 4),
        "tie_word_embeddings": _FLAG,
        **_LABELS,
    },
    "cohere": {**_HEADS, **_ATTENTION_BIAS, "use_qk_norm": _FLAG},
    "falcon": {
        **_SIZES,
        "new_decoder_architecture": _FLAG,
        "multi_query": _FLAG,
        "parallel_attn": _FLAG,
        "bias": _FLAG,
        "num_kv_heads": st.sampled_from([None, 1, 2]),
        "num_ln_in_parallel_attn": st.sampled_from([None, 1, 2]),
        "ffn_hidden_size": st.sampled_from([None, 24]),
    },
    "gemma": {**_HEADS, **_ATTENTION_BIAS, **_LABELS},
    "gemma2": {**_HEADS, **_ATTENTION_BIAS, **_WINDOW},
    "gemma3_text": {
        **_HEADS,
        **_ATTENTION_BIAS,
        **_WINDOW,
        "sliding_window_pattern": st.integers(1, 4),
    },
    "glm4": {**_HEADS, **_ATTENTION_BIAS, **_LABELS},
    "gpt2": {
        "n_inner": st.sampled_from([None, 20]),
        "hidden_size": st.sampled_from([16, 24]),
        "num_hidden_layers": st.integers(1, 4),
        "max_position_embeddings": st.integers(8, 40),
        "tie_word_embeddings": _FLAG,
        **_LABELS,
    },
    "gpt_neox": {**_SIZES, **_ATTENTION_BIAS, **_LABELS},
    "granite": {**_HEADS, **_ATTENTION_BIAS, "mlp_bias": _FLAG},
    "llama": {**_HEADS, **_ATTENTION_BIAS, "mlp_bias": _FLAG, **_LABELS},
    "mamba2": {
        "use_bias": _FLAG,
        "use_conv_bias": _FLAG,
        "conv_kernel": st.integers(2, 5),
        "tie_word_embeddings": _FLAG,
    },
    "mistral": {**_HEADS, **_WINDOW},
    "olmo": {**_HEADS, **_ATTENTION_BIAS},
    "olmo2": {**_HEADS, **_ATTENTION_BIAS},
    "olmo3": {**_HEADS, **_ATTENTION_BIAS, **_WINDOW},
    "opt": {
        "word_embed_proj_dim": st.sampled_from([None, 16]),
        "do_layer_norm_before": _FLAG,
        "_remove_final_layer_norm": _FLAG,
        "enable_bias": _FLAG,
        "layer_norm_elementwise_affine": _FLAG,
        "max_position_embeddings": st.integers(16, 40),
        "tie_word_embeddings": _FLAG,
        **_LABELS,
    },
    "phi": {**_HEADS, "qk_layernorm": _FLAG, **_LABELS},
    "phi3": {**_HEADS, **_WINDOW},
    "qwen2": {**_QWEN, **_LABELS},
    "qwen3": {**_QWEN, **_ATTENTION_BIAS},
    "qwen3_5_text": {
        **_HEADS,
        **_ATTENTION_BIAS,
        "full_attention_interval": st.integers(1, 3),
        "linear_conv_kernel_dim": st.integers(2, 5),
    },
    "smollm3": {
        **_HEADS,
        **_WINDOW,
        "use_sliding_window": _FLAG,
        "no_rope_layer_interval": st.integers(1, 3),
    },
    "stablelm": {
        **_SIZES,
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "use_qkv_bias": _FLAG,
        "qk_layernorm": _FLAG,
        "use_parallel_residual": _FLAG,
        **_LABELS,
    },
    "starcoder2": {**_HEADS, **_WINDOW, "use_bias": _FLAG},
}
