"""Models on the Hub, through the real client and a server that speaks the Hub's endpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qtool.checkpoint import open_checkpoint
from qtool.errors import QtoolError
from qtool.events import Advanced, Event, Note, Started
from tests.checkpoint import tiny_models
from tests.hub_server import TOKEN, TOKEN_WITHOUT_ACCESS, HubServer, hub_server

__all__ = ["hub_server"]  # the fixture

ID = "someone/tiny"


@pytest.fixture
def hub(hub_server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """This process's huggingface_hub talks to the server and caches below `tmp_path`."""
    from huggingface_hub import constants

    template = hub_server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("qtool.checkpoint.hub.time.sleep", lambda seconds: None)
    return hub_server


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_models.write_sharded(tmp_path / "source")


def error_of(model: str, need: str = "headers") -> QtoolError:
    with pytest.raises(QtoolError) as caught:
        open_checkpoint(model, need=need)  # type: ignore[arg-type]
    assert caught.value.hint
    return caught.value


class TestHeaders:
    def test_equal_those_of_the_folder_that_was_published(self, hub: HubServer, sharded: Path):
        commit = hub.add_model(ID, sharded)
        remote = open_checkpoint(ID, need="headers")
        local = open_checkpoint(str(sharded), need="headers")
        assert remote.tensors == local.tensors
        assert list(remote.tensors) == list(local.tensors)
        assert remote.config == local.config
        assert remote.other_files == local.other_files == ("tokenizer.json",)
        assert [s.file_name for s in remote.shards] == [s.file_name for s in local.shards]
        assert (remote.id, remote.location, remote.revision) == (ID, "hub", commit)
        assert remote.folder is None

    def test_need_no_download_of_weights(self, hub: HubServer, tmp_path: Path):
        shapes = {**tiny_models.SHAPES, "model.big.weight": (3000, 1000)}
        hub.add_model(ID, tiny_models.write_single(tmp_path / "source", shapes))
        open_checkpoint(ID, need="headers")
        assert 0 < hub.sent_bytes(".safetensors") <= 128 * 1024
        weights = [r for r in hub.requests if r.path.endswith(".safetensors")]
        assert all(request.range for request in weights)
        assert not list((tmp_path / "cache").rglob("*.safetensors"))

    def test_cost_one_request_for_the_list_and_one_per_file(self, hub: HubServer, sharded: Path):
        hub.add_model(ID, sharded)
        open_checkpoint(ID, need="headers")
        asked = [r.path for r in hub.requests if not r.path.startswith("/cdn/")]
        assert len(asked) == 1 + len({"config", "index", "shard 1", "shard 2"})

    def test_longer_than_the_first_read_are_read_whole(self, hub: HubServer, tmp_path: Path):
        shapes = {f"model.layers.{i}.weight": (4,) for i in range(4000)}
        source = tiny_models.write_single(tmp_path / "source", shapes)
        hub.add_model(ID, source)
        assert len(open_checkpoint(ID, need="headers").tensors) == 4000
        ranges = {r.range for r in hub.requests if r.path.endswith(".safetensors")}
        assert len(ranges) == 2

    def test_survive_a_server_that_ignores_ranges(self, hub: HubServer, tmp_path: Path):
        shapes = {**tiny_models.SHAPES, "model.big.weight": (3000, 1000)}
        hub.add_model(ID, tiny_models.write_single(tmp_path / "source", shapes))
        hub.ignore_ranges = True
        assert len(open_checkpoint(ID, need="headers").tensors) == len(shapes)

    def test_are_not_pieced_together_wrongly_by_such_a_server(self, hub: HubServer, tmp_path: Path):
        shapes = {f"model.layers.{i}.weight": (4,) for i in range(4000)}
        hub.add_model(ID, tiny_models.write_single(tmp_path / "source", shapes))
        hub.ignore_ranges = True
        error = error_of(ID)
        assert error.kind == "network"
        assert "ignores range requests" in error.message

    def test_survive_a_busy_server(self, hub: HubServer, sharded: Path):
        hub.add_model(ID, sharded)
        hub.failures_to_come = 2
        assert open_checkpoint(ID, need="headers").tensors

    def test_of_a_server_that_stays_busy_are_a_network_error(self, hub: HubServer, sharded: Path):
        hub.add_model(ID, sharded)
        hub.failures_to_come = 1000
        error = error_of(ID)
        assert error.kind == "network"
        assert "503" in error.message

    def test_are_checked_like_local_ones(self, hub: HubServer, sharded: Path):
        tiny_models.edit_json(
            sharded / tiny_models.INDEX_NAME, weight_map={"x": "../y.safetensors"}
        )
        hub.add_model(ID, sharded)
        error = error_of(ID)
        assert error.kind == "bad_file"
        assert f"{ID}/{tiny_models.INDEX_NAME}" in error.message
        assert "../y.safetensors" in error.message

    def test_of_a_truncated_shard_name_the_file(self, hub: HubServer, sharded: Path):
        shard = sharded / tiny_models.SECOND
        shard.write_bytes(shard.read_bytes()[:-10])
        hub.add_model(ID, sharded)
        error = error_of(ID)
        assert error.kind == "bad_file"
        assert f"{ID}/{tiny_models.SECOND}" in error.message

    def test_are_absent_for_a_model_that_is_only_a_config(self, hub: HubServer, tmp_path: Path):
        source = tiny_models.write_single(tmp_path / "source")
        (source / "model.safetensors").rename(source / "pytorch_model.bin")
        hub.add_model(ID, source)
        events: list[Event] = []
        checkpoint = open_checkpoint(ID, need="headers", on_event=events.append)
        assert checkpoint.config["model_type"] == "llama"
        assert not checkpoint.tensors
        assert [e for e in events if isinstance(e, Note) and "pytorch_model.bin" in e.text]
        assert error_of(ID, "files").kind == "unsupported"


class TestRevisions:
    def test_pick_the_branch_or_the_commit(self, hub: HubServer, tmp_path: Path):
        old = hub.add_model(ID, tiny_models.write_single(tmp_path / "a"))
        other = tiny_models.write_single(tmp_path / "b", {"only.weight": (2, 2)})
        new = hub.add_model(ID, other, revision="small")
        assert open_checkpoint(ID, need="headers").revision == old
        for revision in ("small", new):
            checkpoint = open_checkpoint(f"{ID}@{revision}", need="headers")
            assert checkpoint.revision == new
            assert checkpoint.id == ID
            assert list(checkpoint.tensors) == ["only.weight"]

    def test_pick_what_is_downloaded(self, hub: HubServer, tmp_path: Path):
        hub.add_model(ID, tiny_models.write_single(tmp_path / "a"))
        other = tiny_models.write_single(tmp_path / "b", {"only.weight": (2, 2)})
        commit = hub.add_model(ID, other, revision="small")
        checkpoint = open_checkpoint(f"{ID}@small", need="files")
        assert checkpoint.revision == commit
        assert list(checkpoint.tensors) == ["only.weight"]

    def test_may_hold_slashes(self, hub: HubServer, sharded: Path):
        commit = hub.add_model(ID, sharded, revision="refs/pr/1")
        assert open_checkpoint(f"{ID}@refs/pr/1", need="headers").revision == commit

    def test_that_do_not_exist_are_not_found(self, hub: HubServer, sharded: Path):
        hub.add_model(ID, sharded)
        error = error_of(f"{ID}@nightly")
        assert error.kind == "not_found"
        assert "'nightly'" in error.message
        assert ID in error.message


class TestAccess:
    def test_to_a_gated_model_without_login(self, hub: HubServer, sharded: Path):
        hub.add_model(ID, sharded, gated=True)
        for need in ("headers", "files"):
            error = error_of(ID, need)
            assert (error.kind, error.exit_code) == ("auth", 4)
            assert "gated" in error.message
            assert f"{hub.url}/{ID}" in error.hint

    def test_to_a_gated_model_that_was_not_granted(
        self, hub: HubServer, sharded: Path, monkeypatch: pytest.MonkeyPatch
    ):
        hub.add_model(ID, sharded, gated=True)
        monkeypatch.setenv("HF_TOKEN", TOKEN_WITHOUT_ACCESS)
        assert error_of(ID).exit_code == 4

    def test_to_a_gated_model_with_a_token(
        self, hub: HubServer, sharded: Path, monkeypatch: pytest.MonkeyPatch
    ):
        hub.add_model(ID, sharded, gated=True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert open_checkpoint(ID, need="headers").tensors
        assert open_checkpoint(ID, need="files").folder is not None
        assert not [r for r in hub.requests if r.path.startswith("/cdn/") and r.authorized]

    def test_to_a_private_model(
        self, hub: HubServer, sharded: Path, monkeypatch: pytest.MonkeyPatch
    ):
        hub.add_model(ID, sharded, private=True)
        error = error_of(ID)
        assert (error.kind, error.exit_code) == ("auth", 4)
        assert "private" in error.message
        monkeypatch.setenv("HF_TOKEN", TOKEN_WITHOUT_ACCESS)
        assert error_of(ID).kind == "not_found"
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert open_checkpoint(ID, need="headers").tensors

    def test_with_a_wrong_token(
        self, hub: HubServer, sharded: Path, monkeypatch: pytest.MonkeyPatch
    ):
        hub.add_model(ID, sharded)
        monkeypatch.setenv("HF_TOKEN", "hf_expired")
        error = error_of(ID)
        assert (error.kind, error.exit_code) == ("auth", 4)
        assert "Invalid credentials" in error.message

    def test_to_a_model_that_does_not_exist(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        error = error_of("someone/tinny")
        assert (error.kind, error.exit_code) == ("not_found", 1)
        assert "someone/tinny" in error.message
        assert "no such local folder" in error.message


class TestFiles:
    def test_are_downloaded_with_all_that_a_copy_needs_and_nothing_else(
        self, hub: HubServer, sharded: Path
    ):
        (sharded / "pytorch_model.bin").write_bytes(b"\x80pickle")
        (sharded / "model.gguf").write_bytes(b"GGUF")
        (sharded / "notes[1].txt").write_text("brackets are no pattern")
        (sharded / "onnx").mkdir()
        (sharded / "onnx" / "model.onnx").write_bytes(b"onnx")
        commit = hub.add_model(ID, sharded)
        checkpoint = open_checkpoint(ID, need="files")
        assert checkpoint.folder is not None
        assert checkpoint.revision == checkpoint.folder.name == commit
        downloaded = {p.name for p in checkpoint.folder.rglob("*")}
        wanted = {"config.json", "tokenizer.json", "notes[1].txt", tiny_models.INDEX_NAME}
        assert downloaded == wanted | {tiny_models.FIRST, tiny_models.SECOND}
        assert checkpoint.other_files == ("notes[1].txt", "tokenizer.json")
        for name in downloaded:
            assert (checkpoint.folder / name).read_bytes() == (sharded / name).read_bytes()

    def test_report_their_bytes(self, hub: HubServer, sharded: Path, capfd):
        hub.add_model(ID, sharded)
        events: list[Event] = []
        open_checkpoint(ID, need="files", on_event=events.append)
        total = sum(path.stat().st_size for path in sharded.iterdir())
        assert Started("download", total) in events
        assert sum(e.num_bytes for e in events if isinstance(e, Advanced)) == total
        assert capfd.readouterr().err == ""  # no bars but ours

    def test_are_not_downloaded_twice(self, hub: HubServer, sharded: Path):
        hub.add_model(ID, sharded)
        first = open_checkpoint(ID, need="files")
        hub.requests.clear()
        events: list[Event] = []
        assert open_checkpoint(ID, need="files", on_event=events.append) == first
        assert hub.sent_bytes(".safetensors") == 0
        assert not [e for e in events if isinstance(e, Started)]
        hub.requests.clear()
        open_checkpoint(ID, need="headers")
        assert hub.sent_bytes(".safetensors") == hub.sent_bytes("config.json") == 0

    def test_that_do_not_fit_the_disk_are_not_begun(
        self, hub: HubServer, sharded: Path, monkeypatch: pytest.MonkeyPatch
    ):
        hub.add_model(ID, sharded)
        usage = type("Usage", (), {"free": 100})
        monkeypatch.setattr("qtool.checkpoint.hub.shutil.disk_usage", lambda path: usage)
        error = error_of(ID, "files")
        assert (error.kind, error.exit_code) == ("no_space", 5)
        assert hub.sent_bytes(".safetensors") == 0


class TestWithoutConnection:
    def test_the_cache_is_used(self, hub: HubServer, sharded: Path):
        commit = hub.add_model(ID, sharded)
        online = open_checkpoint(ID, need="files")
        hub.stop_answering()
        events: list[Event] = []
        offline = open_checkpoint(ID, need="files", on_event=events.append)
        assert offline == online
        assert any(
            isinstance(e, Note) and e.level == "warning" and commit in e.text for e in events
        )

    def test_a_login_page_is_a_network_error(self, hub: HubServer):
        hub.is_login_page = True
        error = error_of(ID)
        assert error.kind == "network"
        assert "expected the Hub's description of a model" in error.message

    def test_an_uncached_model_is_a_network_error(self, hub: HubServer):
        hub.stop_answering()
        error = error_of(ID)
        assert (error.kind, error.exit_code) == ("network", 1)
        assert ID in error.message

    def test_an_incomplete_cache_names_the_missing_file(self, hub: HubServer, sharded: Path):
        hub.add_model(ID, sharded)
        folder = open_checkpoint(ID, need="files").folder
        assert folder is not None
        (folder / tiny_models.SECOND).unlink()
        hub.stop_answering()
        error = error_of(ID, "files")
        assert tiny_models.SECOND in error.message
        assert "online" in error.hint


OPEN_AND_PRINT = """
import json, sys
from qtool.checkpoint import open_checkpoint
from qtool.errors import QtoolError
try:
    checkpoint = open_checkpoint(sys.argv[1], need=sys.argv[2])
    print(json.dumps([len(checkpoint.tensors), checkpoint.revision, str(checkpoint.folder)]))
except QtoolError as error:
    print(json.dumps([error.kind, error.message]))
"""


def test_the_hubs_environment_variables_are_honoured(
    hub_server: HubServer, sharded: Path, tmp_path: Path
):
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, in processes of their own."""
    commit = hub_server.add_model(ID, sharded, private=True)
    home = tmp_path / "home"

    def run(need: str, **variables: str) -> list[object]:
        result = subprocess.run(
            [sys.executable, "-c", OPEN_AND_PRINT, ID, need],
            env=hub_server.environment(home, PYTHONPATH=os.pathsep.join(sys.path), **variables),
            capture_output=True,
            text=True,
            check=True,
        )
        answer: list[object] = json.loads(result.stdout)
        return answer

    assert run("headers")[0] == "auth"
    assert run("headers", HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")[0] == "network"
    num_tensors = len(tiny_models.SHAPES)
    assert run("headers", HF_TOKEN=TOKEN) == [num_tensors, commit, "None"]
    folder = str(home / "hub" / "models--someone--tiny" / "snapshots" / commit)
    assert run("files", HF_TOKEN=TOKEN) == [num_tensors, commit, folder]
    hub_server.requests.clear()
    assert run("files", HF_HUB_OFFLINE="1") == [num_tensors, commit, folder]
    assert not hub_server.requests
