"""config.json -> Architecture: looks the model type up, adds the head that the class asks for.

build_architecture({"model_type": "llama", "architectures": ["LlamaForCausalLM"], ...})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qtool.architecture.config import Config
from qtool.architecture.decoder import Body
from qtool.architecture.model_types import FAMILIES, KNOWN_MODEL_TYPES, Family
from qtool.architecture.parts import Tensors, linear
from qtool.architecture.records import Architecture
from qtool.architecture.skip import default_skips
from qtool.errors import QtoolError


def build_architecture(values: Mapping[str, Any]) -> Architecture:
    """The structure of the model that transformers builds from the config.json `values`.

    Raises:
        QtoolError: "unsupported" for a model type or class that is not known; "bad_file" for a
            broken value, with its key, what was expected and what was found.
    """
    config = Config(values)
    model_type = config.text("model_type")
    if model_type is None:
        config.reject("model_type", None, "the name of a model type, such as 'llama'")
    family = FAMILIES.get(model_type) or _refuse_type(model_type)
    class_name = _class_name(config, model_type, family)
    body = family.read(config)
    if class_name == family.generator:
        head: str | None = f"{body.head}.weight"
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
        activation=sizes.activation,
        tied_embeddings=bool(tied),
        stored_names=body.stored_names,
        experts=body.experts,
        unmodelled=body.unmodelled,
    )


def _lm_head(body: Body) -> Tensors:
    weight, *bias = linear(body.head, body.sizes.vocab, body.head_inputs, bias=body.head_bias)
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
    if given[0] == family.published_as:
        return family.generator
    raise QtoolError(
        f"config.json: architectures: {given[0][:80]!r} of model type {model_type} is not "
        f"supported; known: {', '.join(known)}",
        kind="unsupported",
        hint="use a checkpoint of one of these classes",
    )


def _refuse_type(model_type: str) -> Family:
    from difflib import get_close_matches  # slow to import, and only this refusal needs it

    near = get_close_matches(model_type[:80], KNOWN_MODEL_TYPES, n=3)
    nearest = f"; the nearest of them: {', '.join(near)}" if near else ""
    raise QtoolError(
        f"config.json: model type {model_type[:80]!r} is not supported, {len(KNOWN_MODEL_TYPES)} "
        f"others are{nearest}",
        kind="unsupported",
        hint="use a checkpoint of one of these types; `qtool doctor -v` lists all",
    )
