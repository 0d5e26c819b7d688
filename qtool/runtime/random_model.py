"""Models of any shape with random weights, made on the device in seconds; nothing is read.

    loaded = build_random_model(config, "nf4-dq", device="cuda")

Packed weights are random codes with the statistics that Gaussian weights of standard deviation
0.02 would have, so that products have the size, and bits the variety, of a real model's. Each
tensor has a generator of its own, seeded by its name: the same call gives the same model.
"""

from __future__ import annotations

import math
import threading
import time
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from qtool.architecture import Architecture, ModelTensor, build_architecture
from qtool.errors import Option, QtoolError
from qtool.formats.codebooks import dynamic_map
from qtool.formats.precisions import (
    NESTED_BLOCKSIZE,
    QUANTIZED_PRECISIONS,
    Precision,
    QuantFormat,
)
from qtool.runtime.hf_quantizer import PackedLayersConfig
from qtool.runtime.linear import FourBitLayer, Int8Layer, PackedLayer, build_linear
from qtool.runtime.loading import LoadedModel
from qtool.runtime.memory import DeviceMemory, out_of_memory_as_error
from qtool.runtime.model_config import find_model_class, parse_config
from qtool.runtime.placement import resolve_device
from qtool.runtime.quiet import quiet_transformers
from qtool.runtime.weights import LazyTensor

STANDARD_DEVIATION: Final = 0.02  # as transformers initializes weights
PLAIN_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
PACKED_MODEL_DTYPE: Final = torch.bfloat16  # of what stays unpacked
OUTPUT_HEAD: Final = "lm_head"
# Random numbers near 0 and 1 would make an absmax of zero or infinity.
SMALLEST_QUANTILE: Final = 1e-6
LARGEST_BELOW_ONE: Final = 1 - 2.0**-24


def build_random_model(
    config: Mapping[str, Any],
    precision: Precision,
    *,
    device: str = "auto",
    head_precision: Precision | None = None,
    model_id: str = "random weights",
) -> LoadedModel:
    """The model that `config` describes, without a tokenizer.

    Args:
        config: what a config.json holds.
        precision: bf16, fp16 or fp32 for the whole model, or what its linear layers are packed in.
        device: auto, cpu, cuda or cuda:N.
        head_precision: what the output head is packed in; None leaves it as it is.
        model_id: names the model in errors.

    Raises:
        QtoolError: an architecture that is not known or cannot be packed, no such device, or too
            little memory.
    """
    start_s = time.perf_counter()
    place = resolve_device(device)
    architecture = build_architecture(config)
    layers = _packed_layers(architecture, precision, head_precision, model_id)
    dtype = PLAIN_DTYPES.get(precision, PACKED_MODEL_DTYPE)
    memory = DeviceMemory(place)
    with quiet_transformers(), out_of_memory_as_error(f"making {model_id}"):
        hf_config = parse_config(config, model_id)
        network, report = find_model_class(hf_config).from_pretrained(
            None,
            config=hf_config,
            state_dict=_random_tensors(architecture, layers, dtype, place),
            quantization_config=PackedLayersConfig(layers) if layers else None,
            dtype=dtype,
            device_map={"": str(place)},
            output_loading_info=True,
            local_files_only=True,
        )
    missing = sorted(report["missing_keys"])
    assert not missing, f"{missing[0]} is no tensor of qtool's {architecture.class_name}"
    return LoadedModel(
        model=network,
        tokenizer=None,
        eos_token_ids=(),
        max_context=architecture.max_context,
        num_packed_layers=len(layers),
        load_s=time.perf_counter() - start_s,
        device=place,
        devices=str(place),
        memory=memory,
        _offloaded=ExitStack(),
    )


def random_linear(layer: PackedLayer, *, device: torch.device, seed: int) -> Any:
    """A packed linear layer without a bias, filled with random codes and statistics."""
    with torch.device("meta"):
        module = build_linear(layer, bias=None, compute_dtype=None)
    module.load_state_dict(random_packed(layer, device=device, seed=seed), assign=True)
    return module


def random_packed(layer: PackedLayer, *, device: torch.device, seed: int) -> dict[str, Tensor]:
    """The tensors of a packed layer by the names of its module, see `qtool.runtime.linear`."""
    generator = torch.Generator(device).manual_seed(seed)
    if isinstance(layer, Int8Layer):
        return _random_int8(layer, generator)
    return _random_four_bit(layer, generator)


# -- which tensors --------------------------------------------------------------------------------


def _packed_layers(
    architecture: Architecture,
    precision: Precision,
    head_precision: Precision | None,
    model_id: str,
) -> dict[str, PackedLayer]:
    """By module name."""
    if precision not in PLAIN_DTYPES and architecture.experts is not None:
        raise QtoolError(
            f"{model_id} is a mixture of experts, whose packed experts do not run yet",
            kind="unsupported",
            hint="measure it in bf16, or another model",
        )
    layers = {}
    if precision not in PLAIN_DTYPES:
        for weight in architecture.quantizable().values():
            layers[weight.module_name] = _layer_of(weight, precision)
    head = architecture.tensors.get(f"{OUTPUT_HEAD}.weight")
    if head_precision is None or head_precision in PLAIN_DTYPES:
        return layers
    if head is None or not head.is_linear:
        raise QtoolError(
            f"{model_id}: {architecture.class_name} has no output head named {OUTPUT_HEAD}",
            kind="unsupported",
            hint=("leave out ", Option("head_quant")),
        )
    return layers | {OUTPUT_HEAD: _layer_of(head, head_precision)}


def _layer_of(weight: ModelTensor, precision: Precision) -> PackedLayer:
    if precision not in QUANTIZED_PRECISIONS:
        raise QtoolError(
            (Option("quant", precision), ": qtool runs no such layers"),
            kind="unsupported",
            hint=f"one of {', '.join((*PLAIN_DTYPES, *QUANTIZED_PRECISIONS))}",
        )
    shape = weight.shape[::-1] if weight.kind == "conv1d" else weight.shape
    return packed_layer(shape[0], shape[1], QuantFormat(precision), PACKED_MODEL_DTYPE)


def packed_layer(
    out_features: int, in_features: int, fmt: QuantFormat, dtype: torch.dtype
) -> PackedLayer:
    """The layer that quantizing a weight [out, in] of `dtype` would make."""
    if fmt.is_int8:
        return Int8Layer(out_features, in_features)
    return FourBitLayer(
        out_features=out_features,
        in_features=in_features,
        quant_type=fmt.quant_type,
        blocksize=fmt.blocksize,
        dtype=dtype,
        double_quant=fmt.double_quant,
    )


def _random_tensors(
    architecture: Architecture,
    layers: Mapping[str, PackedLayer],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, LazyTensor]:
    """All tensors as the loader of transformers takes them: each is made when it is asked for."""
    tensors: dict[str, LazyTensor] = {}
    for tensor in architecture.tensors.values():
        layer = layers.get(tensor.module_name)
        if layer is not None and tensor.name.endswith(".weight"):
            tensors |= _lazy_packed(tensor.module_name, layer, device)
        elif tensor.tied_to is None:
            make = partial(_random_plain, tensor, dtype, device)
            tensors[tensor.name] = LazyTensor(dtype, tensor.shape, make)
    return tensors


def _lazy_packed(
    module_name: str, layer: PackedLayer, device: torch.device
) -> dict[str, LazyTensor]:
    """A layer's tensors: all are made with the first, each is given away once."""
    made: dict[str, Tensor] = {}
    lock = threading.Lock()  # the loader may ask from several threads

    def take(part: str) -> Tensor:
        with lock:
            if part not in made:
                made.update(random_packed(layer, device=device, seed=_seed_of(module_name)))
            return made.pop(part)

    with torch.device("meta"):
        parts = build_linear(layer, bias=None, compute_dtype=None).state_dict()
    return {
        f"{module_name}.{part}": LazyTensor(like.dtype, tuple(like.shape), partial(take, part))
        for part, like in parts.items()
    }


def _seed_of(name: str) -> int:
    return zlib.crc32(name.encode())


# -- random values --------------------------------------------------------------------------------


def _random_plain(tensor: ModelTensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Gaussians around 1 for norms, around 0 for all else."""
    generator = torch.Generator(device).manual_seed(_seed_of(tensor.name))
    mean = 1.0 if tensor.kind == "norm" else 0.0
    values = torch.empty(tensor.shape, dtype=dtype, device=device)
    return values.normal_(mean, STANDARD_DEVIATION, generator=generator)


def _random_four_bit(layer: FourBitLayer, generator: torch.Generator) -> dict[str, Tensor]:
    device, num_elements = generator.device, layer.out_features * layer.in_features
    packed = torch.empty((num_elements + 1) // 2, 1, dtype=torch.uint8, device=device)
    packed.random_(0, 256, generator=generator)
    num_blocks = -(-num_elements // layer.blocksize)
    absmax = _random_absmax(num_blocks, layer.blocksize, generator)
    if not layer.double_quant:
        return {"weight": packed, "absmax": absmax}
    return {"weight": packed, **_quantize_absmax(absmax)}


def _random_int8(layer: Int8Layer, generator: torch.Generator) -> dict[str, Tensor]:
    scb = _random_absmax(layer.out_features, layer.in_features, generator)
    shape = (layer.out_features, layer.in_features)
    values = torch.empty(shape, dtype=torch.float32, device=generator.device)
    values.normal_(0, STANDARD_DEVIATION, generator=generator).mul_((127 / scb)[:, None])
    return {"weight": values.round_().clamp_(-127, 127).to(torch.int8), "SCB": scb}


def _random_absmax(count: int, num_values: int, generator: torch.Generator) -> Tensor:
    """float32 (count,): what the largest of `num_values` Gaussian magnitudes may be.

    Drawn by its distribution, the `num_values`-th power of erf(x / sqrt(2)), turned round.
    """
    quantiles = torch.empty(count, dtype=torch.float32, device=generator.device)
    quantiles.uniform_(SMALLEST_QUANTILE, 1, generator=generator)
    quantiles.pow_(1 / num_values).clamp_(max=LARGEST_BELOW_ONE)
    largest: Tensor = torch.special.erfinv(quantiles)
    return largest.mul_(math.sqrt(2) * STANDARD_DEVIATION)


def _quantize_absmax(absmax: Tensor) -> dict[str, Tensor]:
    """Double quantization, up to which of two equally near codes is taken."""
    offset = absmax.double().mean().float()
    num_blocks = -(-absmax.numel() // NESTED_BLOCKSIZE)
    centred = absmax.new_zeros(num_blocks * NESTED_BLOCKSIZE)
    centred[: absmax.numel()] = absmax - offset
    blocks = centred.view(num_blocks, NESTED_BLOCKSIZE)
    nested_absmax = blocks.abs().amax(dim=1)
    table = torch.from_numpy(dynamic_map().copy()).to(absmax.device)
    middles = (table[:-1] + table[1:]) / 2
    codes = torch.bucketize(blocks / nested_absmax[:, None], middles)
    return {
        "absmax": codes.view(-1)[: absmax.numel()].to(torch.uint8),
        "nested_absmax": nested_absmax,
        "nested_quant_map": table,
        "nested_offset": offset,
    }
