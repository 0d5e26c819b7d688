"""Held-out loss after `qtool finetune` beside PEFT + bitsandbytes + TRL, and beside 16-bit LoRA.

    python -m scripts.measure_finetune MODEL TEXT --json FILE
    python -m scripts.measure_finetune MODEL TEXT --steps 400 --batch 16 --device cuda --json FILE

TEXT is split once: its last tenth is held out. Every contender trains on the same sequences in the
same order with the same settings, for each seed, and is measured by the same function over its own
forward pass:

    qtool qlora     the base packed while loading, adapters by `qtool finetune`
    rival qlora     transformers + bitsandbytes, PEFT's layers, TRL's SFTTrainer, torch AdamW
    qtool lora      the base in bfloat16

Two questions. Is the difference of qtool and the rival within the spread of the seeds? Is the gap
between the packed and the 16-bit base no larger after training than before? The rival's adapters
are held in float32 as ours are; TRL by itself would round them to bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl

from qtool import __version__
from qtool.backends.cpu import describe_cpu
from qtool.events import ignore_events
from qtool.finetune.lora_layers import load_lora
from qtool.finetune.network import choose_placement, load_base
from qtool.finetune.records import (
    DataOptions,
    FinetuneRequest,
    LoraOptions,
    TrainingOptions,
)
from qtool.finetune.rows import open_rows
from qtool.finetune.run import prepare, train
from qtool.finetune.sequences import Sequences, encode

HELD_OUT_SHARE = 0.1
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")


@dataclass(frozen=True)
class Setting:
    """What all contenders share."""

    model: str
    train: Path
    held_out: Sequences
    steps: int
    batch: int
    length: int
    lr: float
    r: int
    quant: str
    device: str

    def request(self, method: Any, seed: int, output: Path) -> FinetuneRequest:
        return FinetuneRequest(
            model=self.model,
            output=output,
            method=method,
            quant=self.quant if method == "qlora" else None,  # type: ignore[arg-type]
            device=self.device,
            data=DataOptions(source=str(self.train), max_length=self.length),
            lora=LoraOptions(r=self.r),
            training=TrainingOptions(
                lr=self.lr,
                max_steps=self.steps,
                batch=self.batch,
                grad_accum=1,
                seed=seed,
                save_steps=10**6,
                gradient_checkpointing=False,
            ),
        )


def main() -> None:
    """Measure and print."""
    arguments = _parse()
    with tempfile.TemporaryDirectory() as folder:
        setting = _setting(arguments, Path(folder))
        before = {method: _loss_before(setting, method) for method in ("qlora", "lora")}
        print(f"before: {before}", flush=True)
        contenders: dict[str, Callable[[Setting, int, Path], tuple[float, float]]] = {
            "qtool qlora": lambda *given: _train_qtool("qlora", *given),
            "rival qlora": _train_rival,
            "qtool lora": lambda *given: _train_qtool("lora", *given),
        }
        runs = []
        for seed in arguments.seeds:  # in turns, so that a busy machine is nobody's burden alone
            for name, measure in contenders.items():
                start_s = time.perf_counter()
                loss, first_loss = measure(setting, seed, Path(folder))
                seconds = time.perf_counter() - start_s
                runs.append(
                    {
                        "contender": name,
                        "seed": seed,
                        "held_out_loss": loss,
                        "first_loss": first_loss,
                        "seconds": seconds,
                    }
                )
                print(f"{name:12} seed {seed}  held out {loss:.4f}  {seconds:.0f} s", flush=True)
    document = {
        "measured": "held-out loss of fine-tuning",
        "qtool_version": __version__,
        "machine": torch.cuda.get_device_name() if arguments.device != "cpu" else describe_cpu(),
        "versions": {name: version(name) for name in PACKAGES},
        "settings": {
            key: value for key, value in vars(arguments).items() if key not in ("json", "text")
        }
        | {"text": Path(arguments.text).name, "model": Path(arguments.model).name},
        "held_out_tokens": setting.held_out.num_tokens,
        "before": before,
        "runs": runs,
        "summary": _summary(before, runs),
    }
    print(json.dumps(document["summary"], indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=64, help="sequences")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--quant", default="nf4-dq")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _setting(arguments: argparse.Namespace, folder: Path) -> Setting:
    text = Path(arguments.text).read_text(encoding="utf-8")
    cut = text.rindex("\n", 0, round(len(text) * (1 - HELD_OUT_SHARE))) + 1
    parts = (folder / "train.txt", folder / "held_out.txt")
    for path, part in zip(parts, (text[:cut], text[cut:]), strict=True):
        path.write_text(part, encoding="utf-8")
    held_out = _encode(arguments.model, parts[1], arguments.length)
    # Whole pieces only: then a mean over sequences is a mean over tokens.
    held_out.items = held_out.items[: min(arguments.held_out, len(held_out.items) - 1)]
    return Setting(
        arguments.model,
        parts[0],
        held_out,
        arguments.steps,
        arguments.batch,
        arguments.length,
        arguments.lr,
        arguments.r,
        arguments.quant,
        arguments.device,
    )


def _encode(model: str, path: Path, length: int) -> Sequences:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows = open_rows(DataOptions(source=str(path)))
    return encode(rows, tokenizer, max_length=length, completion_only=True)


@torch.no_grad()
def held_out_loss(model: Any, held_out: Sequences) -> float:
    """Mean loss per token, in bfloat16 as training computes it."""
    model.eval()
    device = next(model.parameters()).device
    losses = []
    for item in held_out.items:
        ids = torch.tensor([item.ids], device=device)
        with torch.autocast(device.type, torch.bfloat16):
            losses.append(float(model(ids, labels=ids, use_cache=False).loss))
    return statistics.fmean(losses)


# -- contenders -----------------------------------------------------------------------------------


def _loss_before(setting: Setting, method: str) -> float:
    return held_out_loss(_load(setting, method).model, setting.held_out)


def _load(setting: Setting, method: str) -> Any:
    request = setting.request(method, 0, Path("unused"))
    planned = prepare(request, warn=_ignore).planned
    return load_base(planned, choose_placement(request), ignore_events)


def _train_qtool(method: str, setting: Setting, seed: int, folder: Path) -> tuple[float, float]:
    output = folder / f"{method}-{seed}"
    prepared = prepare(setting.request(method, seed, output), warn=_ignore)
    result = train(prepared, warn=_ignore, on_progress=_ignore)
    model = load_lora(_load(setting, method).model, output)
    return held_out_loss(model, setting.held_out), result.first_loss


def _train_rival(setting: Setting, seed: int, folder: Path) -> tuple[float, float]:
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=setting.quant.removesuffix("-dq"),
        bnb_4bit_use_double_quant=setting.quant.endswith("-dq"),
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    device = "cpu" if setting.device == "cpu" else "cuda:0"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        setting.model,
        quantization_config=quantization,
        dtype=torch.bfloat16,
        device_map={"": device},
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(setting.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    transformers.set_seed(seed)
    model.requires_grad_(False)
    ours = setting.request("qlora", seed, folder)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=ours.lora.r,
        lora_alpha=ours.lora.alpha,
        lora_dropout=ours.lora.dropout,
        target_modules="all-linear",
    )
    model = peft.get_peft_model(model, lora)
    config = trl.SFTConfig(
        output_dir=str(folder / f"rival-{seed}"),
        per_device_train_batch_size=setting.batch,
        max_steps=setting.steps,
        learning_rate=setting.lr,
        lr_scheduler_type=ours.training.scheduler,
        warmup_steps=ours.training.warmup,
        weight_decay=ours.training.weight_decay,
        optim="adamw_torch",
        seed=seed,
        save_strategy="no",
        logging_steps=1,
        gradient_checkpointing=False,
        bf16=True,
        use_cpu=setting.device == "cpu",
        max_length=setting.length,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=_encode(setting.model, setting.train, setting.length).as_dataset(),
        processing_class=tokenizer,
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.train()
    first_loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return held_out_loss(trainer.model, setting.held_out), first_loss


def _summary(before: dict[str, float], runs: list[dict[str, Any]]) -> dict[str, Any]:
    losses: dict[str, list[float]] = {}
    for run in runs:
        losses.setdefault(run["contender"], []).append(run["held_out_loss"])
    means = {name: statistics.fmean(found) for name, found in losses.items()}
    spreads = {name: max(found) - min(found) for name, found in losses.items()}
    difference = means["qtool qlora"] - means["rival qlora"]
    gap_before, gap_after = (
        before["qlora"] - before["lora"],
        means["qtool qlora"] - means["qtool lora"],
    )
    return {
        "means": means,
        "spreads": spreads,
        "qtool_minus_rival": difference,
        "is_within_spread": abs(difference) <= max(spreads["qtool qlora"], spreads["rival qlora"]),
        "gap_to_16_bit_before": gap_before,
        "gap_to_16_bit_after": gap_after,
        "is_gap_no_larger": gap_after <= gap_before,
    }


def _ignore(*anything: object) -> None:
    pass


if __name__ == "__main__":
    main()
