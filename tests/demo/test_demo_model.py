"""The model that ships: small, complete, loadable, as good as its card says, made by its script."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtool.resources import demo_model_path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/train_demo_model.py"
FOLDER = demo_model_path()
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
MAX_FOLDER_BYTES = 8_000_000
HELD_OUT_FRACTION = 0.1
SHORT_TEXT = 60_000  # characters: enough for a vocabulary of 1024


def test_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MAX_FOLDER_BYTES


def test_index_names_every_tensor_of_two_bfloat16_shards() -> None:
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text())
    stored = {}
    for path in FOLDER.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            for name in shard.offset_keys():
                stored[name] = path.name
                assert shard.get_slice(name).get_dtype() == "BF16"
    assert stored == index["weight_map"]
    assert len(set(stored.values())) == 2


def test_transformers_finds_every_weight() -> None:
    model, report = AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert f"{model.num_parameters():,} parameters" in CARD
    assert not model.config.tie_word_embeddings
    assert model.config.num_key_value_heads < model.config.num_attention_heads


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_tokenizer_returns_any_text(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_and_model_agree() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.model_max_length == config["max_position_embeddings"]


@pytest.mark.slow
def test_held_out_loss_is_the_cards(test_data: Path) -> None:
    text = (test_data / "text/tinyshakespeare.txt").read_text(encoding="utf-8")
    held_out = text[int(len(text) * (1 - HELD_OUT_FRACTION)) :]
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    tokens = torch.tensor(AutoTokenizer.from_pretrained(FOLDER).encode(held_out, verbose=False))
    context = model.config.max_position_embeddings
    nats = 0.0
    with torch.inference_mode():
        for start in range(0, len(tokens) - 1, context):
            window = tokens[None, start : start + context + 1]
            logits = model(window[:, :-1]).logits[0]
            nats += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    assert nats / (len(tokens) - 1) == pytest.approx(_card_figure("nats per token"), abs=2e-4)
    bits_per_byte = nats / math.log(2) / len(held_out.encode())
    assert bits_per_byte == pytest.approx(_card_figure("bits per byte"), abs=2e-4)


@pytest.mark.slow
def test_script_accepts_the_cards_command_and_makes_the_same_kind_of_folder(
    tmp_path: Path,
) -> None:
    [command] = re.findall(r"python scripts/train_demo_model.py (.*)", CARD)
    _, _, *flags = command.split()
    text = tmp_path / "text.txt"
    source = "".join(path.read_text() for path in sorted((ROOT / "qtool").rglob("*.py")))
    text.write_text(source[:SHORT_TEXT])
    quick = ["--steps", "1", "--batch", "1"]  # the later ones count
    made = tmp_path / "model"
    subprocess.run([sys.executable, SCRIPT, text, made, *flags, *quick], check=True)
    assert {path.name for path in made.iterdir()} == {path.name for path in FOLDER.iterdir()}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert _json_but_versions(made / name) == _json_but_versions(FOLDER / name)


def _card_figure(unit: str) -> float:
    [figure] = re.findall(rf"([\d.]+) {unit}", CARD)
    return float(figure)


def _json_but_versions(path: Path) -> dict[str, object]:
    fields = json.loads(path.read_text())
    fields.pop("transformers_version", None)
    return fields
