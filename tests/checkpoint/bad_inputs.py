"""Broken and hostile checkpoints, each built from a tiny valid one by a single change.

case.build(folder)          # a folder that every verb must refuse
case.kind, case.fragments   # with this kind of error, and these words in its message
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.errors import ErrorKind
from tests.checkpoint.tiny_models import (
    FIRST,
    INDEX_NAME,
    SECOND,
    SHAPES,
    edit_header,
    edit_json,
    file_bytes,
    header_json,
    write_sharded,
    write_single,
)

FILE = "model.safetensors"
NORM = "model.norm.weight"  # the last but one tensor of the single file
HEAD = "lm_head.weight"  # the last one
EMBED = "model.embed_tokens.weight"  # the first one


@dataclass(frozen=True)
class BadInput:
    """`change` breaks the valid model that `base` writes."""

    name: str
    base: Callable[[Path], Path]
    change: Callable[[Path], None]
    kind: ErrorKind
    fragments: tuple[str, ...]

    def build(self, folder: Path) -> Path:
        """Write the broken model into `folder`, which need not exist."""
        self.base(folder)
        self.change(folder)
        return folder


BAD_INPUTS: list[BadInput] = []


def _case(
    name: str,
    base: Callable[[Path], Path],
    *fragments: str,
    kind: ErrorKind = "bad_file",
) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Add the decorated change to the table."""

    def add(change: Callable[[Path], None]) -> Callable[[Path], None]:
        BAD_INPUTS.append(BadInput(name, base, change, kind, fragments))
        return change

    return add


# -- the first bytes of a safetensors file ------------------------------------------------------


def _bytes_case(name: str, data: bytes, *fragments: str) -> None:
    def write(folder: Path) -> None:
        (folder / FILE).write_bytes(data)

    _case(name, write_single, FILE, "expected", "found", *fragments)(write)


def _length(num_bytes: int) -> bytes:
    return num_bytes.to_bytes(8, "little")


_bytes_case("file-empty", b"", "at least 10 bytes", "found 0")
_bytes_case("file-of-seven-bytes", b"\x02\0\0\0\0\0\0", "found 7")
_bytes_case(
    "length-beyond-the-file", _length(500) + b"{}", "500", "found a file of 10", "truncated"
)
_bytes_case("length-beyond-the-limit", _length(100_000_001) + b"{}", "100,000,000", "100,000,001")
_bytes_case("length-absurd", b"\xff" * 8 + b"{}", "18,446,744,073,709,551,615")
_bytes_case("length-zero", _length(0) + b"xx", "begins with '{'")
_bytes_case(
    "git-lfs-pointer",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n",
    "Git LFS pointer",
)
_bytes_case(
    "web-page",
    b"<!DOCTYPE html><html><body>Not found</body></html>",
    "found a length of",
    "<!DOCTYP",
)
_bytes_case("header-leading-space", file_bytes(b' {"a":1}'), "begins with '{'")
_bytes_case("header-array", file_bytes(b"[1, 2]"), "begins with '{'")
_bytes_case("header-not-utf-8", file_bytes(b'{"\xff\xfe":1}'), "UTF-8", "0xff", "offset 2")
_bytes_case("header-broken-json", file_bytes(b'{"a" 1}'), "line 1 column 6")
_bytes_case("header-cut-off", file_bytes(b'{"a":{"dtype":"BF16","shape":[1'), "line 1")
_bytes_case("header-nan", file_bytes(b'{"a":NaN}'), "NaN")
_bytes_case("header-infinity", file_bytes(b'{"a":-Infinity}'), "-Infinity")
_bytes_case("header-nested-deeply", file_bytes(b'{"a":' + b"[" * 200_000), "nested levels")
_bytes_case(
    "header-of-too-many-values", file_bytes(b'{"a":[' + b"0," * 1_000_001 + b"0]}"), "1,000,002"
)
_bytes_case(
    "header-huge-integer",
    file_bytes(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}'),
    "sane size",
)
_bytes_case(
    "tensor-name-twice",
    file_bytes(
        b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        2,
    ),
    "'w' twice",
)
_bytes_case("metadata-twice", file_bytes(b'{"__metadata__":{},"__metadata__":{}}'), "twice")
_bytes_case(
    "field-twice",
    file_bytes(b'{"w":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
    "'dtype' twice",
)


# -- the entries of a header --------------------------------------------------------------------


def _entry_case(name: str, tensor: str, change: dict[str, Any], *fragments: str) -> None:
    def edit(folder: Path) -> None:
        edit_header(folder / FILE, lambda header: header[tensor].update(change))

    words = (FILE, tensor, "expected", "found", *fragments)
    _case(name, write_single, *words)(edit)


def _name_case(name: str, tensor: str, *fragments: str) -> None:
    def rename(header: dict[str, Any]) -> None:
        header[tensor] = header.pop(HEAD)

    def edit(folder: Path) -> None:
        edit_header(folder / FILE, rename)

    _case(name, write_single, FILE, "expected tensor names", "found", *fragments)(edit)


@_case("metadata-not-an-object", write_single, FILE, "__metadata__", "expected", "found an array")
def _(folder: Path) -> None:
    edit_header(folder / FILE, lambda header: header.update(__metadata__=["pt"]))


@_case("metadata-not-text", write_single, FILE, "'epoch'", "to be a string", "found a number")
def _(folder: Path) -> None:
    edit_header(folder / FILE, lambda header: header["__metadata__"].update(epoch=3))


@_case("entry-not-an-object", write_single, FILE, NORM, "expected an object", "found a string")
def _(folder: Path) -> None:
    edit_header(folder / FILE, lambda header: header.update({NORM: "BF16"}))


@_case("field-missing", write_single, FILE, NORM, "expected the fields", "found 'dtype', 'shape'")
def _(folder: Path) -> None:
    edit_header(folder / FILE, lambda header: header[NORM].pop("data_offsets"))


@_case("dtype-unknown", write_single, FILE, NORM, "BF16", "found 'BF17'", kind="unsupported")
def _(folder: Path) -> None:
    edit_header(folder / FILE, lambda header: header[NORM].update(dtype="BF17"))


@_case("dtype-not-text", write_single, FILE, NORM, "expected", "found 16", kind="unsupported")
def _(folder: Path) -> None:
    edit_header(folder / FILE, lambda header: header[NORM].update(dtype=16))


_entry_case("field-unknown", NORM, {"offset": 3}, "'offset'")
_entry_case("shape-negative", NORM, {"shape": [-32]}, "[-32]")
_entry_case("shape-fractional", NORM, {"shape": [32.0]}, "[32.0]")
_entry_case("shape-boolean", NORM, {"shape": [True, 32]}, "[True, 32]")
_entry_case("shape-not-a-list", NORM, {"shape": "32"}, "'32'")
_entry_case("shape-of-nine-dimensions", NORM, {"shape": [32] + [1] * 8}, "at most 8", "found 9")
_entry_case("shape-absurd", NORM, {"shape": [2**62, 2**62]}, "2^63")
_entry_case("shape-absurd-but-empty", NORM, {"shape": [2**62, 2**62, 0]}, "2^63")
_entry_case("offsets-of-three-numbers", NORM, {"data_offsets": [0, 1, 2]}, "[0, 1, 2]")
_entry_case("offsets-negative", NORM, {"data_offsets": [-64, 0]}, "[-64, 0]")
_entry_case("offsets-swapped", NORM, {"data_offsets": [64, 0]}, "begin <= end")
_entry_case("offsets-not-numbers", NORM, {"data_offsets": ["0", "64"]}, "['0', '64']")
_entry_case("offsets-boolean", NORM, {"data_offsets": [False, True]}, "[False, True]")
_entry_case("bytes-do-not-fit-the-shape", NORM, {"shape": [33]}, "66 bytes", "span 64")
_entry_case("bytes-do-not-fit-the-dtype", NORM, {"dtype": "F32"}, "128 bytes", "span 64")
_entry_case("half-a-byte", NORM, {"dtype": "F4", "shape": [127]}, "63.5 bytes", "span 64")

_name_case("name-empty", "", "an empty name")
_name_case("name-with-nul", "lm_head\0.weight", "unprintable", "\\x00")
_name_case("name-with-newline", "lm_head\n.weight", "unprintable", "\\n")
_name_case("name-with-escape-sequence", "\x1b[2Jlm_head.weight", "unprintable", "\\x1b")
_name_case("name-that-reads-backwards", "lm_head\u202e.weight", "unprintable", "\\u202e")
_name_case("name-no-text", "lm_head\ud800.weight", "unprintable", "\\ud800")
_name_case("name-too-long", "x" * 513, "513 bytes")
_name_case("name-leads-out", "../../etc/cron.d/weight", "a path")
_name_case("name-absolute", "/etc/passwd", "a path")
_name_case("name-windows-path", "a\\..\\..\\b", "a path")
_name_case("name-ends-with-space", "lm_head.weight ", "a space")


@_case("data-hole", write_single, FILE, HEAD, "expected", "found", "(a hole)")
def _(folder: Path) -> None:
    begin, end = header_json({n: ("BF16", s) for n, s in SHAPES.items()})[HEAD]["data_offsets"]
    change = {"data_offsets": [begin + 16, end + 16]}
    edit_header(folder / FILE, lambda header: header[HEAD].update(change))
    with (folder / FILE).open("ab") as file:
        file.write(bytes(16))


@_case("data-overlap", write_single, FILE, HEAD, "expected", "found", "(an overlap)")
def _(folder: Path) -> None:
    begin, end = header_json({n: ("BF16", s) for n, s in SHAPES.items()})[HEAD]["data_offsets"]
    change = {"data_offsets": [begin - 16, end - 16]}
    edit_header(folder / FILE, lambda header: header[HEAD].update(change))


@_case("data-shared-by-two-tensors", write_single, FILE, "expected", "found", "(an overlap)")
def _(folder: Path) -> None:
    edit_header(folder / FILE, lambda header: header.update(copy=dict(header[NORM])))


@_case("data-does-not-begin-at-zero", write_single, FILE, EMBED, "offset 0", "found", "(a hole)")
def _(folder: Path) -> None:
    def shift(header: dict[str, Any]) -> None:
        for name, entry in header.items():
            if name != "__metadata__":
                entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]

    edit_header(folder / FILE, shift)
    with (folder / FILE).open("ab") as file:
        file.write(bytes(8))


@_case("data-truncated", write_single, FILE, "expected", "found", "truncated")
def _(folder: Path) -> None:
    os.truncate(folder / FILE, (folder / FILE).stat().st_size - 1)


@_case("data-followed-by-more", write_single, FILE, "expected", "found", "bytes of no tensor")
def _(folder: Path) -> None:
    with (folder / FILE).open("ab") as file:
        file.write(b"PK\x03\x04")


# -- index and shards ---------------------------------------------------------------------------


def _index_case(name: str, change: Callable[[dict[str, str]], Any], *fragments: str) -> None:
    def edit(folder: Path) -> None:
        weight_map = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
        change(weight_map)
        edit_json(folder / INDEX_NAME, weight_map=weight_map)

    _case(name, write_sharded, INDEX_NAME, "expected", "found", *fragments)(edit)


def _index_bytes_case(name: str, data: bytes, *fragments: str) -> None:
    def write(folder: Path) -> None:
        (folder / INDEX_NAME).write_bytes(data)

    _case(name, write_sharded, INDEX_NAME, "expected", "found", *fragments)(write)


_index_bytes_case("index-empty-file", b"", "JSON", "line 1")
_index_bytes_case("index-broken-json", b'{"weight_map": {', "JSON", "line 1")
_index_bytes_case("index-array", b"[]", "JSON object", "an array")
_index_bytes_case("index-nested-deeply", b'{"weight_map":' * 100_000, "nested")
_index_bytes_case("index-without-weight-map", b'{"metadata": {}}', "weight_map", "found null")
_index_bytes_case("weight-map-array", b'{"weight_map": ["a"]}', "weight_map", "found an array")
_index_bytes_case("weight-map-empty", b'{"weight_map": {}}', "weight_map", "an empty one")
_index_bytes_case("weight-map-number", b'{"weight_map": {"w": 7}}', "'w'", "found 7")
_index_bytes_case(
    "weight-map-name-twice",
    b'{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}',
    "'w' twice",
)
_index_case(
    "weight-map-leads-out",
    lambda m: m.update({NORM: "../x.safetensors"}),
    NORM,
    "in the same folder",
    "../x.safetensors",
)
_index_case(
    "weight-map-absolute",
    lambda m: m.update({NORM: "/etc/x.safetensors"}),
    NORM,
    "in the same folder",
    "/etc/x",
)
_index_case(
    "weight-map-subfolder",
    lambda m: m.update({NORM: "a/b.safetensors"}),
    NORM,
    "in the same folder",
    "'a/b",
)
_index_case(
    "weight-map-pickle",
    lambda m: m.update({NORM: "pytorch_model.bin"}),
    NORM,
    "in the same folder",
    ".bin",
)
_index_case(
    "weight-map-hidden",
    lambda m: m.update({NORM: ".x.safetensors"}),
    NORM,
    "in the same folder",
    "'.x",
)
_index_case(
    "weight-map-nul",
    lambda m: m.update({NORM: "a\0.safetensors"}),
    NORM,
    "in the same folder",
    "\\x00",
)
_index_case(
    "weight-map-names-absent-shard",
    lambda m: m.update({NORM: "model-00003-of-00003.safetensors"}),
    NORM,
    "model-00003-of-00003.safetensors",
    "1 of 3",
)
_index_case(
    "tensor-of-index-in-no-shard", lambda m: m.update(ghost=FIRST), "'ghost'", FIRST, "in none"
)
_index_case(
    "tensor-in-another-shard",
    lambda m: m.update({NORM: FIRST}),
    NORM,
    f"in {FIRST}",
    f"in {SECOND}",
)
_index_case("tensor-not-in-index", lambda m: m.pop(NORM), NORM, SECOND, "not in the index")


@_case("index-too-large", write_sharded, INDEX_NAME, "at most 64,000,000 bytes", "found 64,000,001")
def _(folder: Path) -> None:
    os.truncate(folder / INDEX_NAME, 64_000_001)


@_case("tensor-in-two-shards", write_sharded, "up_proj", "expected it in one file", FIRST, SECOND)
def _(folder: Path) -> None:
    (folder / FIRST).write_bytes((folder / SECOND).read_bytes())


@_case("shard-missing", write_sharded, INDEX_NAME, "expected the file", SECOND, "1 of 2", "found")
def _(folder: Path) -> None:
    (folder / SECOND).unlink()


@_case("shards-without-index", write_sharded, "expected", "found 2", FIRST, SECOND)
def _(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()


@_case("files-without-index", write_single, "expected", "found 2", "a.safetensors", "b.safetensors")
def _(folder: Path) -> None:
    (folder / "a.safetensors").write_bytes((folder / FILE).read_bytes())
    (folder / FILE).rename(folder / "b.safetensors")


# -- files that are none ------------------------------------------------------------------------


def _link_case(name: str, file: str) -> None:
    def link(folder: Path) -> None:
        outside = folder.parent / f"{folder.name}-outside"
        (folder / file).rename(outside)
        (folder / file).symlink_to(outside)

    _case(name, write_sharded, file, "expected a file inside", "found a link")(link)


_link_case("shard-link-leaves-folder", SECOND)
_link_case("index-link-leaves-folder", INDEX_NAME)
_link_case("config-link-leaves-folder", "config.json")
_link_case("tokenizer-link-leaves-folder", "tokenizer.json")


@_case("shard-link-leaves-by-dots", write_single, FILE, "expected a file inside", "found a link")
def _(folder: Path) -> None:
    outside = folder.parent / f"{folder.name}-outside"
    (folder / FILE).rename(outside)
    (folder / FILE).symlink_to(Path("..") / outside.name)


@_case("shard-link-to-nothing", write_sharded, SECOND, "expected the file", "found no such file")
def _(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to("nothing")


@_case("shard-is-a-folder", write_sharded, SECOND, "expected the file", "found no such file")
def _(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).mkdir()


@_case("shard-is-a-pipe", write_sharded, SECOND, "expected a regular file", "found a device, pipe")
def _(folder: Path) -> None:
    (folder / SECOND).unlink()
    os.mkfifo(folder / SECOND)


@_case(
    "tokenizer-is-a-pipe", write_single, "tokenizer.json", "regular file", "found a device, pipe"
)
def _(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")


# -- no safetensors at all ----------------------------------------------------------------------


def _instead_case(name: str, file: str, *fragments: str, kind: ErrorKind = "unsupported") -> None:
    def rename(folder: Path) -> None:
        (folder / FILE).rename(folder / file)

    _case(name, write_single, "expected", "found", file, *fragments, kind=kind)(rename)


_instead_case("pickle-bin", "pytorch_model.bin", "*.safetensors", "can run code")
_instead_case("pickle-pth", "consolidated.00.pth", "*.safetensors", "can run code")
_instead_case("gguf", "model-q4_k_m.gguf", "another format")
_instead_case("adapter-alone", "adapter_model.safetensors", "PEFT adapter")
_instead_case("weights-missing", "readme.txt", "*.safetensors", kind="not_found")


@_case("folder-empty", write_single, "expected *.safetensors", "found no files", kind="not_found")
def _(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


# -- config.json --------------------------------------------------------------------------------


def _config_case(name: str, data: bytes, *fragments: str) -> None:
    def write(folder: Path) -> None:
        (folder / "config.json").write_bytes(data)

    _case(name, write_single, "config.json", "expected", "found", *fragments)(write)


_config_case("config-empty", b"", "JSON", "line 1 column 1")
_config_case("config-broken-json", b'{"model_type": "llama",}', "JSON", "line 1")
_config_case("config-array", b"[]", "JSON object", "found an array")
_config_case("config-null", b"null", "JSON object", "found null")
_config_case("config-utf-16", '{"a": 1}'.encode("utf-16"), "UTF-8", "0xff")
_config_case("config-name-twice", b'{"a": 1, "a": 2}', "'a' twice")
_config_case("config-nan", b'{"rms_norm_eps": NaN}', "NaN")
_config_case("config-nested-deeply", b'{"a":' * 100_000, "nested")
_config_case("config-huge-integer", b'{"vocab_size": ' + b"9" * 5000 + b"}", "sane size")


@_case("config-too-large", write_single, "config.json", "at most 1,000,000 bytes", "1,000,001")
def _(folder: Path) -> None:
    os.truncate(folder / "config.json", 1_000_001)


@_case("config-missing", write_single, "expected a config.json", "found none")
def _(folder: Path) -> None:
    (folder / "config.json").unlink()
