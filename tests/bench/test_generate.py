"""`bench_generate` on the CPU, with a model of some kilobytes."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from qtool.bench.generate import GenerateBenchRequest, bench_generate
from qtool.bench.generate_engines import QtoolEngine
from qtool.bench.generate_records import Timing, decode_ratio
from qtool.bench.model_shapes import FULL_LAYERS, MODEL_SHAPES
from qtool.bench.records import Limit
from qtool.errors import QtoolError
from qtool.events import Advanced, Finished, Note, Started
from qtool.resources import demo_model_path
from qtool.runtime.decoders.choose import DecoderOptions
from tests.bench.tiny_shape import CONFIG, COPY_BYTES, shrink_sizes, write_tiny_shape
from tests.cli.running import run


@pytest.fixture
def bench(tmp_path, monkeypatch):
    shrink_sizes(monkeypatch)
    shape = str(write_tiny_shape(tmp_path))

    def measure(on_event=lambda event: None, **options):
        defaults = {"shape": shape, "prompts": (6,), "new_tokens": 4, "repeats": 2}
        request = GenerateBenchRequest(**(defaults | {"device": "cpu"} | options))
        return bench_generate(request, on_event)

    return measure


@pytest.fixture
def slow_layers(monkeypatch):
    """A shape with 4 of 32 layers, whose runs take as long as its layers say: 2 s + 1 s each."""
    monkeypatch.setitem(MODEL_SHAPES, "tiny-4layers", {**CONFIG, "num_hidden_layers": 4})
    monkeypatch.setitem(FULL_LAYERS, "tiny-4layers", 32)

    def pretend(engine, input_ids, new_tokens, on_token=None):
        step_s = 2.0 + engine.num_layers
        return Timing(prefill_s=10 * step_s, decode_s=step_s * (new_tokens - 1))

    def remember(engine, loaded, **options):
        engine.path, engine.path_reason = "eager", "told"
        engine.num_layers = loaded.model.config.num_hidden_layers

    monkeypatch.setattr(QtoolEngine, "__init__", remember)
    monkeypatch.setattr(QtoolEngine, "run", pretend)
    monkeypatch.setattr(QtoolEngine, "close", lambda engine: None)


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4-dq"])
def test_every_size_is_measured(bench, precision):
    result = bench(precision=precision, prompts=(6, 3), batches=(1, 2))
    assert [(found.batch, found.prompt_tokens) for found in result.runs] == [
        (1, 6),
        (1, 3),
        (2, 6),
        (2, 3),
    ]
    for found in result.runs:
        assert found.engine == "qtool" and found.path_reason
        assert found.path == ("fused" if found.batch == 1 else "eager")
        assert found.n == 2 and found.new_tokens == 4 and found.allocated_peak_bytes == 0
        assert found.prefill_tok_s > 0 and found.decode_tok_s > 0 and found.decode_tok_s_sd >= 0
        steps_per_s = found.decode_tok_s / found.batch
        share = found.step_bytes * steps_per_s / result.limit.bytes_per_s
        assert found.bandwidth_share == pytest.approx(share) and found.scaled is None
    assert (result.model, result.quant) == ("tiny", precision)
    assert result.limit.bytes == 2 * COPY_BYTES and result.warnings == ()
    assert {"torch", "transformers"} <= result.versions.keys()


@pytest.mark.parametrize(
    ("precision", "rival"), [("nf4", "transformers+bitsandbytes"), ("bf16", "transformers")]
)
def test_the_rival_runs_at_the_same_sizes(bench, precision, rival):
    pytest.importorskip("bitsandbytes")
    result = bench(precision=precision, against="bitsandbytes", new_tokens=24)
    own, other = result.runs
    assert (own.engine, other.engine) == ("qtool", rival) and own.size == other.size
    assert other.path is None and other.n == 2 and other.step_bytes == own.step_bytes
    assert decode_ratio(other, result.runs) == own.decode_tok_s / other.decode_tok_s
    assert ("bitsandbytes" in result.versions) == (precision == "nf4")


def test_a_rival_that_is_not_installed_is_said_before_anything_is_measured(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(QtoolError, match="needs bitsandbytes, not installed here") as caught:
        bench(against="bitsandbytes")
    assert caught.value.kind == "unsupported"
    assert caught.value.hint == "pip install bitsandbytes, or leave out against"
    # Where no layer is packed the rival is transformers alone.
    result = bench(precision="bf16", against="bitsandbytes")
    assert [found.engine for found in result.runs] == ["qtool", "transformers"]


def test_a_rival_that_cannot_be_imported_is_a_warning(bench, monkeypatch):
    monkeypatch.setattr("qtool.bench.generate.require_bitsandbytes", lambda: None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = bench(against="bitsandbytes")
    assert "bitsandbytes is not measured" in result.warnings[0]
    assert [found.engine for found in result.runs] == ["qtool"]


def test_a_rival_that_fails_is_a_warning(bench, monkeypatch):
    pytest.importorskip("bitsandbytes")

    def fail(engine, input_ids, new_tokens):
        raise RuntimeError("cannot\nat all")

    monkeypatch.setattr("qtool.bench.generate_engines.TransformersEngine.run", fail)
    result = bench(against="bitsandbytes")
    assert result.warnings == (
        "transformers+bitsandbytes is not measured at batch 1, 6 + 4 tokens: cannot",
    )
    assert [found.engine for found in result.runs] == ["qtool"]


@pytest.mark.parametrize("batches", [(2, 1), (1, 2)])
def test_a_size_that_does_not_fit_is_a_warning_if_another_does(bench, monkeypatch, batches):
    start = QtoolEngine.__init__

    def fail_with_two(engine, loaded, *, capacity, batch, options):
        if batch == 2:
            raise QtoolError("out of memory", kind="memory", hint="")
        start(engine, loaded, capacity=capacity, batch=batch, options=options)

    monkeypatch.setattr(QtoolEngine, "__init__", fail_with_two)
    result = bench(batches=batches)
    assert [found.batch for found in result.runs] == [1]
    assert result.warnings == ("batch 2, 6 + 4 tokens is not measured: out of memory",)
    with pytest.raises(QtoolError, match="out of memory"):
        bench(batches=(2,))


def test_an_interruption_keeps_the_sizes_that_are_done(bench, monkeypatch):
    make = QtoolEngine.__init__

    def interrupt_at_two(engine, loaded, **options):
        if options["batch"] == 2:
            raise KeyboardInterrupt
        make(engine, loaded, **options)

    monkeypatch.setattr(QtoolEngine, "__init__", interrupt_at_two)
    result = bench(batches=(1, 2, 3))
    assert [found.batch for found in result.runs] == [1]
    assert result.interruption is not None and result.interruption.kind == "interrupted"
    with pytest.raises(QtoolError, match="interrupted"):
        bench(batches=(2, 1))


def test_a_shape_of_few_layers_is_kept_when_its_half_is_interrupted(
    bench, slow_layers, monkeypatch
):
    pretend = QtoolEngine.run

    def run(engine, *arguments, **options):
        if engine.num_layers == 2:
            raise KeyboardInterrupt
        return pretend(engine, *arguments, **options)

    monkeypatch.setattr(QtoolEngine, "run", run)
    result = bench(shape="tiny-4layers")
    assert result.runs[0].scaled is None and result.interruption is not None


def test_one_run_has_no_deviation(bench):
    (found,) = bench(repeats=1).runs
    assert found.prefill_tok_s_sd is None and found.decode_tok_s_sd is None


def test_a_decoder_that_stops_early_is_no_good(bench, monkeypatch):
    monkeypatch.setattr(
        "qtool.runtime.decoders.eager.EagerDecoder.decode",
        lambda decoder, sampling, num_tokens: iter([[1]] * (num_tokens - 1)),
    )
    with pytest.raises(QtoolError, match="made 3 tokens of 4") as caught:
        bench()
    assert caught.value.kind == "internal"


def test_few_layers_tell_what_many_would_take(bench, slow_layers):
    (found,) = bench(shape="tiny-4layers", batches=(3,)).runs
    # 4 layers take 6 s a step, 2 take 4, so 32 take 34.
    assert found.decode_tok_s == pytest.approx(3 / 6)
    scaled = found.scaled
    assert (scaled.layers, scaled.measured_layers) == (32, (2, 4))
    assert scaled.decode_tok_s == pytest.approx(3 / 34)
    assert scaled.prefill_tok_s == pytest.approx(3 * 6 / 340)
    assert scaled.step_bytes > 3 * found.step_bytes


def test_layers_that_take_no_time_are_told(bench, slow_layers, monkeypatch):
    monkeypatch.setattr(QtoolEngine, "run", lambda *_, **__: Timing(1.0, 1.0))
    result = bench(shape="tiny-4layers")
    assert result.runs[0].scaled is None and "took no more time" in result.warnings[0]


def test_layers_on_another_path_tell_nothing(bench, slow_layers, monkeypatch):
    make = QtoolEngine.__init__

    def take_another_path(engine, loaded, **options):
        make(engine, loaded, **options)
        if engine.num_layers == 2:
            engine.path, engine.path_reason = "graph", "no kernels"

    monkeypatch.setattr(QtoolEngine, "__init__", take_another_path)
    result = bench(shape="tiny-4layers")
    assert result.runs[0].scaled is None
    assert "2 layers ran on the graph path (no kernels)" in result.warnings[0]


def test_prompts_that_wait_for_the_host_leave_the_rest_told(bench, slow_layers, monkeypatch):
    run = QtoolEngine.run

    def run_with_a_prompt_of_one_second(*arguments, **options):
        return replace(run(*arguments, **options), prefill_s=1.0)

    monkeypatch.setattr(QtoolEngine, "run", run_with_a_prompt_of_one_second)
    result = bench(shape="tiny-4layers", batches=(3,))
    scaled = result.runs[0].scaled
    assert scaled.prefill_tok_s is None
    assert scaled.decode_tok_s == pytest.approx(3 / 34)
    assert result.warnings == ()


@pytest.mark.parametrize(
    ("precision", "expected"), [(None, "nf4-dq"), ("int8", "int8"), ("bf16", "bf16")]
)
def test_a_checkpoint_is_quantized_on_its_way_in(bench, precision, expected):
    result = bench(model=str(demo_model_path()), precision=precision)
    assert result.quant == expected and len(result.runs) == 1


def test_a_packed_checkpoint_runs_as_it_is(bench, tmp_path):
    ran = run("quantize", demo_model_path(), "-o", tmp_path / "packed", "--quant", "fp4")
    assert ran.exit_code == 0
    assert bench(model=str(tmp_path / "packed")).quant == "fp4"
    with pytest.raises(
        QtoolError, match=r"already \(fp4\), so it does not run with quant='nf4'"
    ) as told:
        bench(model=str(tmp_path / "packed"), precision="nf4")
    assert told.value.hint.startswith("leave out quant='nf4' to run it as it is stored")
    plain, packed = (
        bench(model=str(tmp_path / "packed"), head_precision=head) for head in (None, "int8")
    )
    assert packed.head_quant == "int8"
    assert packed.runs[0].step_bytes < plain.runs[0].step_bytes


def test_a_mixture_runs_unpacked_alone(bench, test_data):
    model, events = str(test_data / "models/tinymoe-6m"), []
    for precision, adds in ((None, "; without it layers are packed in nf4-dq"), ("nf4", "")):
        with pytest.raises(QtoolError, match="is a mixture of 8 experts per layer") as caught:
            bench(events.append, model=model, precision=precision)
        assert caught.value.hint == f"quant='bf16' measures it unpacked{adds}"
    assert not events
    assert bench(model=model, precision="bf16", repeats=1).quant == "bf16"


def test_a_mixture_that_others_packed_is_not_said_to_run(bench, test_data, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(test_data / "models/tinymoe-6m", model, copy_function=shutil.copyfile)
    config = json.loads((model / "config.json").read_text())
    entry = {"quantization_config": {"quant_method": "fp8"}}
    (model / "config.json").write_text(json.dumps(config | entry))
    with pytest.raises(QtoolError, match="is quantized already") as caught:
        bench(model=str(model), precision="nf4")
    assert caught.value.hint.startswith("start from the full-precision checkpoint")


def test_progress_adds_up(bench):
    events = []
    bench(on_event=events.append, batches=(1, 2))
    started = [event for event in events if isinstance(event, Started)]
    advanced = sum(event.num_bytes for event in events if isinstance(event, Advanced))
    assert len(started) == 3  # the copy, and two sizes
    assert advanced == sum(event.total_bytes for event in started)
    assert sum(isinstance(event, Finished) for event in events) == 3


def test_a_cpu_gets_a_model_that_it_runs_in_seconds():
    cpu, gpu = (GenerateBenchRequest().sized_for(torch.device(name)) for name in ("cpu", "cuda"))
    assert (cpu.shape, cpu.new_tokens, cpu.repeats) == ("llama-3.2-1b", 64, 3)
    assert (gpu.shape, gpu.new_tokens, gpu.repeats) == ("llama-3.1-8b", 256, 5)
    asked = GenerateBenchRequest(shape="x", new_tokens=0, repeats=7)
    assert asked.sized_for(torch.device("cpu")) == asked


def test_what_runs_is_told_before_it_begins_and_how_long_it_may_take(
    bench, slow_layers, monkeypatch
):
    slow = Limit(bytes=1, seconds_median=1.0, bytes_per_s=1e3)
    monkeypatch.setattr("qtool.bench.generate.measure_copy", lambda device, on_event: slow)
    events = []
    bench(on_event=events.append, shape="tiny-4layers", prompts=(6, 3))
    notes = [event.text for event in events if isinstance(event, Note)]
    assert events[0] == Note(
        "tiny-4layers in nf4-dq on cpu: batch 1, 6 + 4 tokens; batch 1, 3 + 4 tokens; a run to "
        "warm up and 2 that count"
    )
    assert notes[1].startswith("this takes at least ") and "rate of a copy" in notes[1]
    # 4 layers take 6 s a step, so 10 for the prompt and 3 for the tokens make 78 s.
    assert notes.count("2 runs come, about 156 s") == 2


def test_what_takes_long_is_told_when_it_begins(bench):
    pytest.importorskip("bitsandbytes")
    events = []
    model = str(demo_model_path())
    bench(on_event=events.append, model=model, against="bitsandbytes", new_tokens=24)
    notes = [event.text for event in events if isinstance(event, Note) and event.level == "info"]
    task, loading, ready, sharing, *warm_ups = notes
    assert "in nf4-dq on cpu" in task and loading == f"loading {model}"
    assert ready.startswith(f"{model} is ready after")
    assert sharing == "loading transformers+bitsandbytes over the same weights"
    assert warm_ups[:2] == [  # a slow machine is told how long the rest takes
        "warming up transformers+bitsandbytes, batch 1, 6 + 24 tokens",
        "warming up qtool, batch 1, 6 + 24 tokens",
    ]


def test_a_warm_up_moves_with_each_token(bench):
    events = []
    bench(on_event=events.append, new_tokens=9)
    warm_up = [event for event in events if isinstance(event, Advanced) and event.item == "warm-up"]
    assert len(warm_up) == 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"new_tokens": 1}, "new=1"),
        ({"prompts": (126,)}, "128 tokens together"),
        ({"precision": "fp8"}, "quant='fp8'"),
        ({"head_precision": "fp8"}, "head_quant='fp8'"),
        ({"shape": "llama-99"}, "shape='llama-99'"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_wrong_requests_are_refused(bench, options, words):
    with pytest.raises(QtoolError, match=words) as caught:
        bench(**options)
    assert caught.value.kind == "usage"


def test_a_path_that_cannot_be_taken_is_refused(bench):
    with pytest.raises(QtoolError, match="graph"):
        bench(decoding=DecoderOptions("graph"))
    assert not torch.is_inference_mode_enabled()
