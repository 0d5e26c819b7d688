"""Train the model that `qtool demo` runs on, and write it as a Hugging Face folder.

A Llama of 3.5 million parameters with a byte-level BPE vocabulary, trained on one text file whose
last tenth is held out. The weights of the best held-out loss are kept, as bfloat16 in two shards,
with a model card that records the figures and this command.

    python scripts/train_demo_model.py tinyshakespeare.txt qtool/demo_model

Needs `qtool[run]`. One CPU thread by default: the same machine and library versions then give the
same weights again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_FRACTION = 0.1
WARMUP_STEPS = 60
SHARD_SIZE = "4MB"  # cuts 7 MB of weights into two shards
MAX_FOLDER_BYTES = 8_000_000  # the wheel carries the folder


@dataclass(frozen=True, slots=True)
class Loss:
    """Mean cross entropy of a text: nats per token, and bits per byte of UTF-8."""

    nats_per_token: float
    bits_per_byte: float


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", type=Path, help="a UTF-8 text file")
    parser.add_argument("output", type=Path, help="the folder to write")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--context", type=int, default=512, help="tokens per training window")
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--evaluate-every", type=int, default=100, help="steps")
    parser.add_argument("--patience", type=int, default=3, help="evaluations without a new best")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def train_tokenizer(text: str, vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """The tokens of a whole text, longer than the model's context: int64 (num_tokens,)."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """Untied, grouped-query, every width a multiple of 64."""
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=args.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    # Llama has no dropout on the residual branches; a megabyte of text needs it.
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_hook(
                lambda module, _, output: nn.functional.dropout(
                    output, args.dropout, training=module.training
                )
            )
    return model


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves the norms alone."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))


def sample_windows(tokens: Tensor, args: argparse.Namespace) -> Iterator[Tensor]:
    """Endless batches of windows at random places: int64 (batch, context + 1)."""
    generator = torch.Generator().manual_seed(args.seed)
    offsets = torch.arange(args.context + 1)
    while True:
        starts = torch.randint(len(tokens) - args.context, (args.batch, 1), generator=generator)
        yield tokens[starts + offsets]


def window_loss(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Mean cross entropy in nats of each window's tokens after its first."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def measure_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, context: int
) -> Loss:
    """The loss of `text`, cut into consecutive windows that share one token."""
    model.eval()
    tokens = encode(tokenizer, text)
    nats = 0.0
    for start in range(0, len(tokens) - 1, context):
        window = tokens[None, start : start + context + 1]
        nats += window_loss(model, window).item() * (window.shape[1] - 1)
    model.train()
    return Loss(nats / (len(tokens) - 1), nats / math.log(2) / len(text.encode()))


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    training_text: str,
    held_out_text: str,
    args: argparse.Namespace,
) -> int:
    """Train, writing the folder at every new best held-out loss; returns the best one's step."""
    tokens = encode(tokenizer, training_text)
    bytes_per_token = len(training_text.encode()) / len(tokens)
    print(
        f"{model.num_parameters():,} parameters, {len(tokens):,} training tokens of "
        f"{bytes_per_token:.2f} bytes, {args.batch * args.context:,} tokens per step",
        flush=True,
    )
    optimizer = build_optimizer(model, args)
    windows = sample_windows(tokens, args)
    best, best_step, start_s, recent_loss = math.inf, 0, time.perf_counter(), 0.0
    model.train()
    for step in range(1, args.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_factor(step - 1, args.steps)
        loss = window_loss(model, next(windows))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent_loss += (loss.item() - recent_loss) / min(step, 20)
        if step % args.evaluate_every == 0 or step == args.steps:
            held_out = measure_loss(model, tokenizer, held_out_text, args.context)
            elapsed_s = time.perf_counter() - start_s
            print(
                f"step {step:5d}  {elapsed_s:6.0f} s  training {recent_loss:.3f}  held out "
                f"{held_out.nats_per_token:.4f} ({held_out.bits_per_byte:.4f} bits per byte)",
                flush=True,
            )
            if held_out.nats_per_token < best:
                best, best_step = held_out.nats_per_token, step
                save_folder(model, tokenizer, args.output)
            elif step - best_step >= args.patience * args.evaluate_every:
                break
    return best_step


def save_folder(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write weights as bfloat16, config and tokenizer, over those of an earlier step."""
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config.do_sample = False
    half.save_pretrained(output, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(output)


def write_card(args: argparse.Namespace, best_step: int, held_out_text: str) -> None:
    """README.md of the folder: data, recipe and the loss of the weights as they were written."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.output)
    model = LlamaForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    loss = measure_loss(model, tokenizer, held_out_text, args.context)
    flags = " ".join(
        f"--{name.replace('_', '-')} {value}"
        for name, value in vars(args).items()
        if name not in ("text", "output")
    )
    card = CARD.format(
        parameters=model.num_parameters(),
        text=args.text.name,
        loss=loss,
        best_step=best_step,
        tokens_per_step=args.batch * args.context,
        flags=flags,
        args=args,
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
    )
    (args.output / "README.md").write_text(card, encoding="utf-8")


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The demo model of qtool

A Llama of {parameters:,} parameters that `qtool demo` works on: small enough to ship with the
program, trained far enough that the damage of quantization shows. It writes in the manner of
Shakespeare's plays and knows nothing else.

| | |
|---|---|
| architecture | LlamaForCausalLM, 4 layers, hidden 256, MLP 704, 8 heads with 4 key-value heads, untied |
| tokenizer | byte-level BPE, vocabulary {args.vocabulary}, trained on the training text |
| context | {args.context} tokens |
| data | {text} (public domain), the first 90 % of its characters; the last 10 % are held out |
| recipe | AdamW, peak learning rate {args.learning_rate}, {tokens_per_step:,} tokens per step, dropout {args.dropout}, weight decay {args.weight_decay} |
| weights | bfloat16, of step {best_step}: the best held-out loss of those measured every {args.evaluate_every} steps |
| held-out loss | {loss.nats_per_token:.4f} nats per token, {loss.bits_per_byte:.4f} bits per byte (these files, computed in float32, windows of {args.context} tokens) |
| licence | Apache-2.0 |

Made with torch {torch} and transformers {transformers} by

    python scripts/train_demo_model.py {text} qtool/demo_model {flags}
"""  # noqa: E501 - a Markdown table row is one line


def main() -> None:
    """Train, save, write the card, check the size."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    transformers.utils.logging.disable_progress_bar()
    text = args.text.read_text(encoding="utf-8")
    cut = int(len(text) * (1 - HELD_OUT_FRACTION))
    tokenizer = train_tokenizer(text[:cut], args.vocabulary, args.context)
    model = build_model(args)
    best_step = train(model, tokenizer, text[:cut], text[cut:], args)
    write_card(args, best_step, text[cut:])
    folder_bytes = sum(path.stat().st_size for path in args.output.iterdir())
    print(json.dumps({"best_step": best_step, "folder_bytes": folder_bytes}))
    if folder_bytes > MAX_FOLDER_BYTES:
        raise SystemExit(f"{args.output}: {folder_bytes:,} bytes, at most {MAX_FOLDER_BYTES:,}")


if __name__ == "__main__":
    main()
