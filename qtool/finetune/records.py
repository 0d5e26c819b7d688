"""What a fine-tuning run is asked for, what it tells while it runs, and what it answers with.

Light: knows neither PyTorch nor PEFT. Sizes are bytes, times seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, get_type_hints

from qtool.formats.precisions import ComputeDtype, QuantizedPrecision
from qtool.planner.training import FloatName

Method = Literal["qlora", "lora", "full"]
Scheduler = Literal["linear", "cosine", "constant"]

ADAPTER_LR: Final = 2e-4
FULL_LR: Final = 2e-5
DEFAULT_MAX_LENGTH: Final = 1024
DEFAULT_SPLIT: Final = "train"  # of a dataset on the Hub


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """DATA and how it becomes sequences.

    Args:
        source: a .jsonl, .parquet or .txt file, or a dataset on the Hub with an optional @revision.
        subset: the configuration of a Hub dataset that has several.
        split: which split of a Hub dataset.
        text_column: the column of plain text, where it is not called "text".
        eval_split: a share of the rows between 0 and 1, or a file; "" holds nothing out.
        max_length: tokens per sequence; None takes 1024 or the model's context if shorter.
        packing: several short sequences in one of `max_length`, none of which sees another.
        completion_only: learn completions and what the assistant says, not prompts.
    """

    source: str
    subset: str | None = None
    split: str = DEFAULT_SPLIT
    text_column: str | None = None
    eval_split: str = ""
    max_length: int | None = None
    packing: bool = False
    completion_only: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions:
    """The adapters. `targets` are module names, or None for all linear layers but the head."""

    r: int = 16
    alpha: float = 32
    dropout: float = 0.05
    targets: tuple[str, ...] | None = None
    rslora: bool = False
    dtype: FloatName = "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """The steps. `batch` is sequences per pass and GPU, `grad_accum` passes per step.

    Args:
        lr: None: 2e-4 for adapters, 2e-5 for all weights.
        max_steps: ends earlier than `epochs` would, or later; None goes by the epochs.
        warmup: a share of all steps below 1, or a number of steps.
        master_dtype: what "full" keeps weights and optimizer states in; bfloat16 rounds away steps
            that are small beside the weight, so it takes half the memory and learns less.
        compute_dtype: None: bfloat16, or float16 on a GPU that lacks it.
    """

    lr: float | None = None
    epochs: float = 1
    max_steps: int | None = None
    batch: int = 4
    grad_accum: int = 4
    warmup: float = 0.03
    scheduler: Scheduler = "cosine"
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    seed: int = 0
    save_steps: int = 200
    gradient_checkpointing: bool = True
    master_dtype: FloatName = "fp32"
    compute_dtype: ComputeDtype | None = None

    def learning_rate(self, method: Method) -> float:
        """The one asked for, or what suits the method."""
        return self.lr if self.lr is not None else FULL_LR if method == "full" else ADAPTER_LR


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneRequest:
    """`qtool finetune MODEL DATA -o OUT` with its options.

    Args:
        quant: what a full-precision MODEL is packed to for qlora; None: nf4-dq.
        resume: go on where OUT's last save is.
        restart: drop what an earlier run left in OUT.
        force: run although the plan says that it does not fit.
    """

    model: str
    output: Path
    data: DataOptions
    lora: LoraOptions = field(default_factory=LoraOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    method: Method = "qlora"
    quant: QuantizedPrecision | None = None
    device: str = "auto"
    resume: bool = False
    restart: bool = False
    force: bool = False

    def settings(self) -> dict[str, Any]:
        """What the result depends on, as JSON has it; a resumed run must have the same.

        MODEL and DATA are what they name, however that was spelled.
        """
        fields = {
            "model": place_of(self.model),
            "method": self.method,
            "quant": self.quant,
            **asdict(self.data),
            "source": place_of(self.data.source),
            "eval_split": place_of(self.data.eval_split),
            **{f"lora_{name}": value for name, value in asdict(self.lora).items()},
            **asdict(self.training),
        }
        if self.method == "full":
            fields = {name: value for name, value in fields.items() if name[:5] != "lora_"}
        fields["lr"] = self.training.learning_rate(self.method)
        targets = fields.get("lora_targets")
        return fields | ({"lora_targets": list(targets)} if targets else {})


def place_of(name: str) -> str:
    """The whole path of what is here, which wins; a Hub id, or a share of the rows, as it is."""
    try:
        path = Path(name).expanduser() if name.startswith("~") else Path(name)
        return str(path.resolve()) if name and path.exists() else name
    except (OSError, RuntimeError):  # no name of a file, nobody's home
        return name


class Step(NamedTuple):
    """One optimizer step; `step` counts from 1. Losses are means over the tokens learned."""

    step: int
    loss: float
    lr: float


class Progress(NamedTuple):
    """Where a run is. `memory_bytes` is the allocator's peak so far, None on the CPU."""

    step: int
    total_steps: int
    loss: float
    tokens_per_s: float
    left_s: float
    memory_bytes: int | None
    eval_loss: float | None = None


OnProgress = Callable[[Progress], None]


class DataFile(NamedTuple):
    """Where rows came from: a file with its SHA-256, or a Hub dataset with its revision."""

    source: str
    sha256: str | None
    rows: int
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """What a run made.

    `tokens` are those of all steps, `earlier_tokens` those of the steps before a run was resumed;
    `seconds` and `tokens_per_s` are of this process alone. `allocated_peak_bytes` and the planned
    ones are None where there is no GPU or no plan. `eval_loss` is a mean as a step's loss is.
    """

    output: str
    method: Method
    quant: str | None
    first_loss: float
    final_loss: float
    eval_loss: float | None
    steps: int
    tokens: int
    tokens_per_s: float
    seconds: float
    allocated_peak_bytes: int | None
    planned_peak_bytes: int | None
    planned_allocated_peak_bytes: int | None
    trainable_parameters: int
    device: str
    resumed_from_step: int | None
    earlier_tokens: int = 0
    history: tuple[Step, ...] = ()
    eval_history: tuple[tuple[int, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As the JSON document and the manifest have it, without the histories."""
        fields = asdict(self)
        del fields["history"], fields["eval_history"]
        return fields

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> FinetuneResult:
        """What a finished run's manifest says.

        Raises:
            KeyError, TypeError, ValueError: it is damaged.
        """
        kinds = get_type_hints(cls) | {"method": str}  # as isinstance takes them
        for name, value in manifest["result"].items():
            if not isinstance(value, kinds[name]):
                raise TypeError(f"{name} is {value!r}")
        steps = manifest["losses"]
        return cls(
            **manifest["result"],
            history=tuple(Step(int(step), float(loss), float(lr)) for step, loss, lr in steps),
            eval_history=tuple((int(step), float(loss)) for step, loss in manifest["eval_losses"]),
        )
