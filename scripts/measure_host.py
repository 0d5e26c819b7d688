"""Measures what qtool takes of a machine without a GPU: start-up time, and memory while quantizing.

    python scripts/measure_host.py --folder /tmp --json docs/benchmarks/host.json

Writes random Llama-shaped checkpoints of about 2 and 8 GB into FOLDER, quantizes each, and removes
them. Memory is the peak of anonymous pages that the kernel reports for the process, sampled from
outside every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

STARTS = 20
HIDDEN, MLP, VOCAB = 4096, 14336, 32000
LAYER_SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}
LAYER_BYTES = 2 * sum(int(np.prod(shape)) for shape in LAYER_SHAPES.values())


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gigabytes", type=float, nargs="*", default=[2.0, 8.0])
    parser.add_argument("--quant", default="nf4-dq")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        report = {
            "machine": f"{platform.processor() or platform.machine()}, {usable_cores()} cores",
            "versions": {name: version(name) for name in ("qtool", "numpy", "numba", "typer")}
            | {"python": platform.python_version()},
            "command": " ".join(["python", *sys.argv]),
            "start": measure_starts(Path(place)),
            "quantize": [
                measure_quantize(Path(place), gigabytes, arguments.quant)
                for gigabytes in arguments.gigabytes
            ],
        }
    for row in [*report["start"], *report["quantize"]]:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def usable_cores() -> int:
    """Cores that this process may use."""
    from qtool.backends.cpu import num_usable_cores

    return num_usable_cores()


def measure_starts(place: Path) -> list[dict[str, object]]:
    """Whole-process seconds of `--help` and of `estimate` on a local folder, median of 20."""
    model = place / "small"
    write_checkpoint(model, 0.05)
    rows = []
    for words in (["--help"], ["estimate", str(model)]):
        seconds = []
        for _ in range(STARTS + 2):  # the first two fill the caches
            start_s = time.perf_counter()
            command = [sys.executable, "-m", "qtool", *words]
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(time.perf_counter() - start_s)
        row = {
            "command": f"qtool {words[0]}",
            "n": STARTS,
            "seconds_median": round(statistics.median(seconds[2:]), 4),
        }
        rows.append(row)
    return rows


def measure_quantize(place: Path, gigabytes: float, quant: str) -> dict[str, object]:
    """Peak memory and speed of one `qtool quantize`, the second of two runs in a row."""
    model, output = place / "model", place / "out"
    write_checkpoint(model, gigabytes)
    command = [sys.executable, "-m", "qtool", "quantize", str(model), "-o", str(output)]
    command += ["--quant", quant, "--json"]
    for _ in range(2):
        shutil.rmtree(output, ignore_errors=True)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        peak_bytes = 0
        while process.poll() is None:
            peak_bytes = max(peak_bytes, anonymous_bytes(process.pid))
            time.sleep(0.02)
        document = json.loads(process.communicate()[0])
    shutil.rmtree(model)
    shutil.rmtree(output)
    return {
        "quant": quant,
        "input_bytes": document["input_bytes"],
        "output_bytes": document["output_bytes"],
        "seconds": round(document["seconds"], 3),
        "input_bytes_per_s": int(document["input_bytes"] / document["seconds"]),
        "peak_anonymous_bytes": peak_bytes,
        "peak_host_bytes_reported": document["peak_host_bytes"],
    }


def anonymous_bytes(pid: int) -> int:
    """The process's anonymous resident pages; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def write_checkpoint(folder: Path, gigabytes: float) -> None:
    """A Llama-shaped bf16 checkpoint of random weights, in shards of about 2 GB."""
    folder.mkdir(parents=True)
    num_layers = max(1, round((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / LAYER_BYTES))
    layers_per_shard = max(1, int(2e9 // LAYER_BYTES))
    groups = [
        {
            f"model.layers.{layer}.{name}.weight": shape
            for layer in range(first, min(first + layers_per_shard, num_layers))
            for name, shape in LAYER_SHAPES.items()
        }
        for first in range(0, num_layers, layers_per_shard)
    ]
    groups[0]["model.embed_tokens.weight"] = (VOCAB, HIDDEN)
    groups[-1] |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    weight_map = {}
    rng = np.random.default_rng(0)
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_shard(folder / name, group, rng)
        weight_map |= dict.fromkeys(group, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": VOCAB,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    """One file of Gaussian bf16 weights, tensor by tensor."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            values = rng.standard_normal(shape, dtype=np.float32)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


if __name__ == "__main__":
    main()
