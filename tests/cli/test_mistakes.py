"""One mistake has one exit code, whichever command it is made with."""

from __future__ import annotations

import ctypes.util
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, NoReturn

import pytest

from qtool.backends.cuda_driver import NoCudaError
from qtool.errors import EXIT_CODES, ErrorKind
from tests.cli.running import run
from tests.merge.adapters import linear_layers, lora_tensors, write_adapter
from tests.test_structure import loaded_modules
from tests.tiny_models import write_llama

pytestmark = pytest.mark.usefixtures("enough_memory")

DEMO = Path(__file__).parent.parent.parent / "qtool/demo_model"


@dataclass(frozen=True, slots=True)
class Places:
    """What commands can be given, beside what they cannot use."""

    folder: Path
    rows: Path
    adapter: Path
    output: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Rows to learn from, and an adapter of the demo model."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "rows.jsonl").write_text('{"text": "Once upon a time there was a girl."}\n' * 8)
    config = json.loads((DEMO / "config.json").read_text())
    adapter = write_adapter(folder / "adapter", lora_tensors(linear_layers(config)), DEMO)
    return folder / "rows.jsonl", adapter


@pytest.fixture
def places(inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    folder = tmp_path / "given"
    for name in ("empty", "other", "broken", "memory.html"):
        (folder / name).mkdir(parents=True)
    (folder / "other/notes.md").write_text("hello\n")
    (folder / "notes.md").write_text("hello\n")
    (folder / "latin-1.txt").write_bytes(b"caf\xe9\n")
    (folder / "broken/config.json").write_text("{")
    (folder / "broken/adapter_config.json").write_text("{")
    (folder / "broken/model.safetensors").write_bytes(b"12")
    (folder / "broken/adapter_model.safetensors").write_bytes(b"12")
    (folder / "broken.jsonl").write_text('{"text":\n')
    (folder / "broken.toml").write_text("context = = 3\n")
    (folder / "unknown.toml").write_text("contxet = 3\n")
    return Places(folder, *inputs, tmp_path / "out")


Arguments = tuple[object, ...]
Command = Callable[[Places, object], Arguments]

# What each command takes from elsewhere, here the place where the mistake is made.
READS_A_MODEL: dict[str, Command] = {
    "estimate": lambda at, what: ("estimate", what),
    "sizing": lambda at, what: ("sizing", what),
    "quantize": lambda at, what: ("quantize", what, "-o", at.output),
    "quantize --dry-run": lambda at, what: ("quantize", what, "--dry-run"),
    "inspect": lambda at, what: ("inspect", what),
    "inspect --against": lambda at, what: ("inspect", DEMO, "--against", what),
    "generate": lambda at, what: ("generate", what, "Hi"),
    "finetune": lambda at, what: ("finetune", what, at.rows, "-o", at.output),
    "merge --base": lambda at, what: ("merge", at.adapter, "-o", at.output, "--base", what),
    "bench quantize": lambda at, what: ("bench", "quantize", what),
    "bench generate": lambda at, what: ("bench", "generate", what),
}
READS_AN_ADAPTER: dict[str, Command] = {
    "generate --adapter": lambda at, what: ("generate", DEMO, "Hi", "--adapter", what),
    "merge": lambda at, what: ("merge", what, "-o", at.output),
}
READS_ROWS: dict[str, Command] = {
    "finetune DATA": lambda at, what: ("finetune", DEMO, what, "-o", at.output),
    "finetune --eval-split": lambda at, what: (
        *("finetune", DEMO, at.rows, "-o", at.output),
        *("--eval-split", what),
    ),
}
READS_A_PROMPT: dict[str, Command] = {
    "generate --prompt-file": lambda at, what: ("generate", DEMO, "--prompt-file", what),
}
READS_OPTIONS: dict[str, Command] = {
    "estimate --config": lambda at, what: ("estimate", DEMO, "--config", what),
    "quantize --config": lambda at, what: ("quantize", DEMO, "-o", at.output, "--config", what),
    "doctor --config": lambda at, what: ("doctor", "--config", what),
    "bench kernels --config": lambda at, what: ("bench", "kernels", "--config", what),
}
WRITES_A_FOLDER: dict[str, Command] = {
    "quantize -o": lambda at, where: ("quantize", DEMO, "-o", where),
    "quantize -o --dry-run": lambda at, where: ("quantize", DEMO, "-o", where, "--dry-run"),
    "merge -o": lambda at, where: ("merge", at.adapter, "-o", where),
    "merge -o --dry-run": lambda at, where: ("merge", at.adapter, "-o", where, "--dry-run"),
    "finetune -o": lambda at, where: ("finetune", DEMO, at.rows, "-o", where),
    "finetune -o --dry-run": lambda at, where: (
        *("finetune", DEMO, at.rows, "-o", where),
        "--dry-run",
    ),
    "demo --keep": lambda at, where: ("demo", "--keep", where),
}
# How much it writes depends on the tokens, and a dry run reads no tokenizer.
WITH_SPACE = {"finetune -o --dry-run"}
WRITES_A_FILE: dict[str, Command] = {
    "estimate --plot": lambda at, where: ("estimate", DEMO, "--plot", where),
    "sizing --plot": lambda at, where: ("sizing", DEMO, "--plot", where),
    "bench quantize -o": lambda at, where: ("bench", "quantize", DEMO, "-o", where),
    "bench kernels -o": lambda at, where: ("bench", "kernels", "-o", where),
    "bench generate -o": lambda at, where: ("bench", "generate", DEMO, "-o", where),
    "bench finetune -o": lambda at, where: ("bench", "finetune", "-o", where),
    "bench optimizers -o": lambda at, where: ("bench", "optimizers", "-o", where),
}
# A command line that is whole, to which an option is added.
WHOLE: dict[str, Callable[[Places], Arguments]] = {
    "estimate": lambda at: ("estimate", DEMO),
    "sizing": lambda at: ("sizing", DEMO),
    "quantize": lambda at: ("quantize", DEMO, "-o", at.output),
    "inspect": lambda at: ("inspect", DEMO),
    "generate": lambda at: ("generate", DEMO, "Hi"),
    "finetune": lambda at: ("finetune", DEMO, at.rows, "-o", at.output),
    "merge": lambda at: ("merge", at.adapter, "-o", at.output),
    "demo": lambda at: ("demo",),
    "doctor": lambda at: ("doctor",),
    "bench quantize": lambda at: ("bench", "quantize", DEMO),
    "bench kernels": lambda at: ("bench", "kernels"),
    "bench generate": lambda at: ("bench", "generate", DEMO),
    "bench finetune": lambda at: ("bench", "finetune"),
    "bench optimizers": lambda at: ("bench", "optimizers"),
}
COMPUTES = ("generate", "finetune", "bench generate", "bench finetune", "bench optimizers")
PACKS = ("quantize", "merge", "bench quantize", "bench kernels")
WITHOUT_DRIVER = pytest.mark.skipif(
    ctypes.util.find_library("cuda") is not None, reason="needs a machine without a driver"
)
UNQUANTIZED = {"bench kernels", "bench optimizers"}


class Mistake(NamedTuple):
    """`what` is given as it is, or as a place in the folder if it begins with @."""

    commands: dict[str, Command]
    what: str
    kind: ErrorKind


MISTAKES = {
    "nothing there": Mistake(
        READS_A_MODEL | READS_AN_ADAPTER | READS_ROWS | READS_A_PROMPT, "@none/at/all", "not_found"
    ),
    "mistyped path": Mistake(
        READS_A_MODEL | READS_AN_ADAPTER | READS_ROWS | READS_A_PROMPT, "./none", "not_found"
    ),
    "no name": Mistake(READS_A_MODEL | READS_AN_ADAPTER | READS_ROWS, "no name", "not_found"),
    "no Hub": Mistake(READS_A_MODEL | READS_AN_ADAPTER | READS_ROWS, "org/none", "network"),
    "empty folder": Mistake(READS_A_MODEL | READS_AN_ADAPTER, "@empty", "not_found"),
    "other folder": Mistake(READS_A_MODEL | READS_AN_ADAPTER, "@other", "not_found"),
    "other file": Mistake(READS_A_MODEL | READS_ROWS, "@notes.md", "unsupported"),
    "a folder, no file": Mistake(READS_ROWS | READS_A_PROMPT, "@other", "unsupported"),
    "broken folder": Mistake(READS_A_MODEL | READS_AN_ADAPTER, "@broken", "bad_file"),
    "broken rows": Mistake(READS_ROWS, "@broken.jsonl", "bad_file"),
    "broken options": Mistake(READS_OPTIONS, "@broken.toml", "bad_file"),
    "no UTF-8": Mistake(READS_ROWS | READS_A_PROMPT, "@latin-1.txt", "bad_file"),
    "unknown option in a file": Mistake(READS_OPTIONS, "@unknown.toml", "usage"),
    "neither file nor recipe": Mistake(READS_OPTIONS, "@none.toml", "usage"),
    "a file in its place": Mistake(WRITES_A_FOLDER, "@notes.md", "usage"),
    "a folder below a file": Mistake(WRITES_A_FOLDER, "@notes.md/out", "usage"),
    "another's folder": Mistake(WRITES_A_FOLDER, "@other", "usage"),
    "a file in no folder": Mistake(WRITES_A_FILE, "@none/memory.html", "usage"),
    "a folder in its place": Mistake(WRITES_A_FILE, "@memory.html", "usage"),
}


def check(arguments: Arguments, kind: ErrorKind, output: Path) -> None:
    ran = run(*arguments, "--json")
    assert (ran.exit_code, ran.error["kind"]) == (EXIT_CODES[kind], kind), ran.error
    assert ran.error["message"] and ran.error["hint"] and "bug" not in ran.error["hint"]
    assert ran.stdout == "" and not output.exists()


@pytest.mark.parametrize(
    ("command", "mistake"),
    [
        pytest.param(command, mistake, id=f"{name}: {what}")
        for what, mistake in MISTAKES.items()
        for name, command in mistake.commands.items()
    ],
)
def test_a_place_that_is_wrong(command: Command, mistake: Mistake, places: Places) -> None:
    is_below = mistake.what.startswith("@")
    what = places.folder / mistake.what[1:] if is_below else mistake.what
    before = sorted(places.folder.rglob("*"))
    check(command(places, what), mistake.kind, places.output)
    assert sorted(places.folder.rglob("*")) == before


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("option", [("--no-such-option",), ("--color", "sometimes")])
def test_an_option_that_there_is_not(name: str, option: Arguments, places: Places) -> None:
    check((*WHOLE[name](places), *option), "usage", places.output)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        *((name, "--quant", "nf5") for name in WHOLE if name in {*PACKS, *COMPUTES} - UNQUANTIZED),
        *((name, "--quant", "nf5") for name in ("estimate", "sizing")),
        *((name, "--device", "gpu") for name in COMPUTES),
        *((name, "--backend", "gpu") for name in PACKS),
        *((name, "--gpu", "RTX 1") for name in ("estimate", "sizing")),
        *((name, "--mode", "train") for name in ("estimate", "sizing")),
        *((name, "--context", "0") for name in ("estimate", "sizing")),
        *((name, "--optimizer", "adamx") for name in ("finetune",)),
        *((name, "--lora-targets", "x_proj") for name in ("finetune",)),
        *((name, "--blocksize", "3") for name in ("quantize", "merge")),
        *((name, "--max-shard-size", "big") for name in ("quantize", "merge")),
        ("bench kernels", "--shape", "nothing"),
        ("bench kernels", "--op", "nothing"),
        ("bench optimizers", "--case", "nothing"),
        ("generate", "--max-memory", "all"),
        ("finetune", "--eval-split", "2"),
    ],
)
def test_a_value_that_an_option_has_not(name: str, option: str, value: str, places: Places) -> None:
    check((*WHOLE[name](places), option, value), "usage", places.output)


@pytest.mark.parametrize(
    ("name", "option"),
    [*((name, "--device") for name in COMPUTES), *((name, "--backend") for name in PACKS)],
)
def test_a_gpu_that_is_not_there(
    name: str, option: str, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtool.backends.cuda_driver._load_driver", _no_driver)
    monkeypatch.setattr("qtool.finetune.plan._may_have_driver", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    adds = ("--quant", "nf4") if name == "merge" else ()  # else there is nothing to compute
    arguments = (*WHOLE[name](places), *adds, option, "cuda")
    check(arguments, "unsupported", places.output)
    error = run(*arguments, "--json").error
    assert error["message"] == f"{option} cuda cannot run here: no NVIDIA driver was found"
    assert error["hint"].endswith(f", or use {option} cpu")


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        *((name, ("--device", "gpu")) for name in COMPUTES),
        pytest.param("generate", ("--device", "cuda"), marks=WITHOUT_DRIVER),
        ("generate", ("--max-memory", "all")),
        ("generate", ("--adapter", "./none")),
        ("generate", ("--adapter", DEMO)),
        ("generate", ("--path", "graph", "--device", "cpu")),
        pytest.param("generate", ("--path", "graph"), marks=WITHOUT_DRIVER),
        ("bench generate", ("-o", "none/at/all.json")),
        ("bench finetune", ("--shape", "nothing")),
    ],
)
def test_what_can_be_told_at_once_loads_no_torch(
    name: str, mistake: Arguments, places: Places
) -> None:
    arguments = (*WHOLE[name](places), *mistake)
    assert run(*arguments).exit_code in (1, 2)
    assert "torch" not in loaded_modules(*map(str, arguments))


@pytest.mark.parametrize("command", [("generate", "./none", "Hi"), ("bench", "generate", "./none")])
def test_a_model_that_is_not_there_loads_no_torch(command: tuple[str, ...]) -> None:
    assert "torch" not in loaded_modules(*command)


def test_a_model_that_cannot_be_read_or_packed_loads_no_torch(tmp_path: Path) -> None:
    write_llama(tmp_path / "model")
    (tmp_path / "weightless").mkdir()
    shutil.copy(tmp_path / "model/config.json", tmp_path / "weightless")
    assert run("quantize", tmp_path / "model", "-o", tmp_path / "packed").exit_code == 0
    for name, adds, said in (
        ("weightless", (), "expected *.safetensors, found config.json"),
        ("packed", ("--quant", "nf4"), "packed is quantized already"),
    ):
        command = ("generate", tmp_path / name, "Hi", *adds)
        ran = run(*command, "--json")
        assert ran.exit_code == 1 and said in ran.error["message"]
        assert "torch" not in loaded_modules(*map(str, command))


def _no_driver() -> NoReturn:
    raise NoCudaError("no NVIDIA driver was found", fix="install the driver")


@pytest.mark.parametrize("name", sorted(WRITES_A_FOLDER.keys() - WITH_SPACE))
def test_no_space_for_a_folder(name: str, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(f_frsize=4096, f_bsize=4096, f_blocks=1000, f_bfree=0, f_bavail=0)
    monkeypatch.setattr("os.statvfs", lambda path: full)
    check(WRITES_A_FOLDER[name](places, places.output), "no_space", places.output)


@pytest.mark.parametrize("name", ["estimate --plot", "sizing --plot"])
def test_no_space_for_a_file(name: str, places: Places, tmp_path: Path) -> None:
    (tmp_path / "full.html").symlink_to("/dev/full")
    ran = run(*WRITES_A_FILE[name](places, tmp_path / "full.html"), "--json")
    assert ran.exit_code == EXIT_CODES["no_space"]
    assert ran.error["kind"] == "no_space" and "full.html" in ran.error["message"]
    assert "continue" not in ran.error["hint"]


@pytest.mark.parametrize(
    "arguments", [("quantize", "--model-shape"), ("generate", "--shape"), ("finetune", "--shape")]
)
def test_a_shape_that_there_is_not(arguments: Arguments, places: Places) -> None:
    check(("bench", *arguments, "nothing"), "usage", places.output)
    check(("bench", *arguments, places.folder / "broken/config.json"), "bad_file", places.output)
