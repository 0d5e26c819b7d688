"""`qtool merge` from request to folder, without its words: shown by `report.merge`, asked for by
`cli.merge`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qtool.backends import BackendChoice, ChosenBackend, choose_backend
from qtool.checkpoint.adapter_files import CONFIG_NAME, TOKENIZER_FILES, AdapterPlace, find_adapter
from qtool.checkpoint.local_folder import LocalFolder
from qtool.checkpoint.records import Checkpoint
from qtool.events import Note, OnEvent, ignore_events
from qtool.formats.precisions import Precision, QuantFormat
from qtool.merge.adapter import Adapter, check_values, open_adapter
from qtool.merge.base import Base, Onto, find_base
from qtool.merge.plan import MergeSources, pair
from qtool.quantize.folder_state import RunIdentity
from qtool.quantize.pipeline import PipelineSettings
from qtool.quantize.plan import QuantPlan, Recipe, ShardPlan, build_plan
from qtool.quantize.run import (
    FolderPlan,
    QuantizeResult,
    check_output,
    describe_recipe,
    describe_source,
    folder_file_names,
    source_state,
    write_folder,
)

STAGE: Final = "merge"
NONFINITE_HINT: Final = (
    "the base or the adapter is damaged, or the sum is beyond the dtype; `qtool inspect` shows the "
    "base's"
)
_PRECISIONS: Final[dict[str, Precision]] = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """What the user asked for.

    `adapter` is a folder or a Hub id. `recipe` None writes 16 bit. `base` and `onto` None go by the
    adapter's config and by what the base is.
    """

    adapter: str | Path
    output: Path
    base: str | None = None
    onto: Onto | None = None
    recipe: Recipe | None = None
    max_shard_bytes: int | None = None
    backend: BackendChoice = "auto"
    num_workers: int | None = None
    tile_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedMerge:
    """A request whose adapter and base were opened and paired.

    `quant_plan` is None for 16 bit.
    """

    request: MergeRequest
    adapter: Adapter
    base: Base
    sources: MergeSources
    quant_plan: QuantPlan | None
    chosen: ChosenBackend

    @property
    def shards(self) -> tuple[ShardPlan, ...]:
        """What will be written."""
        return self.sources.shards if self.quant_plan is None else self.quant_plan.shards

    @property
    def input_bytes(self) -> int:
        """Of the files that are read."""
        base_bytes = sum(shard.file_bytes for shard in self.base.checkpoint.shards)
        return self.adapter.shard.file_bytes + base_bytes

    @property
    def precision(self) -> Precision:
        """Of the output, in the contract's words: of most of its bytes."""
        if self.quant_plan is not None:
            return self.quant_plan.recipe.format.precision
        sizes: dict[str, int] = {}
        for tensor in self.sources.checkpoint.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
        return _PRECISIONS.get(max(sizes, key=sizes.__getitem__), "bf16")


def plan_merge(request: MergeRequest, *, on_event: OnEvent = ignore_events) -> PlannedMerge:
    """Open adapter and base, pair their tensors, and plan the output.

    Raises:
        QtoolError: what is wrong with either, or that they do not belong together.
    """
    adapter = open_adapter(find_adapter(request.adapter, on_event))
    recipe = request.recipe
    quant = recipe.format.precision if recipe else None
    base = find_base(adapter, request.base, request.onto, on_event, quant=quant)
    sources = pair(
        adapter,
        base.checkpoint,
        max_shard_bytes=None if recipe else request.max_shard_bytes,
    )
    for text in _warnings(adapter):
        on_event(Note(text, "warning"))
    quant_plan = None if recipe is None else build_plan(sources.checkpoint, recipe)
    chosen = choose_backend(request.backend if recipe else "cpu")
    if recipe is None:
        chosen = chosen._replace(reason="16 bit: a GPU has nothing to do")
    return PlannedMerge(request, adapter, base, sources, quant_plan, chosen)


def _warnings(adapter: Adapter) -> Iterator[str]:
    """What its config says of modules that are not there, which PEFT leaves out as well."""
    for pattern in adapter.idle_patterns:
        yield f"{adapter.place}: {pattern} in {CONFIG_NAME} matches no module of the adapter"


def run_merge(
    planned: PlannedMerge, *, restart: bool = False, on_event: OnEvent = ignore_events
) -> QuantizeResult:
    """Write the merged model, or go on with it.

    Raises:
        QtoolError: the adapter or the sum holds NaN or infinity; what `quantize_checkpoint` raises.
    """
    request = planned.request
    settings = PipelineSettings(
        request.num_workers, request.tile_bytes, nonfinite_hint=NONFINITE_HINT
    )
    return write_folder(
        _plan_folder(planned),
        request.output,
        planned.chosen.backend,
        settings,
        restart=restart,
        on_event=on_event,
    )


def check_merge_output(planned: PlannedMerge, *, restart: bool = False) -> None:
    """Refuse what `run_merge` would before it reads the base's weights, and write nothing."""
    check_output(_plan_folder(planned), planned.request.output, restart=restart)


def _plan_folder(planned: PlannedMerge) -> FolderPlan:
    """Reads the adapter, whose checksum is a part of what the folder is."""
    from qtool.backends.cpu import CpuBackend
    from qtool.merge.reading import MergeReader

    adapter, base = planned.adapter, planned.base.checkpoint
    check_values(adapter)
    other_files = _other_files(adapter, base)
    return FolderPlan(
        stage=STAGE,
        checkpoint=planned.sources.checkpoint,
        shards=planned.shards,
        format=planned.quant_plan.recipe.format if planned.quant_plan else QuantFormat(),
        config=_config(planned),
        other_files=other_files,
        identity=_identify(planned, other_files),
        input_bytes=planned.input_bytes,
        source_folders=tuple(f for f in (base.folder, adapter.folder) if f is not None),
        open_tensors=MergeReader(adapter, base, planned.sources, CpuBackend()),
    )


def _config(planned: PlannedMerge) -> dict[str, Any]:
    config = dict(planned.sources.checkpoint.config)
    if planned.quant_plan is not None:
        config["quantization_config"] = dict(planned.quant_plan.config_entry)
    return config


def _other_files(adapter: Adapter, base: Checkpoint) -> dict[str, Path]:
    """The base's small files; the tokenizer is the adapter's, if it has one."""
    names = [
        name
        for name in base.other_files
        if not (adapter.tokenizer_files and name in TOKENIZER_FILES)
    ]
    files = {name: base.path_of(name) for name in names}
    files |= {name: adapter.folder / name for name in adapter.tokenizer_files}
    return dict(sorted(files.items()))


def _identify(planned: PlannedMerge, other_files: dict[str, Path]) -> RunIdentity:
    adapter, base = planned.adapter, planned.base.checkpoint
    recipe = planned.quant_plan.recipe if planned.quant_plan else None
    max_shard_bytes = planned.request.max_shard_bytes
    state = LocalFolder(adapter.folder).status_of(CONFIG_NAME)
    return RunIdentity(
        source={
            **describe_source(base),
            "adapter": {
                **_describe_place(adapter.place),
                "sha256": dict(sorted(adapter.digests.items())),
            },
        },
        options={
            "onto": planned.base.onto,
            **(describe_recipe(recipe) if recipe else {"max_shard_bytes": max_shard_bytes}),
        },
        source_state={
            **source_state(base),
            adapter.shard.file_name: [adapter.shard.file_bytes, adapter.shard.modified_ns],
            CONFIG_NAME: [state.num_bytes, state.modified_ns],
        },
        file_names=folder_file_names(planned.shards, other_files),
    )


def _describe_place(place: AdapterPlace) -> dict[str, Any]:
    """What the manifest says of it: a local folder's place is not part of what it is."""
    if place.hub_id is None:
        return {"name": place.folder.resolve().name}
    return {"name": place.hub_id, "revision": place.revision}
