"""Bytes of tensors: exactly those asked for, or an error that names file, offset and sizes."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.reading import ShardReader, open_shard
from qtool.errors import QtoolError
from tests.checkpoint import tiny_models


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(np.random.default_rng(0).bytes(10_000))
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32])
def test_fills_buffers_of_any_dtype_and_shape(file: Path, dtype: type):
    expected = np.frombuffer(file.read_bytes(), dtype, count=600, offset=104).reshape(20, 30)
    buffer = np.zeros((20, 30), dtype)
    with ShardReader(file) as reader:
        reader.read_into(buffer, 104)
    assert buffer.tobytes() == expected.tobytes()


def test_reads_nothing_into_an_empty_buffer(file: Path):
    with ShardReader(file) as reader:
        reader.read_into(np.empty((0, 4), np.float32), 10_000)
        reader.read_columns(10_000, 0, 8, 0, 8, np.empty(0, np.uint8))
        reader.read_columns(0, 4, 8, 8, 0, np.empty(0, np.uint8))
        with pytest.raises(QtoolError):  # one byte there is too much
            reader.read_into(np.empty(1, np.uint8), 10_000)


def test_tensors_are_those_that_the_safetensors_library_loads(tmp_path: Path):
    rng = np.random.default_rng(1)
    arrays = {
        "a": rng.standard_normal((7, 9)).astype(np.float32),
        "b": rng.standard_normal(5).astype(np.float16),
        "scalar": np.full((), 2.5, np.float32),
        "none": np.empty((3, 0), np.float32),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path), need="files", need_config=False)
    with open_shard(checkpoint, "model.safetensors") as reader:
        for name, array in arrays.items():
            data = reader.read_tensor(checkpoint.tensors[name])
            assert (data.dtype, data.ndim) == (np.uint8, 1)
            assert data.tobytes() == array.tobytes()


@given(
    rows=st.integers(0, 12),
    num_columns=st.integers(1, 17),
    slab=st.tuples(st.integers(0, 17), st.integers(0, 17)),
    offset=st.integers(0, 500),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_column_slabs_are_numpys(
    file: Path, rows: int, num_columns: int, slab: tuple[int, int], offset: int
):
    begin, end = sorted(min(column, num_columns) for column in slab)
    data = file.read_bytes()[offset:]
    matrix = np.frombuffer(data, np.uint16, count=rows * num_columns).reshape(rows, num_columns)
    buffer = np.zeros((rows, end - begin), np.uint16)
    with ShardReader(file) as reader:
        reader.read_columns(
            offset,
            rows=rows,
            row_bytes=2 * num_columns,
            col_start_bytes=2 * begin,
            col_num_bytes=2 * (end - begin),
            buffer=buffer,
        )
    np.testing.assert_array_equal(buffer, matrix[:, begin:end])


@pytest.mark.parametrize(("num_buffer_bytes", "start"), [(31, 0), (32, 5)])
def test_a_slab_that_fits_no_buffer_or_row_is_the_callers_mistake(
    file: Path, num_buffer_bytes: int, start: int
):
    with ShardReader(file) as reader, pytest.raises(ValueError, match="rows of 8 bytes"):
        reader.read_columns(0, 8, 8, start, 4, np.empty(num_buffer_bytes, np.uint8))


def test_a_file_that_ends_early_is_named_with_offset_and_sizes(file: Path):
    with ShardReader(file) as reader, pytest.raises(QtoolError) as caught:
        reader.read_into(np.empty(2000, np.uint8), 9000)
    assert caught.value.kind == "bad_file"
    for word in (str(file), "expected 2,000 bytes", "offset 9,000", "found 1,000"):
        assert word in caught.value.message
    with ShardReader(file) as reader, pytest.raises(QtoolError, match="truncated"):
        reader.read_columns(9000, 100, 100, 20, 10, np.empty(1000, np.uint8))


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes()[::-1])


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")
    os.utime(path, ns=(0, 0))  # the size alone tells


def shrink(path: Path) -> None:
    os.truncate(path, 100)
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize("change", [rewrite, grow, shrink])
def test_a_file_that_changes_while_it_is_read_is_refused(file: Path, change):
    os.utime(file, ns=(0, 0))
    with (
        pytest.raises(QtoolError, match=r"changed while reading: expected .*, found") as caught,
        ShardReader(file) as reader,
    ):
        reader.read_into(np.empty(50, np.uint8), 0)
        change(file)
    assert caught.value.kind == "bad_file"
    assert str(file) in caught.value.message


@pytest.mark.parametrize("change", [rewrite, grow, shrink])
def test_a_file_that_changed_since_its_header_was_read_is_refused(tmp_path: Path, change):
    folder = tiny_models.write_single(tmp_path)
    os.utime(folder / "model.safetensors", ns=(0, 0))
    checkpoint = open_checkpoint(str(folder), need="files")
    with open_shard(checkpoint, "model.safetensors") as reader:
        reader.check_unchanged()
    change(folder / "model.safetensors")
    with pytest.raises(QtoolError, match="changed while reading"):
        open_shard(checkpoint, "model.safetensors")


def test_another_error_is_not_hidden_by_a_changed_file(file: Path):
    with pytest.raises(KeyError), ShardReader(file):
        grow(file)
        raise KeyError


def test_threads_may_read_at_once(file: Path):
    data = file.read_bytes()
    wrong: list[int] = []

    def read(reader: ShardReader, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(200):
            offset, size = int(rng.integers(0, 9000)), int(rng.integers(1, 1000))
            buffer = np.empty(size, np.uint8)
            reader.read_into(buffer, offset)
            if buffer.tobytes() != data[offset : offset + size]:
                wrong.append(offset)

    with ShardReader(file) as reader:
        threads = [threading.Thread(target=read, args=(reader, seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_no_file_stays_open(file: Path):
    gc.collect()  # what other tests left open
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with ShardReader(file):
        pass
    with pytest.raises(QtoolError), ShardReader(file) as reader:
        reader.read_into(np.empty(1, np.uint8), 10_000)
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before
