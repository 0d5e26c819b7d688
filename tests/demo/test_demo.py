"""`qtool demo`: offline, what it shows is what the verbs do, and nothing stays behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qtool.backends.cpu import CpuBackend
from qtool.demo.speed import SHAPE, measure_speed
from qtool.resources import demo_model_path

pytestmark = pytest.mark.slow

# No server answers there: what works with it works offline.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
STEPS = ("estimate", "quantize", "inspect", "generate", "generate", "sizing")
QTOOL = f"{sys.executable} -c 'from qtool.cli import main; main()'"
# What differs between two runs of the same command.
VARYING = {"seconds", "resumed", "peak_host_bytes", "prefill_tok_s", "decode_tok_s"}


def _shell(command: str, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("QTOOL_")}
    env |= {"COLUMNS": "80", "TMPDIR": str(tmp_path), **OFFLINE, **variables}
    script = f'qtool() {{ {QTOOL} "$@"; }}\n{command}'
    return subprocess.run(
        ["bash", "-c", script], env=env, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """`qtool demo`, whose temporary folder must be gone afterwards."""
    tmp_path = tmp_path_factory.mktemp("text")
    completed = _shell("qtool demo", tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert [path for path in tmp_path.iterdir() if "qtool" in path.name] == []
    return completed


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """`qtool demo --keep OUT --json`: the folder and the document."""
    output = tmp_path_factory.mktemp("kept") / "out"
    completed = _shell(f"qtool demo --keep {output} --json", output.parent)
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr == ""
    return output, json.loads(completed.stdout)


def test_every_verb_is_shown_with_its_command(
    text_run: subprocess.CompletedProcess[str],
) -> None:
    commands = re.findall(r"^\$ qtool (\w+)", text_run.stdout, re.MULTILINE)
    assert tuple(commands) == STEPS


def test_text_shows_budget_speed_error_and_verdict(
    text_run: subprocess.CompletedProcess[str],
) -> None:
    for shown in ("KV cache", "GB/s", "mlp.down_proj", "rules hold", "--keep DIR"):
        assert shown in text_run.stdout
    for said in ("28 of 39 tensors", "tok/s"):
        assert said in text_run.stderr


def test_text_fits_80_columns_but_for_paths_to_copy(
    text_run: subprocess.CompletedProcess[str],
) -> None:
    long = [line for line in text_run.stdout.splitlines() if len(line) > 80]
    assert all(line.startswith(("M=", "OUT=")) for line in long), long


def test_json_tells_one_story(kept: tuple[Path, dict[str, Any]]) -> None:
    output, shown = kept
    assert shown["schema"] == 1
    assert shown["command"] == "demo"
    assert shown["warnings"] == []
    assert shown["model"] == str(demo_model_path())
    assert shown["output"] == str(output)
    weights_bytes = shown["quantize"]["weights_bytes"]
    sizes = {plan["quant"]: plan["checkpoint_bytes"] for plan in shown["estimate"]["plans"]}
    assert sizes["nf4-dq"] == weights_bytes == shown["inspect"]["weights_bytes"]
    assert shown["inspect"]["verify"]["ok"] is True
    assert len(shown["inspect"]["errors"]) == shown["quantize"]["tensors"]["quantized"] == 28
    assert all(0.05 < error["relative_error"] < 0.15 for error in shown["inspect"]["errors"])
    assert shown["kernel_speed"]["seconds"] > 0


def test_text_before_and_after_comes_from_different_weights(
    kept: tuple[Path, dict[str, Any]],
) -> None:
    before, after = kept[1]["generate"]["before"], kept[1]["generate"]["after"]
    assert before["new_tokens"] == after["new_tokens"] > 0
    assert before["token_ids"] != after["token_ids"]


def test_commands_shown_do_what_was_shown(
    text_run: subprocess.CompletedProcess[str],
    kept: tuple[Path, dict[str, Any]],
    tmp_path: Path,
) -> None:
    _, shown = kept
    expected = [shown[verb] for verb in STEPS]
    expected[3:5] = shown["generate"]["before"], shown["generate"]["after"]
    commands = re.findall(r"^\$ (qtool .*)", text_run.stdout, re.MULTILINE)
    places = {"M": str(demo_model_path()), "OUT": str(tmp_path / "out")}
    for command, document in zip(commands, expected, strict=True):
        completed = _shell(f"{command} --json", tmp_path, **places)
        assert completed.returncode == 0, completed.stderr
        answer = json.loads(completed.stdout)
        assert _lasting(answer) == _lasting({**document, **_frame(answer)}), command


@pytest.mark.parametrize("num_threads", [1, 3])
def test_speed_is_measured_over_the_whole_weight(num_threads: int) -> None:
    class CountingBackend(CpuBackend):
        sizes: list[tuple[int, int, int]]

        def quantize_4bit(
            self,
            values: Any,
            dtype: Any,
            quant_type: Any,
            blocksize: int,
            packed: np.ndarray,
            absmax: np.ndarray,
        ) -> int:
            self.sizes.append((values.size, packed.size * 2, absmax.size * blocksize))
            return super().quantize_4bit(values, dtype, quant_type, blocksize, packed, absmax)

    backend = CountingBackend()
    backend.sizes = []
    speed = measure_speed(backend, num_threads)
    assert all(values == codes == scaled for values, codes, scaled in backend.sizes)
    num_runs = len(backend.sizes) / num_threads
    assert sum(values for values, _, _ in backend.sizes) == num_runs * SHAPE[0] * SHAPE[1]
    assert speed.input_bytes == 2 * SHAPE[0] * SHAPE[1]


def _frame(answer: dict[str, Any]) -> dict[str, Any]:
    """What every command's document has beside its own fields."""
    return {name: answer[name] for name in ("schema", "command", "warnings")}


def _lasting(document: dict[str, Any]) -> dict[str, Any]:
    """The fields that two runs share; the two runs write to different folders."""
    places = {"output", "path"}
    return {name: value for name, value in document.items() if name not in VARYING | places}
