"""An adapter that generating keeps beside the weights, from its config and its file's header.

PEFT holds in float32 what it adds to layers, whatever the file has, and copies modules that were
trained whole. The fused path copies A and B of LoRA besides, in the dtype of activations, ranks
filled up to a multiple of 8, and has room for the inner values A x of a step. Tests hold this
module against PEFT and `qtool.runtime.decoders.fused_adapters`.

On the other paths PEFT's layers run. To the result of an adapted product (n, rows) they add B (A x)
in float32, so that beside x (n, columns) in float32 two more results lie there. DoRA makes the
update of the whole weight for each product, out of an identity matrix of its columns; then there
are the update, scaled, the weight, and their sum in float32, or two of them and more results.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from qtool.architecture import Architecture
from qtool.checkpoint.adapter_files import WEIGHTS_NAME, AdapterFiles
from qtool.errors import QtoolError
from qtool.planner.allocator import ROUNDING_BYTES
from qtool.planner.lora import HEADS, features
from qtool.planner.units import FLOAT32_BYTES

RANK_MULTIPLE: Final = 8
INT32_BYTES: Final = 4
PREFIX: Final = "base_model.model."
# The layers of the common block by what they multiply: one launch makes the inner values of each.
GROUPS: Final = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), 0),
    "o_proj": 1,
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), 2),
    "down_proj": 3,
}
_IN_BLOCK: Final = re.compile(r"(.*\.layers\.\d+)\.(?:self_attn|mlp)\.(\w+)")
_FACTOR: Final = re.compile(r"(.+)\.lora_([AB])\.weight")
# Of PEFT's LoRA, what is more than the two factors.
_VARIANTS: Final = (
    *("alora_invocation_tokens", "arrow_config", "lora_bias"),
    *("use_bdlora", "use_dora", "use_qalora"),
)


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """LoRA of one linear layer: A (rank, columns) and B (rows, rank)."""

    module: str
    rank: int
    rows: int
    columns: int

    @property
    def filled_rank(self) -> int:
        """As kernels take it."""
        return -(-self.rank // RANK_MULTIPLE) * RANK_MULTIPLE

    @property
    def group(self) -> tuple[str, int] | None:
        """Its block, and which of the block's inputs it multiplies; None outside of blocks."""
        match = _IN_BLOCK.fullmatch(self.module)
        place = GROUPS.get(match[2]) if match else None
        return None if match is None or place is None else (match[1], place)

    def beside_product_bytes(self, tokens: int, element_bytes: int, *, is_dora: bool) -> int:
        """What PEFT's layer makes beside x and the result of its base layer."""
        x_elements = 0 if element_bytes == FLOAT32_BYTES else tokens * self.columns
        results, matrix = tokens * self.rows, self.rows * self.columns
        moments = [2 * results]
        if is_dora:
            moments = [self.columns**2 + matrix, 4 * matrix, 2 * matrix + 3 * results]
        return (x_elements + max(moments)) * FLOAT32_BYTES


@dataclass(frozen=True, slots=True)
class PlannedAdapter:
    """What is known of an adapter without its weights.

    Args:
        layers: those with LoRA.
        more_elements: of other tensors that PEFT adds, one number each.
        copied_elements: of tensors that were trained whole, each a copy beside the base's.
        file_bytes: of all tensors, as they come to the device before PEFT takes them over.
        is_plain: nothing but LoRA on linear layers, which the fused path takes.
        config: its adapter_config.json.
    """

    name: str
    layers: tuple[AdaptedLayer, ...]
    more_elements: tuple[int, ...]
    copied_elements: tuple[int, ...]
    file_bytes: int
    is_plain: bool
    is_dora: bool = False
    config: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, name: str, files: AdapterFiles) -> Self:
        """From config and header; whether it fits a model is for `check_fits` to say."""
        factors: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        more, copied = [], []
        saved = _saved_modules(files.config)
        is_lora = files.config.get("peft_type") == "LORA"
        for tensor in files.tensors:
            own_name = tensor.name.removeprefix(PREFIX)
            match = _FACTOR.fullmatch(own_name) if is_lora and len(tensor.shape) == 2 else None
            if match is not None:
                factors[match[1]][match[2]] = tensor.shape
            elif _is_saved(own_name, saved):
                copied.append(tensor.num_elements)
            elif not is_lora or "lora_" in own_name:
                more.append(tensor.num_elements)  # a trained bias takes the place of the base's
        layers = tuple(
            AdaptedLayer(module, found["A"][0], found["B"][0], found["A"][1])
            for module, found in factors.items()
            if found.keys() == {"A", "B"}
        )
        is_plain = is_lora and not more and not copied
        is_plain &= not any(files.config.get(key) for key in _VARIANTS)
        is_plain &= not any(_is_outside(layer.module) for layer in layers)
        return cls(
            name=name,
            layers=layers,
            more_elements=tuple(more),
            copied_elements=tuple(copied),
            file_bytes=sum(tensor.num_bytes for tensor in files.tensors),
            is_plain=is_plain,
            is_dora=bool(files.config.get("use_dora")),
            config=files.config,
        )

    @property
    def rank(self) -> int | None:
        """The commonest one; None without LoRA."""
        ranks = Counter(layer.rank for layer in self.layers)
        return ranks.most_common(1)[0][0] if ranks else None

    def check_fits(self, architecture: Architecture) -> None:
        """Refuse layers of other sizes than the model's.

        Raises:
            QtoolError: bad_file, naming the first of them; or that none is the model's.
        """
        found = {layer: architecture.find(f"{layer.module}.weight") for layer in self.layers}
        known = {layer: tensor for layer, tensor in found.items() if tensor is not None}
        if self.layers and not known:
            raise self._mismatch(f"the model has no {self.layers[0].module}")
        for layer, tensor in known.items():
            inputs, outputs = features(tensor) if tensor.is_linear else tensor.shape[::-1]
            if (inputs, outputs) != (layer.columns, layer.rows):
                raise self._mismatch(
                    f"{layer.module}: expected a weight {[outputs, inputs]}, its factors make "
                    f"{[layer.rows, layer.columns]}"
                )

    def _mismatch(self, detail: str) -> QtoolError:
        return QtoolError(
            f"{self.name}: {WEIGHTS_NAME}: the adapter does not fit the model: {detail}",
            kind="bad_file",
            hint="adapter_config.json names the model it was made for",
        )

    def held_bytes(self, element_bytes: int) -> int:
        """What PEFT keeps; `element_bytes` is that of the model."""
        factors = [n * it.rank for it in self.layers for n in (it.columns, it.rows)]
        added = _allocated([*factors, *self.more_elements], FLOAT32_BYTES)
        return added + _allocated(self.copied_elements, element_bytes)

    def copies_bytes(self, batch: int, element_bytes: int) -> int:
        """What the fused path has besides, to make `batch` tokens at once."""
        rows: Counter[tuple[str, int]] = Counter()
        columns: dict[tuple[str, int], int] = {}
        b_elements = []
        for layer in self.layers:
            if (group := layer.group) is not None:
                rows[group] += layer.filled_rank
                columns[group] = layer.columns
                b_elements += [part * layer.filled_rank for part in _parts_of(layer)]
        if not rows:
            return 0
        a_elements = [num_rows * columns[group] for group, num_rows in rows.items()]
        return (
            _allocated([*a_elements, *b_elements], element_bytes)
            + _allocated([*rows.values(), batch * max(rows.values())], FLOAT32_BYTES)
            + _allocated([len(rows)], INT32_BYTES)
        )

    def notes(self) -> tuple[str, ...]:
        """What one may not expect of generating with it."""
        if self.is_plain:
            return ()
        if self.is_dora:
            return ("DoRA runs in PEFT's own layers, which make a whole weight for each product",)
        if self.layers:
            return ("the adapter is more than LoRA on linear layers, so PEFT's own layers run",)
        return ("PEFT's own layers run, and what they make beside their results is not counted",)

    def inner_rows(self) -> Mapping[int, int]:
        """The most inner values of a token for each of a block's inputs, see `GROUPS`."""
        rows: Counter[tuple[str, int]] = Counter()
        for layer in self.layers:
            if (group := layer.group) is not None:
                rows[group] += layer.filled_rank
        most: dict[int, int] = {}
        for (_, place), num_rows in rows.items():
            most[place] = max(most.get(place, 0), num_rows)
        return most


def _parts_of(layer: AdaptedLayer) -> tuple[int, ...]:
    """Rows of the layers that it is to kernels: gate and up may be one, and its A is there once."""
    half = layer.rows // 2
    return (half, half) if layer.module.endswith(".gate_up_proj") else (layer.rows,)


def _allocated(elements: Iterable[int], element_bytes: int) -> int:
    units = (-(-number * element_bytes // ROUNDING_BYTES) for number in elements)
    return ROUNDING_BYTES * sum(units)


def _saved_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    named = config.get("modules_to_save")
    return tuple(it for it in named if isinstance(it, str)) if isinstance(named, list) else ()


def _is_saved(name: str, modules: Iterable[str]) -> bool:
    """Whether a tensor belongs to a module that was trained whole: its name ends so, to PEFT."""
    return any(f"{module}." in name for module in modules)


def _is_outside(module: str) -> bool:
    """Head and embedding, whose adapters kernels do not know."""
    last = module.rpartition(".")[2]
    return last in HEADS or last.startswith("embed")
