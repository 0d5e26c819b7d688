"""A small network of a model's kind, run while the model's weights are read.

PyTorch loads a kernel when it is first called, and makes cuBLAS ready with its first product: half
a second for the operations of a block, which a decoder is compared with before the first token.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any, Final

import torch

from qtool.defaults import PREFILL_CHUNK
from qtool.runtime.decoders.caches import CAPACITY_STEP, fixed_cache
from qtool.runtime.decoders.network import Network
from qtool.runtime.meta_device import WithoutMetaArithmetic

NUM_TOKENS: Final = (1, 4)  # one alone has kernels of its own
MAX_PARAMETERS: Final = 1 << 20  # a few MiB: memory is what a model may be short of


def build_small_network(model_class: Any, config: Any) -> Any | None:
    """One layer with two heads as wide as the model's, on the meta device; None if its type cannot
    be so small."""
    text = config.get_text_config()
    if text is not config:  # its other parts would be as large as ever
        return None
    small = copy.deepcopy(config)
    with suppress(Exception):  # types that want more than this say so in many ways
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        is_grouped = text.num_key_value_heads != text.num_attention_heads
        small.hidden_size = small.intermediate_size = 2 * head_dim
        small.num_attention_heads, small.num_key_value_heads = 2, 1 if is_grouped else 2
        small.num_hidden_layers, small.vocab_size, small.pad_token_id = 1, 64, None
        if getattr(small, "layer_types", None):
            small.layer_types = small.layer_types[:1]
        with WithoutMetaArithmetic(), torch.device("meta"):
            network = model_class(small).eval()
        if sum(it.numel() for it in network.parameters()) <= MAX_PARAMETERS:
            return network
    return None


@torch.inference_mode()
def run_small_network(small: Any | None, device: torch.device, dtype: torch.dtype) -> None:
    """A few tokens through its operations on a GPU, over weights that have no values."""
    if small is None:
        return
    with suppress(Exception), torch.cuda.device(device):  # the model will say what is wrong
        network = Network(small.to_empty(device=device).to(dtype), PREFILL_CHUNK)
        for num_tokens in NUM_TOKENS:
            tokens = torch.zeros(1, num_tokens, dtype=torch.int64, device=device)
            cache = fixed_cache(small.config, CAPACITY_STEP)
            network.prefill(tokens, 0, cache, in_chunks=False)
