"""Folders that bitsandbytes wrote are described, verified and measured like qtool's own."""

from __future__ import annotations

import numpy as np
import pytest

from qtool.backends import choose_backend
from qtool.checkpoint import open_checkpoint
from qtool.inspection import compare_checkpoints, inspect_checkpoint, verify_folder
from tests.inspection.conftest import OPTIONS

PARAMETERS = {"tinylm-19m": 18_945_536, "stories260K-hf": 260_032, "slm4096-gpt2-hf": 211_712}
CASES = [
    *(("tinylm-19m", kind) for kind in OPTIONS),
    ("stories260K-hf", "nf4-dq"),
    ("slm4096-gpt2-hf", "nf4-dq"),
    ("slm4096-gpt2-hf", "int8"),
    ("tinymoe-6m", "nf4"),
]
PRECISION = {kind: kind.partition(" ")[0] for kind in OPTIONS}


@pytest.mark.parametrize(("model", "kind"), CASES)
def test_verify_finds_nothing_wrong(model, kind, bitsandbytes_folder):
    verification = verify_folder(bitsandbytes_folder(model, kind))
    assert verification.problems == ()
    assert verification.num_layers > 0


@pytest.mark.parametrize(("model", "kind"), CASES)
def test_parameters_are_those_before_packing(model, kind, bitsandbytes_folder):
    inspection = inspect_checkpoint(
        open_checkpoint(str(bitsandbytes_folder(model, kind)), need="files")
    )
    assert inspection.quant == PRECISION[kind]
    assert inspection.quant_method == "bitsandbytes"
    assert inspection.parameters == PARAMETERS.get(model, 6_234_240)
    assert inspection.compute_dtype == {"nf4-dq": "bfloat16", "int8": "bfloat16"}.get(
        kind, "float32"
    )


@pytest.mark.parametrize(
    ("model", "kind"),
    [("tinylm-19m", kind) for kind in OPTIONS] + [("slm4096-gpt2-hf", "nf4-dq")],
)
def test_errors_are_those_of_bitsandbytes_own_dequantization(
    model, kind, bitsandbytes_folder, test_data
):
    folder = bitsandbytes_folder(model, kind)
    found = compare_checkpoints(
        open_checkpoint(str(folder), need="files"),
        open_checkpoint(str(test_data / "models" / model), need="files"),
        choose_backend("cpu").backend,
    )
    expected = errors_by_bitsandbytes(folder, test_data / "models" / model)
    assert {error.name for error in found.errors} == expected.keys()
    for error in found.errors:
        measures = (error.mse, error.relative_error, error.max_abs_error, error.sqnr_db)
        np.testing.assert_allclose(measures, expected[error.name], rtol=1e-9)
    if model == "tinylm-19m":  # a bf16 model: transformers copied the rest
        assert found.num_equal == 13 and found.differences == ()
    else:  # an fp32 model was converted to bf16
        assert {d.reason for d in found.differences} == {"dtype BF16, in the original F32"}


def errors_by_bitsandbytes(folder, original):
    """name -> (mse, relative error, largest error, SQNR) of what bitsandbytes dequantizes."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
    from transformers import AutoModelForCausalLM

    packed = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    exact = AutoModelForCausalLM.from_pretrained(original, dtype="float32")
    originals = dict(exact.named_modules())
    errors = {}
    for name, module in packed.named_modules():
        weight = getattr(module, "weight", None)
        if type(weight).__name__ == "Params4bit":
            values = dequantize_4bit(weight.data, weight.quant_state)
        elif type(weight).__name__ == "Int8Params":
            values = int8_vectorwise_dequant(weight.data, weight.SCB)
        else:
            continue
        truth = originals[name].weight.detach()
        truth = truth.T if type(originals[name]).__name__ == "Conv1D" else truth
        truth = truth.double().numpy()
        difference = values.double().numpy() - truth
        mse = (difference**2).mean()
        relative = np.linalg.norm(difference) / np.linalg.norm(truth)
        sqnr_db = -20 * np.log10(relative)
        errors[f"{name}.weight"] = (mse, relative, np.abs(difference).max(), sqnr_db)
    return errors
