"""Whatever a config.json says and whatever is asked of it: a sound answer or one clear error; and
how answers relate to each other, for every mode and runtime."""

from __future__ import annotations

import io
import itertools
import json
import random
from typing import Any

import pytest
from rich.console import Console

from qtool.architecture import KNOWN_MODEL_TYPES
from qtool.checkpoint import Checkpoint
from qtool.errors import QtoolError
from qtool.planner.estimate import EstimateRequest, estimate_opened
from qtool.planner.gpus import resolve_gpus
from qtool.planner.model import PlannedModel, describe_model
from qtool.planner.records import Estimate, Tuning, Workload
from qtool.planner.reference_models import reference_models
from qtool.report.estimate import EstimateView, estimate_document
from tests.architecture.families import TINY
from tests.architecture.test_mutations import fresh, mutate
from tests.planner.plans import plan_of

NUM_MUTATIONS = 10_000
NUM_SEEDS = 10
LONGEST_MESSAGE = 2_000
WIDTH = 80

MODES = ("generate", "qlora", "lora", "full")
RUNTIMES = ("qtool", "transformers", "vllm")
RUNNABLE = [
    (mode, runtime)
    for mode, runtime in itertools.product(MODES, RUNTIMES)
    if mode == "generate" or runtime != "vllm"  # which does not train
]
QUANTS = ((), ("bf16",), ("nf4",), ("nf4-dq",), ("int8", "fp16"), ("fp8",), ("fp32", "nf4"))
GPUS = resolve_gpus(("4090", "H200"))

# What decides the sizes, of all keys that some architecture reads.
KEYS = (
    "architectures",
    "dtype",
    "head_dim",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "kv_lora_rank",
    "layer_types",
    "max_position_embeddings",
    "model_type",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "quantization_config",
    "sliding_window",
    "text_config",
    "tie_word_embeddings",
    "torch_dtype",
    "vision_config",
    "vocab_size",
)


def describe(config: dict[str, Any]) -> PlannedModel:
    """The model of a config.json alone."""
    return describe_model(Checkpoint.of_config("model", config))


def tiny_configs() -> list[dict[str, Any]]:
    return [{"model_type": kind, **config} for kind, config in sorted(TINY.items())]


def random_request(rng: random.Random) -> EstimateRequest:
    """Any combination of options that the command line lets through."""
    tuning = Tuning(
        lora_r=rng.choice([1, 16, 10**6]),
        lora_targets=rng.choice([None, None, None, ("q_proj",), ("no_such",)]),
        lora_dropout=rng.choice([0.0, 0.05, 1.0]),
        adapter_dtype=rng.choice(["fp32", "bf16"]),
        optimizer=rng.choice(["adamw", "adamw-8bit", "paged-adamw-8bit", "adafactor", "lion"]),
        gradient_checkpointing=rng.random() < 0.5,
    )
    workload = Workload(
        context=0,
        batch=rng.choice([1, 1, 2, 7, 10**6]),
        mode=rng.choice(MODES),
        runtime=rng.choice(RUNTIMES),
        kv_dtype=rng.choice(["auto", "bf16", "fp8", "int8"]),
        gpus=rng.choice([1, 1, 2, 3, 8, 1024]),
        split=rng.choice(["pipeline", "tensor"]),
        tuning=tuning,
    )
    return EstimateRequest(
        model="model",
        quants=rng.choice(QUANTS),
        context=rng.choice([None, 1, 4096, 10**9, 10**30]),
        workload=workload,
        headroom_percent=rng.choice([0, 10, 99]),
    )


def assert_sound(answer: Estimate) -> None:
    """What every answer promises, however odd the question was."""
    for plan in answer.plans:
        for name, part in plan.components.items():
            assert type(part.bytes) is int and part.bytes >= 0, (name, part)
        assert 0 < plan.peak_low_bytes <= plan.peak_bytes <= plan.peak_high_bytes
        assert 0 < plan.steady_bytes <= plan.peak_bytes
        assert plan.checkpoint_bytes > 0 and plan.load_peak_bytes > 0
        assert all(suggestion.saves_bytes > 0 for suggestion in plan.suggestions)
        for fit in plan.fits:
            assert fit.max_context is None or fit.max_context >= 0
            assert (fit.verdict == "no") == (plan.peak_bytes > fit.usable_bytes)


def assert_reportable(answer: Estimate) -> None:
    """JSON without NaN, and text that fits the terminal."""
    json.dumps(estimate_document(answer), allow_nan=False)
    out = io.StringIO()
    Console(file=out, width=WIDTH).print(EstimateView(answer))
    assert max(map(len, out.getvalue().splitlines())) <= WIDTH


def ask(config: dict[str, Any], request: EstimateRequest, rng: random.Random) -> bool:
    """Whether it is answered; anything but a sound answer or a clear error fails."""
    gpus = GPUS[: rng.choice([1, 2])] if rng.random() < 0.05 else ()
    try:
        answer = estimate_opened(describe(config), gpus, request)
    except QtoolError as error:
        assert error.hint and 0 < len(error.message) < LONGEST_MESSAGE, error.message
        return False
    assert_sound(answer)
    if rng.random() < 0.03:
        assert_reportable(answer)
    return True


@pytest.mark.parametrize("kind", sorted(KNOWN_MODEL_TYPES))
def test_every_known_type_is_planned_in_every_mode_and_runtime(kind):
    rng = random.Random(kind)
    config = {"model_type": kind, **TINY[kind]}
    for mode, runtime in RUNNABLE:
        gpus, split = rng.choice([(1, "pipeline"), (2, "pipeline"), (2, "tensor"), (8, "tensor")])
        kv_dtype = rng.choice(["auto", "bf16", "fp8", "int8"])
        workload = Workload(0, 2, mode, runtime, kv_dtype, gpus, split)
        answer = estimate_opened(
            describe(config), GPUS[:1], EstimateRequest("model", (), 64, workload)
        )
        assert_sound(answer)
    assert_reportable(answer)


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_a_mutated_config_is_a_sound_answer_or_one_clear_error(seed):
    rng, configs = random.Random(seed), tiny_configs()
    answers = 0
    for _ in range(NUM_MUTATIONS // NUM_SEEDS):
        config = fresh(rng.choice(configs))
        for _ in range(rng.choice([1, 1, 2, 4])):
            mutate(config, rng, KEYS)
        answers += ask(config, random_request(rng), rng)
    assert NUM_MUTATIONS // NUM_SEEDS * 0.1 < answers < NUM_MUTATIONS // NUM_SEEDS * 0.9


def test_published_configs_are_planned_whatever_is_asked(test_data):
    rng = random.Random(0)
    files = sorted((test_data / "configs").glob("*/config.json"))
    assert len(files) > 40
    answers = sum(ask(json.loads(file.read_text()), random_request(rng), rng) for file in files * 2)
    assert answers > len(files) // 2


# -- how answers relate ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return reference_models()[0].describe()


def configs_of_kinds() -> list[str]:
    return ["llama", "gemma3_text", "mixtral", "deepseek_v3", "qwen3_next", "jamba", "bloom"]


@pytest.mark.parametrize("kind", configs_of_kinds())
@pytest.mark.parametrize(("mode", "runtime"), RUNNABLE)
def test_peak_grows_with_context_and_batch(kind, mode, runtime):
    model = describe({"model_type": kind, **TINY[kind]})
    quant = "nf4" if mode == "qlora" else "bf16"
    for kv_dtype in ("auto", "int8"):
        options = {"mode": mode, "runtime": runtime, "kv_dtype": kv_dtype}
        by_context = [
            plan_of(model, quant, context=context, **options).peak_bytes
            for context in (1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 500, 8191, 8192, 8193, 40_000)
        ]
        assert by_context == sorted(by_context)
        by_batch = [
            plan_of(model, quant, context=33, batch=batch, **options).peak_bytes
            for batch in (1, 2, 3, 8, 9, 100, 10_000)
        ]
        assert by_batch == sorted(by_batch)
        assert by_context[0] < by_context[-1] and by_batch[0] < by_batch[-1]


@pytest.mark.parametrize("context", [1, 128, 4096, 100_000])
def test_fewer_bits_take_less(context):
    """For dense models in qtool's own runtime; on disk, on the device and at the peak."""
    for reference in reference_models():
        plans = [
            plan_of(reference.describe(), quant, context=context)
            for quant in ("fp32", "bf16", "int8", "nf4", "nf4-dq")
        ]
        for name in ("checkpoint_bytes", "steady_bytes"):
            sizes = [getattr(plan, name) for plan in plans]
            assert sizes == sorted(sizes, reverse=True), (reference.name, name)
        peaks = [plan.peak_bytes for plan in plans if plan.quant != "fp32"]
        assert peaks == sorted(peaks, reverse=True), reference.name


@pytest.mark.parametrize("split", ["pipeline", "tensor"])
@pytest.mark.parametrize("num_gpus", [2, 3, 8])
@pytest.mark.parametrize("quant", ["bf16", "nf4-dq"])
def test_gpus_together_hold_at_least_the_whole(small, quant, num_gpus, split):
    for mode in ("generate", "lora" if quant == "bf16" else "qlora"):
        whole = plan_of(small, quant, mode=mode)
        part = plan_of(small, quant, mode=mode, gpus=num_gpus, split=split)
        held, needed = (
            sum(
                plan.components[name].bytes
                for name in ("weights", "kv_cache", "adapters")
                if name in plan.components
            )
            for plan in (part, whole)
        )
        assert held < needed
        if split == "tensor":  # of a pipeline the fullest GPU is shown, by all it holds
            assert needed <= num_gpus * held
        assert part.peak_bytes < whole.peak_bytes


@pytest.mark.parametrize("quant", ["fp32", "bf16", "int8", "nf4-dq"])
def test_tied_is_untied_without_the_head(small, quant):
    tied, untied = (
        describe({**small.config, "tie_word_embeddings": is_tied}) for is_tied in (True, False)
    )
    head = small.config["vocab_size"] * small.config["hidden_size"]
    head_bytes = (4 if quant == "fp32" else 2) * head
    assert untied.facts.parameters - tied.facts.parameters == head
    for context in (1, 4096):
        one, two = (plan_of(model, quant, context=context) for model in (tied, untied))
        assert two.peak_bytes - one.peak_bytes == head_bytes
        assert two.checkpoint_bytes - one.checkpoint_bytes >= head_bytes
        assert two.components["kv_cache"] == one.components["kv_cache"]
