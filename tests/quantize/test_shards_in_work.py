"""Several shards in work at once: what one of them meets, and what is left of the others."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from qtool.errors import QtoolError
from qtool.events import Advanced, Event, Started
from qtool.quantize.growing_file import GrowingFile
from qtool.quantize.pipeline import PipelineSettings, ShardPipeline
from qtool.quantize.tiles import Tile
from qtool.quantize.workers import SHARDS_IN_TURN
from tests.quantize.test_run import folder_digest, quantize
from tests.quantize.watched_backend import WatchedBackend
from tests.tiny_models import write_llama

NUM_SHARDS = 16


@pytest.fixture
def source(tmp_path) -> Path:
    write_llama(tmp_path / "in", num_shards=NUM_SHARDS, layers=8)
    return tmp_path / "in"


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out"


def finished_shards(output: Path) -> set[str]:
    return {path.name for path in output.glob("model-*")}


def partial_files(output: Path) -> list[Path]:
    return list((output / ".qtool").glob("*.partial"))


def interrupt_when_two_are_finished(source: Path, output: Path) -> None:
    def before_kernel(number: int) -> None:
        if len(finished_shards(output)) >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, output, backend=WatchedBackend(before_kernel))


def record_tiles(monkeypatch, after=lambda tile: None) -> list[Tile]:
    """The tiles of the runs that follow, as they are carried; `after` is called in the worker."""
    tiles: list[Tile] = []
    real = ShardPipeline.carry

    def carry(self, tile, buffers):
        tiles.append(tile)
        real(self, tile, buffers)
        after(tile)

    monkeypatch.setattr(ShardPipeline, "carry", carry)
    return tiles


def record_checksums(monkeypatch) -> list[GrowingFile]:
    """The shards whose checksum somebody began to follow."""
    shards: list[GrowingFile] = []
    real = GrowingFile.sha256

    def sha256(file: GrowingFile) -> str:
        if file.num_bytes > 100:  # else it is a small file
            shards.append(file)
        return real(file)

    monkeypatch.setattr(GrowingFile, "sha256", sha256)
    return shards


def wait_until(condition) -> None:
    """Fails after half a minute."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("what was waited for did not come")


def keep_changing(shard: Path, monkeypatch) -> None:
    """Change the time of a source shard after each of its tiles, until the last."""
    times = iter(range(10**9))

    def touch(tile: Tile) -> None:
        if tile.tensor.source.shard == shard.name:
            os.utime(shard, ns=(1, next(times)))

    record_tiles(monkeypatch, after=touch)


def put_nan(shard: Path) -> None:
    """Make its first value NaN; size and time stay."""
    status = shard.stat()
    with shard.open("r+b") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        file.write(b"\xc0\x7f")
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))


def open_files_and_threads() -> tuple[int, int]:
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


def test_several_files_are_in_work_at_once(source, output):
    most = 0

    def count(number: int) -> None:
        nonlocal most
        most = max(most, len(partial_files(output)))

    quantize(source, output, backend=WatchedBackend(count))
    assert most >= SHARDS_IN_TURN


def test_killed_with_several_files_in_work_and_run_again(source, output, tmp_path):
    quantize(source, tmp_path / "whole")
    pid = os.fork()
    if pid == 0:  # stops for good when it has finished two shards and others are in work

        def wait_to_be_killed(number: int) -> None:
            while len(finished_shards(output)) >= 2:
                time.sleep(0.01)

        try:
            quantize(source, output, backend=WatchedBackend(wait_to_be_killed))
        finally:
            os._exit(0)
    while len(finished_shards(output)) < 2 or len(partial_files(output)) < SHARDS_IN_TURN:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert partial_files(output) and not (output / "config.json").exists()
    times = {name: (output / name).stat().st_mtime_ns for name in finished_shards(output)}
    events: list[Event] = []
    _, result = quantize(source, output, on_event=events.append)
    assert result.resumed
    (started,) = (event for event in events if isinstance(event, Started))
    advanced = sum(event.num_bytes for event in events if isinstance(event, Advanced))
    assert started.done_bytes > 0 and started.done_bytes + advanced == started.total_bytes
    assert folder_digest(output) == folder_digest(tmp_path / "whole")
    for name, modified_ns in times.items():  # they were not made again
        assert (output / name).stat().st_mtime_ns == modified_ns


def test_interrupted_with_several_files_in_work(source, output, tmp_path):
    before = open_files_and_threads()
    interrupt_when_two_are_finished(source, output)
    assert open_files_and_threads() == before
    assert len(finished_shards(output)) >= 2 and not partial_files(output)
    assert not (output / "config.json").exists()
    quantize(source, output)
    quantize(source, tmp_path / "whole")
    assert folder_digest(output) == folder_digest(tmp_path / "whole")


def test_an_error_in_one_shard_stops_all_and_is_the_one_that_is_raised(source, output):
    before = open_files_and_threads()

    def fail(number: int) -> None:
        if number == 20:
            raise ZeroDivisionError("in a kernel")
        if number > 20:
            time.sleep(0.01)

    backend = WatchedBackend(fail)
    with pytest.raises(ZeroDivisionError, match="in a kernel"):
        quantize(source, output, backend=backend)
    assert backend.num_kernels < 40  # of more than 200
    assert open_files_and_threads() == before
    assert not partial_files(output) and backend.num_releases == 1


def test_a_bad_value_in_one_shard_of_a_continued_run_keeps_the_finished_ones(source, output):
    damaged = max(source.glob("model-*.safetensors"))
    put_nan(damaged)
    interrupt_when_two_are_finished(source, output)
    finished = finished_shards(output)
    assert damaged.name not in finished
    with pytest.raises(QtoolError, match=f"{damaged.name}: .*element 0 is nan"):
        quantize(source, output)
    assert finished <= finished_shards(output)
    assert not partial_files(output) and not (output / "config.json").exists()


def test_a_source_that_changes_until_its_shard_ends_leaves_no_output_of_it(
    source, output, monkeypatch
):
    interrupt_when_two_are_finished(source, output)
    finished = finished_shards(output)
    changing = max({path.name for path in source.glob("model-*.safetensors")} - finished)
    keep_changing(source / changing, monkeypatch)
    with pytest.raises(QtoolError, match=f"{changing}: changed while reading"):
        quantize(source, output)
    assert finished <= finished_shards(output) and changing not in finished_shards(output)
    assert not partial_files(output) and not (output / "config.json").exists()


def test_a_source_that_changes_leaves_nothing_of_a_first_run(source, output, monkeypatch):
    changing = f"model-{NUM_SHARDS:05d}-of-{NUM_SHARDS:05d}.safetensors"  # others finish before
    keep_changing(source / changing, monkeypatch)
    with pytest.raises(QtoolError, match=f"{changing}: changed while reading"):
        quantize(source, output)
    assert not output.exists()


def test_a_range_that_nothing_writes_is_an_error_and_no_endless_wait(source, output, monkeypatch):
    real = ShardPipeline._write_constants

    def forget_some(self, tensor, nested_offset):
        if "layers.3" not in tensor.source.name:
            real(self, tensor, nested_offset)

    monkeypatch.setattr(ShardPipeline, "_write_constants", forget_some)
    with pytest.raises(RuntimeError, match="nothing was written at offset"):
        quantize(source, output)


# -- order and overlap -----------------------------------------------------------------------------


def test_shards_take_turns_tile_by_tile(source, output, monkeypatch):
    followed = record_checksums(monkeypatch)
    tiles = record_tiles(
        monkeypatch, after=lambda tile: wait_until(lambda: len(followed) >= SHARDS_IN_TURN)
    )
    quantize(source, output, settings=PipelineSettings(1, 4096))
    shards = [tile.tensor.source.shard for tile in tiles]
    for begin in range(1, 17):
        assert len(set(shards[begin : begin + SHARDS_IN_TURN])) == SHARDS_IN_TURN


def test_tiles_go_by_their_place_in_the_output(source, output, monkeypatch):
    tiles = record_tiles(monkeypatch)
    quantize(source, output, settings=PipelineSettings(1, 4096))
    for path in output.glob("model-*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        names = [tile.tensor.source.name for tile in tiles if tile.tensor.source.name in header]
        offsets = [header[name]["data_offsets"][0] for name in names]
        assert offsets == sorted(offsets)


def test_the_checksum_follows_while_tiles_are_carried(source, output, monkeypatch):
    followed = record_checksums(monkeypatch)
    backend = WatchedBackend(lambda number: wait_until(lambda: followed))
    quantize(source, output, backend=backend)


def test_progress_is_complete_when_the_run_is(source, output, monkeypatch):
    tiles = record_tiles(monkeypatch, after=lambda tile: time.sleep(0.005))  # late to come back
    events = []
    quantize(source, output, on_event=events.append)
    advanced = sum(event.num_bytes for event in events if isinstance(event, Advanced))
    assert advanced == sum(tile.source_bytes for tile in tiles)


def test_an_interrupt_stops_the_workers_and_not_only_the_next_shards(source, output, tmp_path):
    whole = WatchedBackend()
    quantize(source, tmp_path / "whole", backend=whole)

    def interrupt(event):
        if isinstance(event, Advanced):
            raise KeyboardInterrupt

    backend = WatchedBackend(lambda number: time.sleep(0.01))
    with pytest.raises(KeyboardInterrupt):
        quantize(source, output, backend=backend, on_event=interrupt)
    assert backend.num_kernels < whole.num_kernels // 2
