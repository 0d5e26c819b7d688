"""The model types that are known: how each is read, and its classes in transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from qtool.architecture.config import Config
    from qtool.architecture.decoder import Body


class Family(NamedTuple):
    """A model type: how its body is read, and its classes with and without an output head."""

    reader: str  # "module.function" in families/, imported when a model of the type comes
    generator: str  # the class with output embeddings, `lm_head`; the default
    classifier: str | None = None  # the class with a `score` layer over num_labels
    published_as: str | None = None  # the generator's name in code that came with checkpoints

    def read(self, config: Config) -> Body:
        """The body that a config of this type describes."""
        module, function = self.reader.split(".")
        body: Body = getattr(import_module(f"qtool.architecture.families.{module}"), function)(
            config
        )
        return body


# A new architecture: a function in families/ and its row here.
FAMILIES: Final[dict[str, Family]] = {
    "bloom": Family("gpt.bloom", "BloomForCausalLM", "BloomForSequenceClassification"),
    "cohere": Family("llama.cohere", "CohereForCausalLM"),
    "deepseek_v2": Family(
        "deepseek.deepseek_v2", "DeepseekV2ForCausalLM", "DeepseekV2ForSequenceClassification"
    ),
    "deepseek_v3": Family(
        "deepseek.deepseek_v3", "DeepseekV3ForCausalLM", "DeepseekV3ForSequenceClassification"
    ),
    "deepseek_v32": Family("deepseek.deepseek_v32", "DeepseekV32ForCausalLM"),
    "deepseek_v4": Family("deepseek_v4.deepseek_v4", "DeepseekV4ForCausalLM"),
    "ernie4_5_moe": Family("ernie.ernie4_5_moe", "Ernie4_5_MoeForCausalLM"),
    "falcon": Family("gpt.falcon", "FalconForCausalLM", "FalconForSequenceClassification"),
    "falcon_mamba": Family("mamba.mamba", "FalconMambaForCausalLM"),
    "gemma": Family("gemma.gemma", "GemmaForCausalLM", "GemmaForSequenceClassification"),
    "gemma2": Family("gemma.gemma2", "Gemma2ForCausalLM", "Gemma2ForSequenceClassification"),
    "gemma3": Family("gemma.gemma3", "Gemma3ForConditionalGeneration"),
    "gemma3_text": Family(
        "gemma.gemma3_text", "Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"
    ),
    "gemma4": Family("gemma4.gemma4", "Gemma4ForConditionalGeneration"),
    "gemma4_text": Family("gemma4.gemma4_text", "Gemma4ForCausalLM"),
    "glm4": Family("glm.glm4", "Glm4ForCausalLM", "Glm4ForSequenceClassification"),
    "glm4_moe": Family("glm.glm4_moe", "Glm4MoeForCausalLM"),
    "glm_moe_dsa": Family("deepseek.glm_moe_dsa", "GlmMoeDsaForCausalLM"),
    "gpt2": Family("gpt.gpt2", "GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    "gpt_neox": Family("gpt.gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification"),
    "gpt_oss": Family(
        "attention_sinks.gpt_oss", "GptOssForCausalLM", "GptOssForSequenceClassification"
    ),
    "granite": Family("llama.llama", "GraniteForCausalLM"),
    "granitemoe": Family("moe.granitemoe", "GraniteMoeForCausalLM"),
    "jamba": Family("hybrid.jamba", "JambaForCausalLM", "JambaForSequenceClassification"),
    "kimi_k2": Family(
        "deepseek.deepseek_v3", "DeepseekV3ForCausalLM", "DeepseekV3ForSequenceClassification"
    ),
    "kimi_k25": Family(
        "kimi.kimi_k25",
        "Kimi_K25ForConditionalGeneration",
        published_as="KimiK25ForConditionalGeneration",
    ),
    "llama": Family("llama.llama", "LlamaForCausalLM", "LlamaForSequenceClassification"),
    "llama4": Family("llama4.llama4", "Llama4ForConditionalGeneration"),
    "llama4_text": Family("llama4.llama4_text", "Llama4ForCausalLM"),
    "mamba": Family("mamba.mamba", "MambaForCausalLM"),
    "mamba2": Family("mamba.mamba2", "Mamba2ForCausalLM"),
    "mimo_v2_flash": Family("attention_sinks.mimo_v2_flash", "MiMoV2FlashForCausalLM"),
    "minimax_m2": Family("moe.minimax_m2", "MiniMaxM2ForCausalLM"),
    "mistral": Family("llama.mistral", "MistralForCausalLM", "MistralForSequenceClassification"),
    "mixtral": Family("moe.mixtral", "MixtralForCausalLM", "MixtralForSequenceClassification"),
    "nemotron_h": Family("hybrid.nemotron_h", "NemotronHForCausalLM"),
    "olmo": Family("llama.olmo", "OlmoForCausalLM"),
    "olmo2": Family("llama.olmo2", "Olmo2ForCausalLM"),
    "olmo3": Family("llama.olmo3", "Olmo3ForCausalLM"),
    "olmoe": Family("moe.olmoe", "OlmoeForCausalLM"),
    "opt": Family("gpt.opt", "OPTForCausalLM", "OPTForSequenceClassification"),
    "phi": Family("llama.phi", "PhiForCausalLM", "PhiForSequenceClassification"),
    "phi3": Family("llama.phi3", "Phi3ForCausalLM", "Phi3ForSequenceClassification"),
    "qwen2": Family("llama.qwen2", "Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
    "qwen2_5_vl": Family("qwen_multimodal.qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    "qwen2_moe": Family(
        "moe.qwen2_moe", "Qwen2MoeForCausalLM", "Qwen2MoeForSequenceClassification"
    ),
    "qwen2_vl": Family("qwen_multimodal.qwen2_vl", "Qwen2VLForConditionalGeneration"),
    "qwen3": Family("llama.qwen3", "Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
    "qwen3_5": Family("qwen_multimodal.qwen3_5", "Qwen3_5ForConditionalGeneration"),
    "qwen3_5_moe": Family("qwen_multimodal.qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
    "qwen3_5_moe_text": Family("linear_attention.qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"),
    "qwen3_5_text": Family("linear_attention.qwen3_5_text", "Qwen3_5ForCausalLM"),
    "qwen3_moe": Family(
        "moe.qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeForSequenceClassification"
    ),
    "qwen3_next": Family(
        "linear_attention.qwen3_next", "Qwen3NextForCausalLM", "Qwen3NextForSequenceClassification"
    ),
    "qwen3_vl": Family("qwen_multimodal.qwen3_vl", "Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": Family("qwen_multimodal.qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
    "smollm3": Family("llama.smollm3", "SmolLM3ForCausalLM", "SmolLM3ForSequenceClassification"),
    "stablelm": Family(
        "llama.stablelm", "StableLmForCausalLM", "StableLmForSequenceClassification"
    ),
    "starcoder2": Family(
        "llama.starcoder2", "Starcoder2ForCausalLM", "Starcoder2ForSequenceClassification"
    ),
}

KNOWN_MODEL_TYPES: Final = tuple(sorted(FAMILIES))
