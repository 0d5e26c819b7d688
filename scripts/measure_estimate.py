"""Times `qtool estimate` of Hub models beside hf-mem and `accelerate estimate-memory`.

    python -m venv OTHER && OTHER/bin/pip install hf-mem
    python -m scripts.measure_estimate --hf-mem OTHER/bin/python --json FILE

A server on localhost (tests/hub_server.py) speaks the Hub's endpoints, redirects for weights as the
Hub does, and lets every request wait. The models have true names, shapes and shards; their weights
are holes in sparse files. Whole processes are timed, in turns, after one run each that fills the
page cache and what the tools cache themselves.

hf-mem knows no HF_ENDPOINT: it runs from a copy in which the Hub's address, and nothing else, is
this server's. Without TLS it speaks HTTP/1.1, like the others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qtool.backends.cpu import describe_cpu
from qtool.checkpoint.safetensors_header import encode_header
from qtool.formats.tensors import TensorLayout
from tests.hub_server import HubServer

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MIXTRAL_8X7B = LLAMA_8B | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "org/mixtral-8x7b": (MIXTRAL_8X7B, 30),
    "org/llama-8b": (LLAMA_8B, 4),
}


@dataclass
class Tool:
    """A rival or qtool: its command and what its runs took."""

    name: str
    command: list[str]
    environment: dict[str, str]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    requests: int = 0
    fetched_bytes: int = 0

    def run(self, hub: HubServer, model: str) -> None:
        """One whole process, timed; what it fetched is the server's record."""
        hub.requests.clear()
        start_s, start_cpu_s = time.perf_counter(), cpu_seconds_of_children()
        command = [word.format(model=model) for word in self.command]
        subprocess.run(command, env=self.environment, check=True, capture_output=True)
        self.seconds.append(time.perf_counter() - start_s)
        self.cpu_seconds.append(cpu_seconds_of_children() - start_cpu_s)
        self.requests = len(hub.requests)
        self.fetched_bytes = sum(request.sent_bytes for request in hub.requests)

    def summary(self) -> dict[str, object]:
        """Medians of the timed runs; requests and bytes of the last one."""
        median = statistics.median(self.seconds)
        return {
            "tool": self.name,
            "seconds_median": round(median, 3),
            "seconds_mad": round(statistics.median(abs(s - median) for s in self.seconds), 3),
            "cpu_seconds_median": round(statistics.median(self.cpu_seconds), 3),
            "requests": self.requests,
            "fetched_bytes": self.fetched_bytes,
        }


def main() -> None:
    """Measure, print a line per row, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf-mem", type=Path, required=True, help="the Python that has hf-mem")
    parser.add_argument("--latency-ms", type=float, action="append", help="default: 20 and 0")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch, HubServer() as hub:
        for model, (config, num_shards) in MODELS.items():
            folder = Path(scratch, model)
            write_model(folder, config, num_shards)
            hub.add_model(model, folder)
        for model in MODELS:
            for latency_ms in arguments.latency_ms or (20, 0):
                hub.latency_s = latency_ms / 1000
                tools = list_tools(hub, Path(scratch), arguments.hf_mem)
                measure(tools, hub, model, arguments.repeat)
                place = {"model": model, "shards": MODELS[model][1], "latency_ms": latency_ms}
                rows += [place | tool.summary() for tool in tools]
                for row in rows[-len(tools) :]:
                    print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if arguments.json:
        report = {
            "machine": describe_cpu(),
            "versions": list_versions(arguments.hf_mem),
            "command": "python -m scripts.measure_estimate --hf-mem PYTHON --json FILE",
            "repeat": arguments.repeat,
            "estimate": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(tools: list[Tool], hub: HubServer, model: str, repeat: int) -> None:
    """Run the tools in turns, once to warm up and then `repeat` times."""
    for _ in range(1 + repeat):
        for tool in tools:
            tool.run(hub, model)
    for tool in tools:
        del tool.seconds[0], tool.cpu_seconds[0]


def cpu_seconds_of_children() -> float:
    """User and system time of all processes that ran so far."""
    times = os.times()
    return times.children_user + times.children_system


def list_tools(hub: HubServer, scratch: Path, hf_mem_python: Path) -> list[Tool]:
    """qtool and its rivals, each with a Hub cache of its own."""
    programs = Path(sys.executable).parent
    copy = copy_hf_mem(hf_mem_python, scratch / "copy", hub.url)
    run_hf_mem = "from hf_mem.cli import main; main()"
    accelerate = [str(programs / "accelerate"), "estimate-memory", "{model}"]
    homes = {name: hub.environment(scratch / name) for name in ("qtool", "hf-mem", "accelerate")}
    for home in homes.values():  # installed programs run from compiled files
        home.pop("PYTHONDONTWRITEBYTECODE", None)
    return [
        Tool("qtool", [str(programs / "qtool"), "estimate", "{model}"], homes["qtool"]),
        Tool(
            "hf-mem",
            [str(hf_mem_python), "-c", run_hf_mem, "--model-id", "{model}"],
            homes["hf-mem"] | {"PYTHONPATH": str(copy)},
        ),
        Tool("accelerate", [*accelerate, "--library_name", "transformers"], homes["accelerate"]),
    ]


def copy_hf_mem(python: Path, target: Path, endpoint: str) -> Path:
    """A folder with hf-mem's package as installed, except for the Hub's address."""
    print_folder = "import hf_mem, pathlib; print(pathlib.Path(hf_mem.__file__).parent)"
    installed = subprocess.check_output([str(python), "-c", print_folder], text=True).strip()
    shutil.rmtree(target, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(installed, target / "hf_mem", ignore=ignore)
    for path in target.rglob("*.py"):
        path.write_text(path.read_text().replace("https://huggingface.co", endpoint))
    return target


def list_versions(hf_mem_python: Path) -> dict[str, str]:
    """What was measured, and what it stands on."""
    print_version = "from importlib.metadata import version; print(version('hf-mem'))"
    hf_mem = subprocess.check_output([str(hf_mem_python), "-c", print_version], text=True).strip()
    names = ("qtool", "accelerate", "transformers", "torch", "huggingface_hub")
    return {name: version(name) for name in names} | {
        "hf-mem": hf_mem,
        "python": platform.python_version(),
    }


# -- models -------------------------------------------------------------------------------------


def write_model(folder: Path, config: dict[str, Any], num_shards: int) -> None:
    """config.json, index and shards whose weights are holes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards = split(list(list_tensors(config)), num_shards)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        header = encode_header(shard)
        with (folder / name).open("wb") as file:
            file.write(header.data)
        os.truncate(folder / name, header.file_bytes)
        weight_map |= {layout.name: name for layout in shard}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def split(layouts: list[TensorLayout], num_shards: int) -> list[list[TensorLayout]]:
    """Runs of the list, of about the same number of bytes."""
    total_bytes = sum(layout.num_bytes for layout in layouts)
    shards: list[list[TensorLayout]] = [[] for _ in range(num_shards)]
    done_bytes = 0
    for layout in layouts:
        shards[min(num_shards - 1, done_bytes * num_shards // total_bytes)].append(layout)
        done_bytes += layout.num_bytes
    return shards


def list_tensors(config: dict[str, Any]) -> Iterator[TensorLayout]:
    """The tensors of a Llama or Mixtral as its authors published them, bfloat16."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield TensorLayout("model.embed_tokens.weight", "BF16", (vocab, hidden))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            yield TensorLayout(f"{prefix}self_attn.{name}_proj.weight", "BF16", (rows, hidden))
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield TensorLayout(f"{prefix}{name}.weight", "BF16", (hidden,))
        yield from list_mlp_tensors(config, prefix)
    yield TensorLayout("model.norm.weight", "BF16", (hidden,))
    yield TensorLayout("lm_head.weight", "BF16", (vocab, hidden))


def list_mlp_tensors(config: dict[str, Any], prefix: str) -> Iterator[TensorLayout]:
    """One layer's MLP, or its router and experts."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    num_experts = config.get("num_local_experts", 0)
    if not num_experts:
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden))):
            yield TensorLayout(f"{prefix}mlp.{name}_proj.weight", "BF16", shape)
        yield TensorLayout(f"{prefix}mlp.down_proj.weight", "BF16", (hidden, inner))
        return
    moe = f"{prefix}block_sparse_moe."
    yield TensorLayout(f"{moe}gate.weight", "BF16", (num_experts, hidden))
    for expert in range(num_experts):
        for name, shape in (
            ("w1", (inner, hidden)),
            ("w2", (hidden, inner)),
            ("w3", (inner, hidden)),
        ):
            yield TensorLayout(f"{moe}experts.{expert}.{name}.weight", "BF16", shape)


if __name__ == "__main__":
    main()
