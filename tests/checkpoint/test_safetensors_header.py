"""Headers: agreement with the safetensors library in both directions, and nothing but QtoolErrors
for whatever else may stand in a file."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtool.checkpoint.safetensors_header import (
    FIRST_READ_BYTES,
    Header,
    encode_header,
    fetch_header,
    read_header,
)
from qtool.errors import QtoolError
from qtool.formats.tensors import DTYPE_BITS, TensorLayout
from tests.checkpoint import tiny_models

NUMPY_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "U8": np.uint8}
WHOLE_BYTE_DTYPES = sorted(name for name, bits in DTYPE_BITS.items() if bits % 8 == 0)

names = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1).filter(
    lambda name: ".." not in name and name[0] not in "/\\" and len(name.encode()) <= 512
)
layout_lists = st.lists(
    st.builds(
        TensorLayout,
        names,
        st.sampled_from(WHOLE_BYTE_DTYPES),
        st.lists(st.integers(0, 7), max_size=4).map(tuple),
    ),
    max_size=8,
    unique_by=lambda layout: layout.name,
)
texts = st.text(st.characters(codec="utf-8"), max_size=20)


def header_of(data: bytes) -> Header:
    return fetch_header(
        lambda offset, num_bytes: data[offset : offset + num_bytes],
        shard="x.safetensors",
        file="x.safetensors",
        file_bytes=len(data),
    )


class TestAgreementWithTheLibrary:
    @given(layout_lists, st.dictionaries(texts, texts, max_size=3))
    def test_it_reads_what_we_encode(self, layouts: list[TensorLayout], metadata: dict[str, str]):
        encoded = encode_header(layouts, metadata or None)
        file = encoded.data + bytes(encoded.file_bytes - len(encoded.data))
        theirs = dict(safetensors.deserialize(file))
        assert {name: (t["dtype"], tuple(t["shape"])) for name, t in theirs.items()} == {
            layout.name: (layout.dtype, layout.shape) for layout in layouts
        }
        assert len(encoded.data) % 16 == 0
        ours = header_of(file)
        assert [(t.name, t.dtype, t.shape) for t in ours.tensors] == [
            (layout.name, layout.dtype, layout.shape) for layout in layouts
        ]
        assert tuple(t.offset for t in ours.tensors) == encoded.offsets
        assert ours.metadata == (metadata or {"format": "pt"})

    def test_it_finds_our_bytes_where_we_say(self, tmp_path: Path):
        arrays = {
            "a": np.arange(6, dtype=np.float32).reshape(2, 3),
            "b": np.arange(5, dtype=np.uint8),
            "ä.weight": np.float16(2.5).reshape(()),
        }
        layouts = [
            TensorLayout("b", "U8", (5,)),
            TensorLayout("a", "F32", (2, 3)),
            TensorLayout("ä.weight", "F16", ()),
        ]
        encoded = encode_header(layouts)
        data = bytearray(encoded.data + bytes(encoded.file_bytes - len(encoded.data)))
        for layout, offset in zip(layouts, encoded.offsets, strict=True):
            raw = arrays[layout.name].tobytes()
            data[offset : offset + len(raw)] = raw
        path = tmp_path / "x.safetensors"
        path.write_bytes(data)
        loaded = safetensors.numpy.load_file(path)
        assert loaded.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(loaded[name], array)

    @given(layout_lists.map(lambda ls: [la for la in ls if la.dtype in NUMPY_DTYPES]), st.data())
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_we_read_what_it_writes(
        self, tmp_path: Path, layouts: list[TensorLayout], data: st.DataObject
    ):
        arrays = {
            layout.name: np.full(layout.shape, index, NUMPY_DTYPES[layout.dtype])
            for index, layout in enumerate(layouts)
        }
        # Not {}: without tensors the library writes a broken file then.
        metadata = data.draw(st.none() | st.dictionaries(texts, texts, min_size=1, max_size=3))
        path = tmp_path / "x.safetensors"
        safetensors.numpy.save_file(arrays, path, metadata)
        header = read_header(path)
        raw = path.read_bytes()
        assert header.metadata == (metadata or {})
        assert {t.name: (t.dtype, t.shape) for t in header.tensors} == {
            layout.name: (layout.dtype, layout.shape) for layout in layouts
        }
        for tensor in header.tensors:
            found = raw[tensor.offset : tensor.offset + tensor.num_bytes]
            assert found == arrays[tensor.name].tobytes()

    @pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
    def test_every_dtype_has_the_size_that_it_has_there(self, dtype: str):
        encoded = encode_header([TensorLayout("w", dtype, (4, 2))])
        file = encoded.data + bytes(encoded.file_bytes - len(encoded.data))
        ((name, theirs),) = safetensors.deserialize(file)
        assert (name, theirs["dtype"]) == ("w", dtype)
        assert len(theirs["data"]) == DTYPE_BITS[dtype]
        assert header_of(file).tensors[0].num_bytes == DTYPE_BITS[dtype]

    def test_the_test_models(self, test_data: Path):
        files = sorted(test_data.glob("models/*/*.safetensors"))
        assert files
        for path in files:
            header = read_header(path)
            with safetensors.safe_open(path, framework="numpy") as theirs:
                assert sorted(theirs.keys()) == sorted(t.name for t in header.tensors)
                for tensor in header.tensors:
                    part = theirs.get_slice(tensor.name)
                    assert tuple(part.get_shape()) == tensor.shape
                    assert part.get_dtype() == tensor.dtype


class TestEncoding:
    def test_is_the_same_for_the_same_layouts(self):
        layouts = [TensorLayout("w", "BF16", (3, 5)), TensorLayout("ä", "F32", (5,))]
        encoded = encode_header(layouts)
        text = (
            b'{"__metadata__":{"format":"pt"},'
            b'"w":{"dtype":"BF16","shape":[3,5],"data_offsets":[0,30]},'
            b'"\xc3\xa4":{"dtype":"F32","shape":[5],"data_offsets":[30,50]}}'
        )
        assert encoded.data == struct.pack("<Q", 152) + text.ljust(152)
        assert encoded.offsets == (160, 190)
        assert encoded.file_bytes == 210
        assert encode_header(layouts, {"b": "1", "a": "2"}) == encode_header(
            layouts, {"a": "2", "b": "1"}
        )

    @pytest.mark.parametrize("name", ["w", "__metadata__"])
    def test_refuses_a_name_twice(self, name: str):
        with pytest.raises(ValueError, match=name):
            encode_header([TensorLayout("w", "U8", (1,)), TensorLayout(name, "U8", (2,))])


class TestFetching:
    @pytest.mark.parametrize("num_tensors", [3, 5000])
    def test_reads_the_start_once_and_the_rest_only_of_a_long_header(self, num_tensors: int):
        layouts = [TensorLayout(f"layer.{i}.weight", "BF16", (64,)) for i in range(num_tensors)]
        encoded = encode_header(layouts)
        file = encoded.data + bytes(encoded.file_bytes - len(encoded.data))
        reads: list[tuple[int, int]] = []

        def read(offset: int, num_bytes: int) -> bytes:
            reads.append((offset, num_bytes))
            return file[offset : offset + num_bytes]

        header = fetch_header(read, shard="x", file="x", file_bytes=len(file))
        assert len(header.tensors) == num_tensors
        first = min(FIRST_READ_BYTES, len(file))
        rest = len(encoded.data) - first
        assert reads == ([(0, first)] if rest <= 0 else [(0, first), (first, rest)])


# -- fuzzing ------------------------------------------------------------------------------------

VALID = tiny_models.file_bytes(
    tiny_models.header_json(
        {"a.weight": ("BF16", (2, 3)), "b": ("F32", ()), "c": ("U8", (0, 4)), "d": ("I8", (5,))}
    )
)
JSON_BYTES = int.from_bytes(VALID[:8], "little")
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)


def check_refused_or_read_as_the_library_does(data: bytes) -> None:
    try:
        header = header_of(data)
    except QtoolError as error:
        assert error.kind in ("bad_file", "unsupported")
        assert error.hint
        assert "x.safetensors" in error.message
        assert "expected" in error.message
        assert "found" in error.message
        assert len(error.message) < 600
        return
    theirs = {t.name: t for t in header.tensors}
    for name, tensor in safetensors.deserialize(data):
        ours = theirs.pop(name)
        assert (ours.dtype, list(ours.shape)) == (tensor["dtype"], tensor["shape"])
        assert data[ours.offset : ours.offset + ours.num_bytes] == bytes(tensor["data"])
    assert not theirs


@st.composite
def mutated_bytes(draw: st.DrawFn) -> bytes:
    """A valid file with bytes overwritten, inserted, removed or moved; length fixed up or not."""
    data = bytearray(VALID)
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(data)))
        end = draw(st.integers(begin, min(len(data), begin + 12)))
        other = draw(st.integers(0, len(data)))
        data[begin:end] = draw(
            st.binary(max_size=12)
            | st.sampled_from([b'"', b"{", b"}", b"[", b"]", b",", b":", b"9", b"\\u0000", b"-1"])
            | st.just(bytes(data[other : other + 40]))
        )
    if draw(st.booleans()) and len(data) > 8 + 40:
        data[:8] = (len(data) - 40).to_bytes(8, "little")
    return bytes(data)


@st.composite
def mutated_json(draw: st.DrawFn) -> bytes:
    """A valid file with some value of its header replaced, removed or renamed."""
    header = json.loads(VALID[8 : 8 + JSON_BYTES])
    for _ in range(draw(st.integers(1, 2))):
        target, keys = header, list(header)
        if (
            keys
            and draw(st.booleans())
            and isinstance(header[key := draw(st.sampled_from(keys))], dict)
        ):
            target, keys = header[key], list(header[key])
        key = draw(st.sampled_from(keys) if keys else st.text(max_size=9))
        match draw(st.sampled_from(["replace", "remove", "rename", "copy"])):
            case "replace":
                target[key] = draw(json_values)
            case "remove":
                target.pop(key, None)
            case "rename":
                target[draw(st.text(max_size=9))] = target.pop(key, None)
            case "copy":
                target[draw(st.text(max_size=9))] = target.get(key)
    return tiny_models.file_bytes(json.dumps(header).encode(), len(VALID) - 8 - JSON_BYTES)


class TestWhateverStandsInAFile:
    @given(mutated_bytes())
    @settings(max_examples=600, deadline=None)
    def test_changed_bytes(self, data: bytes):
        check_refused_or_read_as_the_library_does(data)

    @given(mutated_json())
    @settings(max_examples=600, deadline=None)
    def test_changed_values(self, data: bytes):
        check_refused_or_read_as_the_library_does(data)

    @given(st.binary(max_size=200))
    @settings(max_examples=300, deadline=None)
    def test_random_bytes(self, data: bytes):
        check_refused_or_read_as_the_library_does(data)

    @given(st.binary(max_size=100))
    def test_random_headers(self, text: bytes):
        check_refused_or_read_as_the_library_does(tiny_models.file_bytes(b"{" + text))

    def test_every_truncation(self):
        assert header_of(VALID).tensors
        for length in range(len(VALID)):
            with pytest.raises(QtoolError):
                header_of(VALID[:length])


PEAK_OF_ONE_FILE = """
import re, sys
from pathlib import Path
from qtool.checkpoint.safetensors_header import read_header
from qtool.errors import QtoolError
def peak_kib():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
start_kib = peak_kib()
try:
    read_header(Path(sys.argv[1]))
except QtoolError as error:
    print(error, file=sys.stderr)
print(peak_kib() - start_kib)
assert "numpy" not in sys.modules
"""


@pytest.mark.parametrize(
    "text",
    [
        b"{" + b"".join(b'"%x":{},' % i for i in range(900_000)) + b'"x":0}',
        b'{"a":[' + b"1e9," * 900_000 + b"0]}",
        b'{"a":"' + b"x" * 90_000_000 + b'"}',
        b'{"a":' + b"[" * 90_000_000,
        b'{"a":[' + b"0," * 45_000_000 + b"0]}",
    ],
    ids=["names", "numbers", "one long text", "deep", "many values"],
)
def test_the_worst_headers_take_bounded_memory(text: bytes, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(tiny_models.file_bytes(text))
    command = [sys.executable, "-c", PEAK_OF_ONE_FILE, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr  # it was refused
    assert int(result.stdout) < 450 * 1024
