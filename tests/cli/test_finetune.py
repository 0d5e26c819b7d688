"""`qtool finetune` as a user meets it: streams, JSON, errors, signals, terminals, processes."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from safetensors.numpy import load_file

from qtool.finetune import plan
from qtool.runtime import requirements
from tests.cli.running import Ran, run

pytestmark = pytest.mark.usefixtures("enough_memory")

# Whatever memory is free: what a process of its own finds is not ours to say.
PROGRAM = (sys.executable, "-m", "qtool", "finetune", "--force")
QUICK = (
    *("--device", "cpu", "--max-length", 32, "--batch", 2, "--grad-accum", 1, "--lora-r", 4),
    *("--lr", 5e-3),
)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
STORY = "Once upon a time there was a little girl named Lily. She had a red ball.\n"
DOCUMENT = {
    "schema": int,
    "command": str,
    "output": str,
    "method": str,
    "quant": str,
    "first_loss": float,
    "final_loss": float,
    "eval_loss": float,
    "steps": int,
    "tokens": int,
    "tokens_per_s": float,
    "seconds": float,
    "allocated_peak_bytes": type(None),
    "planned_peak_bytes": int,
    "planned_allocated_peak_bytes": int,
    "trainable_parameters": int,
    "device": str,
    "resumed_from_step": type(None),
    "earlier_tokens": int,
    "warnings": list,
}


@pytest.fixture
def stories(test_data: Path) -> Path:
    return test_data / "models" / "stories260K-hf"


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text("".join(f"{number} {STORY}" for number in range(60)))
    return path


def rows(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_json_is_one_document_with_the_contracts_fields(
    stories: Path, story: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = run(
        *("finetune", stories, story, "-o", out, *QUICK, "--max-steps", 6),
        *("--eval-split", "0.1", "--json"),
    )
    assert (ran.exit_code, ran.stderr) == (0, "")
    document = ran.document
    assert set(document) == set(DOCUMENT)
    for name, kind in DOCUMENT.items():
        assert type(document[name]) is kind, name
    assert document["command"] == "finetune"
    assert document["output"] == str(out)
    assert document["steps"] == 6
    assert document["tokens"] == 6 * 2 * 32
    assert document["warnings"] == []
    drawing = ElementTree.parse(out / "loss.svg").getroot()
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"


def test_the_answer_goes_to_stdout_and_the_rest_to_stderr(
    stories: Path, story: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = run("finetune", stories, story, "-o", out, *QUICK, "--max-steps", 5)
    assert re.fullmatch(
        rf"{re.escape(str(out))}: adapter, 23 k parameters trained in 5 steps, "
        r"loss \d\.\d{4} → \d\.\d{4}\n",
        ran.stdout,
    )
    for said in ("plan     stories260K-hf", "memory   ", "running text", "step 1/5 · loss ", "┤"):
        assert said in ran.stderr
    # Over what it learned on.
    assert f"next: qtool generate {stories} PROMPT --quant nf4-dq --adapter {out}\n" in ran.stderr
    again = run("finetune", stories, story, "-o", out, *QUICK, "--max-steps", 5, "--resume")
    assert (again.exit_code, again.stdout) == (0, ran.stdout)
    refused = run("finetune", stories, story, "-o", out, *QUICK, "--json")
    assert (refused.exit_code, refused.error["kind"]) == (2, "usage")
    assert "--restart begins anew" in refused.error["hint"]


def test_the_adapter_runs_in_generate(stories: Path, story: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    learned = run("finetune", stories, story, "-o", out, *QUICK, "--max-steps", 30, "--quiet")
    assert (learned.exit_code, learned.stderr) == (0, "")
    arguments = ("generate", stories, "7 Once upon", "--max-new-tokens", 12, "--json")
    with_it = run(*arguments, "--quant", "nf4-dq", "--adapter", out).document
    without = run(*arguments, "--quant", "nf4-dq").document
    assert with_it["token_ids"] != without["token_ids"]
    assert with_it["text"].startswith(" a time there was a little girl")


def test_an_adapter_names_its_base_wherever_it_is_used(
    stories: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "model").mkdir()
    for file in stories.iterdir():
        (home / "model" / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(home)
    steps = ("--max-steps", 2, "--save-steps", 1)
    assert run("finetune", "model", story, "-o", tmp_path / "out", *QUICK, *steps).exit_code == 0
    monkeypatch.chdir(tmp_path)
    configs = [*(tmp_path / "out").rglob("adapter_config.json")]
    assert len(configs) == 3
    for config in configs:
        named = json.loads(config.read_text())["base_model_name_or_path"]
        assert named == str(home.resolve() / "model")
    merge = ("merge", "out", "--no-check", "--json")
    merged = run(*merge, "-o", "merged")
    assert merged.exit_code == 0, merged.stderr
    # The same place in other words is still what it was trained on.
    again = run(*merge, "-o", "again", "--base", "home/model")
    [said] = merged.document["warnings"]
    assert "trained against nf4-dq weights, packed while loading" in said
    assert again.document["warnings"] == [said.replace(str(home.resolve()), "home")]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    peft = pytest.importorskip("peft")
    assert peft.AutoPeftModelForCausalLM.from_pretrained("out") is not None


def test_weights_that_are_not_there_are_said_before_the_plan(
    stories: Path, story: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((stories / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    command = ("finetune", tmp_path, story, "-o", tmp_path / "out", *QUICK, "--json")
    planned, done = run(*command, "--dry-run"), run(*command)
    assert planned.exit_code == done.exit_code == 1 and planned.error == done.error
    assert "found only pickles" in planned.error["message"]


def test_a_dry_run_plans_and_writes_nothing(stories: Path, story: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = run("finetune", stories, story, "-o", out, *QUICK, "--dry-run", "--json")
    assert ran.exit_code == 0
    [plan] = ran.document["plans"]
    assert (plan["mode"], plan["quant"], plan["context"], plan["batch"]) == (
        *("qlora", "nf4-dq"),
        *(32, 2),
    )
    assert ran.document["data"][0]["source"] == str(story)
    assert not out.exists()
    shown = run("finetune", stories, story, "-o", out, *QUICK, "--dry-run")
    assert shown.stdout.startswith("plan     stories260K-hf")
    assert re.search(r"weights [\d.]+ KiB.* of this machine's memory\n", shown.stdout)
    assert (shown.stdout.count("plan "), "GPU" in shown.stdout, shown.stderr) == (1, False, "")


@pytest.mark.parametrize(
    ("lines", "kind", "said"),
    [
        (('{"text": "a"}', "{"), "bad_file", "line 2: not JSON"),
        (('{"question": "a"}',), "bad_file", 'found "question"'),
        ((), "bad_file", "line 1: not JSON"),
        (('{"text": 4}',), "bad_file", 'line 1: "text": expected text, found a number'),
        (('{"messages": [{"role": "user", "content": "a"}]}',), "bad_file", "of the assistant"),
        (('{"messages": [{"role": "assistant"}]}',), "unsupported", "no chat template"),
    ],
)
def test_bad_data_is_an_error_with_its_line(
    stories: Path, tmp_path: Path, lines: tuple[str, ...], kind: str, said: str
) -> None:
    data = rows(tmp_path / "rows.jsonl", *(lines or ("[",)))
    ran = run("finetune", stories, data, "-o", tmp_path / "out", *QUICK, "--json")
    assert (ran.exit_code, ran.error["kind"]) == (1, kind)
    assert said in ran.error["message"]


def test_flags_are_called_what_they_are(stories: Path, story: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> Ran:
        return run("finetune", stories, story, "-o", tmp_path / "out", *arguments, "--json")

    ran = refused("--lora-targets", "q_porj")
    assert (ran.exit_code, ran.error["kind"]) == (2, "usage")
    assert "q_proj" in ran.error["hint"]
    ran = refused("--max-length", 4096)
    assert "--max-length 4096" in ran.error["message"]
    ran = refused("--eval-split", "1.5")
    assert "--eval-split 1.5: expected a share" in ran.error["message"]
    ran = refused("--resume", "--restart")
    assert ran.exit_code == 2
    ran = refused("--lora-targets", "lm_head")
    assert (ran.exit_code, ran.error["kind"]) == (2, "usage")
    ran = refused("--method", "lora", "--quant", "nf4")
    assert "--method lora wants a 16-bit base" in ran.error["message"]


@pytest.mark.parametrize("is_dry", [False, True])
@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (("--device", "cuda"), 1, "--device cuda cannot run here: no NVIDIA driver was found"),
        (("--device", "gpu"), 2, "--device gpu: there is no such device"),
        (("--seed", str(1 << 32)), 2, "Invalid value for '--seed': 4294967296 is not between 0"),
        (("--optimizer", "paged-adamw-8bit"), 1, "--optimizer paged-adamw-8bit keeps states in"),
        (
            ("--optimizer", "paged-adamw-8bit", "--device", "cpu"),
            2,
            "--optimizer paged-adamw-8bit keeps states in a GPU's memory: training is on the CPU",
        ),
        (("-o", "/proc/x"), 2, "/proc/x cannot be created"),
    ],
)
def test_what_this_machine_cannot_is_said_before_the_plan(
    stories: Path,
    story: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    exit_code: int,
    said: str,
    is_dry: bool,
) -> None:
    monkeypatch.setattr(plan, "DRIVER", "libno_such_driver.so")
    monkeypatch.setattr(plan, "DRIVER_FILE", tmp_path / "no_such_file")
    out = tmp_path / "out"
    ran = run("finetune", stories, story, "-o", out, *arguments, *["--dry-run"] * is_dry)
    assert (ran.exit_code, ran.stdout) == (exit_code, "")
    assert ran.stderr.startswith(f"error: {said}")
    assert not out.exists()


def test_a_refusal_leaves_nothing_behind(stories: Path, story: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("finetune", stories, story, "-o", out, *QUICK, "--eval-split", "0.5")
    ran = run(*arguments, "--max-length", 512, "--compute-dtype", "float16")
    assert (ran.exit_code, out.exists()) == (1, False)
    assert "trains on GPUs only" in ran.stderr
    out.mkdir()
    assert run(*arguments, "--compute-dtype", "float16").exit_code == 1
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "said", "advice"),
    [
        ("qlora", "which of its layers --method qlora would pack is not known", "--method lora"),
        ("lora", "model_type 'nonesuch', which this transformers does not know", "upgrade"),
        ("full", "model_type 'nonesuch', which this transformers does not know", "upgrade"),
    ],
)
def test_a_model_type_that_nobody_knows_begins_no_run(
    stories: Path, story: Path, tmp_path: Path, method: str, said: str, advice: str
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(stories, model, copy_function=shutil.copyfile)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    ran = run("finetune", model, story, "-o", out, *QUICK, "--method", method, "--json")
    assert (ran.exit_code, ran.error["kind"]) == (1, "unsupported")
    assert said in ran.error["message"] and advice in ran.error["hint"]
    assert not out.exists()


def test_a_missing_extra_names_the_command(
    stories: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "FINETUNE_PACKAGES", ("trl", "no_such_package"))
    ran = run("finetune", stories, story, "-o", tmp_path / "out", "--json")
    assert (ran.exit_code, ran.error["kind"]) == (1, "unsupported")
    assert ran.error["hint"] == 'pip install "qtool[finetune]"'


# -- processes ------------------------------------------------------------------------------------


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ONE_THREAD, **environment},
    )


def wait_for(process: subprocess.Popen[str], words: str) -> str:
    """stderr up to the line that holds `words`."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if words in line:
            return said
    pytest.fail(f"never said {words!r}: {said}")


def losses(out: Path) -> Any:
    return json.loads((out / "qtool_finetune.json").read_text())["losses"]


def test_killed_and_resumed_it_ends_in_the_same_bits(
    stories: Path, story: Path, tmp_path: Path
) -> None:
    arguments = (stories, story, *QUICK, "--max-steps", 12, "--save-steps", 4)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(*arguments, "-o", whole, "-q").wait(300) == 0
    process = start(*arguments, "-o", killed, "-v")
    wait_for(process, "step 7/12")
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not (killed / "adapter_model.safetensors").exists()
    resumed = start(*arguments, "-o", killed, "--resume")
    _, said = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, said
    # The kill may come after the step that follows, and that may be a save.
    assert re.search("resume   goes on after step [48]\n", said)
    assert re.search("resumed after step [48]", said)
    assert losses(killed) == losses(whole)
    weights = [load_file(out / "adapter_model.safetensors") for out in (whole, killed)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_ctrl_c_saves_and_says_how_to_go_on(stories: Path, story: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(stories, story, "-o", out, *QUICK, "--max-steps", 5000, "-v")
    wait_for(process, "step 3/5,000")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert re.search(r"error: interrupted after step \d+ of 5000; it is saved", said)
    assert "hint: the same command with --resume goes on from there" in said
    [save] = (out / "checkpoints").glob("checkpoint-*")
    assert (save / "whole.json").is_file()
    assert (save / "adapter_model.safetensors").is_file()
    ran = run("merge", out, "-o", tmp_path / "merged", "--json")
    assert (ran.exit_code, ran.error["kind"]) == (1, "not_found")
    assert "holds an unfinished run of qtool finetune" in ran.error["message"]
    assert "goes on with --resume" in ran.error["hint"]
    assert f"its last save, {save}, is an adapter too" in ran.error["hint"]
    merged = run("merge", save, "-o", tmp_path / "merged", "--onto", "original", "--json")
    assert merged.exit_code == 0, merged.stderr


@pytest.mark.parametrize("columns", [80, 140])
def test_on_a_terminal_one_line_shows_the_steps(
    stories: Path, tmp_path: Path, columns: int
) -> None:
    data = rows(tmp_path / "rows.jsonl", *[json.dumps({"text": STORY * 3})] * 8)
    arguments = (stories, data, "-o", tmp_path / "out", *QUICK, "--max-steps", 40)
    shown = run_on_terminal(columns, *arguments)
    assert "training" in shown
    # A warning or a note has a line of its own.
    marks = ("warning: ", "tokens   ", "train    ")
    lines = re.split(r"[\r\n]+", shown)
    found = [line for line in lines if any(mark in line for mark in marks)]
    assert len(found) == len(marks)
    assert all(line.startswith(marks) for line in found)
    bars = [line for line in re.split(r"[\r\n]", shown) if "tok/s" in line and "left" in line]
    assert bars
    assert all(len(line.rstrip()) <= columns for line in bars)
    assert re.search(r"\d+/40 loss \d\.\d+ · [\d,]+ tok/s · .* left", bars[-1])


@pytest.mark.parametrize("columns", [80, 140])
def test_on_a_terminal_a_warning_takes_the_place_of_the_bar(
    stories: Path, story: Path, tmp_path: Path, columns: int
) -> None:
    arguments = (stories, story, "-o", tmp_path / "out", *QUICK, "--max-steps", 5000)
    shown = run_on_terminal(columns, *arguments, ctrl_c_after=b" left", exit_code=130)
    [said] = [line for line in re.split(r"[\r\n]", shown) if "stopping after this step" in line]
    assert said.startswith("warning: ")


def run_on_terminal(
    columns: int, *arguments: object, ctrl_c_after: bytes = b"", exit_code: int = 0
) -> str:
    """What the terminal got, without colours and cursor movements."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(ONE_THREAD, TERM="xterm-256color")
        os.environ.pop("NO_COLOR", None)
        os.execv(PROGRAM[0], [*PROGRAM, *map(str, arguments)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    data = b""
    deadline_s = time.monotonic() + 300
    while time.monotonic() < deadline_s:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # the program has ended
            break
        if not chunk:
            break
        data += chunk
        if ctrl_c_after and ctrl_c_after in data:
            ctrl_c_after = b""
            os.write(terminal, b"\x03")
    _, status = os.waitpid(pid, 0)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode(errors="replace"))
    assert os.waitstatus_to_exitcode(status) == exit_code, text
    return text


@pytest.mark.parametrize("packing", [(), ("--packing",)])
def test_two_processes_train_one_adapter(
    stories: Path, story: Path, tmp_path: Path, packing: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    # 5 rows, so that some of the last batches' are rows again; and steps that change nothing.
    texts = [json.dumps({"text": STORY * (number % 3) + "The end."}) for number in range(5)]
    held_out = rows(tmp_path / "held_out.jsonl", *texts)
    measure = ("--eval-split", held_out, "--lr", 1e-9, "--compute-dtype", "float32", "--json")
    measure += packing
    alone = run(
        *("finetune", stories, story, "-o", tmp_path / "alone", *QUICK),
        *("--max-steps", 1, *measure),
    )
    launched = subprocess.run(
        [
            # What `accelerate launch` starts; its own --cpu starts one process.
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2"),
            *("-m", *PROGRAM[2:], str(stories), str(story), "-o", str(out)),
            *map(str, (*QUICK, "--max-steps", 4, *measure)),
        ],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, **ONE_THREAD},
        check=False,
    )
    assert launched.returncode == 0, launched.stderr
    document = json.loads(launched.stdout)
    assert document["steps"] == 4
    assert document["tokens"] == 4 * 2 * 2 * 32  # both processes' batches
    assert document["eval_loss"] == pytest.approx(alone.document["eval_loss"], rel=1e-5)
    assert len(losses(out)) == 4


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("rows.txt", ("--packing",), "--packing changes nothing: a running text fills"),
        ("rows.txt", ("--text-column", "a"), "--text-column a changes nothing: a text has no"),
        ("rows.jsonl", ("--split", "test"), "--split test changes nothing: DATA is a file"),
        ("rows.jsonl", ("--subset", "a"), "--subset a changes nothing: DATA is a file"),
        ("rows.jsonl", ("--text-column", "text"), None),
    ],
)
def test_options_without_effect_are_warnings(
    tmp_path: Path, name: str, options: tuple[str, ...], said: str | None
) -> None:
    data = tmp_path / name
    data.write_text('{"text": "a text to learn"}\n' * 8)
    ran = run(
        "finetune",
        "qtool/demo_model",
        data,
        "-o",
        tmp_path / "out",
        *options,
        "--dry-run",
        "--json",
    )
    assert ran.exit_code == 0
    found = [warning for warning in ran.document["warnings"] if "changes nothing" in warning]
    assert len(found) == (said is not None) and all(w.startswith(said or "") for w in found)
