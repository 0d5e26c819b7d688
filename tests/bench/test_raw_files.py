"""The raw transfer moves every byte once, and no more."""

from __future__ import annotations

import os

import pytest

from qtool.bench.raw_files import RawTransfer

TRANSFER = RawTransfer(num_threads=3, tile_bytes=1000)


def test_files_are_written_whole(tmp_path):
    sizes = {tmp_path / "a": 10_001, tmp_path / "b": 999, tmp_path / "c": 0}
    assert TRANSFER.time_writing(sizes) > 0
    for path, num_bytes in sizes.items():
        data = path.read_bytes()
        assert len(data) == num_bytes
        assert data.count(0) < max(1, num_bytes // 50)


def test_every_byte_is_read_once(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(10_001))
    (tmp_path / "b").write_bytes(bytes(500))
    read, preadv = [], os.preadv

    def short_read(descriptor, buffers, offset):
        """Half of what was asked for: reads may be short."""
        (buffer,) = buffers
        num_bytes = preadv(descriptor, [buffer[: max(1, len(buffer) // 2)]], offset)
        read.append((descriptor, offset, num_bytes))
        return num_bytes

    monkeypatch.setattr(os, "preadv", short_read)
    assert TRANSFER.time_reading([tmp_path / "a", tmp_path / "b"]) > 0
    seen = [(fd, byte) for fd, start, length in read for byte in range(start, start + length)]
    assert len(seen) == len(set(seen)) == 10_501


def test_existing_files_are_not_overwritten(tmp_path):
    (tmp_path / "mine").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        TRANSFER.time_writing({tmp_path / "mine": 5})
    assert (tmp_path / "mine").read_bytes() == b"precious"


def test_an_error_in_one_thread_ends_the_transfer(tmp_path, monkeypatch):
    def full(descriptor, data, offset):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        TRANSFER.time_writing({tmp_path / "a": 10_000})
