"""The peak of a run that never happens: build, run on the meta device, count."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from qtool.errors import Option, QtoolError
from qtool.exact.generate import run_generate
from qtool.exact.models import build_model, tensors
from qtool.exact.moments import Moments
from qtool.exact.own_runtime import run_own_runtime
from qtool.exact.records import ExactPeak, ExactRequest
from qtool.exact.storages import LiveStorages
from qtool.exact.training import run_training
from qtool.runtime.bitsandbytes_logging import quiet_bitsandbytes
from qtool.runtime.quiet import quiet_transformers


def exact_peak(
    config: Mapping[str, Any], request: ExactRequest, model_id: str = "MODEL"
) -> ExactPeak:
    """Run the model of a config.json as `request` says and count what it allocates.

    Raises:
        QtoolError: an architecture that this transformers does not know or build, a precision
            that does not run, a model whose operators ask for values, PEFT missing for LoRA.
    """
    start_s = time.perf_counter()
    with quiet_transformers():
        model = build_model(config, request, model_id)
        moments = Moments(model, model.config.get_text_config().vocab_size)
        storages = LiveStorages(moments.classify, moments.place)
        try:
            weights_bytes = _run(model, storages, moments, request)
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise QtoolError(
                f"{model_id}: transformers' {type(model).__name__} does not run without a GPU: "
                f"{str(error).strip().partition(chr(10))[0]}",
                kind="unsupported",
                hint=("leave out ", Option("exact"), "; QTOOL_DEBUG=1 shows where it fails"),
            ) from error
    return ExactPeak(
        allocated_peak_bytes=storages.peak_bytes,
        weights_bytes=weights_bytes,
        breakdown=storages.at_peak(),
        at_peak=storages.peak_place,
        seconds=time.perf_counter() - start_s,
    )


def _run(model: Any, storages: LiveStorages, moments: Moments, request: ExactRequest) -> int:
    """The bytes of the weights, after everything has run."""
    if request.mode != "generate":
        return run_training(model, storages, moments, request)
    weights_bytes = storages.add(tensors(model), "weights")
    if request.adapter is not None:
        with quiet_bitsandbytes():  # PEFT imports it where it is installed
            from qtool.exact.lora import put_into_layers

        put_into_layers(model, request.adapter)
        storages.add(tensors(model), "adapters")
    if request.runtime == "qtool":
        run_own_runtime(model, storages, moments, request)
    else:
        run_generate(model, storages, moments, context=request.context, batch=request.batch)
    return weights_bytes
