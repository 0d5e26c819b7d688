"""Measures how long qtool takes from start to exit where it has next to nothing to do.

    python scripts/measure_start.py --json docs/benchmarks/start.json

Runs `--help` and `estimate` on the model that ships, 20 times each after two that fill the caches.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from qtool.backends.cpu import describe_cpu
from qtool.resources import demo_model_path

NUM_RUNS = 20
NUM_WARM_UPS = 2
COMMANDS = (["--help"], ["estimate", str(demo_model_path())])


def main() -> None:
    """Measure, print a line per command, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = {
        "machine": describe_cpu(),
        "versions": {name: version(name) for name in ("qtool", "numpy", "typer", "rich")}
        | {"python": platform.python_version()},
        "command": "python scripts/measure_start.py",
        "start": [measure(words) for words in COMMANDS],
    }
    for row in report["start"]:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(words: list[str]) -> dict[str, object]:
    """Whole-process seconds of `qtool WORDS`: median and median absolute deviation."""
    seconds = [run_once(words) for _ in range(NUM_WARM_UPS + NUM_RUNS)][NUM_WARM_UPS:]
    median = statistics.median(seconds)
    deviation = statistics.median(abs(value - median) for value in seconds)
    return {
        "command": f"qtool {words[0]}",
        "n": NUM_RUNS,
        "seconds_median": round(median, 4),
        "seconds_mad": round(deviation, 4),
    }


def run_once(words: list[str]) -> float:
    """Seconds from start to exit."""
    start_s = time.perf_counter()
    subprocess.run([sys.executable, "-m", "qtool", *words], check=True, capture_output=True)
    return time.perf_counter() - start_s


if __name__ == "__main__":
    main()
