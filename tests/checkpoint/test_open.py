"""What MODEL may be, which files count, and what a checkpoint then says of itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import safetensors

from qtool.checkpoint import hub, open_checkpoint
from qtool.checkpoint.hub_errors import NoSuchModel
from qtool.checkpoint.open import HubReference, locate_model
from qtool.errors import QtoolError
from qtool.events import Event, Note
from tests.checkpoint import tiny_models
from tests.checkpoint.tiny_models import FIRST, INDEX_NAME, SECOND, edit_json


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return tiny_models.write_single(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_models.write_sharded(tmp_path / "model")


@pytest.mark.parametrize("left", [set(), {FIRST}, {FIRST, SECOND}, {FIRST, SECOND, INDEX_NAME}])
def test_a_folder_whose_run_did_not_finish_is_called_that(sharded: Path, left: set[str]) -> None:
    """config.json comes last."""
    for file in sharded.iterdir():
        if file.name not in left:
            file.unlink()
    (sharded / ".qtool").mkdir()
    for need in ("headers", "files"):
        with pytest.raises(QtoolError, match="a qtool command that did not finish") as caught:
            open_checkpoint(str(sharded), need=need)  # type: ignore[arg-type]
        assert str(sharded) in caught.value.message
        assert "run it again" in str(caught.value.hint)


def warnings_of(model: Path, **options: object) -> list[str]:
    events: list[Event] = []
    open_checkpoint(str(model), need="headers", on_event=events.append, **options)  # type: ignore[arg-type]
    return [event.text for event in events if isinstance(event, Note) and event.level == "warning"]


class TestModelNames:
    @pytest.mark.parametrize(
        ("model", "repo_id", "revision"),
        [
            ("gpt2", "gpt2", None),
            ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", None),
            ("Qwen/Qwen3-0.6B@main", "Qwen/Qwen3-0.6B", "main"),
            ("org/model@refs/pr/3", "org/model", "refs/pr/3"),
            ("org/model_v1.5-x@v1@2", "org/model_v1.5-x", "v1@2"),
        ],
    )
    def test_that_exist_nowhere_locally_are_hub_ids(
        self, model: str, repo_id: str, revision: str | None, tmp_path: Path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        assert locate_model(model) == HubReference(repo_id, revision)

    @pytest.mark.parametrize("model", ["org/model", "model", "org/model@v1"])
    def test_that_exist_locally_are_folders(self, model: str, tmp_path: Path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / model).mkdir(parents=True)
        assert locate_model(model) == Path(model)

    @pytest.mark.parametrize(
        "model",
        [
            *("", " ", "./model", "../model", "/no/such/folder", "~/no-such-folder", "a/b/c"),
            *("model/", "model.safetensors", "org/model@", "org//model", "a b", "-x", "org/m\0"),
            *("x" * 300, "org/" + "x" * 5000, "@main", "modèle", "org\\model"),
        ],
    )
    def test_that_are_neither_are_not_found(self, model: str, tmp_path: Path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(QtoolError) as caught:
            locate_model(model)
        assert caught.value.kind == "not_found"
        assert "no such folder" in caught.value.message
        assert caught.value.hint

    def test_with_a_typing_mistake_get_the_nearest_neighbour(self, single: Path, monkeypatch):
        with pytest.raises(QtoolError) as caught:
            open_checkpoint(str(single.parent / "modle"), need="headers")
        assert f"did you mean {single}?" in caught.value.hint

    @pytest.mark.parametrize(
        ("model", "nearest"),
        [
            ("./modle", "model"),
            ("../here/modle", "../here/model"),
            ("./modles/llama", "models/llama"),
            ("models/lama/", "models/llama"),
            ("./models/lama/config.json", "models/llama/config.json"),
            ("./models/lama/nothing.json", None),
            ("elsewhere/entirely/x", None),
        ],
    )
    def test_that_look_like_paths_are_told_what_is_near(
        self, model: str, nearest: str | None, tmp_path: Path, monkeypatch
    ):
        (tmp_path / "here" / "model").mkdir(parents=True)
        tiny_models.write_single(tmp_path / "here" / "models" / "llama")
        monkeypatch.chdir(tmp_path / "here")
        with pytest.raises(QtoolError) as caught:
            locate_model(model)
        assert caught.value.message == f"{model}: no such folder or file"
        asked = f"did you mean {nearest}?" if nearest else "give a local folder, or a Hub id"
        assert caught.value.hint.startswith(asked)

    @pytest.mark.parametrize(
        ("model", "nearest"),
        [
            ("modle", "model"),
            ("modles/llama", "models/llama"),
            ("models/lama@main", "models/llama"),
            ("org/model", None),
            ("readme", None),  # near a file
        ],
    )
    def test_that_the_hub_does_not_know_are_told_what_is_near(
        self, model: str, nearest: str | None, tmp_path: Path, monkeypatch
    ):
        for folder in ("model", "models/llama"):
            (tmp_path / folder).mkdir(parents=True)
        (tmp_path / "readme.md").touch()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(hub, "open_on_hub", self._refuse)
        with pytest.raises(QtoolError) as caught:
            open_checkpoint(model, need="headers")
        expected = f"did you mean {nearest}? If not: ask elsewhere" if nearest else "ask elsewhere"
        assert (caught.value.kind, caught.value.hint) == ("network", expected)

    def _refuse(self, repo_id: str, revision: str | None, **_: object) -> NoReturn:
        raise NoSuchModel(repo_id, kind="network", hint="ask elsewhere")

    def test_of_a_gated_model_are_not_taken_for_a_mistake(self, tmp_path: Path, monkeypatch):
        def refuse(repo_id: str, revision: str | None, **_: object) -> NoReturn:
            raise QtoolError("gated", kind="auth", hint="log in")

        (tmp_path / "model").mkdir()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(hub, "open_on_hub", refuse)
        with pytest.raises(QtoolError) as caught:
            open_checkpoint("modle", need="headers")
        assert caught.value.hint == "log in"

    def test_may_begin_with_a_tilde(self, single: Path, monkeypatch):
        monkeypatch.setenv("HOME", str(single.parent))
        assert open_checkpoint("~/model", need="files").folder == single


class TestRecords:
    @pytest.mark.parametrize("write", [tiny_models.write_single, tiny_models.write_sharded])
    def test_say_what_the_safetensors_library_says(self, write, tmp_path: Path):
        folder = write(tmp_path / "model")
        checkpoint = open_checkpoint(str(folder), need="files")
        seen = {}
        for shard in checkpoint.shards:
            assert shard.file_bytes == checkpoint.path_of(shard.file_name).stat().st_size
            assert shard.metadata == {"format": "pt"}
            with safetensors.safe_open(checkpoint.path_of(shard.file_name), "numpy") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    part = file.get_slice(name)
                    seen[name] = (part.get_dtype(), tuple(part.get_shape()), shard.file_name)
        assert seen == {t.name: (t.dtype, t.shape, t.shard) for t in checkpoint.tensors.values()}
        assert checkpoint.id == str(folder)
        assert (checkpoint.location, checkpoint.revision) == ("local", None)
        assert checkpoint.config == tiny_models.CONFIG
        num_elements = sum(t.num_elements for t in checkpoint.tensors.values())
        assert checkpoint.num_parameters == num_elements
        assert checkpoint.weights_bytes == 2 * num_elements

    def test_keep_the_order_of_shards_and_headers(self, sharded: Path):
        checkpoint = open_checkpoint(str(sharded), need="files")
        assert [shard.file_name for shard in checkpoint.shards] == [FIRST, SECOND]
        assert list(checkpoint.tensors) == list(tiny_models.SHAPES)

    def test_of_the_test_models(self, test_data: Path):
        for folder in sorted((test_data / "models").iterdir()):
            checkpoint = open_checkpoint(str(folder), need="files")
            index = folder / INDEX_NAME
            if index.exists():
                metadata = json.loads(index.read_text())["metadata"]
                assert checkpoint.weights_bytes == metadata["total_size"]
            weights = {path.name for path in folder.glob("model*")}
            others = {path.name for path in folder.iterdir()} - weights - {"config.json"}
            assert set(checkpoint.other_files) == others

    def test_of_published_configs(self, test_data: Path):
        configs = sorted((test_data / "configs").glob("*/config.json"))
        assert len(configs) >= 50
        for path in configs:
            checkpoint = open_checkpoint(str(path), need="headers")
            assert checkpoint.config == json.loads(path.read_text())


class TestWhichWeights:
    def test_a_file_of_any_name_counts_if_it_is_the_only_one(self, single: Path):
        (single / "model.safetensors").rename(single / "weights.fp16.safetensors")
        checkpoint = open_checkpoint(str(single), need="files")
        assert [shard.file_name for shard in checkpoint.shards] == ["weights.fp16.safetensors"]

    def test_shards_and_index_may_have_any_prefix(self, sharded: Path):
        weight_map = json.loads((sharded / INDEX_NAME).read_text())["weight_map"]
        for shard in (FIRST, SECOND):
            (sharded / shard).rename(sharded / shard.replace("model", "pytorch_model"))
        renamed = {name: f"pytorch_{shard}" for name, shard in weight_map.items()}
        edit_json(sharded / INDEX_NAME, weight_map=renamed)
        (sharded / INDEX_NAME).rename(sharded / f"pytorch_{INDEX_NAME}")
        assert len(open_checkpoint(str(sharded), need="files").tensors) == 12

    def test_files_that_the_index_does_not_name_are_left_alone(self, sharded: Path):
        shutil.copy(sharded / FIRST, sharded / "consolidated.safetensors")
        assert len(open_checkpoint(str(sharded), need="files").shards) == 2

    def test_one_file_wins_over_a_stale_index_with_a_warning(self, sharded: Path, tmp_path: Path):
        other = tiny_models.write_single(tmp_path / "other", {"only.weight": (2, 2)})
        shutil.copy(other / "model.safetensors", sharded)
        assert list(open_checkpoint(str(sharded), need="files").tensors) == ["only.weight"]
        (warning,) = warnings_of(sharded)
        assert INDEX_NAME in warning
        assert "model.safetensors" in warning

    def test_one_file_with_an_index_of_its_own_gives_no_warning(self, single: Path):
        weight_map = dict.fromkeys(tiny_models.SHAPES, "model.safetensors")
        (single / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
        assert not warnings_of(single)

    def test_pickles_beside_safetensors_do_not_matter(self, single: Path):
        (single / "pytorch_model.bin").write_bytes(b"\x80")
        checkpoint = open_checkpoint(str(single), need="files")
        assert checkpoint.tensors
        assert "pytorch_model.bin" not in checkpoint.other_files


class TestSingleFiles:
    def test_a_safetensors_file_is_a_model_of_its_own(self, single: Path):
        shutil.copy(single / "model.safetensors", single / "other.safetensors")
        checkpoint = open_checkpoint(str(single / "other.safetensors"), need="files")
        assert list(checkpoint.tensors) == list(tiny_models.SHAPES)
        assert checkpoint.config == tiny_models.CONFIG
        assert checkpoint.folder == single
        assert checkpoint.other_files == ()

    @pytest.mark.parametrize("need", ["headers", "files"])
    def test_one_shard_of_several_is_none_but_can_be_looked_at(self, sharded: Path, need):
        path = str(sharded / SECOND)
        with pytest.raises(QtoolError, match="found one of the 2 shards that") as caught:
            open_checkpoint(path, need=need)
        assert INDEX_NAME in caught.value.message
        assert caught.value.hint == f"give its folder, {sharded}"
        looked_at = open_checkpoint(path, need=need, need_config=False)
        assert list(looked_at.tensors) == list(tiny_models.SHAPES)[6:]

    def test_a_file_that_no_index_counts_among_several_is_one(self, sharded: Path):
        shutil.copy(sharded / SECOND, sharded / "alone.safetensors")
        assert open_checkpoint(str(sharded / "alone.safetensors"), need="files").tensors
        weight_map = dict.fromkeys(tiny_models.SHAPES, "alone.safetensors")
        (sharded / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
        assert open_checkpoint(str(sharded / "alone.safetensors"), need="files").tensors

    def test_a_safetensors_file_without_config_can_be_looked_at(self, single: Path):
        (single / "config.json").unlink()
        path = str(single / "model.safetensors")
        assert open_checkpoint(path, need="files", need_config=False).config == {}
        with pytest.raises(QtoolError, match=r"expected a config\.json"):
            open_checkpoint(path, need="files")

    def test_a_config_is_a_model_without_weights(self, single: Path):
        checkpoint = open_checkpoint(str(single / "config.json"), need="headers")
        assert (checkpoint.config, dict(checkpoint.tensors)) == (tiny_models.CONFIG, {})

    def test_a_config_where_weights_are_needed_is_told_its_folder(self, single: Path):
        path = single / "config.json"
        with pytest.raises(QtoolError, match="found a file without weights") as caught:
            open_checkpoint(str(path), need="headers", need_weights=True)
        assert caught.value.message.startswith(f"{path}: ")
        assert (caught.value.kind, caught.value.hint) == ("not_found", f"give its folder, {single}")
        (single / "model.safetensors").unlink()
        with pytest.raises(QtoolError, match="found a file without weights") as caught:
            open_checkpoint(str(path), need="files")
        assert caught.value.hint.startswith("give the folder of the original checkpoint")

    @pytest.mark.parametrize(
        "name", ["model.gguf", "pytorch_model.bin", "notes.txt", INDEX_NAME, "tokenizer.json"]
    )
    def test_other_files_are_refused(self, single: Path, name: str):
        (single / name).write_bytes(b"x")
        with pytest.raises(QtoolError, match=r"expected a model folder.*found") as caught:
            open_checkpoint(str(single / name), need="headers")
        assert caught.value.kind == "unsupported"
        assert caught.value.hint == f"give its folder, {single}"
        (single / "model.safetensors").unlink()
        with pytest.raises(QtoolError) as caught:
            open_checkpoint(str(single / name), need="headers")
        assert caught.value.hint.startswith("give the folder of the original checkpoint")


class TestConfigAlone:
    def test_is_enough_for_headers(self, single: Path):
        (single / "model.safetensors").unlink()
        assert not warnings_of(single)
        checkpoint = open_checkpoint(str(single), need="headers")
        assert (checkpoint.shards, dict(checkpoint.tensors)) == ((), {})

    def test_is_not_enough_for_files_or_where_weights_are_needed(self, single: Path):
        (single / "model.safetensors").unlink()
        with pytest.raises(QtoolError, match=r"expected \*\.safetensors"):
            open_checkpoint(str(single), need="files")
        with pytest.raises(QtoolError, match=r"expected \*\.safetensors"):
            open_checkpoint(str(single), need="headers", need_weights=True)

    def test_warns_of_weights_that_are_not_read(self, single: Path):
        (single / "model.safetensors").rename(single / "pytorch_model.bin")
        (warning,) = warnings_of(single)
        assert "pytorch_model.bin" in warning
        assert "config.json" in warning

    def test_may_hold_infinity_as_some_published_ones_do(self, single: Path):
        (single / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
        config = open_checkpoint(str(single), need="headers").config
        assert config == {"time_step_limit": [0.0, float("inf")]}


class TestOtherFiles:
    def test_are_all_small_files_but_weights_configs_and_hidden_ones(self, single: Path):
        kept = [
            *("LICENSE", "README.md", "chat_template.jinja", "generation_config.json"),
            *("modeling_custom.py", "tokenizer.json", "tokenizer.model", "vocab.txt"),
            *("1_Pooling/config.json", "additional_chat_templates/tool.jinja", "figures/a.png"),
        ]
        left = [
            *("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "x.gguf"),
            *("qtool_manifest.json", ".gitattributes", ".env", ".git/config", ".cache/x"),
            *("onnx/model.onnx", "onnx/config.json", "original/consolidated.00.pth"),
            *("original/params.json", "checkpoint-5/model.safetensors", "checkpoint-5/config.json"),
        ]
        for name in (*kept, *left):
            (single / name).parent.mkdir(exist_ok=True)
            (single / name).write_text("x")
        assert open_checkpoint(str(single), need="files").other_files == tuple(sorted(kept))

    def test_do_not_include_large_ones(self, single: Path):
        with (single / "corpus.txt").open("wb") as file:
            file.truncate(100_000_001)
        assert open_checkpoint(str(single), need="files").other_files == ("tokenizer.json",)

    def test_end_at_a_folder_that_is_no_model(self, single: Path, monkeypatch):
        monkeypatch.setattr("qtool.checkpoint.local_folder.MAX_FILES", 10)
        for i in range(10):
            (single / f"{i}.txt").touch()
        with pytest.raises(QtoolError, match="more than 10 files"):
            open_checkpoint(str(single), need="files")


class TestLinks:
    def test_inside_the_folder_are_followed(self, single: Path):
        (single / "real").mkdir()
        (single / "model.safetensors").rename(single / "real" / "a.safetensors")
        (single / "model.safetensors").symlink_to("real/a.safetensors")
        assert open_checkpoint(str(single), need="files").tensors

    def test_to_the_folder_itself_are_followed(self, single: Path, tmp_path: Path):
        (tmp_path / "link").symlink_to(single)
        assert open_checkpoint(str(tmp_path / "link"), need="files").tensors

    def test_of_the_hub_cache_are_followed_to_its_blobs_only(self, single: Path, tmp_path: Path):
        repo = tmp_path / "models--org--name"
        snapshot = repo / "snapshots" / "0123abc"
        snapshot.parent.mkdir(parents=True)
        (repo / "blobs").mkdir()
        shutil.copytree(single, snapshot)
        for index, path in enumerate(sorted(snapshot.iterdir())):
            path.rename(repo / "blobs" / str(index))
            path.symlink_to(Path("../../blobs") / str(index))
        assert len(open_checkpoint(str(snapshot), need="files").tensors) == 12
        snapshot.parent.rename(repo / "elsewhere")
        with pytest.raises(QtoolError, match="expected a file inside"):
            open_checkpoint(str(repo / "elsewhere" / snapshot.name), need="files")
        (repo / "elsewhere").rename(snapshot.parent)
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to("../../../model/config.json")
        with pytest.raises(QtoolError, match="expected a file inside"):
            open_checkpoint(str(snapshot), need="files")

    def test_of_a_hub_cache_whose_blobs_are_on_another_disk(self, single: Path, tmp_path: Path):
        repo = tmp_path / "models--org--name"
        snapshot = repo / "snapshots" / "0123abc"
        snapshot.parent.mkdir(parents=True)
        (tmp_path / "disk").mkdir()
        (repo / "blobs").symlink_to(tmp_path / "disk")
        shutil.copytree(single, snapshot)
        for path in snapshot.iterdir():
            path.rename(repo / "blobs" / path.name)
            path.symlink_to(Path("../../blobs") / path.name)
        assert len(open_checkpoint(str(snapshot), need="files").tensors) == 12

    def test_of_files_that_are_not_read_may_lead_anywhere(self, single: Path):
        (single / "merges.txt").symlink_to("/dev/null")
        assert open_checkpoint(str(single), need="headers").tensors
        with pytest.raises(QtoolError, match=r"merges\.txt"):
            open_checkpoint(str(single), need="files")


def test_a_local_folder_is_opened_without_numpy_or_the_hub_client(sharded: Path):
    code = (
        "import sys; from qtool.checkpoint import open_checkpoint;"
        "open_checkpoint(sys.argv[1], need='headers');"
        "print(sorted({'numpy', 'huggingface_hub', 'torch', 'rich', 'typer'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(sharded)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
