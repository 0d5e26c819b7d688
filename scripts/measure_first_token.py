"""Measures how long `qtool generate` takes from the start of its process to its first token.

    python -m scripts.measure_first_token --json FILE

Writes a model of a known shape with random weights and a tokenizer of as many words, quantizes it,
and runs the command again and again, the first time uncounted: then the files are in the page
cache, and kernels on the disk. stderr is a terminal, on which the longest silence is measured, too.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import selectors
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from qtool.backends.cpu import describe_cpu
from qtool.bench.machine import package_versions
from qtool.bench.model_shapes import DEFAULT_SHAPE, SHAPE_NAMES, read_model_shape
from qtool.bench.random_checkpoint import plan_checkpoint, write_checkpoint
from qtool.events import ignore_events

PROMPT = " ".join(f"w{number}" for number in range(5, 25))
NUM_NEW = 16


@dataclass(frozen=True)
class Run:
    """Seconds from the start of the process: to the first text on stdout, and the longest in which
    neither stdout nor stderr changed before it."""

    first_token_s: float
    longest_silence_s: float


def main() -> None:
    """Measure, print a line per run and the medians, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default=DEFAULT_SHAPE, help=SHAPE_NAMES)
    parser.add_argument("--quant", default="nf4-dq")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="for the models")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with quantized(arguments.shape, arguments.quant, arguments.folder) as model:
        runs = [run_once(model, arguments.device) for _ in range(1 + arguments.runs)][1:]
    for run in runs:
        print(f"first token after {run.first_token_s:.2f} s, silent {run.longest_silence_s:.2f} s")
    report = {
        "machine": describe_machine(),
        "versions": package_versions("torch", "transformers"),
        "command": f"python -m scripts.measure_first_token --shape {arguments.shape} "
        f"--quant {arguments.quant} --device {arguments.device} --runs {arguments.runs}",
        "first_token_s_median": statistics.median(run.first_token_s for run in runs),
        "longest_silence_s_median": statistics.median(run.longest_silence_s for run in runs),
        "runs": [asdict(run) for run in runs],
    }
    print({name: value for name, value in report.items() if name.endswith("_median")})
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


@contextmanager
def quantized(shape: str, quant: str, place: Path) -> Iterator[Path]:
    """A folder in `place` with the packed model and its tokenizer, for as long as it is needed."""
    folder = Path(tempfile.mkdtemp(prefix="qtool-first-token-", dir=place))
    try:
        original, packed = folder / "original", folder / "packed"
        _, config = read_model_shape(shape)
        config = {**config, "dtype": "bfloat16"}
        write_checkpoint(plan_checkpoint(config), original, os.cpu_count() or 1, ignore_events)
        (original / "config.json").write_text(json.dumps(config))
        write_tokenizer(original, config["vocab_size"])
        words = ["quantize", str(original), "-o", str(packed), "--quant", quant, "--quiet"]
        subprocess.run([sys.executable, "-m", "qtool", *words], check=True)
        shutil.rmtree(original)
        yield packed
    finally:
        shutil.rmtree(folder)


def write_tokenizer(folder: Path, num_words: int) -> None:
    """One whose tokens are the words w0, w1, ...: as large as the vocabulary."""
    words = {f"w{number}": number for number in range(num_words)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def run_once(model: Path, device: str) -> Run:
    """One process, from its start to its first text."""
    words = ["generate", str(model), PROMPT, "--max-new-tokens", str(NUM_NEW), "--ignore-eos"]
    ours, theirs = pty.openpty()
    start_s = last_s = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "qtool", *words, "--device", device],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    assert process.stdout is not None
    silence_s, text, said = 0.0, b"", b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(ours, selectors.EVENT_READ)
        while not text.strip():
            ready = selector.select()
            now_s = time.perf_counter()
            silence_s, last_s = max(silence_s, now_s - last_s), now_s
            for key, _ in ready:
                piece = read(key.fd)
                if key.fd != ours:
                    text += piece
                else:
                    said += piece
                if not piece:
                    raise SystemExit(f"qtool generate ended without a text: {said.decode()}")
    process.stdout.read()
    process.wait()
    os.close(ours)
    return Run(last_s - start_s, silence_s)


def read(descriptor: int) -> bytes:
    """What is there; nothing at the end, where a terminal has an error."""
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:
        return b""


def describe_machine() -> str:
    """The GPU, if there is one, and the processor."""
    import torch

    cpu = describe_cpu()
    return f"{torch.cuda.get_device_name()}, {cpu}" if torch.cuda.is_available() else cpu


if __name__ == "__main__":
    main()
