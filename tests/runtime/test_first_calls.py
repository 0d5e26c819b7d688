"""The operations that are called before there is a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from qtool.resources import demo_model_path
from qtool.runtime.first_calls import call_operations
from qtool.runtime.loading import LoadOptions, load_model

WITHOUT_KERNELS = {"aten::alias", "aten::detach", "aten::detach_", "aten::lift_fresh"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_they_run_on_any_device(dtype: torch.dtype, head_dim: int) -> None:
    call_operations(torch.device("cpu"), dtype, head_dim)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_they_run_on_a_gpu(dtype: torch.dtype) -> None:
    call_operations(torch.device("cuda"), dtype, 128)
    torch.cuda.synchronize()


def test_they_are_those_of_a_block() -> None:
    """Nearly all that a model calls, whatever the version of transformers."""
    with load_model(str(demo_model_path()), LoadOptions(device="cpu")) as loaded:
        ids = torch.arange(4)[None]
        with torch.inference_mode():
            of_model = called(lambda: loaded.model(input_ids=ids).logits.float())
        head_dim = loaded.model.config.head_dim
        ours = called(lambda: call_operations(torch.device("cpu"), loaded.model.dtype, head_dim))
    assert len(of_model) > 30
    assert len(of_model - ours - WITHOUT_KERNELS) <= 2, of_model - ours


def called(run: Callable[[], object]) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as record:
        run()
    return {event.key for event in record.key_averages() if event.key.startswith("aten::")}
