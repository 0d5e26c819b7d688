"""`import qtool`: light until it is used, and what docs/python.md shows runs."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

import qtool
from qtool.resources import demo_model_path
from qtool.runtime import api
from qtool.runtime.answers import Request, answer
from qtool.runtime.decoders import history
from qtool.runtime.decoders.choose import DecoderOptions
from qtool.runtime.generate import Limits, Sampling
from qtool.runtime.linear import LinearInt8
from qtool.runtime.loading import LoadOptions, load_model
from tests.hub_server import HubServer, hub_server
from tests.merge.adapters import linear_layers, lora_tensors, write_adapter

__all__ = ["hub_server"]  # the fixture

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
        "names = {'load', 'stream', 'release', 'register', 'unregister', 'QtoolError'}\n"
        "assert names <= set(dir(qtool))\n"
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
    eager = "".join(qtool.stream(model, PROMPT, max_new_tokens=24, path="eager"))
    assert model.tokenizer.decode(output[0], skip_special_tokens=True).endswith(eager)


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
    pieces = qtool.stream(model, PROMPT, max_new_tokens=400, path="eager")  # a call for each token
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    hook.remove()
    assert 0 < len(steps) < 40


def test_texts_that_are_left_unfinished_end_with_the_program_in_silence() -> None:
    script = (
        "import sys, qtool\n"
        "model = qtool.load(sys.argv[1], quant='nf4', device='cpu')\n"
        "def begun(path):\n"
        "    pieces = qtool.stream(model, 'Once', max_new_tokens=400, path=path)\n"
        "    print(end=next(pieces), flush=True)\n"
        "    return pieces\n"
        "texts = [begun('fused'), begun('eager'), begun('fused')]\n"  # two have caches of their own
        "unread = qtool.stream(model, 'Once')\n"
    )
    command = [sys.executable, "-c", script, str(demo_model_path())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout and done.stderr == ""


def test_but_for_one_that_a_thread_is_making_just_then() -> None:
    def pieces() -> Generator[str]:
        yield "a"
        api._close(weakref.ref(running))  # from within: as if by another thread
        yield "b"

    running = pieces()
    assert list(running) == ["a", "b"]


def test_overlapping_texts_do_not_disturb_each_other(model: Any) -> None:
    expected = greedy_text(12)
    pieces = [qtool.stream(model, PROMPT, max_new_tokens=12) for _ in range(2)]
    texts = ["".join(parts) for parts in zip(*zip(*pieces, strict=True), strict=True)]
    assert texts == [expected, expected]


def test_a_whole_model_is_not_dequantized_and_the_error_says_what_is(model: Any) -> None:
    with pytest.raises(qtool.QtoolError, match="not dequantized as a whole") as caught:
        model.dequantize()
    assert "full-precision" in caught.value.hint and "layer.dequantize()" in caught.value.hint


@pytest.fixture
def decoders_made(monkeypatch: pytest.MonkeyPatch) -> list[DecoderOptions]:
    """The options of each decoder that is made."""
    made: list[DecoderOptions] = []
    real = history.choose_decoder

    def choose(loaded: Any, capacity: int, *, options: DecoderOptions) -> Any:
        made.append(options)
        return real(loaded, capacity, options=options)

    monkeypatch.setattr(history, "choose_decoder", choose)
    return made


def test_a_decoder_is_kept_until_it_is_released(
    model: Any, decoders_made: list[DecoderOptions]
) -> None:
    qtool.release(model)
    for _ in range(3):
        "".join(qtool.stream(model, PROMPT, max_new_tokens=4))
    assert len(decoders_made) == 1
    qtool.release(model)
    "".join(qtool.stream(model, PROMPT, max_new_tokens=4))
    assert len(decoders_made) == 2


def test_ways_to_run_reach_the_decoder(model: Any, decoders_made: list[DecoderOptions]) -> None:
    pieces = qtool.stream(model, PROMPT, max_new_tokens=8, prefill_chunk=2, path="eager")
    text = "".join(pieces)
    assert decoders_made == [DecoderOptions("eager", 2)]
    assert text == greedy_text(8)
    with pytest.raises(qtool.QtoolError, match="cannot take the graph path") as caught:
        list(qtool.stream(model, PROMPT, path="graph"))
    assert caught.value.hint.startswith("leave out path")


def test_the_context_can_be_bounded(model: Any) -> None:
    num_prompt = len(model.tokenizer(PROMPT)["input_ids"])
    whole = qtool.stream(model, PROMPT, max_new_tokens=8)
    bounded = qtool.stream(model, PROMPT, max_new_tokens=8, max_context=num_prompt + 2)
    assert len("".join(bounded)) < len("".join(whole))


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
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": 1e-320}, "temperature=1e-320"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"max_context": 0}, "max_context=0"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1 << 63}, "seed=9223372036854775808"),
        ({"max_new_tokens": "x"}, "max_new_tokens='x': expected a whole number, at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5: expected a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens=True: expected a whole number"),
        ({"max_new_tokens": None}, "max_new_tokens: expected a whole number"),
        ({"max_context": "a"}, "max_context='a': expected a whole number"),
        ({"prefill_chunk": 2.5}, "prefill_chunk=2.5: expected a whole number"),
        ({"temperature": "x"}, "temperature='x': expected 0, or a number"),
        ({"temperature": 1.0, "top_p": "x"}, "top_p='x': expected a number"),
        ({"temperature": 1.0, "top_k": 1.5}, "top_k=1.5: expected a whole number"),
        ({"temperature": 1.0, "seed": 1.5}, "seed=1.5: expected a whole number"),
        ({"chat": "no"}, "chat='no': expected True, False or None"),
        ({"system": 5}, "system: expected text, found int"),
        ({"stop": 5}, "stop: expected text, found int"),
        ({"stop": ["a", 5]}, "stop: expected text, found int"),
        ({"stop": ["a", ""]}, "stop='': expected a text, since the empty one"),
        ({"path": "fast"}, "path='fast': expected one of auto, fused, graph, eager"),
    ],
)
def test_arguments_out_of_range_or_of_another_type_are_refused_at_once(
    model: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(qtool.QtoolError, match=message) as caught:
        qtool.stream(model, PROMPT, **arguments)
    assert caught.value.kind == "usage"
    assert "conversation" not in caught.value.hint


def test_an_empty_prompt_is_refused_in_words_of_python(model: Any) -> None:
    with pytest.raises(qtool.QtoolError, match="the prompt is empty") as caught:
        qtool.stream(model, "", chat=False)
    assert "PROMPT" not in caught.value.hint


@pytest.mark.parametrize("prompt", [None, 5, ["a", "b"], [{"role": "user", "content": "a"}]])
def test_a_prompt_that_is_no_text_is_refused(model: Any, prompt: Any) -> None:
    with pytest.raises(qtool.QtoolError, match="prompt: expected text, found") as caught:
        qtool.stream(model, prompt)
    assert caught.value.kind == "usage"
    assert "apply_chat_template" in caught.value.hint


def test_a_model_of_another_origin_is_refused() -> None:
    with pytest.raises(qtool.QtoolError, match="found a Linear of another origin"):
        qtool.stream(torch.nn.Linear(2, 2), PROMPT)
    with pytest.raises(qtool.QtoolError, match="found a Linear of another origin"):
        qtool.release(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quant": "int4"}, "quant='int4'"),
        ({"head_quant": "bf16"}, "head_quant='bf16'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"device": "tpu"}, "device='tpu'"),
    ],
)
def test_unknown_words_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(qtool.QtoolError, match=message):
        qtool.load(demo_model_path(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path_or_id": 5}, "path_or_id: expected text, found int"),
        ({"adapter": 5}, "adapter: expected text, found int"),
        ({"device": 3}, "device: expected text, found int"),
        ({"max_memory": 5}, "max_memory=5: expected like"),
        ({"int8_threshold": "x"}, "int8_threshold='x': expected 0 or more"),
        ({"int8_threshold": True}, "int8_threshold=True: expected 0 or more"),
    ],
)
def test_arguments_of_load_of_another_type_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(qtool.QtoolError, match=message) as caught:
        qtool.load(**({"path_or_id": demo_model_path()} | arguments))
    assert caught.value.kind == "usage"


def test_options_of_load_reach_the_model() -> None:
    model = qtool.load(demo_model_path(), device=torch.device("cpu"), dtype=torch.float32)
    assert model.dtype == torch.float32
    assert model.device.type == "cpu"
    with pytest.raises(qtool.QtoolError, match="'cpu=plenty' is not of the form"):
        qtool.load(demo_model_path(), device="cpu", max_memory={"cpu": "plenty"})


def test_the_output_head_can_be_packed() -> None:
    model = qtool.load(demo_model_path(), device="cpu", head_quant="int8")
    assert isinstance(model.get_output_embeddings(), LinearInt8)
    assert len("".join(qtool.stream(model, PROMPT, max_new_tokens=4))) > 0


def test_an_adapter_may_be_a_folder_or_lie_on_the_hub(
    tmp_path: Path,
    hub_server: HubServer,
) -> None:
    pytest.importorskip("peft")
    config = json.loads((demo_model_path() / "config.json").read_text())
    tensors = lora_tensors(linear_layers(config))
    folder = write_adapter(tmp_path / "adapter", tensors, demo_model_path())
    hub_server.add_model("org/adapter", folder, revision="v2")
    script = (
        "import sys, qtool\n"
        "model = qtool.load(sys.argv[1], adapter=sys.argv[2], device='cpu')\n"
        "print(''.join(qtool.stream(model, sys.argv[3], max_new_tokens=12)))\n"
    )
    environment = hub_server.environment(tmp_path / "home", PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", script, str(demo_model_path()), "org/adapter@v2", PROMPT],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    model = qtool.load(demo_model_path(), adapter=str(folder), device="cpu")
    own = "".join(qtool.stream(model, PROMPT, max_new_tokens=12))
    assert done.stdout == f"{own}\n"
    assert own != greedy_text(12)


@pytest.mark.parametrize(
    ("changes", "quant", "said"),
    [
        ({"model_type": "zebra"}, None, "model_type 'zebra', which this transformers"),
        ({"quantization_config": {"quant_method": "gptq"}}, "nf4", "is quantized already"),
    ],
)
def test_of_a_model_that_cannot_run_no_weights_are_downloaded(
    tmp_path: Path, hub_server: HubServer, changes: dict[str, Any], quant: str | None, said: str
) -> None:
    shutil.copytree(demo_model_path(), tmp_path / "model", copy_function=shutil.copyfile)
    config = json.loads((demo_model_path() / "config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | changes))
    hub_server.add_model("org/model", tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", f"import qtool; qtool.load('org/model', quant={quant!r})"],
        capture_output=True,
        text=True,
        check=False,
        env=hub_server.environment(tmp_path / "home", PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 1 and said in done.stderr
    asked = [request for request in hub_server.requests if "safetensors" in request.path]
    assert all(request.range for request in asked)  # headers
    assert not [*(tmp_path / "home").rglob("*.safetensors")]


def test_arguments_are_checked_before_an_adapter_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fetch(adapter: str) -> None:
        raise AssertionError("fetched")

    monkeypatch.setattr("qtool.runtime.api.fetch_adapter", fetch)
    with pytest.raises(qtool.QtoolError, match="int8_threshold=-1"):
        qtool.load(demo_model_path(), adapter="org/adapter", int8_threshold=-1)


REFUSED_BY_STREAM: list[dict[str, Any]] = [
    {"chat": True},
    {"chat": False, "system": "Be brief."},
    {"max_context": 1},
    {"max_context": 100_000},
    {"path": "graph"},
]
REFUSED_BY_LOAD: list[dict[str, Any]] = [
    {"device": "tpu"},
    {"device": "cuda:99"},
    {"max_memory": {0: "6GiB"}, "device": "cpu"},
    {"max_memory": "plenty", "device": "cpu"},
    {"adapter": "no-such-adapter", "device": "cpu"},
]


def test_errors_speak_of_arguments(model: Any) -> None:
    told = []
    for arguments in REFUSED_BY_STREAM:
        with pytest.raises(qtool.QtoolError) as caught:
            list(qtool.stream(model, PROMPT, **arguments))
        told.append((arguments, f"{caught.value.message} {caught.value.hint}"))
    for arguments in REFUSED_BY_LOAD:
        with pytest.raises(qtool.QtoolError) as caught:
            qtool.load(demo_model_path(), **arguments)
        told.append((arguments, f"{caught.value.message} {caught.value.hint}"))
    for arguments, text in told:
        assert "--" not in text, text
        assert any(name in text for name in arguments), text


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
