"""A LoRA adapter as PEFT saves it: the config, checked, and the tensors, by what they do.

    base_model.model.MODULE.lora_A.weight        (r, in)      with lora_B (out, r): adds s * B A
    base_model.model.MODULE.lora_embedding_A     (r, rows)    with lora_embedding_B (width, r): the
                                                              transpose of the same
    base_model.model.MODULE.lora_magnitude_vector (out,)      DoRA: the norms of the output rows
    base_model.model.MODULE.lora_B.bias          (out,)       adds s times itself to the bias
    base_model.model.NAME                                     takes the place of the tensor NAME
                                                              (modules_to_save, trained biases)

What changes the forward pass in another way is refused.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from qtool.checkpoint.adapter_files import (
    CONFIG_NAME,
    PREFIX,
    TOKENIZER_FILES,
    WEIGHTS_NAME,
    AdapterPlace,
    read_adapter_files,
    trained_quant,
)
from qtool.checkpoint.local_folder import LocalFolder
from qtool.checkpoint.names import quoted
from qtool.checkpoint.reading import ShardReader
from qtool.checkpoint.records import Shard, TensorInfo
from qtool.errors import Option, QtoolError
from qtool.formats.floats import NUMPY_DTYPES, count_nonfinite, widen
from qtool.formats.precisions import QuantizedPrecision
from qtool.formats.tensors import DTYPE_BITS, TORCH_NAMES, SourceDtype

CHUNK_BYTES: Final = 8 << 20

# What a config may say without changing what the tensors mean.
_HARMLESS: Final = frozenset(
    {
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
        *("ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out"),
        *("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform"),
        *("loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config"),
        *("megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size"),
        *("r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type"),
        *("use_dora", "use_rslora"),
    }
)
_REFUSED: Final = {
    "alora_invocation_tokens": "it acts on some tokens only",
    "arrow_config": "it chooses among adapters for every token",
    "kasa_config": "it changes the singular values of the base's weights",
    "layer_replication": "it repeats layers of the base",
    "megatron_config": "its layers are spread over processes",
    "monteclora_config": "its update is sampled",
    "target_parameters": "it adapts parameters that are no weights of linear layers",
    "trainable_token_indices": "it trains single rows of the embedding",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "it pools the inputs in groups",
}
# Initialisations that leave the base's weights as they are; others subtract the update from them.
_PLAIN_INITS: Final = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

_PART: Final = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A"
    r"|lora_embedding_B|lora_magnitude_vector(?:\.weight)?)"
)
_NO_REPLACEMENT: Final = re.compile(
    r"\.lora_|\.token_adapter\.|\.trainable_tokens_|\.modules_to_save\.|\.original_module\."
)


@dataclass(frozen=True, slots=True)
class LowRank:
    """The update of one module: scale * B A.

    `a` is (r, in), `b` (out, r); for an embedding (r, rows) and (width, r). `magnitude` (out,) is
    DoRA's, `bias` (out,) is added to the layer's.
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    scale: float
    is_embedding: bool
    magnitude: TensorInfo | None = None
    bias: TensorInfo | None = None

    @property
    def features(self) -> tuple[int, int]:
        """(outputs, inputs) of the layer."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter folder whose config and headers were checked.

    `updates` are by module, `replacements` by the name of the tensor that they replace; names are
    the model's.
    """

    place: AdapterPlace
    config: Mapping[str, Any]
    shard: Shard
    updates: Mapping[str, LowRank]
    replacements: Mapping[str, TensorInfo]
    tokenizer_files: tuple[str, ...]
    trained_quant: QuantizedPrecision | None = None  # of the base in training, where that is known
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.place.folder

    @property
    def base(self) -> str | None:
        """The model that it was trained on, as its config names it."""
        name, revision = self.config.get("base_model_name_or_path"), self.config.get("revision")
        if not isinstance(name, str) or not name:
            return None
        is_folder = Path(name).exists() or not isinstance(revision, str) or "@" in name
        return name if is_folder or not revision else f"{name}@{revision}"

    @property
    def idle_patterns(self) -> tuple[str, ...]:
        """Patterns of ranks and alphas that match no module: the config may be another's."""
        return tuple(
            f"{key} {quoted(pattern)}"
            for key in ("rank_pattern", "alpha_pattern")
            for pattern in self.config.get(key) or {}
            if not any(_ends(module, pattern) for module in self.updates)
        )

    @property
    def keeps_ties(self) -> bool:
        """Whether weights that the base ties stay tied in training."""
        return bool(self.config.get("ensure_weight_tying"))

    def open(self) -> AdapterReader:
        """A reader of its tensors."""
        return AdapterReader(self)


class AdapterReader(ShardReader):
    """The open file of an adapter's tensors."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__(adapter.folder / WEIGHTS_NAME, shard=adapter.shard)

    def read_floats(self, tensor: TensorInfo) -> NDArray[np.float32]:
        """A tensor's values, float32, in its shape."""
        dtype = cast(SourceDtype, tensor.dtype)
        values = self.read_tensor(tensor).view(NUMPY_DTYPES[dtype])
        return widen(values, dtype).reshape(tensor.shape)


def open_adapter(place: AdapterPlace) -> Adapter:
    """Read config and headers of the adapter, and check them.

    Raises:
        QtoolError: not_found or bad_file; unsupported for what is no LoRA, or for a variant whose
            update is not one of the weights alone.
    """
    folder = place.folder
    files = read_adapter_files(folder)
    _check_config(folder, files.config)
    updates, replacements = _sort_tensors(folder, files.config, files.tensors)
    source = LocalFolder(folder)
    return Adapter(
        place=place,
        config=files.config,
        shard=files.shard,
        updates=updates,
        replacements=replacements,
        tokenizer_files=_tokenizer_files(source),
        trained_quant=trained_quant(source),
        digests={CONFIG_NAME: files.config_sha256},
    )


def check_values(adapter: Adapter) -> None:
    """Read every byte once: refuse NaN and infinity, and keep the file's checksum.

    Raises:
        QtoolError: bad_file.
    """
    tensors = sorted(
        _tensors_of(adapter), key=lambda tensor: tensor.offset
    )  # so that the file is read from start to end
    digest = hashlib.sha256()
    with adapter.open() as reader:
        position = 0
        for tensor in tensors:
            digest.update(_read(reader, position, tensor.offset - position))
            for start, chunk in _chunks(reader, tensor):
                digest.update(chunk.data)
                _refuse_nonfinite(adapter.folder, tensor, start, chunk)
            position = tensor.offset + tensor.num_bytes
        digest.update(_read(reader, position, adapter.shard.file_bytes - position))
    adapter.digests[WEIGHTS_NAME] = digest.hexdigest()


def _tensors_of(adapter: Adapter) -> Iterator[TensorInfo]:
    for update in adapter.updates.values():
        parts = (update.a, update.b, update.magnitude, update.bias)
        yield from (part for part in parts if part is not None)
    yield from adapter.replacements.values()


def _read(reader: ShardReader, offset: int, num_bytes: int) -> bytes:
    buffer = np.empty(num_bytes, np.uint8)
    reader.read_into(buffer, offset)
    return buffer.tobytes()


def _chunks(reader: ShardReader, tensor: TensorInfo) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    for start in range(0, tensor.num_bytes, CHUNK_BYTES):
        chunk = np.empty(min(CHUNK_BYTES, tensor.num_bytes - start), np.uint8)
        reader.read_into(chunk, tensor.offset + start)
        yield start, chunk


def _refuse_nonfinite(
    folder: Path, tensor: TensorInfo, start: int, chunk: NDArray[np.uint8]
) -> None:
    dtype = cast(SourceDtype, tensor.dtype)
    values = chunk.view(NUMPY_DTYPES[dtype])
    if num_bad := count_nonfinite(values, dtype):
        found = int(np.argmax(~np.isfinite(widen(values, dtype))))
        index = start * 8 // DTYPE_BITS[dtype] + found
        raise _bad(
            folder,
            f"{WEIGHTS_NAME}: {tensor.name}: expected finite values, found {num_bad} that are not, "
            f"the first at element {index}",
            "the training diverged or the file is damaged; take an earlier checkpoint of it",
        )


# ---- The folder and its config ----------------------------------------------------------------


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise _unsupported(folder, f"peft_type is {quoted(peft_type)}, only LORA can be merged")
    for key, value in config.items():
        if key in _REFUSED and value not in (None, False, [], {}):
            raise _unsupported(folder, f"it was trained with {key}: {_REFUSED[key]}")
        if key not in _HARMLESS and key not in _REFUSED and value not in (None, False, [], {}, ""):
            raise _unsupported(folder, f"{key} is {quoted(value)}, which qtool does not know")
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise QtoolError(
            f"{folder}: init_lora_weights is {quoted(init)}, which changed the base's weights when "
            "the training began",
            kind="unsupported",
            hint="convert the adapter with PEFT: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)",
        )
    for key, is_valid in (
        ("r", _is_count),
        ("lora_alpha", _is_number),
        ("rank_pattern", _is_pattern),
        ("alpha_pattern", _is_pattern),
        ("target_modules", _is_targets),
        ("exclude_modules", _is_targets),
        ("modules_to_save", _is_names),
        ("layers_to_transform", _is_layers),
        ("layers_pattern", _is_layer_names),
    ):
        if not is_valid(config.get(key, 8 if key in ("r", "lora_alpha") else None)):
            raise _bad(
                folder,
                f"{CONFIG_NAME}: {key} is {quoted(config.get(key))}",
                "restore the file as PEFT wrote it",
            )


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(cast(float, value))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_pattern(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not all(_is_number(number) for number in value.values()):
        return False
    return all(map(_is_expression, value))


def _is_targets(value: object) -> bool:
    """Names, or one regular expression for all of the name."""
    if isinstance(value, list):
        return all(isinstance(name, str) for name in value)
    return value is None or (isinstance(value, str) and _is_expression(value))


def _is_names(value: object) -> bool:
    """Names that PEFT reads as expressions."""
    names = [] if value is None else value
    return isinstance(names, list) and all(isinstance(n, str) and _is_expression(n) for n in names)


def _is_layer_names(value: object) -> bool:
    return _is_names([value] if isinstance(value, str) else value)


def _is_layers(value: object) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return value is None or all(type(number) is int for number in numbers)


def _is_expression(pattern: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except re.error:
        return False
    return True


def _tokenizer_files(source: LocalFolder) -> tuple[str, ...]:
    """The tokenizer's files, if there is a whole one."""
    names = [name for name in source.files if name in TOKENIZER_FILES]
    if not {"tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model"} & set(names):
        return ()
    for name in names:
        source.status_of(name)  # no link may lead out of the folder
    return tuple(names)


# ---- Its tensors ------------------------------------------------------------------------------


def _sort_tensors(
    folder: Path, config: Mapping[str, Any], tensors: tuple[TensorInfo, ...]
) -> tuple[dict[str, LowRank], dict[str, TensorInfo]]:
    parts: dict[str, dict[str, TensorInfo]] = {}
    replacements: dict[str, TensorInfo] = {}
    for tensor in tensors:
        if tensor.dtype not in TORCH_NAMES:
            raise _unsupported(
                folder,
                f"{tensor.name} is {tensor.dtype}, expected one of {', '.join(TORCH_NAMES)}",
            )
        name = tensor.name.removeprefix(PREFIX)
        if match := _PART.fullmatch(name):
            part = match["part"].removesuffix(".weight").replace("embedding_", "")
            kind = "embedding" if "lora_embedding" in match["part"] else "linear"
            found = parts.setdefault(match["module"], {})
            _refuse_second(folder, found.get(part), tensor)
            found[part] = tensor
            if part == "lora_A":
                found[kind] = tensor
        elif _NO_REPLACEMENT.search(name):
            raise _unsupported(
                folder, f"{WEIGHTS_NAME} holds {tensor.name}, which is no plain LoRA"
            )
        else:
            name = name.replace(".base_layer.", ".")
            _refuse_second(folder, replacements.get(name), tensor)
            replacements[name] = tensor
    updates = {module: _low_rank(folder, config, module, found) for module, found in parts.items()}
    if not updates and not replacements:
        raise _bad(folder, f"{WEIGHTS_NAME} holds no tensors", "save the adapter again")
    return updates, replacements


def _refuse_second(folder: Path, first: TensorInfo | None, second: TensorInfo) -> None:
    if first is not None:
        raise _bad(
            folder,
            f"{WEIGHTS_NAME}: {first.name} and {second.name} are for the same place",
            "the file was put together from several; save the adapter again with PEFT",
        )


def _low_rank(
    folder: Path, config: Mapping[str, Any], module: str, parts: Mapping[str, TensorInfo]
) -> LowRank:
    for name in ("lora_A", "lora_B"):
        if name not in parts:
            found = ", ".join(part.name for part in dict.fromkeys(parts.values()))
            raise _bad(
                folder,
                f"{WEIGHTS_NAME}: {module} has no {name}, only {found}",
                "the adapter is incomplete; save it again, or fetch it again",
            )
    a, b = parts["lora_A"], parts["lora_B"]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise _unsupported(
            folder, f"{a.name} has the shape {list(a.shape)}: only matrices can be merged"
        )
    rank = _by_pattern(config, "rank_pattern", module, config.get("r", 8))
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha", 8))
    if a.shape[0] != b.shape[1] or a.shape[0] != rank:
        raise _bad(
            folder,
            f"{WEIGHTS_NAME}: {module}: {CONFIG_NAME} implies rank {rank}, found lora_A "
            f"{list(a.shape)} and lora_B {list(b.shape)}",
            "config and weights are of different adapters",
        )
    magnitude, bias = parts.get("lora_magnitude_vector"), parts.get("lora_B.bias")
    if (magnitude is not None) is not bool(config.get("use_dora")):
        found = "no lora_magnitude_vector" if magnitude is None else "a lora_magnitude_vector"
        raise _bad(
            folder,
            f"{WEIGHTS_NAME}: {module} has {found}, but use_dora is "
            f"{quoted(config.get('use_dora'))}",
            "config and weights are of different adapters",
        )
    for part in (magnitude, bias):
        if part is not None and part.shape != b.shape[:1]:
            raise _bad(
                folder,
                f"{WEIGHTS_NAME}: {part.name}: expected shape {list(b.shape[:1])}, found "
                f"{list(part.shape)}",
                "the file is damaged",
            )
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return LowRank(module, a, b, alpha / divisor, "embedding" in parts, magnitude, bias)


def _by_pattern(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The value of the first pattern that the end of the module's name matches, as in PEFT."""
    matching = (
        value for pattern, value in (config.get(key) or {}).items() if _ends(module, pattern)
    )
    return next(matching, default)


def _ends(module: str, pattern: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _bad(folder: Path, what: str, hint: str) -> QtoolError:
    return QtoolError(f"{folder}: {what}", kind="bad_file", hint=hint)


def _unsupported(folder: Path, what: str) -> QtoolError:
    return QtoolError(
        f"{folder}: {what}",
        kind="unsupported",
        hint=("such an adapter can be used unmerged: `qtool generate` ", Option("adapter", folder)),
    )
