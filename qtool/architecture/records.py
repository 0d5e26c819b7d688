"""The records that describe a model's structure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qtool.architecture.cache import CacheLayer
from qtool.architecture.skip import first_match, is_skipped
from qtool.architecture.stored_names import StoredNames

# "linear": weight [out, in] of an nn.Linear. "conv1d": weight [in, out] of transformers' Conv1D
# (GPT-2), stored transposed. "experts": one parameter [experts, out, in] with the weights of all
# routed experts of a mixture; "experts_transposed": the same as [experts, in, out]. Everything else
# is never quantized.
TensorKind = Literal[
    "linear", "conv1d", "experts", "experts_transposed", "bias", "embedding", "norm", "other"
]


@dataclass(frozen=True, slots=True)
class ModelTensor:
    """One parameter of the model as transformers builds it, by its state-dict name.

    `replaceable` is False for linear layers that transformers + bitsandbytes leave alone whatever
    the config says: subclasses of nn.Linear (Falcon's), as only `type(module) is nn.Linear` and
    Conv1D are replaced, and those that the model class keeps exact (the indexer of GLM-5).
    `experts_per_token` is set for parameters with a leading dimension of routed experts: how many
    of them one token uses.
    """

    name: str
    shape: tuple[int, ...]
    kind: TensorKind
    tied_to: str | None = None  # the parameter whose storage it shares; that one is counted
    replaceable: bool = True
    experts_per_token: int | None = None

    @property
    def module_name(self) -> str:
        """The module that owns the parameter: the name without its last component."""
        return self.name.rpartition(".")[0]

    @property
    def is_linear(self) -> bool:
        """Whether it is the weight of a linear layer, in either orientation."""
        return self.kind in ("linear", "conv1d")

    @property
    def is_expert(self) -> bool:
        """Whether it holds the weight matrices of routed experts."""
        return self.kind in ("experts", "experts_transposed")

    @property
    def num_active(self) -> int:
        """Elements that one token's computation uses: all, but for experts it is not routed to."""
        num_elements = math.prod(self.shape)
        if self.experts_per_token is None:
            return num_elements
        return num_elements // self.shape[0] * self.experts_per_token


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of a mixture, and the shared ones that every token passes.

    `intermediate_size` is one expert's width, `shared_intermediate_size` that of all shared ones
    together.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Architecture:
    """A model's structure, computed from its config.json alone; equal to itself alone.

    `tensors` are in the model's own order. `skipped_modules` are the names that transformers'
    default rule keeps in 16 bit (output head, tied weights, ...). `cache_layers` has an entry for
    every layer that keeps something; layers that share another's cache have none. `unmodelled`
    names parts whose memory is not covered (a vision tower's activations). `activation` is that of
    the MLPs, by transformers' name.
    """

    model_type: str
    class_name: str
    tensors: Mapping[str, ModelTensor]
    skipped_modules: tuple[str, ...]
    cache_layers: tuple[CacheLayer, ...]
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int | None
    activation: str
    tied_embeddings: bool
    stored_names: StoredNames
    experts: Experts | None = None
    unmodelled: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Parameters, tied weights counted once."""
        return sum(math.prod(t.shape) for t in self.tensors.values() if t.tied_to is None)

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token's computation uses; as `num_parameters` without experts."""
        return sum(t.num_active for t in self.tensors.values() if t.tied_to is None)

    def quantizable(self, skip: Sequence[str] = ()) -> dict[str, ModelTensor]:
        """The weights to quantize, by name: the default rule, and `skip` on top of it."""
        return self.replaced((*self.skipped_modules, *skip))

    def replaced(self, skip_modules: Sequence[str]) -> dict[str, ModelTensor]:
        """The weights that transformers replaces when a config gives exactly this
        `llm_int8_skip_modules`, which then stands in for the default rule."""
        return {
            tensor.name: tensor
            for tensor in self.tensors.values()
            if tensor.is_linear
            and tensor.replaceable
            and not is_skipped(tensor.module_name, skip_modules)
        }

    def explicit_skips(self, skip: Sequence[str] = ()) -> tuple[str, ...]:
        """The `llm_int8_skip_modules` to write for `skip`: full module names, no patterns.

        Loaders read patterns differently (transformers up to 5.17 lets "layers.1" match
        "layers.11"), but they agree on full names.
        """
        kept = (
            tensor.module_name
            for tensor in self.tensors.values()
            if tensor.is_linear and is_skipped(tensor.module_name, skip)
        )
        return tuple(dict.fromkeys((*self.skipped_modules, *kept)))

    def find(self, stored_name: str) -> ModelTensor | None:
        """The parameter that a checkpoint's tensor is loaded into; None if there is none."""
        for name in self.stored_names.candidates(stored_name):
            if name in self.tensors:
                return self.tensors[name]
        return None

    def why_kept(self, stored_name: str, skip: Sequence[str] = ()) -> str | None:
        """Why a checkpoint's tensor is copied as it is; None if it is to be quantized."""
        tensor = self.find(stored_name)
        if tensor is None:
            known = self.stored_names.why_ignored(stored_name)
            return known or f"not a parameter of {self.class_name}"
        if tensor.tied_to is not None:
            return f"tied to {tensor.tied_to}"
        if not tensor.is_linear:
            return "no linear layer" if tensor.kind == "other" else tensor.kind
        if not tensor.replaceable:
            return "a subclass of nn.Linear or kept exact by its class, so never replaced"
        if first_match(tensor.module_name, self.skipped_modules):
            return "output head, kept by default"
        pattern = first_match(tensor.module_name, skip)
        return None if pattern is None else f"skipped by {pattern!r}"
