"""`import qtool`: light until it is used, and what docs/python.md shows runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qtool
from qtool.resources import demo_model_path
from qtool.runtime.answers import Request, answer
from qtool.runtime.generate import Limits, Sampling
from qtool.runtime.loading import LoadOptions, load_model

ROOT = Path(__file__).parent.parent
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def model() -> Any:
    return qtool.load(demo_model_path(), quant="nf4-dq", device="cpu")


def greedy_text(max_new_tokens: int) -> str:
    loaded = load_model(str(demo_model_path()), LoadOptions("nf4-dq", device="cpu"))
    request = Request("", None, None, Sampling(), Limits(max_new_tokens))
    return answer(loaded, request, PROMPT, write=lambda piece: None).text


def test_importing_is_light_and_knows_its_names() -> None:
    script = (
        "import sys, qtool\n"
        "assert {'load', 'stream', 'register', 'unregister', 'QtoolError'} <= set(dir(qtool))\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'numpy', 'cupy'} & set(sys.modules)\n"
        "print(qtool.__version__, sorted(heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split(maxsplit=1) == [qtool.__version__, "[]\n"]


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        qtool.no_such_name  # noqa: B018


def test_without_torch_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtool.runtime import requirements

    monkeypatch.setattr(requirements, "RUN_PACKAGES", ("no_such_package",))
    monkeypatch.delitem(vars(qtool), "stream", raising=False)
    with pytest.raises(qtool.QtoolError, match="no_such_package, not installed") as caught:
        qtool.stream  # noqa: B018
    assert "qtool[run]" in caught.value.hint


def test_generate_and_stream_make_the_commands_text(model: Any) -> None:
    expected = greedy_text(24)
    pieces = list(qtool.stream(model, PROMPT, max_new_tokens=24))
    assert len(pieces) > 1
    assert "".join(pieces) == expected
    inputs = model.tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert model.tokenizer.decode(output[0], skip_special_tokens=True).endswith(expected)


def test_sampling_is_repeatable(model: Any) -> None:
    def text(seed: int) -> str:
        pieces = qtool.stream(model, PROMPT, temperature=1.0, seed=seed, max_new_tokens=16)
        return "".join(pieces)

    assert text(1) == text(1) != text(2)


@pytest.mark.parametrize("several", [False, True])
def test_stop_ends_the_text_before_it(model: Any, several: bool) -> None:
    whole = "".join(qtool.stream(model, PROMPT, max_new_tokens=32))
    word = whole.split()[3]
    stop = ["no such text", word] if several else word
    text = "".join(qtool.stream(model, PROMPT, max_new_tokens=32, stop=stop))
    assert text == whole[: whole.index(word)]


def test_leaving_early_ends_the_work(model: Any) -> None:
    steps: list[None] = []
    hook = model.register_forward_hook(lambda *_: steps.append(None))
    pieces = qtool.stream(model, PROMPT, max_new_tokens=400)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    hook.remove()
    assert 0 < len(steps) < 40


def test_a_prompt_that_cannot_be_run_is_refused_at_once(model: Any) -> None:
    with pytest.raises(qtool.QtoolError, match="the context"):
        qtool.stream(model, "word " * 3000)
    with pytest.raises(qtool.QtoolError, match="chat"):
        qtool.stream(model, PROMPT, chat=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
    ],
)
def test_numbers_out_of_range_are_refused_at_once(
    model: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(qtool.QtoolError, match=message) as caught:
        qtool.stream(model, PROMPT, **arguments)
    assert caught.value.kind == "usage"


def test_a_model_of_another_origin_is_refused() -> None:
    with pytest.raises(qtool.QtoolError, match=r"Linear that qtool\.load did not make"):
        qtool.stream(torch.nn.Linear(2, 2), PROMPT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"quant": "int4"}, "quant='int4'"), ({"dtype": "int8"}, "dtype='int8'")],
)
def test_unknown_words_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(qtool.QtoolError, match=message):
        qtool.load(demo_model_path(), **arguments)


def test_options_of_load_reach_the_model() -> None:
    model = qtool.load(demo_model_path(), device=torch.device("cpu"), dtype=torch.float32)
    assert model.dtype == torch.float32
    assert model.device.type == "cpu"
    with pytest.raises(qtool.QtoolError, match="'cpu=plenty' is not of the form"):
        qtool.load(demo_model_path(), device="cpu", max_memory={"cpu": "plenty"})


@pytest.mark.slow
def test_the_documented_examples_run(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(examples) >= 5
    shutil.copytree(demo_model_path(), tmp_path / "qtool" / "demo_model")
    [command] = re.findall(r"`qtool (quantize .+?)`", text.replace("\n", " "))[:1]
    for words in (["-m", "qtool", *command.split()], ["-P", "-c", "\n".join(examples)]):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert "Linear4bit(" in done.stdout
    assert "no such folder" in done.stdout
