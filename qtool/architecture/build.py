"""config.json -> Architecture: looks the model type up, adds the head that the class asks for.

build_architecture({"model_type": "llama", "architectures": ["LlamaForCausalLM"], ...})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from qtool.architecture.config import Config
from qtool.architecture.decoder import Body
from qtool.architecture.families import gemma, gpt, llama, mamba, qwen_multimodal
from qtool.architecture.parts import Tensors, linear
from qtool.architecture.records import Architecture
from qtool.architecture.skip import default_skips
from qtool.errors import QtoolError


@dataclass(frozen=True, slots=True)
class Family:
    """A model type: how its body is read, and its classes with and without an output head."""

    read: Callable[[Config], Body]
    generator: str  # the class with output embeddings, `lm_head`; the default
    classifier: str | None = None  # the class with a `score` layer over num_labels


# A new architecture: a function in families/ and its row here.
FAMILIES: Final[dict[str, Family]] = {
    "bloom": Family(gpt.bloom, "BloomForCausalLM", "BloomForSequenceClassification"),
    "cohere": Family(llama.cohere, "CohereForCausalLM"),
    "falcon": Family(gpt.falcon, "FalconForCausalLM", "FalconForSequenceClassification"),
    "gemma": Family(gemma.gemma, "GemmaForCausalLM", "GemmaForSequenceClassification"),
    "gemma2": Family(gemma.gemma2, "Gemma2ForCausalLM", "Gemma2ForSequenceClassification"),
    "gemma3": Family(gemma.gemma3, "Gemma3ForConditionalGeneration"),
    "gemma3_text": Family(
        gemma.gemma3_text, "Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"
    ),
    "gpt2": Family(gpt.gpt2, "GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    "gpt_neox": Family(gpt.gpt_neox, "GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification"),
    "granite": Family(llama.llama, "GraniteForCausalLM"),
    "llama": Family(llama.llama, "LlamaForCausalLM", "LlamaForSequenceClassification"),
    "mamba2": Family(mamba.mamba2, "Mamba2ForCausalLM"),
    "mistral": Family(llama.mistral, "MistralForCausalLM", "MistralForSequenceClassification"),
    "olmo": Family(llama.olmo, "OlmoForCausalLM"),
    "olmo2": Family(llama.olmo2, "Olmo2ForCausalLM"),
    "olmo3": Family(llama.olmo3, "Olmo3ForCausalLM"),
    "opt": Family(gpt.opt, "OPTForCausalLM", "OPTForSequenceClassification"),
    "phi": Family(llama.phi, "PhiForCausalLM", "PhiForSequenceClassification"),
    "phi3": Family(llama.phi3, "Phi3ForCausalLM", "Phi3ForSequenceClassification"),
    "qwen2": Family(llama.qwen2, "Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
    "qwen3": Family(llama.qwen3, "Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
    "qwen3_5": Family(qwen_multimodal.qwen3_5, "Qwen3_5ForConditionalGeneration"),
    "qwen3_5_text": Family(qwen_multimodal.qwen3_5_text, "Qwen3_5ForCausalLM"),
    "qwen3_vl": Family(qwen_multimodal.qwen3_vl, "Qwen3VLForConditionalGeneration"),
    "smollm3": Family(llama.smollm3, "SmolLM3ForCausalLM", "SmolLM3ForSequenceClassification"),
    "stablelm": Family(llama.stablelm, "StableLmForCausalLM", "StableLmForSequenceClassification"),
    "starcoder2": Family(
        llama.starcoder2, "Starcoder2ForCausalLM", "Starcoder2ForSequenceClassification"
    ),
}

KNOWN_MODEL_TYPES: Final = tuple(sorted(FAMILIES))

# Keys by which the configs of mixtures of experts can be told, whatever their type is called.
_EXPERT_KEYS: Final = ("num_experts", "num_local_experts", "n_routed_experts")


def build_architecture(values: Mapping[str, Any]) -> Architecture:
    """The structure of the model that transformers builds from the config.json `values`.

    Raises:
        QtoolError: "unsupported" for a model type, class or mixture of experts that is not known;
            "bad_file" for a broken value, with its key, what was expected and what was found.
    """
    config = Config(values)
    model_type = config.text("model_type")
    if model_type is None:
        config.reject("model_type", None, f"one of {', '.join(KNOWN_MODEL_TYPES)}")
    family = FAMILIES.get(model_type) or _refuse_type(model_type, values)
    class_name = _class_name(config, model_type, family)
    body = family.read(config)
    if class_name == family.generator:
        head: str | None = "lm_head.weight"
        head_tensors = _lm_head(body)
    else:
        head = None
        head_tensors = linear("score", config.num_labels(), body.head_inputs)
    tensors = (*body.tensors, *head_tensors)
    tied = [(tensor.name, tensor.tied_to) for tensor in tensors if tensor.tied_to is not None]
    last = next(tensor.name for tensor in reversed(tensors) if tensor.tied_to is None)
    sizes = body.sizes
    return Architecture(
        model_type=model_type,
        class_name=class_name,
        tensors={tensor.name: tensor for tensor in tensors},
        skipped_modules=default_skips(tied, last, head),
        cache_layers=body.cache_layers,
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_attention_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        vocab_size=sizes.vocab,
        max_context=sizes.max_context,
        tied_embeddings=bool(tied),
        stored_names=body.stored_names,
        unmodelled=body.unmodelled,
    )


def _lm_head(body: Body) -> Tensors:
    weight, *bias = linear("lm_head", body.sizes.vocab, body.head_inputs, bias=body.head_bias)
    tied_to = f"{body.embedding}.weight" if body.tied else None
    return (replace(weight, tied_to=tied_to), *bias)


def _class_name(config: Config, model_type: str, family: Family) -> str:
    """The model class: the first of `architectures`, the generator where none is given."""
    given = config.items("architectures")
    if not given:
        return family.generator
    if not isinstance(given[0], str):
        config.reject("architectures", given, "a list of class names")
    known = [name for name in (family.generator, family.classifier) if name is not None]
    if given[0] in known:
        return given[0]
    raise QtoolError(
        f"config.json: architectures: {given[0][:80]!r} of model type {model_type} is not "
        f"supported; known: {', '.join(known)}",
        kind="unsupported",
        hint="use a checkpoint of one of these classes",
    )


def _refuse_type(model_type: str, values: Mapping[str, Any]) -> Family:
    text = values.get("text_config")
    places = [values, text] if isinstance(text, Mapping) else [values]
    if "moe" in model_type or any(place.get(key) for place in places for key in _EXPERT_KEYS):
        raise QtoolError(
            f"config.json: model type {model_type[:80]!r} is a mixture of experts, which this "
            "version does not support",
            kind="unsupported",
            hint="use a dense model; supported types: " + ", ".join(KNOWN_MODEL_TYPES),
        )
    from difflib import get_close_matches  # slow to import, and only this refusal needs it

    near = get_close_matches(model_type, KNOWN_MODEL_TYPES, n=3)
    raise QtoolError(
        f"config.json: model type {model_type[:80]!r} is not supported; known: "
        + ", ".join(KNOWN_MODEL_TYPES),
        kind="unsupported",
        hint=f"nearest: {', '.join(near)}" if near else "use a checkpoint of one of these types",
    )
