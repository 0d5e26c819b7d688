"""What names of files tell of a tokenizer is what transformers makes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qtool.architecture import KNOWN_MODEL_TYPES, build_architecture
from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.records import Checkpoint
from qtool.errors import QtoolError
from qtool.runtime.loading import load_tokenizer
from qtool.runtime.prompts import has_chat_template
from qtool.runtime.tokenizer_files import (
    lacks_chat_template,
    lacks_tokenizer,
    passes_on_no_tokenizer,
)

MODEL = "TinyStories-656K-hf"
LLAMA = {"model_type": "llama"}
NO_TOKENIZERS = ("README.md", "LICENSE", "chat_template.jinja", "generation_config.json")
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "tekken.json",
    "tiktoken.model",
    "qwen.tiktoken",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "source.spm",
    "prophetnet.tokenizer",
)
TEMPLATE = "{{ messages[-1]['content'] }}"
TEMPLATES: dict[str, Any] = {
    "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "chat_template": TEMPLATE},
    "special_tokens_map.json": {"chat_template": TEMPLATE},
    "chat_template.jinja": TEMPLATE,
    "additional_chat_templates/tool_use.jinja": TEMPLATE,
}


def in_folder(folder: Path, config: Mapping[str, Any] = LLAMA) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return replace(Checkpoint.of_config("the model", config), folder=folder)


def on_the_hub(*names: str) -> Checkpoint:
    return replace(Checkpoint.of_config("org/model", LLAMA), other_files=names)


@pytest.mark.parametrize("model_type", KNOWN_MODEL_TYPES)
def test_no_type_has_a_tokenizer_without_files(tmp_path: Path, model_type: str) -> None:
    checkpoint = in_folder(tmp_path, {"model_type": model_type})
    for name in NO_TOKENIZERS:
        (tmp_path / name).write_text("{}")
    (tmp_path / "original").mkdir()
    assert lacks_tokenizer(checkpoint)
    with pytest.raises(QtoolError, match="no usable tokenizer"):
        load_tokenizer(checkpoint)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_any_file_of_one_is_left_to_transformers(tmp_path: Path, name: str) -> None:
    checkpoint = in_folder(tmp_path)
    (tmp_path / name).touch()
    assert not lacks_tokenizer(checkpoint)
    assert lacks_tokenizer(on_the_hub(*NO_TOKENIZERS))
    assert not lacks_tokenizer(on_the_hub(*NO_TOKENIZERS, name))


def test_a_class_or_a_type_that_may_need_no_file_is_too(tmp_path: Path) -> None:
    of_bytes = in_folder(tmp_path / "bytes", {**LLAMA, "tokenizer_class": "ByT5Tokenizer"})
    assert len(load_tokenizer(of_bytes)) > 256
    assert not lacks_tokenizer(of_bytes)
    assert not lacks_tokenizer(in_folder(tmp_path / "new", {"model_type": "of tomorrow"}))


def test_beside_a_single_file_lies_the_tokenizer(models: Path) -> None:
    opened = open_checkpoint(str(models / MODEL / "model.safetensors"), need="headers")
    assert not lacks_tokenizer(opened)
    assert lacks_chat_template(opened)
    assert not has_chat_template(load_tokenizer(opened))


def test_a_single_file_passes_it_on_to_no_copy(models: Path) -> None:
    for name, expected in (("model.safetensors", True), ("", False)):
        opened = open_checkpoint(str(models / MODEL / name), need="files")
        architecture = build_architecture(opened.config)
        assert passes_on_no_tokenizer(opened, architecture) is expected


def test_a_copy_of_a_classifier_or_of_bytes_needs_none(models: Path, tmp_path: Path) -> None:
    config = json.loads((models / MODEL / "config.json").read_text())
    for changes, expected in (
        ({}, True),
        ({"architectures": ["LlamaForSequenceClassification"]}, False),
        ({"tokenizer_class": "ByT5Tokenizer"}, False),
    ):
        changed = in_folder(tmp_path, config | changes)
        assert passes_on_no_tokenizer(changed, build_architecture(changed.config)) is expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_may_lie_in_several_files(models: Path, tmp_path: Path, name: str) -> None:
    checkpoint = in_folder(tmp_path)
    shutil.copyfile(models / MODEL / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert lacks_chat_template(checkpoint)
    assert not has_chat_template(load_tokenizer(checkpoint))
    content = TEMPLATES[name]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert has_chat_template(load_tokenizer(checkpoint))
    assert not lacks_chat_template(checkpoint)
    assert not lacks_chat_template(on_the_hub("tokenizer.json", name))


def test_what_cannot_be_read_may_hold_a_template(tmp_path: Path) -> None:
    checkpoint = in_folder(tmp_path / "model")
    settings = tmp_path / "model/tokenizer_config.json"
    for content in ("{", "[]", "[" * 100_000):
        settings.write_text(content)
        assert not lacks_chat_template(checkpoint)
    settings.unlink()
    settings.symlink_to("/dev/zero")
    assert not lacks_chat_template(checkpoint)
    assert lacks_chat_template(on_the_hub("tokenizer.json"))
