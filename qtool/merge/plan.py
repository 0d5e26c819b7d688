"""Which tensor of the output comes from what, decided from headers alone.

    sources = pair(adapter, base)             # every tensor of the merged model, in 16 bit
    sources.checkpoint                        # as if that had been written and opened again

`--quant` plans from that checkpoint, as `qtool quantize` would from the folder, so that both give
the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from qtool.architecture import Architecture, ModelTensor, build_architecture
from qtool.checkpoint.adapter_files import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from qtool.checkpoint.reading import open_shard
from qtool.checkpoint.records import Checkpoint, Shard, TensorInfo
from qtool.errors import Option, QtoolError
from qtool.formats.bitsandbytes import (
    QuantizedWeight,
    QuantState,
    find_quantized,
    layout_problems,
    parse_quant_state,
    stray_statistics,
)
from qtool.formats.tensors import TORCH_NAMES, SourceDtype
from qtool.merge.adapter import Adapter, LowRank
from qtool.merge.targets import is_saved_whole, is_target, stack_of
from qtool.quantize.plan import ShardPlan, TensorPlan, split_into_shards

MAX_QUANT_STATE_BYTES: Final = 1 << 16
SOURCE_DTYPES: Final = {torch_name: dtype for dtype, torch_name in TORCH_NAMES.items()}


@dataclass(frozen=True, slots=True)
class PackedSource:
    """A packed weight of the base; `state` is None for INT8.

    `transposed`: it is stored [out, in] where the model has a Conv1D's [in, out].
    """

    weight: QuantizedWeight
    state: QuantState | None
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix before it was packed, [out, in]."""
        return self.weight.weight.shape if self.state is None else self.state.shape


@dataclass(frozen=True, slots=True)
class Source:
    """Where a tensor of the merged model comes from.

    `base` is a tensor of the checkpoint or, with `in_adapter`, of the adapter. `by_columns`: the
    update's outputs are the stored matrix's columns. `added_bias` has what is added to a bias.
    """

    base: TensorInfo | PackedSource
    in_adapter: bool = False
    update: LowRank | None = None
    by_columns: bool = False
    added_bias: LowRank | None = None

    @property
    def reason(self) -> str:
        """What happens to it, in a word."""
        if self.update is not None or self.added_bias is not None:
            return "merged"
        if self.in_adapter:
            return "replaced"
        return "dequantized" if isinstance(self.base, PackedSource) else "copied"


@dataclass(frozen=True, slots=True)
class MergeSources:
    """The merged model in 16 bit: its tensors as if they were on disk, and where they come from.

    `checkpoint` is not there to be read; `shards` are the files that it would be written to.
    """

    checkpoint: Checkpoint
    shards: tuple[ShardPlan, ...]
    by_name: Mapping[str, Source]
    untied: str | None  # the weight that has become one of its own

    def count(self) -> Counter[str]:
        """How many tensors are merged, replaced, dequantized, copied."""
        return Counter(source.reason for source in self.by_name.values())


def pair(adapter: Adapter, base: Checkpoint, *, max_shard_bytes: int | None) -> MergeSources:
    """Find the weight of every tensor of the adapter.

    Raises:
        QtoolError: a tensor of the adapter has no weight, or one of another shape; or what its
            config says was trained is not in it.
    """
    pairing = _Pairing(adapter, base)
    for module, update in adapter.updates.items():
        pairing.add_update(module, update)
    for name, tensor in adapter.replacements.items():
        pairing.replace(name, tensor)
    pairing.check_shapes()  # first: another model lacks modules too
    pairing.check_complete()
    pairing.check_named()
    untied = pairing.untie()
    tensors = [
        TensorPlan(info, "copy", source.reason, (info,)) for info, source in pairing.outputs()
    ]
    shards = split_into_shards(tensors, max_shard_bytes)
    config = _config(base, shards, untied=untied is not None)
    return MergeSources(_as_written(base, config, shards), shards, pairing.sources, untied)


def known_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """The model that config.json describes; None for one that is not known."""
    try:
        return build_architecture(config)
    except QtoolError:
        return None


class _Pairing:
    """The tensors of the base by the names that the model gives them."""

    def __init__(self, adapter: Adapter, base: Checkpoint) -> None:
        self.adapter, self.base = adapter, base
        self.architecture = known_architecture(base.config)
        self.sources: dict[str, Source] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        packed = {weight.name: weight for weight in find_quantized(base.tensors).values()}
        statistics = {part.name for w in packed.values() for part in w.statistics.values()}
        statistics |= set(stray_statistics(base.tensors))
        default_dtype = _commonest_dtype(base)
        self._dtypes: dict[str, str] = {}
        self._shards: dict[str, str] = {}
        for name, tensor in base.tensors.items():
            if name in statistics:
                continue
            if name in packed:
                source = self._packed_source(packed[name])
                shape = source.shape[::-1] if source.transposed else source.shape
                recorded = source.state.dtype if source.state else None
                dtype = SOURCE_DTYPES[recorded] if recorded else default_dtype
                self._add(name, Source(source), shape, dtype, tensor.shard)
            else:
                self._add(name, Source(tensor), tensor.shape, tensor.dtype, tensor.shard)
        self._stored = {self._parameter_name(name): name for name in reversed(self.sources)}

    def add_update(self, module: str, update: LowRank) -> None:
        """Pair one low-rank update with its weight, and with its bias."""
        name = self._find(f"{module}.weight", update.a.name, may_be_tied=True)
        source = self.sources[name]
        if source.update is not None:
            raise self._second(name, source.update.a.name, update.a.name)
        self._refuse_other_kind(name, update)
        by_columns = update.is_embedding or self._is_conv1d(name)
        if update.is_embedding and update.magnitude is not None:
            raise QtoolError(
                f"{self.adapter.folder}: {module}: DoRA of an embedding cannot be merged here",
                kind="unsupported",
                hint="merge it with PEFT, or train without DoRA on the embedding",
            )
        self.sources[name] = replace(source, update=update, by_columns=by_columns)
        if update.bias is not None:
            bias = self._find(f"{module}.bias", update.bias.name)
            self.sources[bias] = replace(self.sources[bias], added_bias=update)

    def replace(self, name: str, tensor: TensorInfo) -> None:
        """Let the adapter's tensor take the place of the base's."""
        stored = self._find(name, tensor.name, may_be_tied=True)
        self._refuse_other_shape(stored, tensor)
        source = self.sources[stored]
        if source.in_adapter:
            raise self._second(stored, cast(TensorInfo, source.base).name, tensor.name)
        self.sources[stored] = replace(source, base=tensor, in_adapter=True)

    def check_complete(self) -> None:
        """Refuse an adapter without what its config says was trained, as far as the model is known.

        PEFT goes on with what it makes anew, which adds nothing. Of a model of several stacks, text
        and images, those that the adapter leaves alone may be another class's, which it was trained
        without.
        """
        if self.architecture is None:
            return
        parameters = list(self.architecture.tensors.values())
        stacks = {stack_of(it.name) for it in parameters} - {None}
        if len(stacks) > 1:
            adapted = {stack_of(it.name) for it in parameters if self._is_adapted(it.module_name)}
            parameters = [
                it
                for it in parameters
                if stack_of(it.name) in adapted
                or is_saved_whole(self.adapter.config, it.module_name)
            ]
        lost = [it for it in parameters if self._is_lost(it)]
        if not lost:
            return
        first, config = lost[0], self.adapter.config
        if is_saved_whole(config, first.module_name):
            key, names = "modules_to_save", f"{PREFIX}{first.name}"
        elif first.name.endswith(".bias"):
            key, names = "bias", f"{PREFIX}{first.name}"
        else:
            part = "lora_embedding_A" if first.kind == "embedding" else "lora_A.weight"
            key, names = "target_modules", f"{PREFIX}{first.module_name}.{part}"
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise QtoolError(
            f"{self.adapter.folder}: {WEIGHTS_NAME}: expected {names}{more}, as {key} in "
            f"{CONFIG_NAME} says that it was trained; found nothing for it",
            kind="bad_file",
            hint=(
                "the adapter is incomplete: save or fetch it again; or it belongs to another "
                "model: name its own with ",
                Option("base"),
                f"; if it is whole, let {key} in its {CONFIG_NAME} name only what was trained",
            ),
        )

    def check_named(self) -> None:
        """Refuse updates of modules that the config does not name: PEFT would leave them out."""
        config = self.adapter.config
        if config.get("target_modules") is None:
            return  # PEFT goes by the model's type then
        others = [
            update
            for module, update in self.adapter.updates.items()
            if not is_target(config, module, is_linear=not update.is_embedding)
        ]
        if not others:
            return
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise QtoolError(
            f"{self.adapter.folder}: {WEIGHTS_NAME} holds {others[0].a.name}{more}; in "
            f"{CONFIG_NAME} target_modules does not name that module, or another key leaves it out",
            kind="bad_file",
            hint="config and weights are of different adapters; if they belong together, let "
            f"target_modules in its {CONFIG_NAME} name all that was trained",
        )

    def untie(self) -> str | None:
        """Where one of two tied weights was changed, let the other one be stored as it was.

        Returns its name. Without this the output head would follow the embedding's update, which it
        did not in training.
        """
        if self.architecture is None:
            return None
        for parameter in self.architecture.tensors.values():
            if parameter.tied_to is None:
                continue
            owner = self._stored.get(parameter.tied_to)
            tied = self._stored.get(parameter.name)
            if owner is None:
                continue
            changed = [n for n in (owner, tied) if n and self.sources[n].reason in CHANGED]
            if not changed or (self.adapter.keeps_ties and tied not in changed):
                continue
            if tied is None:
                self._store_tied(parameter, owner)
            return parameter.name
        return None

    def check_shapes(self) -> None:
        """Refuse updates that do not have the size of their weights, or that cannot be added."""
        for name, source in self.sources.items():
            update = source.update
            if update is not None:
                outputs, inputs = update.features
                expected = (inputs, outputs) if source.by_columns else (outputs, inputs)
                if self._shapes[name] != expected:
                    raise self._wrong_shape(update.a.name, name, expected)
            bias = source.added_bias.bias if source.added_bias is not None else None
            if bias is not None and self._shapes[name] != bias.shape:
                raise self._wrong_shape(bias.name, name, bias.shape)
            if source.reason in CHANGED and self._dtypes[name] not in TORCH_NAMES:
                raise QtoolError(
                    f"{self.base.id}: {name} is {self._dtypes[name]}, expected one of "
                    f"{', '.join(TORCH_NAMES)} to merge into",
                    kind="unsupported",
                    hint="convert the checkpoint to bfloat16 first",
                )

    def outputs(self) -> Iterator[tuple[TensorInfo, Source]]:
        """The merged model's tensors, by the base's shards and in their order."""
        for name, source in self.sources.items():
            info = TensorInfo(name, self._dtypes[name], self._shapes[name], self._shards[name], 0)
            yield info, source

    # -- inside ---------------------------------------------------------------------------------

    def _is_lost(self, parameter: ModelTensor) -> bool:
        """Whether it was trained, and nothing of that is in the adapter."""
        config, module = self.adapter.config, parameter.module_name
        stored = self._stored.get(parameter.name)
        source = self.sources[stored] if stored is not None else None
        if is_saved_whole(config, module):
            owner = self._stored.get(parameter.tied_to or "")
            found = source or (self.sources[owner] if owner is not None else None)
            return found is not None and not found.in_adapter
        if source is None and parameter.tied_to is None:
            return False  # the base has no such tensor, which is not for the adapter to say
        if parameter.name.endswith(".bias"):
            is_trained = config.get("bias") == "all" or (
                config.get("bias") == "lora_only" and self._is_adapted(module)
            )
            return is_trained and source is not None and not source.in_adapter
        is_linear = parameter.is_linear
        if not is_linear and parameter.kind != "embedding":
            return False
        is_changed = source is not None and source.update is not None
        return not is_changed and is_target(config, module, is_linear=is_linear)

    def _is_adapted(self, module: str) -> bool:
        stored = self._stored.get(f"{module}.weight")
        return stored is not None and self.sources[stored].update is not None

    def _refuse_other_kind(self, name: str, update: LowRank) -> None:
        """LoRA of an embedding has its factors the other way round."""
        parameter = self.architecture.find(name) if self.architecture else None
        if parameter is None or (parameter.kind == "embedding") is update.is_embedding:
            return
        expected = "lora_embedding_A" if parameter.kind == "embedding" else "lora_A.weight"
        raise QtoolError(
            f"{self.adapter.folder}: {WEIGHTS_NAME}: {update.a.name}: expected {expected}, as "
            f"{name} of {self.base.id} is of the kind {parameter.kind}",
            kind="bad_file",
            hint=("the adapter belongs to another model; name its own with ", Option("base")),
        )

    def _second(self, name: str, first: str, second: str) -> QtoolError:
        return QtoolError(
            f"{self.adapter.folder}: {WEIGHTS_NAME}: {first} and {second} are both for {name} of "
            f"{self.base.id}",
            kind="bad_file",
            hint="the file was put together from several; save the adapter again with PEFT",
        )

    def _add(
        self, name: str, source: Source, shape: tuple[int, ...], dtype: str, shard: str
    ) -> None:
        self.sources[name] = source
        self._shapes[name], self._dtypes[name], self._shards[name] = shape, dtype, shard

    def _packed_source(self, weight: QuantizedWeight) -> PackedSource:
        state = None if weight.precision == "int8" else _read_state(self.base, weight)
        for problem in layout_problems(weight, state):
            raise QtoolError(
                f"{self.base.id}: {problem.tensor}: expected {problem.expected}, found "
                f"{problem.found}",
                kind="bad_file",
                hint=("see all with ", Option("verify", verb="inspect")),
            )
        return PackedSource(weight, state, self._is_conv1d(weight.name))

    def _is_conv1d(self, name: str) -> bool:
        parameter = self.architecture.find(name) if self.architecture else None
        if parameter is not None:
            return parameter.kind == "conv1d"
        return bool(self.adapter.config.get("fan_in_fan_out"))

    def _parameter_name(self, stored_name: str) -> str:
        parameter = self.architecture.find(stored_name) if self.architecture else None
        return parameter.name if parameter else stored_name

    def _find(self, name: str, adapter_name: str, *, may_be_tied: bool = False) -> str:
        """The stored tensor of the parameter `name`; a tied one gets a tensor of its own."""
        if name in self.sources:
            return name
        parameter = self.architecture.find(name) if self.architecture else None
        if parameter is not None and parameter.name in self._stored:
            return self._stored[parameter.name]
        if parameter is not None and may_be_tied and parameter.tied_to in self._stored:
            return self._store_tied(parameter, self._stored[parameter.tied_to])
        raise self._no_weight(name, adapter_name)

    def _store_tied(self, parameter: ModelTensor, owner: str) -> str:
        """Give a tied weight a tensor of its own, with the base's values, beside its owner's."""
        tensor = self.base.tensors.get(owner)
        if tensor is None or owner in find_quantized(self.base.tensors):
            raise QtoolError(
                f"{self.base.id}: {owner} is packed and tied to {parameter.name}",
                kind="unsupported",
                hint="merge onto a full-precision base",
            )
        self._add(parameter.name, Source(tensor), tensor.shape, tensor.dtype, tensor.shard)
        self._stored[parameter.name] = parameter.name
        shards = list(dict.fromkeys(self._shards.values()))
        self.sources = dict(  # a shard's tensors stay together
            sorted(self.sources.items(), key=lambda item: shards.index(self._shards[item[0]]))
        )
        return parameter.name

    def _no_weight(self, name: str, adapter_name: str) -> QtoolError:
        from difflib import get_close_matches

        near = get_close_matches(name, list(self.sources), n=3, cutoff=0.5)
        nearest = f"; the nearest are {', '.join(near)}" if near else ""
        if self.architecture is not None and self.architecture.experts is not None:
            nearest += "; experts of a mixture cannot be merged into"
        return QtoolError(
            f"{self.adapter.folder}: {WEIGHTS_NAME}: {adapter_name} has no weight in "
            f"{self.base.id}: expected {name}{nearest}",
            kind="bad_file",
            hint=("the adapter belongs to another model; name its own with ", Option("base")),
        )

    def _wrong_shape(self, adapter_name: str, name: str, expected: Sequence[int]) -> QtoolError:
        return QtoolError(
            f"{self.adapter.folder}: {WEIGHTS_NAME}: {adapter_name} implies a weight "
            f"{list(expected)}, but {name} of {self.base.id} is {list(self._shapes[name])}",
            kind="bad_file",
            hint=("the adapter belongs to another model; name its own with ", Option("base")),
        )

    def _refuse_other_shape(self, stored: str, tensor: TensorInfo) -> None:
        if tensor.shape == self._shapes[stored]:
            return
        if tensor.shape[1:] == self._shapes[stored][1:]:
            raise QtoolError(
                f"{self.adapter.folder}: {WEIGHTS_NAME}: {tensor.name} has {tensor.shape[0]} rows, "
                f"{stored} of {self.base.id} {self._shapes[stored][0]}: the vocabulary was resized "
                "in training",
                kind="unsupported",
                hint=("resize the base in transformers, save it, and give it as ", Option("base")),
            )
        raise self._wrong_shape(tensor.name, stored, tensor.shape)


CHANGED: Final = ("merged", "replaced")


def _read_state(base: Checkpoint, weight: QuantizedWeight) -> QuantState:
    blob = cast(TensorInfo, weight.quant_state)
    try:
        if blob.num_bytes > MAX_QUANT_STATE_BYTES:
            raise ValueError(f"quant_state has {blob.num_bytes} bytes")
        with open_shard(base, blob.shard) as reader:
            state = parse_quant_state(reader.read_tensor(blob).tobytes())
        if len(state.shape) != 2:
            raise ValueError(f"quant_state: shape is {list(state.shape)}, expected a matrix")
    except ValueError as error:
        raise QtoolError(
            f"{blob.shard}: {blob.name}: {error}",
            kind="bad_file",
            hint=("see all with ", Option("verify", verb="inspect")),
        ) from error
    return state


def _commonest_dtype(base: Checkpoint) -> SourceDtype:
    """What INT8 weights become, which record no dtype: config.json's, else that of the rest."""
    text = base.config.get("text_config")
    for fields in (base.config, text if isinstance(text, Mapping) else {}):
        said = fields.get("dtype") or fields.get("torch_dtype")
        if said in SOURCE_DTYPES:
            return SOURCE_DTYPES[said]
    floats = Counter(t.dtype for t in base.tensors.values() if t.dtype in ("BF16", "F16"))
    return cast(SourceDtype, floats.most_common(1)[0][0]) if floats else "BF16"


def _config(base: Checkpoint, shards: Sequence[ShardPlan], *, untied: bool) -> dict[str, Any]:
    """The base's config.json for the merged model in 16 bit."""
    config = {key: value for key, value in base.config.items() if key != "quantization_config"}
    if "quantization_config" in base.config:
        num_bytes: Counter[str] = Counter()
        for shard in shards:
            for tensor in shard.tensors:
                num_bytes[tensor.source.dtype] += tensor.source.num_bytes
        commonest = cast(SourceDtype, num_bytes.most_common(1)[0][0])
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
        config |= dict.fromkeys(keys, TORCH_NAMES[commonest])
    if untied:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), Mapping):
            config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return config


def _as_written(
    base: Checkpoint, config: Mapping[str, Any], shards: Sequence[ShardPlan]
) -> Checkpoint:
    """The checkpoint that opening the written folder would give; its bytes cannot be read."""
    tensors = {
        output.name: TensorInfo(output.name, output.dtype, output.shape, shard.file_name, 0)
        for shard in sorted(shards, key=lambda shard: shard.file_name)
        for output in shard.outputs()
    }
    files = tuple(Shard(shard.file_name, 0) for shard in shards)
    return replace(base, config=config, shards=files, tensors=tensors)
