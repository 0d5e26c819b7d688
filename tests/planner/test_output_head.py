"""The output head packed in memory: planned as the runtime packs it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers

from qtool.checkpoint import Checkpoint
from qtool.errors import QtoolError
from qtool.exact.peak import exact_peak
from qtool.exact.records import ExactRequest
from qtool.planner.fit import fit
from qtool.planner.gpus import vram_class
from qtool.planner.memory import MemoryBudget
from qtool.planner.model import describe_model, open_model
from qtool.planner.records import Workload
from qtool.planner.reference_models import reference_models
from qtool.runtime.output_head import quantize_head
from tests.planner.plans import budget_of, plan_of
from tests.tiny_models import llama_config, write_llama

PRECISIONS = ("int8", "fp4", "fp4-dq", "nf4", "nf4-dq")
# Of a vocabulary that outweighs the rest.
CONFIG = {**llama_config(hidden=256, layers=2, mlp=512, vocab=40_000), "dtype": "bfloat16"}


def planned_model(**changes):
    return describe_model(Checkpoint.of_config("bare", {**CONFIG, **changes}))


def bytes_of(model) -> int:
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_quant", PRECISIONS)
def test_it_takes_what_the_packed_head_of_a_model_takes(head_quant, tied, dtype):
    config = {**CONFIG, "tie_word_embeddings": tied, "dtype": dtype}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config))
    model = model.to(getattr(torch, dtype))
    before = bytes_of(model)
    quantize_head(model, head_quant)
    planned = planned_model(tie_word_embeddings=tied, dtype=dtype)
    precision = "bf16" if dtype == "bfloat16" else "fp32"
    plain = planned.weights(precision)
    packed = planned.weights(precision, head_quant=head_quant)
    # The offset of double quantization, which stands in the files' JSON, is not planned.
    assert bytes_of(model) - before - (packed.device_bytes - plain.device_bytes) in (0, 4)
    assert packed.checkpoint_bytes == plain.checkpoint_bytes


def test_a_token_reads_the_packed_head_and_one_row_of_a_tied_embedding():
    for tied in (False, True):
        model = planned_model(tie_word_embeddings=tied)
        head = model.architecture.tensors["lm_head.weight"].shape
        plain, packed = (model.weights("nf4", head_quant=quant) for quant in (None, "int8"))
        saved = plain.read_per_token_bytes - packed.read_per_token_bytes
        assert saved == head[0] * head[1] * (2 - 1) - 4 * head[0]


# Not of a type that takes the fused path, whose kernels need not be installed here.
STABLELM = {"architectures": ["StableLmForCausalLM"], "partial_rotary_factor": 0.25}


@pytest.mark.parametrize("head_quant", ["int8", "nf4-dq"])
@pytest.mark.parametrize("quant", ["bf16", "fp32", "int8"])
def test_all_that_is_allocated_is_what_the_model_allocates(quant, head_quant):
    """In float32 the head is dequantized, else its packed bytes are read."""
    workload = Workload(300, 2, head_quant=head_quant)
    budget = MemoryBudget.of(planned_model(model_type="stablelm", **STABLELM), quant, workload)
    beside = ("workspace", "runtime_overhead", "allocator")
    components = budget.plan(workload).components
    planned = sum(part.bytes for name, part in components.items() if name not in beside)
    request = ExactRequest(quant, context=300, batch=2, head_quant=head_quant)
    found = exact_peak({**CONFIG, "model_type": "stablelm", **STABLELM}, request)
    assert planned == pytest.approx(found.allocated_peak_bytes, rel=0.01)
    assert (components["dequant_buffer"].bytes > 0) == (quant == "fp32")


def test_many_sequences_dequantize_it():
    model = planned_model(model_type="stablelm", **STABLELM)
    few, many = (
        plan_of(model, "bf16", context=8, batch=batch, head_quant="nf4").components
        for batch in (32, 33)
    )
    assert few["dequant_buffer"].bytes == 0
    # Comparing a graph's logits takes more than multiplying by 20 MB of head in 16 bit.
    assert many["logits"].bytes > 40_000 * 256 * 2


def test_until_it_is_packed_the_head_is_as_the_files_have_it():
    model = reference_models()[2].describe()
    plain, packed = (plan_of(model, "nf4-dq", context=16, head_quant=q) for q in (None, "nf4-dq"))
    assert packed.peak_bytes < plain.peak_bytes
    assert packed.load_peak_bytes == plain.load_peak_bytes > packed.peak_bytes
    budget = budget_of(model, "nf4-dq", context=16, head_quant="nf4-dq")
    plan = budget.plan(budget.workload)
    for over, verdict in ((-1, "no"), (1, "tight")):
        gpu = vram_class(32)
        percent = 100 * (1 - (packed.load_peak_bytes + over * 1024) / gpu.usable_bytes)
        answer = fit(budget, plan, gpu, percent)
        assert answer.verdict == verdict
        assert (answer.max_context == 0) == (verdict == "no")


@pytest.mark.parametrize("elsewhere", [{"runtime": "transformers"}, {"mode": "qlora"}])
def test_only_qtool_s_own_runtime_packs_it(elsewhere):
    model = reference_models()[2].describe()
    plain, asked = (plan_of(model, "nf4", **elsewhere, head_quant=q) for q in (None, "nf4"))
    assert plain.peak_bytes == asked.peak_bytes


def test_on_several_gpus_the_last_one_has_it():
    model = reference_models()[2].describe()
    plain, packed = (plan_of(model, "nf4", gpus=2, head_quant=quant) for quant in (None, "nf4"))
    assert packed.peak_bytes < plain.peak_bytes


def test_a_head_that_is_packed_in_the_files_is_refused(tmp_path):
    write_llama(tmp_path / "model")
    model = open_model(str(tmp_path / "model"))
    assert model.weights("nf4", head_quant="nf4").more_before_bytes > 0
    stored = replace(model, packed={"lm_head.weight": None})
    with pytest.raises(QtoolError, match=r"head_quant='nf4': .* found one that is packed"):
        stored._output_head("nf4")


def test_a_head_that_is_not_known_is_refused(tmp_path):
    write_llama(tmp_path / "model")
    config = {"model_type": "no_such_type", "architectures": ["X"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    model = open_model(str(tmp_path / "model"))
    with pytest.raises(QtoolError, match=r"head_quant='nf4': .* found none") as caught:
        model.weights("bf16", head_quant="nf4")
    assert caught.value.kind == "unsupported"
