"""Vision-language models run without images; their tensors' names differ from the modules'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)

from qtool.runtime.generate import Limits, Sampling, generate
from qtool.runtime.loading import LoadOptions, load_model
from tests.runtime.folders import bitsandbytes_config, stock_weight

bnb = pytest.importorskip("bitsandbytes")

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "head_dim": 16,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model"},
    },
    "gemma3": {
        "text_config": TEXT | {"model_type": "gemma3_text"},
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
    },
}


def save_tokenizer(folder: Path) -> None:
    words = {f"w{i}": i for i in range(TEXT["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def dequantized(stock: Any) -> Any:
    """`stock` with plain layers for packed ones.

    bitsandbytes' own product of float32 activations rounds them and absmax to bfloat16 where the
    processor has instructions for it, which says nothing about ours.
    """
    for name, module in list(stock.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight.data = stock_weight(module.weight)
            plain.bias = module.bias
            stock.set_submodule(name, plain)
    return stock


@pytest.mark.parametrize("model_type", CONFIGS)
def test_packed_and_plain_equal_the_stock_model(tmp_path: Path, model_type: str) -> None:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**CONFIGS[model_type])
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "plain")
    packing = bitsandbytes_config("nf4-dq", compute_dtype="float32")
    for name, settings in (("plain", {}), ("packed", {"quantization_config": packing})):
        stock = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "plain", device_map="cpu", **settings
        )
        stock.save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
        with load_model(str(tmp_path / name), LoadOptions(device="cpu")) as loaded:
            assert (loaded.num_packed_layers > 0) == (name == "packed")
            prompt = torch.arange(3, 20)[None]
            with torch.inference_mode():
                found = loaded.model(input_ids=prompt).logits
                expected = dequantized(stock)(input_ids=prompt).logits
            assert torch.allclose(found, expected, atol=1e-5)
            assert len(generate(loaded, [3, 4], Sampling(), Limits(3)).token_ids) == 3
