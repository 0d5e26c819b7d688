"""Lines that say what a runtime does, where it does it and nowhere else."""

from __future__ import annotations

import pytest

from qtool.checkpoint import Checkpoint
from qtool.planner.estimate import default_quants
from qtool.planner.fit import fit
from qtool.planner.gpus import find_gpu, vram_class
from qtool.planner.model import describe_model, open_model
from qtool.planner.records import Tuning, Workload
from qtool.planner.reference_models import reference_models
from tests.planner.plans import budget_of, plan_of
from tests.tiny_models import llama_config

GIB = 1 << 30


@pytest.fixture(scope="module")
def mixture(test_data):
    return open_model(str(test_data / "configs" / "Qwen--Qwen3-30B-A3B"))


def notes_on(model, quant, gib, **workload):
    budget = budget_of(model, quant, **workload)
    return fit(budget, budget.plan(budget.workload), vram_class(gib)).notes


def test_what_fits_has_room_for_a_text_that_is_computed_anew(test_data):
    """Phi-3 computes a text anew that grows past 4,096 tokens, with two caches for that token."""
    phi_3 = open_model(str(test_data / "configs" / "mlc--phi-3_5"))
    needed, peaks = {}, {}
    for context in (4095, 4096, 4097, 8192):
        budget = budget_of(phi_3, "bf16", runtime="transformers", context=context)
        needed[context] = budget.needed_bytes(budget.workload)
        peaks[context] = budget.peak_bytes(budget.workload)
    assert list(needed.values()) == sorted(needed.values())
    assert needed[4095] == peaks[4095] < peaks[4097] < needed[4097] == peaks[4096]
    assert "room for that" in " ".join(
        plan_of(phi_3, "bf16", runtime="transformers", context=4097).notes
    )
    own = budget_of(phi_3, "bf16", context=4097)
    assert own.needed_bytes(own.workload) == own.peak_bytes(own.workload)


def test_experts_stay_in_16_bit_with_transformers(mixture):
    """59.7 GB instead of the 16.7 that 4 bits per parameter make one expect."""
    plan = plan_of(mixture, "nf4", runtime="transformers")
    assert plan.components["weights"].bytes / 1e9 == pytest.approx(59.7, abs=0.3)
    assert plan_of(mixture, "nf4").components["weights"].bytes / 1e9 == pytest.approx(17.7, abs=0.5)
    (note,) = plan.notes
    assert "54.00 GiB" in note and "stay as they are" in note
    assert plan_of(mixture, "bf16", runtime="transformers").notes == ()
    assert "experts yet" in plan_of(mixture, "nf4").notes[0]


def test_the_device_map_leaves_a_part_of_the_gpu_free():
    model = reference_models()[2].describe()  # 14.96 GiB in bf16
    assert notes_on(model, "bf16", 24, runtime="transformers") == ()
    (note,) = notes_on(model, "bf16", 16.5, runtime="transformers")
    assert "90%" in note and "device_map={'': 0}" in note
    (note,) = notes_on(model, "nf4-dq", 6, runtime="transformers")
    assert "81%" in note
    assert notes_on(model, "bf16", 16.5) == ()


def test_gpus_without_kernels_of_ours_are_named_to_our_runtime_alone():
    model = reference_models()[0].describe()
    for name, runtime, mode, said in (
        ("V100 16GB", "qtool", "generate", "--runtime transformers or vllm plans"),
        ("M3 Max", "qtool", "qlora", "--runtime transformers plans"),  # vLLM does not train
        ("V100 16GB", "transformers", "generate", None),
        ("T4", "qtool", "generate", None),
    ):
        budget = budget_of(model, "nf4", runtime=runtime, mode=mode)
        notes = fit(budget, budget.plan(budget.workload), find_gpu(name)).notes
        assert [said in note and "7.5 or newer" in note for note in notes] == [True] * bool(said)


def test_vllm_has_nine_tenths_of_the_gpu():
    model = reference_models()[2].describe()
    answers = {}
    for runtime in ("qtool", "vllm"):
        budget = budget_of(model, "bf16", runtime=runtime)
        answers[runtime] = fit(budget, budget.plan(budget.workload), vram_class(24))
    assert answers["vllm"].usable_bytes == int(0.9 * answers["qtool"].usable_bytes)
    assert "gpu_memory_utilization" in plan_of(model, "bf16", runtime="vllm").notes[0]


def test_preparing_for_training_makes_float32_of_what_is_not_packed():
    model = reference_models()[2].describe()
    stock = plan_of(model, "nf4-dq", mode="qlora", runtime="transformers")
    ours = plan_of(model, "nf4-dq", mode="qlora")
    assert any("prepare_model_for_kbit_training" in note for note in stock.notes)
    head_and_embedding = 2 * 128_256 * 4096
    difference = stock.components["weights"].bytes - ours.components["weights"].bytes
    assert difference == pytest.approx(2 * head_and_embedding, rel=0.01)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (Tuning(lora_r=8), Tuning(lora_r=64)),
        (Tuning(), Tuning(gradient_checkpointing=False)),
        (Tuning(adapter_dtype="bf16"), Tuning()),
        (Tuning(optimizer="adamw-8bit"), Tuning()),
        (Tuning(lora_targets=("q_proj", "v_proj")), Tuning()),
    ],
)
def test_every_choice_of_training_shows_in_the_plan(less, more):
    model = reference_models()[0].describe()
    smaller, larger = (plan_of(model, "nf4", mode="qlora", tuning=t) for t in (less, more))
    assert smaller.allocated_peak_bytes < larger.allocated_peak_bytes


def test_training_in_full_takes_gradients_and_states_of_every_parameter():
    model = reference_models()[0].describe()
    parts = plan_of(model, "bf16", mode="full").components
    num_parameters = model.facts.parameters
    assert parts["optimizer"].bytes == 2 * 2 * num_parameters
    assert parts["weights"].bytes == 2 * num_parameters
    assert "kv_cache" not in parts


@pytest.mark.parametrize(
    ("runtime", "expected"), [("qtool", ("fp32", "bf16")), ("transformers", ("bf16",))]
)
def test_full_training_is_planned_as_it_is_done(runtime, expected):
    """`qtool finetune` holds float32 weights, the Trainer those of the model it was given."""
    workload = Workload(context=1, mode="full", runtime=runtime)
    assert default_quants(workload) == expected


@pytest.mark.parametrize(
    ("heads", "key_heads", "gpus", "is_refused"),
    [(16, 16, 3, True), (24, 8, 3, True), (16, 2, 4, False), (16, 16, 4, False), (15, 5, 3, True)],
)
def test_vllm_spreads_whole_heads_evenly(heads, key_heads, gpus, is_refused):
    config = {
        **llama_config(hidden=960),
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": 64,
        "dtype": "bfloat16",
    }
    model = describe_model(Checkpoint.of_config("m", config))

    def refusals(runtime, split):
        workload = {"runtime": runtime, "split": split, "gpus": gpus, "context": 64}
        notes = plan_of(model, "bf16", **workload).notes
        return [note for note in notes if "vLLM refuses" in note]

    said = refusals("vllm", "tensor")
    assert len(said) == is_refused
    assert all(f"{heads} attention heads" in note and f"{gpus} GPUs" in note for note in said)
    assert refusals("vllm", "pipeline") == refusals("qtool", "tensor") == []
