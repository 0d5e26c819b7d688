"""From a checkpoint to a model that generates: one way for packed and full-precision weights.

    loaded = load_model("org/model", LoadOptions(quant="nf4-dq"))
    loaded.model.generate(...)

transformers builds the model and places every tensor; the tensors come from our own checked
readers (`qtool.runtime.weights`), so nothing is read that the headers' checks did not cover.
"""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
import transformers

from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.adapter_files import FINETUNE_RECORD, trained_quant
from qtool.checkpoint.local_folder import LocalFolder
from qtool.checkpoint.records import Checkpoint
from qtool.errors import ErrorKind, Option, QtoolError, Words
from qtool.events import Finished, Note, OnEvent, Started, ignore_events
from qtool.formats.precisions import QuantFormat, QuantizedPrecision
from qtool.runtime import int8_products
from qtool.runtime.adapters import add_adapter, check_adapter
from qtool.runtime.dequantize_host import KERNEL_DTYPES
from qtool.runtime.hf_quantizer import PackedLayersConfig, wrong_shape
from qtool.runtime.host_head import multiply_head_on_host
from qtool.runtime.linear import Int8Layer, LinearInt8, PackedLayer
from qtool.runtime.memory import DeviceMemory, out_of_memory_as_error
from qtool.runtime.meta_device import WithoutMetaArithmetic
from qtool.runtime.model_config import (
    DO_NOT_BELONG,
    GENERATION_CONFIG,
    Int8Threshold,
    as_list,
    bad_config,
    build_config,
    check_quantization,
    find_model_class,
    first_of,
    in_no_file,
    int8_threshold,
    layer_compute_dtype,
    model_dtype,
    place_of,
    read_generation_config,
    require_weights,
)
from qtool.runtime.on_load import quantize_on_load
from qtool.runtime.output_head import quantize_head
from qtool.runtime.placement import (
    Placement,
    choose_placement,
    describe_devices,
    read_limits,
    resolve_device,
    why_no_gpu,
)
from qtool.runtime.quiet import quiet_transformers
from qtool.runtime.weights import WeightSource, open_stored_weights

QUIET_S: Final = 0.5  # work that takes longer is told about
NO_TOKENIZER: Final = "transformers finds none among its files"
OWN_CODE: Final = "custom code"  # as transformers says where a folder brings its own
TOKENIZER_JSON: Final = ("tokenizer.json", "tokenizer_config.json")
OTHER_TOKENIZER_JSON: Final = ("special_tokens_map.json", "added_tokens.json", "vocab.json")
SLOW_FLOAT32: Final = (
    "config.json asks for products in float32, which is slow on a GPU; "
    "--compute-dtype bfloat16 is faster"
)
UNROUNDED: Final = (
    "--int8-threshold changes nothing here: on a GPU activations are rounded only in 16 bit, by "
    "kernels that need CuPy"
)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load: `quant` packs a full-precision model on its way in.

    `compute_dtype` is one of float32, float16, bfloat16, or None for what the checkpoint says;
    `device` and `max_memory` as `qtool.runtime.placement` reads them; `head_quant` packs the output
    head in memory. `int8_threshold`, a number or the config's, lets INT8 layers round the
    activations of many tokens too.
    """

    quant: QuantizedPrecision | None = None
    compute_dtype: str | None = None
    device: str = "auto"
    max_memory: str | None = None
    adapter: Path | None = None
    head_quant: QuantizedPrecision | None = None
    int8_threshold: Int8Threshold | None = None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run.

    Args:
        model: a transformers model in eval mode, an adapter already in its layers.
        eos_token_ids: the tokens that end a text.
        max_context: tokens that the model was made for; None where nothing limits them.
        num_packed_layers: linear layers that hold packed weights.
        load_s: seconds that loading took.
        devices: where the weights lie, for people: "cuda:0 + cpu".
        memory: watches `device` from before the weights came.
    """

    model: Any
    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    max_context: int | None
    num_packed_layers: int
    load_s: float
    device: torch.device
    devices: str
    memory: DeviceMemory
    _offloaded: ExitStack

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Delete what was offloaded to disk; the model cannot run afterwards."""
        self._offloaded.close()


@dataclass(frozen=True, slots=True)
class Preview:
    """What is known of a model before its weights are read; a `LoadedModel` has it too."""

    tokenizer: Any
    max_context: int | None
    device: torch.device


def load_model(
    model: str,
    options: LoadOptions,
    *,
    on_event: OnEvent = ignore_events,
    check: Callable[[Preview], None] = lambda preview: None,
) -> LoadedModel:
    """Load MODEL from a local folder or the Hub.

    Args:
        check: raises where what the model is to be used for cannot be, before weights are read.

    Raises:
        QtoolError: what is wrong with the checkpoint, the options or the memory.
    """
    start_s = time.perf_counter()
    # What can be told before anything is fetched or loaded.
    trained = None
    if options.adapter is not None:
        check_adapter(options.adapter)
        trained = trained_quant(LocalFolder(options.adapter, only=(FINETUNE_RECORD,)))
    device = resolve_device(options.device)
    if options.device == "auto" and device.type == "cpu":
        on_event(Note(f"{device}: {why_no_gpu()[0]}", level="detail"))
    if options.max_memory is not None:
        read_limits(options.max_memory, device)
    checkpoint = open_checkpoint(model, need="files", on_event=on_event)
    memory = DeviceMemory(device)
    with (
        quiet_transformers(),
        out_of_memory_as_error("loading the model"),
        ThreadPoolExecutor(1, "qtool-prepare") as background,
    ):
        context = background.submit(_make_context, device)
        config = build_config(checkpoint)
        # Or there is none, which says more than its tokenizer would.
        model_class = find_model_class(config)
        generation = read_generation_config(checkpoint)
        tokenizer = load_tokenizer(checkpoint)
        max_context = getattr(config.get_text_config(), "max_position_embeddings", None)
        check(Preview(tokenizer, max_context, device))
        seconds = time.perf_counter() - start_s
        on_event(Note(f"headers, config and tokenizer: {seconds:.1f} s", level="detail"))
        with _open_weights(checkpoint, options, on_event) as source, ExitStack() as offloaded:
            require_weights(checkpoint, model_class, source.layers)
            if trained is not None and not source.layers:
                on_event(Note(_trained_beside(trained)))
            threshold = None
            if options.int8_threshold is not None:
                threshold = int8_threshold(checkpoint, source.layers, options.int8_threshold)
            context.result()
            dtypes = _Dtypes.of(checkpoint, options)
            weights_bytes = _loaded_bytes(source, dtypes.model)
            placement = choose_placement(options.device, options.max_memory, weights_bytes)
            compiling = background.submit(
                _compile_kernels,
                config,
                source.layers,
                placement,
                dtypes,
                options,
                threshold,
            )
            offload_folder = offloaded.enter_context(tempfile.TemporaryDirectory())
            network = _build_model(
                checkpoint, config, source, placement, dtypes, offload_folder, on_event
            )
            loaded_s = time.perf_counter()
            _wait_for_kernels(compiling, on_event)
            seconds = time.perf_counter() - loaded_s
            on_event(Note(f"kernels: ready {seconds:.1f} s after the weights", level="detail"))
            if threshold is not None:
                _set_int8_threshold(network, threshold, placement, dtypes, on_event)
            if options.head_quant is not None:
                quantize_head(network, options.head_quant)
            multiply_head_on_host(network)
            if options.adapter is not None:
                add_adapter(network, options.adapter)
            return LoadedModel(
                model=network,
                tokenizer=tokenizer,
                eos_token_ids=_eos_token_ids(generation, config, tokenizer),
                max_context=max_context,
                num_packed_layers=len(source.layers),
                load_s=time.perf_counter() - start_s,
                device=placement.device,
                devices=describe_devices(network, placement),
                memory=memory,
                _offloaded=offloaded.pop_all(),
            )


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer; QtoolError if there is none that runs without its own code."""
    assert checkpoint.folder is not None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(checkpoint.folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises plain Exception for bad files
        first_line = str(error).strip().partition("\n")[0].rstrip()
        is_whole = not first_line.endswith(":")  # else a list follows of what there might have been
        _refuse_broken_json(checkpoint)
        raise _no_tokenizer(checkpoint, first_line if is_whole else NO_TOKENIZER) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made from no file, by some types
        raise _no_tokenizer(checkpoint, NO_TOKENIZER)
    return tokenizer


def _no_tokenizer(checkpoint: Checkpoint, reason: str) -> QtoolError:
    folder = checkpoint.folder
    assert folder is not None
    kind: ErrorKind = "not_found"
    hint = "tokenizer.json and tokenizer_config.json belong into the model's folder"
    if OWN_CODE in reason:
        kind, hint = "unsupported", "qtool runs no code that comes with a model; give another one"
    elif all((folder / name).is_file() for name in TOKENIZER_JSON):
        kind, hint = "bad_file", "see to what it names, or fetch the tokenizer's files again"
    return QtoolError(f"{checkpoint.id}: no usable tokenizer: {reason}", kind=kind, hint=hint)


def _refuse_broken_json(checkpoint: Checkpoint) -> None:
    """Name the first of the tokenizer's files that is no JSON; transformers tells only where."""
    folder = checkpoint.folder
    assert folder is not None
    is_slow = not (folder / TOKENIZER_JSON[0]).is_file()  # else the others are not needed
    for name in (*TOKENIZER_JSON, *OTHER_TOKENIZER_JSON * is_slow):
        path = folder / name
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            continue
        except (ValueError, RecursionError) as error:
            raise QtoolError(
                f"{path}: expected JSON, found an error: {error}",
                kind="bad_file",
                hint=f"fetch {name} again from the model's original source",
            ) from error


def _trained_beside(quant: QuantizedPrecision) -> Words:
    """What to know of an adapter from packed weights over others."""
    return (
        f"the adapter was trained against {quant} weights, and these are not packed; ",
        Option("quant", quant),
        " packs them alike",
    )


def _make_context(device: torch.device) -> None:
    """Make the CUDA context, which takes a while and needs no Python meanwhile."""
    if device.type == "cuda":
        torch.empty(1, device=device)


@dataclass(frozen=True, slots=True)
class _Dtypes:
    """Of activations and unpacked weights, and what packed layers compute in if it differs."""

    model: torch.dtype
    compute: torch.dtype | None

    @property
    def of_products(self) -> torch.dtype:
        """What packed layers compute in."""
        return self.compute or self.model

    @classmethod
    def of(cls, checkpoint: Checkpoint, options: LoadOptions) -> Self:
        asked = options.compute_dtype
        return cls(model_dtype(checkpoint, asked), layer_compute_dtype(checkpoint, asked))


def _compile_kernels(
    config: Any,
    layers: Mapping[str, PackedLayer],
    placement: Placement,
    dtypes: _Dtypes,
    options: LoadOptions,
    threshold: float | None,
) -> None:
    """Compile what the model will run, or load it from the disk cache."""
    device = placement.device
    if device.type == "cpu":
        from qtool.runtime.decoders.host_warm_up import warm_up_step

        warm_up_step(config, layers, dtypes.of_products)
    if layers and device.type == "cuda" and importlib.util.find_spec("cupy") is not None:
        from qtool.runtime.warm_up import warm_up_kernels

        is_adapted = options.adapter is not None
        warm_up_kernels(config, layers, device, dtypes.of_products, adapted=is_adapted)
        if threshold is not None:
            widths = [la.in_features for la in layers.values() if isinstance(la, Int8Layer)]
            int8_products.warm_up(widths, device, dtypes.of_products)


def _open_weights(checkpoint: Checkpoint, options: LoadOptions, on_event: OnEvent) -> WeightSource:
    if options.quant is not None:
        return quantize_on_load(checkpoint, QuantFormat(options.quant), on_event)
    source = open_stored_weights(checkpoint)
    check_quantization(checkpoint, source.layers)
    return source


def _build_model(
    checkpoint: Checkpoint,
    config: Any,
    source: WeightSource,
    placement: Placement,
    dtypes: _Dtypes,
    offload_folder: str,
    on_event: OnEvent,
) -> Any:
    if placement.reason:
        on_event(Note(f"{placement.device}: {placement.reason}"))
    if dtypes.compute == torch.float32 != dtypes.model and placement.device.type == "cuda":
        on_event(Note(SLOW_FLOAT32, level="warning"))
    packed = PackedLayersConfig(source.layers, dtypes.compute) if source.layers else None
    model_class = find_model_class(config)
    on_event(Started("loading", source.total_bytes))
    try:
        with source.stored.read_ahead(placement.reading_device, on_event), WithoutMetaArithmetic():
            network, report = model_class.from_pretrained(
                None,
                config=config,
                state_dict=source.tensors,
                quantization_config=packed,
                dtype=dtypes.model,
                device_map=placement.device_map,
                max_memory=placement.max_memory,
                offload_folder=offload_folder,
                offload_buffers=True,  # the packed layers' statistics are buffers
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
                local_files_only=True,
            )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        refusal = (
            f"transformers {transformers.__version__} cannot build the {model_class.__name__} of "
            "this config.json"
        )
        raise bad_config(checkpoint.config, checkpoint.id, refusal, error) from error
    on_event(Finished("loading"))
    _check_report(checkpoint, report, on_event)
    network.generation_config = _generation_config(checkpoint, network, on_event)
    return network


def _set_int8_threshold(
    network: Any, threshold: float, placement: Placement, dtypes: _Dtypes, on_event: OnEvent
) -> None:
    if placement.device.type == "cuda":
        in_16_bit = dtypes.of_products in KERNEL_DTYPES
        if not in_16_bit or importlib.util.find_spec("cupy") is None:
            on_event(Note(UNROUNDED, level="warning"))
    for module in network.modules():
        if isinstance(module, LinearInt8):
            module.threshold = threshold


def _wait_for_kernels(compiling: Future[None], on_event: OnEvent) -> None:
    try:
        compiling.result(timeout=QUIET_S)
    except TimeoutError:
        on_event(Note("waiting for kernels; what is compiled is kept for the next run"))
        compiling.result()


def _check_report(checkpoint: Checkpoint, report: dict[str, Any], on_event: OnEvent) -> None:
    """Weights that are missing or of another shape are errors, superfluous ones a warning."""
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise wrong_shape(place_of(checkpoint, name), expected, found)
    if report["missing_keys"]:
        raise in_no_file(checkpoint, report["missing_keys"])
    if report.get("error_msgs"):
        text = f"{checkpoint.id}: {report['error_msgs'][0]}"
        raise QtoolError(text, kind="bad_file", hint=DO_NOT_BELONG)
    if report["unexpected_keys"]:
        text = f"{first_of(report['unexpected_keys'])} stored, but not part of the model"
        on_event(Note(text, level="warning"))


def _loaded_bytes(source: WeightSource, dtype: torch.dtype) -> int:
    """What the weights take once loaded: packed ones as stored, others in the model's dtype."""
    total = 0
    for name, tensor in source.tensors.items():
        module, _, part = name.rpartition(".")
        kept = (module in source.layers and part != "bias") or not tensor.dtype.is_floating_point
        total += math.prod(tensor.shape) * (tensor.dtype if kept else dtype).itemsize
    return total


def _generation_config(checkpoint: Checkpoint, network: Any, on_event: OnEvent) -> Any:
    """What `network.generate` goes by: generation_config.json, else what config.json implies."""
    assert checkpoint.folder is not None
    path = checkpoint.folder / GENERATION_CONFIG
    if not path.exists():
        return network.generation_config
    try:
        return transformers.GenerationConfig.from_pretrained(
            str(checkpoint.folder), local_files_only=True
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        text = f"{path}: transformers does not take it, so the library's defaults hold: {error}"
        on_event(Note(text, level="warning"))
        return network.generation_config


def _eos_token_ids(generation: Mapping[str, Any], config: Any, tokenizer: Any) -> tuple[int, ...]:
    """From what generation_config.json holds, else config.json; and the tokenizer's own."""
    found = generation.get("eos_token_id")
    if found is None:
        found = getattr(config.get_text_config(), "eos_token_id", None)
    ids = (*as_list(found), tokenizer.eos_token_id)
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))
