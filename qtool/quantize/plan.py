"""What will happen to every tensor, and how many bytes it becomes, before a byte is read.

Pure: headers + config + recipe -> `QuantPlan`. `--dry-run`, `estimate`, `sizing`, the progress bar,
the free-space check and the writer all read the same plan, so its sizes are exact by construction.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

from qtool.architecture import Architecture, ModelTensor, build_architecture
from qtool.architecture.skip import is_skipped
from qtool.architecture.stored_weights import check_linear_layers, place_of
from qtool.checkpoint.records import Checkpoint, TensorInfo
from qtool.checkpoint.safetensors_header import DATA_ALIGNMENT
from qtool.checkpoint.weight_files import SINGLE_FILE
from qtool.errors import Option, QtoolError, Words, naming
from qtool.formats.bitsandbytes import find_quantized, packed_layouts, quantization_config
from qtool.formats.precisions import ComputeDtype, QuantFormat
from qtool.formats.tensors import TensorLayout

Action = Literal["quantize", "copy"]

FROM_FULL_PRECISION: Final = (
    "start from the full-precision checkpoint; `qtool inspect` shows what this one is"
)
_MAX_NAMES: Final = 12
_MAX_NAME_LENGTH: Final = 80


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that the user decides about the output.

    `skip` adds module names to transformers' default rule; `int8_threshold` is recorded for
    LLM.int8() readers; `max_shard_bytes` None keeps one output shard per source shard.
    """

    format: QuantFormat = field(default_factory=QuantFormat)
    skip: tuple[str, ...] = ()
    compute_dtype: ComputeDtype = "bfloat16"
    int8_threshold: float = 6.0
    max_shard_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One source tensor's fate.

    `outputs[0]` takes the tensor's place, the others are its statistics. `transposed`: the source
    is a Conv1D weight [in, out] and is written as [out, in].
    """

    source: TensorLayout
    action: Action
    reason: str
    outputs: tuple[TensorLayout, ...]
    transposed: bool = False

    @property
    def output_bytes(self) -> int:
        """Bytes of all outputs."""
        return sum(output.num_bytes for output in self.outputs)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file and the tensors that fill it."""

    file_name: str
    tensors: tuple[TensorPlan, ...]

    @property
    def input_bytes(self) -> int:
        """Bytes of tensor data that will be read for it."""
        return sum(tensor.source.num_bytes for tensor in self.tensors)

    @property
    def weights_bytes(self) -> int:
        """Bytes of tensor data that it will hold."""
        return sum(tensor.output_bytes for tensor in self.tensors)

    def outputs(self) -> list[TensorLayout]:
        """The file's tensors in file order: multiples of the alignment first, large before small.

        So every large tensor is as aligned as the data's start, although safetensors allows no
        gaps, and no 16-byte load straddles its start.
        """
        layouts = [output for tensor in self.tensors for output in tensor.outputs]
        return sorted(
            layouts,
            key=lambda t: (t.num_bytes % DATA_ALIGNMENT != 0, -t.num_bytes, t.name),
        )


@dataclass(frozen=True, slots=True)
class QuantPlan:
    """The whole output: shards, and the `quantization_config` entry for config.json."""

    recipe: Recipe
    architecture: Architecture
    shards: tuple[ShardPlan, ...]
    config_entry: Mapping[str, Any]

    @property
    def tensors(self) -> list[TensorPlan]:
        """All tensors, in output order."""
        return [tensor for shard in self.shards for tensor in shard.tensors]

    @property
    def input_bytes(self) -> int:
        """Bytes of tensor data to read."""
        return sum(shard.input_bytes for shard in self.shards)

    @property
    def weights_bytes(self) -> int:
        """Bytes of tensor data to write, without headers: the size that `estimate` reports."""
        return sum(shard.weights_bytes for shard in self.shards)

    def count(self, action: Action) -> int:
        """How many source tensors have this fate."""
        return sum(tensor.action == action for tensor in self.tensors)

    def warnings(self) -> list[Words]:
        """Of patterns of `skip` that match no module, each with the nearest names."""
        modules = list(dict.fromkeys(t.module_name for t in self.architecture.tensors.values()))
        return [
            _of_no_module(pattern, modules)
            for pattern in self.recipe.skip
            if not any(is_skipped(module, (pattern,)) for module in modules)
        ]


def build_plan(checkpoint: Checkpoint, recipe: Recipe) -> QuantPlan:
    """Plan a checkpoint whose headers are known.

    Raises:
        QtoolError: no weights, already quantized, an unknown architecture, shapes that contradict
            config.json, a dtype that cannot be quantized.
    """
    if not checkpoint.tensors:
        raise QtoolError(
            f"{checkpoint.id} holds no safetensors weights, so there is nothing to quantize",
            kind="not_found",
            hint="`qtool estimate` needs only a config.json; quantizing needs the weights",
        )
    refuse_quantized_source(checkpoint)
    with naming(checkpoint.id):
        architecture = build_architecture(checkpoint.config)
        tensors = plan_tensors(checkpoint.tensors.values(), architecture, recipe)
    if not any(tensor.action == "quantize" for tensor in tensors):
        raise QtoolError(
            f"{checkpoint.id}: none of the {len(tensors)} tensors is to be quantized: "
            f"{'; '.join(sorted({tensor.reason for tensor in tensors}))}",
            kind="unsupported",
            hint=(
                "only linear layers are quantized; leave out a ",
                Option("skip", verb="quantize"),
                " that covers them all",
            ),
        )
    entry = quantization_config(
        recipe.format,
        compute_dtype=recipe.compute_dtype,
        skip_modules=architecture.explicit_skips(recipe.skip),
        int8_threshold=recipe.int8_threshold,
    )
    shards = split_into_shards(tensors, recipe.max_shard_bytes)
    return QuantPlan(recipe, architecture, shards, entry)


def plan_tensors(
    tensors: Collection[TensorLayout], architecture: Architecture, recipe: Recipe
) -> tuple[TensorPlan, ...]:
    """Decide every tensor's fate, in the order given.

    Raises:
        QtoolError: a linear weight is missing, has another shape than config.json says, or a dtype
            that cannot be quantized; a mixture of experts.
    """
    _refuse_mixture(architecture)
    check_linear_layers(tensors, architecture, recipe.skip)
    planned: list[TensorPlan] = []
    for tensor in tensors:
        reason = architecture.why_kept(tensor.name, recipe.skip)
        parameter = architecture.find(tensor.name)
        if reason is None and parameter is not None:
            planned.append(_plan_quantized(tensor, parameter, recipe.format))
        else:
            planned.append(TensorPlan(tensor, "copy", reason or "", (tensor,)))
    return tuple(planned)


def refuse_quantized_source(
    checkpoint: Checkpoint, *, if_packed: Words = FROM_FULL_PRECISION
) -> None:
    """Raise QtoolError if the checkpoint is quantized already.

    Args:
        if_packed: the next step where it is so in the layout that `quantize` writes.
    """
    entry = checkpoint.config.get("quantization_config")
    if isinstance(entry, Mapping) and entry.get("llm_int8_has_fp16_weight"):
        raise QtoolError(
            f"{checkpoint.id}: config.json has llm_int8_has_fp16_weight, so its weights are 16 bit "
            "and are quantized anew in every forward pass; nothing packed is in it",
            kind="unsupported",
            hint="remove quantization_config from its config.json to treat it as a 16-bit model",
        )
    packed = find_quantized(checkpoint.tensors)
    if entry or packed:
        method = entry.get("quant_method", "bitsandbytes") if isinstance(entry, Mapping) else None
        where = f"{next(iter(packed))} is packed" if packed else f"quant_method is {method!r}"
        raise QtoolError(
            f"{checkpoint.id} is quantized already ({where}); quantizing it twice would lose more",
            kind="unsupported",
            hint=if_packed if packed else FROM_FULL_PRECISION,
        )


def _of_no_module(pattern: str, modules: Sequence[str]) -> Words:
    from difflib import get_close_matches  # slow to import, and only mistakes need it

    last_parts = list(dict.fromkeys(module.rpartition(".")[2] for module in modules))
    known = [*last_parts, *modules]
    near = get_close_matches(pattern[:_MAX_NAME_LENGTH], known, n=3) or last_parts[:_MAX_NAMES]
    names = ", ".join(near)
    return (Option("skip", pattern, verb="quantize"), f" matches no module; names such as {names}")


def _refuse_mixture(architecture: Architecture) -> None:
    if architecture.experts is not None:
        raise QtoolError(
            f"config.json: {architecture.class_name} is a mixture of "
            f"{architecture.experts.num_experts} experts per layer, whose packed experts nothing "
            "would run",
            kind="unsupported",
            hint="quantize a dense model; `qtool estimate` plans mixtures of experts too",
        )


def _plan_quantized(tensor: TensorLayout, parameter: ModelTensor, fmt: QuantFormat) -> TensorPlan:
    transposed = parameter.kind == "conv1d"
    shape = tensor.shape[::-1] if transposed else tensor.shape
    weight = TensorLayout(tensor.name, tensor.dtype, shape)
    reason = "Conv1D, transposed" if transposed else "linear layer"
    try:
        outputs = packed_layouts(weight, fmt)
    except ValueError as error:
        raise QtoolError(
            f"{place_of(tensor)}: {error}",
            kind="unsupported",
            hint=(Option("skip", parameter.module_name, verb="quantize"), " keeps it as it is"),
        ) from error
    return TensorPlan(tensor, "quantize", reason, outputs, transposed)


def split_into_shards(
    tensors: Sequence[TensorPlan], max_shard_bytes: int | None
) -> tuple[ShardPlan, ...]:
    """The tensors in files, in their order: one per source shard, or of at most so many bytes."""
    groups: list[list[TensorPlan]] = []
    group_bytes = 0
    for tensor in tensors:
        shard = cast(TensorInfo, tensor.source).shard
        if max_shard_bytes is None:
            starts_new = not groups or cast(TensorInfo, groups[-1][-1].source).shard != shard
        else:
            starts_new = not groups or group_bytes + tensor.output_bytes > max_shard_bytes
        if starts_new:
            groups.append([])
            group_bytes = 0
        groups[-1].append(tensor)
        group_bytes += tensor.output_bytes
    return tuple(
        ShardPlan(_shard_name(number, len(groups)), tuple(group))
        for number, group in enumerate(groups, start=1)
    )


def _shard_name(number: int, num_shards: int) -> str:
    if num_shards == 1:
        return SINGLE_FILE
    return f"model-{number:05d}-of-{num_shards:05d}.safetensors"
