"""`qtool bench` as users and scripts see it."""

from __future__ import annotations

import json

import pytest

from qtool.bench.generate_records import GenerateRun
from qtool.bench.kernels import _Group
from qtool.bench.records import Limit
from qtool.report.bench import _path_lines
from tests.bench.tiny_shape import shrink_sizes, write_tiny_shape
from tests.cli.running import run
from tests.tiny_models import llama_config, write_llama

ROW_FIELDS = {
    "op",
    "shape",
    "dtype",
    "engine",
    "seconds_median",
    "seconds_mad",
    "n",
    "bytes",
    "input_bytes",
    "bytes_per_s",
    "share_of_limit",
    "tokens",
    "relative_error",
}
RUN_FIELDS = {
    "engine",
    "path",
    "path_reason",
    "batch",
    "prompt_tokens",
    "new_tokens",
    "n",
    "prefill_tok_s",
    "prefill_tok_s_sd",
    "decode_tok_s",
    "decode_tok_s_sd",
    "step_bytes",
    "bandwidth_share",
    "allocated_peak_bytes",
    "scaled",
}
COMMON_FIELDS = {
    "schema",
    "command",
    "warnings",
    "argv",
    "device",
    "host",
    "versions",
    "limits",
    "rows",
    "backend",
    "backend_reason",
    "complete",
}
NO_RIVAL = ("bench", "kernels", "--backend", "cpu", "--shape", "16x128", "--no-rival")
KERNELS = (*NO_RIVAL, "--op", "quantize nf4", "--op", "dequantize nf4")
PRODUCTS = (*NO_RIVAL, "--op", "linear nf4", "--rows", "1", "--rows", "4")


@pytest.fixture
def quantize(tmp_path):
    shape = tmp_path / "tiny.json"
    shape.write_text(json.dumps(llama_config()))
    words = ("bench", "quantize", "--backend", "cpu", "--no-rival", "--repeat", "1")
    return (*words, "--work-dir", tmp_path, "--model-shape", shape)


@pytest.fixture
def generate(tmp_path, monkeypatch):
    shrink_sizes(monkeypatch)
    words = ("bench", "generate", "--device", "cpu", "--shape", write_tiny_shape(tmp_path))
    return (*words, "--prompt", "5", "--new", "4", "--repeat", "2")


def check_common(document, command):
    assert document.keys() >= COMMON_FIELDS
    assert document["schema"] == 1 and document["command"] == command
    assert document["warnings"] == []
    assert all(row.keys() == ROW_FIELDS for row in document["rows"])
    assert all(
        limit.keys() == {"bytes", "seconds_median", "bytes_per_s"}
        for limit in document["limits"].values()
    )
    assert {"python", "qtool", "numpy", "numba"} <= document["versions"].keys()


def test_kernels_json_is_one_document_and_the_file_the_same(tmp_path):
    ran = run(*KERNELS, "--json", "--output", tmp_path / "k.json")
    assert ran.exit_code == 0 and ran.stderr == ""
    check_common(ran.document, "bench kernels")
    assert json.loads((tmp_path / "k.json").read_text()) == ran.document


def test_every_measurement_says_what_it_does_before_it_takes_long(quantize, tmp_path):
    (stderr, task, *_) = run(*KERNELS).stderr.splitlines()
    assert stderr.startswith("backend  cpu")
    assert task == (
        "2 operations on weights of 16x128 in bf16: 2 rounds to warm up and 20 that count"
    )
    task = run(*quantize).stderr.splitlines()[1]
    assert task == f"tiny to nf4-dq, in {tmp_path}: a round to warm up and 1 that count"
    assert run(*KERNELS, "-q").stderr == run(*quantize, "-q").stderr == ""


def test_products_have_an_error_in_the_json(monkeypatch):
    shrink_sizes(monkeypatch)
    ran = run(*PRODUCTS, "--json")
    check_common(ran.document, "bench kernels")
    own = [row for row in ran.document["rows"] if row["engine"] == "qtool"]
    assert [(row["op"], row["tokens"]) for row in own] == [("linear nf4", 1), ("linear nf4", 4)]
    assert all(0 < row["relative_error"] < 0.01 for row in own)


def test_generate_says_what_it_does_before_it_takes_long(generate):
    ran = run(*generate)
    assert ran.exit_code == 0
    loading, task = ran.stderr.splitlines()[:2]
    assert loading == "loading PyTorch and transformers"
    assert task.startswith("tiny in nf4-dq on cpu: batch 1, 5 + 4 tokens; ")
    assert run(*generate, "-q").stderr == ""


def test_generate_says_which_sizes_ran_on_which_path(generate):
    def paths(*sizes):
        ran = run(*generate, *sizes)
        return [line for line in ran.stdout.splitlines() if line.startswith("qtool ran on")]

    (alone,) = paths("--prompt", "4")
    assert alone.startswith("qtool ran on the fused path: ")
    first, second = paths("--prompt", "4", "--batch", "1", "--batch", "2")
    assert first.startswith("qtool ran on the fused path (batch 1): ")
    assert second.startswith("qtool ran on the eager path (batch 2): ")


def test_paths_are_told_apart_by_as_few_words_as_do():
    def lines(*runs):
        found = []
        for batch, prompt_tokens, path in runs:
            rates = dict.fromkeys(("prefill_tok_s", "decode_tok_s", "bandwidth_share"), 1.0)
            found.append(
                GenerateRun(
                    engine="qtool",
                    path=path,
                    path_reason="told",
                    batch=batch,
                    prompt_tokens=prompt_tokens,
                    new_tokens=4,
                    n=1,
                    prefill_tok_s_sd=None,
                    decode_tok_s_sd=None,
                    step_bytes=1,
                    allocated_peak_bytes=0,
                    **rates,
                )
            )
        return list(_path_lines(found))

    assert lines() == []
    assert lines((1, 5, "fused"), (2, 5, "fused")) == ["qtool ran on the fused path: told"]
    assert lines((1, 5, "fused"), (2, 5, "eager"), (4, 5, "eager")) == [
        "qtool ran on the fused path (batch 1): told",
        "qtool ran on the eager path (batch 2; batch 4): told",
    ]
    assert lines((1, 5, "fused"), (1, 9, "eager"), (2, 5, "fused")) == [
        "qtool ran on the fused path (5 + 4 tokens): told",
        "qtool ran on the eager path (9 + 4 tokens): told",
    ]
    assert lines((1, 5, "fused"), (1, 9, "eager"), (2, 5, "eager"), (2, 9, "eager")) == [
        "qtool ran on the fused path (batch 1, 5 + 4 tokens): told",
        "qtool ran on the eager path (batch 1, 9 + 4 tokens; batch 2, 5 + 4 tokens; batch 2, 9 + 4 "
        "tokens): told",
    ]


@pytest.mark.parametrize("verb", ["quantize", "generate", "finetune"])
def test_help_lists_the_shapes_that_an_error_offers(verb):
    option = "--model-shape" if verb == "quantize" else "--shape"
    ran = run("bench", verb, option, "bogus", "--json")
    shapes = ran.error["hint"].removesuffix(", or the path of a model's config.json").split(", ")
    assert len(shapes) == 4
    help_text = run("bench", verb, "--help").stdout
    assert all(shape in help_text for shape in shapes)


UNRUNNABLE = {
    "unknown type": (
        {"model_type": "zebra"},
        "model_type 'zebra', which this transformers does not know",
        "pip install --upgrade transformers",
    ),
    "no weights": ({}, "expected *.safetensors, found config.json", "*.safetensors"),
    "another's format": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quant_method 'gptq', expected bitsandbytes",
        "start from the full-precision model",
    ),
}


@pytest.mark.parametrize("quant", [(), ("--quant", "bf16"), ("--quant", "nf4")])
@pytest.mark.parametrize("case", UNRUNNABLE)
def test_generate_tells_of_a_model_that_cannot_run_before_it_measures(
    tmp_path, monkeypatch, case, quant
):
    changes, said, hint = UNRUNNABLE[case]
    config = write_llama(tmp_path) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    if case == "no weights":
        (tmp_path / "model.safetensors").unlink()
    monkeypatch.setattr("qtool.bench.generate.measure_copy", in_vain)
    sizes = ("--prompt", "5", "--new", "4")
    ran = run("bench", "generate", tmp_path, "--device", "cpu", *sizes, *quant, "--json")
    assert ran.exit_code == 1 and said in ran.error["message"]
    assert hint in ran.error["hint"]


def test_generate_tells_of_too_many_tokens_before_pytorch(tmp_path, monkeypatch):
    longest = write_llama(tmp_path)["max_position_embeddings"]
    monkeypatch.setattr("qtool.runtime.model_config.require_runnable", in_vain)
    ran = run("bench", "generate", tmp_path, "--new", longest, "--json")
    assert ran.exit_code == 2
    assert f"was made for {longest:,} tokens together" in ran.error["message"]


def in_vain(*arguments):
    raise AssertionError("nothing should be measured")


def test_generate_json_is_one_document_and_the_file_the_same(generate, tmp_path):
    ran = run(*generate, "--batch", "1", "--batch", "2", "--json", "--output", tmp_path / "g.json")
    assert ran.exit_code == 0 and ran.stderr == ""
    document = ran.document
    assert document["schema"] == 1 and document["command"] == "bench generate"
    assert document["model"] == "tiny" and document["quant"] == "nf4-dq"
    assert document["head_quant"] is None and document["warnings"] == []
    assert {"device", "host", "versions", "argv", "limits"} <= document.keys()
    assert [run["batch"] for run in document["runs"]] == [1, 2]
    assert all(run.keys() == RUN_FIELDS for run in document["runs"])
    assert json.loads((tmp_path / "g.json").read_text()) == document


def test_quantize_json_is_one_document_and_the_file_the_same(quantize, tmp_path):
    ran = run(*quantize, "--json", "--output", tmp_path / "q.json")
    assert ran.exit_code == 0 and ran.stderr == ""
    check_common(ran.document, "bench quantize")
    assert json.loads((tmp_path / "q.json").read_text()) == ran.document
    assert {"storage", "runs", "num_threads", "limit_seconds"} <= ran.document.keys()


def test_the_tables_name_their_units_and_fit_80_columns(quantize, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for words, last_row in ((KERNELS, "dequantize nf4"), (quantize, "quantize nf4-dq")):
        ran = run(*words)
        assert ran.exit_code == 0, ran.stderr
        lines = ran.stdout.splitlines()
        (head,) = (line for line in lines if line.startswith("operation"))
        assert head.split() == ["operation", "engine", "time", "GB/s", "of", "limit"]
        assert "vs qtool" not in ran.stdout  # there is nobody else
        (row,) = (line for line in lines if line.startswith(last_row))
        assert "s " in row and "%" in row and "…" not in ran.stdout
        assert max(map(len, lines)) <= 80


def test_the_products_table_fits_80_columns_and_shows_errors(monkeypatch):
    shrink_sizes(monkeypatch)
    monkeypatch.setenv("COLUMNS", "80")
    ran = run(*PRODUCTS)
    lines = ran.stdout.splitlines()
    assert ran.exit_code == 0 and max(map(len, lines)) <= 80 and "…" not in ran.stdout
    assert "bf16  16x128  1 token" in lines and "bf16  16x128  4 tokens" in lines
    (own, _) = (line for line in lines if line.split()[:3] == ["linear", "nf4", "qtool"])
    assert "e-03" in own


@pytest.mark.parametrize(("copy_bytes_per_s", "is_beyond"), [(1.0, True), (1e15, False)])
def test_more_than_the_limit_is_explained(generate, monkeypatch, copy_bytes_per_s, is_beyond):
    limit = Limit(bytes=1, seconds_median=1.0, bytes_per_s=copy_bytes_per_s)
    monkeypatch.setattr("qtool.bench.generate.measure_copy", lambda device, on_event: limit)
    ran = run(*generate)
    assert ran.exit_code == 0 and "vs qtool" not in ran.stdout  # there is nobody else
    assert ("more than 100 %" in ran.stdout) is is_beyond


def test_the_generate_table_fits_80_columns(generate, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("COLUMNS", "80")
    ran = run(*generate, "--against", "bitsandbytes", "--new", "24", "--head-quant", "int8")
    assert ran.exit_code == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in ran.stdout
    assert "tiny, nf4-dq, output head int8" in lines and "batch 1, 5 + 24 tokens" in lines
    (head,) = (line for line in lines if line.startswith("engine"))
    assert head.split() == [
        "engine",
        "prefill",
        "tok/s",
        "decode",
        "tok/s",
        "of",
        "limit",
        "vs",
        "qtool",
    ]
    (own,) = (line for line in lines if line.startswith("qtool  "))
    (rival,) = (line for line in lines if line.startswith("transformers+bnb"))
    assert "%" in own and rival.rstrip().endswith("x")
    assert "vs qtool: time of decoding" in " ".join(lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generate", "--shape", "llama-99"), "llama-99"),
        (("generate", "--quant", "fp8"), "fp8"),
        (("generate", "--new", "1"), "new"),
        (("generate", "--against", "nobody"), "against"),
        (("generate", "--output", "."), "cannot be written"),
        (("kernels", "--rows", "0"), "rows"),
        (("kernels", "--op", "quantize nf5"), "nf5"),
        (("kernels", "--shape", "12"), "ROWSxCOLUMNS"),
        (("kernels", "--dtype", "fp64"), "fp64"),
        (("kernels", "--repeat", "19"), "20"),
        (("kernels", "--output", "no/such/folder/x.json"), "cannot be written"),
        (("quantize", "--model-shape", "llama-99"), "llama-99"),
        (("quantize", "--output", "."), "cannot be written"),
        (("quantize", "--repeat", "0"), "repeat"),
        (("quantise",), "quantise"),
        ((), "command"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_was_expected(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["qtool", "--json"])
    ran = run("bench", *words, "--json") if words else run("bench")
    assert ran.exit_code == 2 and ran.stdout == ""
    text = ran.error["message"] + ran.error["hint"] if words else ran.stderr
    assert message in text and list(tmp_path.iterdir()) == []


def test_no_space_exits_with_5(tmp_path, monkeypatch):
    monkeypatch.setattr("qtool.bench.work_folder.free_bytes", lambda folder: 10**9)
    ran = run("bench", "quantize", "--work-dir", tmp_path, "--backend", "cpu", "--json")
    assert ran.exit_code == 5 and ran.error["kind"] == "no_space"
    assert list(tmp_path.iterdir()) == []


def test_cuda_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for verb in ("kernels", "quantize"):
        ran = run("bench", verb, "--backend", "cuda", "--json")
        assert ran.exit_code == 1 and ran.error["kind"] == "unsupported"


def test_options_come_from_variables_too(monkeypatch):
    monkeypatch.setenv("QTOOL_REPEAT", "21")
    assert run(*KERNELS, "--json").document["rows"][0]["n"] == 21


def test_options_come_from_a_table_of_the_config_file_too(tmp_path):
    config = tmp_path / "run.toml"
    config.write_text('backend = "cpu"\n["bench kernels"]\nrepeat = 22\n[estimate]\nbatch = 2\n')
    assert run(*KERNELS, "--json", "--config", config).document["rows"][0]["n"] == 22
    config.write_text("[bench]\nrepeat = 22\n")
    ran = run(*KERNELS, "--json", "--config", config)
    assert ran.exit_code == 2 and "bench kernels" in ran.error["hint"]


def test_help_shows_all_verbs_and_their_examples():
    ran = run("bench", "--help")
    assert all(verb in ran.stdout for verb in ("quantize", "kernels", "generate"))
    ran = run("bench", "kernels", "--help")
    assert "qtool bench kernels" in ran.stdout and "qtool bench quantize" not in ran.stdout


def test_an_interruption_keeps_what_was_measured(tmp_path, monkeypatch):
    shrink_sizes(monkeypatch)
    path = tmp_path / "part.json"
    measure = _Group.measure

    def measure_the_first(group, repeats, on_event):
        if group.shape == (32, 128):
            raise KeyboardInterrupt
        return measure(group, repeats, on_event)

    monkeypatch.setattr(_Group, "measure", measure_the_first)
    ran = run(*KERNELS, "--shape", "32x128", "--shape", "64x128", "--output", path, "--json")
    assert ran.exit_code == 130
    assert ran.error["kind"] == "interrupted" and "until then" in ran.error["hint"]
    for document in (ran.document, json.loads(path.read_text())):
        assert document["complete"] is False
        assert {row["shape"] for row in document["rows"]} == {"16x128"}


def test_an_interruption_before_anything_is_measured_keeps_nothing(tmp_path, monkeypatch):
    shrink_sizes(monkeypatch)
    monkeypatch.setattr(_Group, "measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    ran = run(*KERNELS, "--output", tmp_path / "none.json", "--json")
    assert ran.exit_code == 130 and ran.stdout == ""
    assert "from the start" in ran.error["hint"]
    assert not (tmp_path / "none.json").exists()
