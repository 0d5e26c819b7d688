"""The step's operators, made ready while weights load.

What they will be is known from the config and the sizes of packed layers. An operator that is not
wanted after all costs time in the background and a file in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from cupy_kernels.linear_few import LinearKind
from qtool.backends.cpu_attention import attention_operator, merge_operator
from qtool.backends.cpu_step import added_norm_operator, embedding_operator
from qtool.runtime.decoders.blocks import MODEL_TYPES
from qtool.runtime.decoders.host_blocks import DTYPES, GROUP
from qtool.runtime.decoders.host_tasks import kept_as, operator_for
from qtool.runtime.dequantize_host import SOURCE_DTYPES
from qtool.runtime.linear import FourBitLayer, PackedLayer


def warm_up_step(config: Any, layers: Mapping[str, PackedLayer], dtype: torch.dtype) -> None:
    """Compile what steps of such a model will run, or load it from the disk cache.

    Does nothing for models without such a step.

    Args:
        config: transformers' of the model.
        layers: the packed ones, by name.
        dtype: of activations.
    """
    if config.model_type not in MODEL_TYPES or dtype not in DTYPES:
        return
    text = config.get_text_config()
    for kind in set(_kinds(text, layers, dtype)):
        if kind.columns % GROUP == 0 and kind.blocksize % GROUP == 0:
            operator_for(kind, dtype)
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    attention_operator(kept_as(dtype), head_dim, heads // kv_heads)
    merge_operator()
    embedding_operator(kept_as(dtype))
    added_norm_operator()


def _kinds(
    text: Any, layers: Mapping[str, PackedLayer], dtype: torch.dtype
) -> Iterator[LinearKind]:
    """Of all layers; what is not packed has the dtype of activations."""
    yield LinearKind("plain", text.hidden_size, SOURCE_DTYPES[dtype])
    for layer in layers.values():
        if isinstance(layer, FourBitLayer):
            rounded_to = SOURCE_DTYPES[layer.dtype]
            yield LinearKind(
                layer.quant_type,
                layer.in_features,
                rounded_to,
                blocksize=layer.blocksize,
                nested=layer.double_quant,
            )
        else:
            yield LinearKind("int8", layer.in_features, "F32")
