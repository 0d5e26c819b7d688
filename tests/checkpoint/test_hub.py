"""Models on the Hub, through the real client and a server that speaks the Hub's endpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.adapter_files import AdapterPlace, find_adapter
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
    monkeypatch.setattr("qtool.checkpoint.hub_requests.time.sleep", lambda seconds: None)
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
        assert 0 < hub.sent_bytes(".safetensors") <= 16 * 1024
        weights = [r for r in hub.requests if r.path.endswith(".safetensors")]
        assert all(request.range for request in weights)
        assert not list((tmp_path / "cache").rglob("*.safetensors"))

    def test_cost_one_request_for_the_list_and_one_per_file(self, hub: HubServer, sharded: Path):
        hub.add_model(ID, sharded)
        open_checkpoint(ID, need="headers")
        asked = [r.path for r in hub.requests if not r.path.startswith("/cdn/")]
        assert len(asked) == 1 + len({"config", "shard 1", "shard 2"})

    def test_that_are_numbered_and_complete_need_no_index(self, hub: HubServer, sharded: Path):
        hub.add_model(ID, sharded)
        open_checkpoint(ID, need="headers")
        assert hub.sent_bytes(tiny_models.INDEX_NAME) == 0
        (sharded / tiny_models.SECOND).rename(sharded / "second.safetensors")
        weight_map = json.loads((sharded / tiny_models.INDEX_NAME).read_text())["weight_map"]
        names = {tiny_models.SECOND: "second.safetensors"}
        moved = {tensor: names.get(shard, shard) for tensor, shard in weight_map.items()}
        tiny_models.edit_json(sharded / tiny_models.INDEX_NAME, weight_map=moved)
        hub.add_model(ID, sharded)
        assert set(open_checkpoint(ID, need="headers").tensors) == set(moved)
        assert hub.sent_bytes(tiny_models.INDEX_NAME) > 0

    def test_of_thirty_shards_share_connections_and_stay_far_under_2_mb(
        self, hub: HubServer, tmp_path: Path
    ):
        write_shards(tmp_path / "source", num_shards=30, tensors_per_shard=100)
        hub.add_model(ID, tmp_path / "source")
        events: list[Event] = []
        checkpoint = open_checkpoint(ID, need="headers", on_event=events.append)
        assert len(checkpoint.tensors) == 3000
        num_bytes = sum(request.sent_bytes for request in hub.requests)
        assert num_bytes < 600_000
        shown = f"read 30 headers in {len(hub.requests)} requests, {num_bytes:,} bytes fetched, "
        assert [e for e in events if isinstance(e, Note) and shown in e.text] != []
        assert {e.level for e in events if isinstance(e, Note)} == {"detail"}
        connections_before = hub.num_connections
        open_checkpoint(ID, need="headers")
        assert hub.num_connections - connections_before < 30  # of 62 requests

    def test_longer_than_the_first_read_are_read_whole(self, hub: HubServer, tmp_path: Path):
        shapes = {f"model.layers.{i}.weight": (4,) for i in range(4000)}
        source = tiny_models.write_single(tmp_path / "source", shapes)
        hub.add_model(ID, source)
        assert len(open_checkpoint(ID, need="headers").tensors) == 4000
        ranges = {r.range for r in hub.requests if r.path.endswith(".safetensors")}
        assert len(ranges) == 2
        redirected = [r for r in hub.requests if r.status == 302]
        assert len(redirected) == 1  # the rest is asked for where the beginning came from

    def test_longer_than_the_first_read_do_not_tell_others_the_token(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        shapes = {f"model.layers.{i}.weight": (4,) for i in range(4000)}
        hub.add_model(ID, tiny_models.write_single(tmp_path / "source", shapes))
        open_checkpoint(ID, need="headers")
        assert [r.authorized for r in hub.requests if r.path.startswith("/cdn/")] == [False] * 2
        assert all(r.authorized for r in hub.requests if not r.path.startswith("/cdn/"))

    def test_of_later_shards_are_read_at_once_when_the_first_was_long(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("qtool.checkpoint.hub.HubRepository.num_parallel_reads", 1)
        write_shards(tmp_path / "source", num_shards=5, tensors_per_shard=400)
        hub.add_model(ID, tmp_path / "source")
        assert len(open_checkpoint(ID, need="headers").tensors) == 2000
        parts = [r for r in hub.requests if r.path.startswith("/cdn/")]
        assert len(parts) == 6

    def test_survive_a_server_that_ignores_ranges(self, hub: HubServer, tmp_path: Path):
        shapes = {**tiny_models.SHAPES, "model.big.weight": (3000, 1000)}
        hub.add_model(ID, tiny_models.write_single(tmp_path / "source", shapes))
        hub.ignore_ranges = True
        assert len(open_checkpoint(ID, need="headers").tensors) == len(shapes)

        weights = [r for r in hub.requests if r.path.endswith(".safetensors")]
        assert {r.status for r in weights} == {200, 302}

    def test_longer_than_the_first_read_survive_such_a_server(self, hub: HubServer, tmp_path: Path):
        shapes = {f"model.layers.{i}.weight": (4,) for i in range(4000)}
        hub.add_model(ID, tiny_models.write_single(tmp_path / "source", shapes))
        hub.ignore_ranges = True
        assert len(open_checkpoint(ID, need="headers").tensors) == 4000

    def test_of_a_large_file_do_not_make_such_a_server_send_it_all(
        self, hub: HubServer, tmp_path: Path
    ):
        layouts = {"model.big.weight": ("BF16", (40_000, 40_000))}
        source = tiny_models.write_single(tmp_path / "source", {})
        write_sparse(source / "model.safetensors", tiny_models.header_json(layouts))
        hub.add_model(ID, source)
        hub.ignore_ranges = True
        checkpoint = open_checkpoint(ID, need="headers")
        assert checkpoint.weights_bytes == 3_200_000_000
        assert hub.sent_bytes(".safetensors") < 50_000_000  # what the sockets hold

    def test_of_absurd_length_are_refused_unread(self, hub: HubServer, tmp_path: Path):
        source = tiny_models.write_single(tmp_path / "source")
        path = source / "model.safetensors"
        path.write_bytes((10**12).to_bytes(8, "little") + path.read_bytes()[8:])
        hub.add_model(ID, source)
        error = error_of(ID)
        assert (error.kind, error.exit_code) == ("bad_file", 1)
        assert f"{ID}/model.safetensors" in error.message
        assert "1,000,000,000,000" in error.message
        assert len([r for r in hub.requests if r.path.startswith("/cdn/")]) == 1

    @pytest.mark.parametrize("fault", ["breaks_off", "has_short_ranges"])
    def test_that_arrive_cut_are_a_network_error(self, hub: HubServer, sharded: Path, fault: str):
        hub.add_model(ID, sharded)
        setattr(hub, fault, True)
        error = error_of(ID)
        assert (error.kind, error.exit_code) == ("network", 1)
        assert ID in error.message

    def test_are_asked_for_again_where_they_arrive_cut(self, hub: HubServer, sharded: Path):
        hub.add_model(ID, sharded)
        hub.has_short_ranges = True
        error_of(ID)
        attempts = [r for r in hub.requests if r.path.endswith(tiny_models.FIRST)]
        assert len([r for r in attempts if r.status == 302]) == 3

    def test_are_resolved_again_when_a_redirect_no_longer_holds(
        self, hub: HubServer, tmp_path: Path
    ):
        shapes = {f"model.layers.{i}.weight": (4,) for i in range(4000)}
        hub.add_model(ID, tiny_models.write_single(tmp_path / "source", shapes))
        hub.expire_redirects_after = 1
        assert len(open_checkpoint(ID, need="headers").tensors) == 4000
        assert [r.status for r in hub.requests if r.path.startswith("/cdn/")] == [206, 403, 206]

    def test_survive_a_busy_server(self, hub: HubServer, sharded: Path):
        hub.add_model(ID, sharded)
        hub.fail(2)
        assert open_checkpoint(ID, need="headers").tensors

    def test_wait_as_long_as_the_hub_asks_them_to(
        self, hub: HubServer, sharded: Path, monkeypatch: pytest.MonkeyPatch
    ):
        waits: list[float] = []
        monkeypatch.setattr("qtool.checkpoint.hub_requests.time.sleep", waits.append)
        hub.add_model(ID, sharded)
        hub.fail(1, 429, {"RateLimit": '"resolvers";r=0;t=7'})
        hub.fail(1, 503, {"Retry-After": "9"})
        assert open_checkpoint(ID, need="headers").tensors
        assert sorted(waits) == [7, 9]

    def test_beyond_the_rate_limit_name_it_and_do_not_wait_for_minutes(
        self, hub: HubServer, sharded: Path, monkeypatch: pytest.MonkeyPatch
    ):
        waits: list[float] = []
        monkeypatch.setattr("qtool.checkpoint.hub_requests.time.sleep", waits.append)
        hub.add_model(ID, sharded)
        hub.fail(100, 429, {"Retry-After": "300"})
        error = error_of(ID)
        assert (error.kind, error.exit_code) == ("network", 1)
        assert "429" in error.message
        assert "higher limit" in error.hint
        assert waits == []

    def test_of_a_server_that_stays_busy_are_a_network_error(self, hub: HubServer, sharded: Path):
        hub.add_model(ID, sharded)
        hub.fail(1000)
        error = error_of(ID)
        assert error.kind == "network"
        assert "503" in error.message

    def test_are_checked_like_local_ones(self, hub: HubServer, sharded: Path):
        (sharded / tiny_models.SECOND).unlink()  # or else the index is not needed
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


def write_shards(folder: Path, *, num_shards: int, tensors_per_shard: int) -> None:
    """A model in shards of small tensors, with an index."""
    folder.mkdir()
    weight_map = {}
    for shard in range(1, num_shards + 1):
        name = f"model-{shard:05d}-of-{num_shards:05d}.safetensors"
        tensors = [f"model.layers.{shard}.{i}.weight" for i in range(tensors_per_shard)]
        layouts = dict.fromkeys(tensors, ("BF16", (4, 4)))
        write_sparse(folder / name, tiny_models.header_json(layouts))
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "config.json").write_text(json.dumps(tiny_models.CONFIG))
    (folder / tiny_models.INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def write_sparse(path: Path, header: dict[str, Any]) -> None:
    """A safetensors file whose data is a hole."""
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    end = max(entry["data_offsets"][1] for entry in header.values() if "data_offsets" in entry)
    os.truncate(path, 8 + len(text) + end)


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


class TestAdapters:
    """Of PEFT, which are no models."""

    def test_are_downloaded_without_what_nobody_reads(self, hub: HubServer, tmp_path: Path):
        source = write_adapter(tmp_path / "source")
        (source / "optimizer.safetensors").write_bytes(bytes(5_000_000))
        commit = hub.add_model(ID, source, revision="v2")
        place = find_adapter(f"{ID}@v2")
        assert (place.hub_id, place.revision, str(place)) == (ID, commit, f"{ID}@{commit[:7]}")
        found = {path.name: path.read_bytes() for path in place.folder.iterdir()}
        names = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
        assert found == {name: (source / name).read_bytes() for name in names}
        hub.stop_answering()
        assert find_adapter(f"{ID}@v2") == place

    def test_of_a_folder_stay_there(self, hub: HubServer, tmp_path: Path):
        source = write_adapter(tmp_path / "source")
        assert find_adapter(str(source)) == find_adapter(source) == AdapterPlace(source)
        assert not hub.requests

    def test_that_are_none_are_refused_before_a_download(self, hub: HubServer, tmp_path: Path):
        hub.add_model(ID, tiny_models.write_single(tmp_path / "model"))
        with pytest.raises(QtoolError, match=f"{ID} holds no adapter_config.json") as caught:
            find_adapter(ID)
        assert caught.value.kind == "not_found"
        source = write_adapter(tmp_path / "source")
        (source / "adapter_model.safetensors").rename(source / "adapter_model.bin")
        hub.add_model("someone/pickled", source)
        with pytest.raises(QtoolError, match="only a pickle, which can run code"):
            find_adapter("someone/pickled")
        assert {request.path.split("/")[1] for request in hub.requests} == {"api"}

    def test_that_do_not_exist_are_not_found(self, hub: HubServer, monkeypatch, tmp_path: Path):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        with pytest.raises(QtoolError) as caught:
            find_adapter("someone/else")
        assert caught.value.kind == "not_found"
        write_adapter(tmp_path / "else")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(QtoolError) as caught:
            find_adapter("elsewhere")
        assert "did you mean else?" in str(caught.value.hint)


def write_adapter(folder: Path) -> Path:
    """The files alone; what is in them is for others to check."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("an adapter")
    return folder


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
