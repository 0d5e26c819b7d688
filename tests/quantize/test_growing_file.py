"""A checksum that follows a file while it is written in any order."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtool.quantize import growing_file
from qtool.quantize.growing_file import GrowingFile


@pytest.fixture
def descriptor(tmp_path):
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@st.composite
def ranges_in_any_order(draw) -> tuple[int, list[tuple[int, int]]]:
    num_bytes = draw(st.integers(0, 5000))
    cuts = draw(st.sets(st.integers(0, num_bytes), max_size=40))
    ranges = list(pairwise(sorted({0, num_bytes, *cuts})))
    return num_bytes, draw(st.permutations(ranges))


@given(ranges_in_any_order(), st.integers(1, 4), st.integers(1, 6000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_order_of_ranges_from_any_threads_gives_the_checksum(
    descriptor, ranges, num_threads, chunk_bytes
):
    num_bytes, order = ranges
    data = np.random.default_rng(num_bytes).bytes(num_bytes)
    os.ftruncate(descriptor, 0)
    os.ftruncate(descriptor, num_bytes)
    file = GrowingFile(descriptor, num_bytes)
    with (
        pytest.MonkeyPatch.context() as patch,
        ThreadPoolExecutor(num_threads) as writers,
        ThreadPoolExecutor(1) as hasher,
    ):
        patch.setattr(growing_file, "_HASH_CHUNK_BYTES", chunk_bytes)
        digest = hasher.submit(file.sha256)
        for begin, end in order:
            writers.submit(file.write, np.frombuffer(data[begin:end], np.uint8), begin)
        assert digest.result(timeout=60) == hashlib.sha256(data).hexdigest()
    file.require_complete()
    assert file.sha256() == hashlib.sha256(data).hexdigest()  # asked for again


def test_all_but_the_rest_is_hashed_before_the_last_range_is_written(descriptor, monkeypatch):
    monkeypatch.setattr(growing_file, "_HASH_CHUNK_BYTES", 100)
    read = []
    real = os.preadv

    def preadv(fd, buffers, offset):
        read.append(offset)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    file = GrowingFile(descriptor, 1000)
    with ThreadPoolExecutor(1) as hasher:
        digest = hasher.submit(file.sha256)
        file.write(b"b" * 450, 400)
        file.write(b"a" * 400, 0)
        while len(read) < 8:  # 800 of 850 bytes: whole chunks only
            time.sleep(0.001)
        assert not digest.done()
        file.write(b"c" * 150, 850)
        assert (
            digest.result(timeout=60)
            == hashlib.sha256(b"a" * 400 + b"b" * 450 + b"c" * 150).hexdigest()
        )
    assert read == list(range(0, 1000, 100))


def test_waiting_ends_where_the_file_has_a_hole(descriptor):
    file = GrowingFile(descriptor, 300)
    file.write(b"a" * 100, 0)
    file.write(b"c" * 100, 200)
    assert file.wait_for(50) == 100
    with pytest.raises(RuntimeError, match="nothing was written at offset 100"):
        file.require_complete()
    file.write(b"b" * 100, 100)
    assert file.wait_for(101) == 300
    file.require_complete()


def test_who_waits_for_an_abandoned_file_is_woken(descriptor):
    file = GrowingFile(descriptor, 100)
    failed = threading.Event()

    def wait() -> None:
        with pytest.raises(CancelledError):
            file.sha256()
        failed.set()

    thread = threading.Thread(target=wait)
    thread.start()
    file.abandon()
    thread.join(60)
    assert failed.is_set()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.float32])
@pytest.mark.parametrize("shape", [(), (3, 4), (0, 4)])
def test_arrays_are_written_as_they_lie(descriptor, dtype, shape):
    array = np.full(shape, 7, dtype)
    file = GrowingFile(descriptor, array.nbytes)
    file.write(array, 0)
    file.require_complete()
    assert os.pread(descriptor, 100, 0) == array.tobytes()


def test_short_writes_go_on(descriptor, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:7], offset))
    file = GrowingFile(descriptor, 100)
    file.write(bytes(range(100)), 0)
    assert file.sha256() == hashlib.sha256(bytes(range(100))).hexdigest()


def test_a_file_cut_by_others_is_an_error_and_no_endless_loop(descriptor):
    file = GrowingFile(descriptor, 100)
    file.write(b"a" * 100, 0)
    os.ftruncate(descriptor, 50)
    with pytest.raises(RuntimeError, match="cut to 50 bytes"):
        file.sha256()
