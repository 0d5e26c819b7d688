"""Names, shapes, quant_state and config against bitsandbytes' and transformers' own."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.formats.bitsandbytes import (
    QUANT_STATE_PREFIX,
    QuantState,
    find_quantized,
    layout_problems,
    packed_layouts,
    parse_quant_state,
    quant_state_bytes,
    quantization_config,
    stray_statistics,
)
from qtool.formats.precisions import BLOCKSIZES, QUANTIZED_PRECISIONS, QuantFormat
from qtool.formats.tensors import TensorLayout

FOUR_BIT = [precision for precision in QUANTIZED_PRECISIONS if precision != "int8"]
TAGS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "uint8": "U8", "int8": "I8"}
WEIGHT = TensorLayout("model.layers.0.mlp.up_proj.weight", "BF16", (96, 320))


def layouts_of_state_dict(state: dict, prefix: str = "") -> list[TensorLayout]:
    return [
        TensorLayout(
            prefix + name, TAGS[str(value.dtype).removeprefix("torch.")], tuple(value.shape)
        )
        for name, value in state.items()
    ]


def quantized_module(fmt: QuantFormat, dtype: str, out_features: int, in_features: int):
    """A layer that bitsandbytes quantized, on the CPU."""
    torch = pytest.importorskip("torch")
    bnb = pytest.importorskip("bitsandbytes")
    if fmt.is_int8:
        module = bnb.nn.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
    else:
        module = bnb.nn.Linear4bit(
            in_features,
            out_features,
            bias=False,
            quant_type=fmt.quant_type,
            compress_statistics=fmt.double_quant,
            quant_storage=getattr(torch, fmt.quant_storage),
        )
        module.weight.blocksize = fmt.blocksize
    weight = torch.randn(out_features, in_features).to(getattr(torch, dtype))
    parameter = type(module.weight)(weight, requires_grad=False, **vars(module.weight))
    module.weight = parameter
    return module.to("cpu")


# ---- Writing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tensors_are_those_of_bitsandbytes_modules_in_their_order(precision, dtype):
    fmt = QuantFormat(precision)
    state = quantized_module(fmt, dtype, 33, 100).state_dict()
    theirs = layouts_of_state_dict(state, "P.")
    ours = packed_layouts(TensorLayout("P.weight", TAGS[dtype], (33, 100)), fmt)
    assert [layout.name for layout in ours] == [layout.name for layout in theirs]
    for our, their in zip(ours, theirs, strict=True):
        if QUANT_STATE_PREFIX in our.name:
            assert (our.dtype, our.num_bytes % 16) == ("U8", 0)
            assert our.num_bytes >= their.num_bytes
        else:
            assert our == their


@pytest.mark.parametrize("precision", FOUR_BIT)
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
@pytest.mark.parametrize("blocksize", [64, 4096])
def test_quant_state_is_bitsandbytes_own_and_padded(precision, storage, blocksize):
    fmt = QuantFormat(precision, blocksize, storage)
    module = quantized_module(fmt, "float16", 64, 128)
    state = module.weight.quant_state
    packed = state.as_dict(packed=True)
    theirs = bytes(packed[f"{QUANT_STATE_PREFIX}{fmt.quant_type}"].numpy())
    offset = state.offset.item() if fmt.double_quant else None
    ours = quant_state_bytes((64, 128), "F16", fmt, offset)
    assert ours.rstrip(b" ") == theirs
    layouts = packed_layouts(TensorLayout("P.weight", "F16", (64, 128)), fmt)
    assert layouts[-1].num_bytes == len(ours)
    assert (layouts[0].dtype, layouts[0].shape) == (
        TAGS.get(storage, "BF16"),
        tuple(module.weight.shape),
    )


@pytest.mark.parametrize("precision", FOUR_BIT)
def test_bitsandbytes_reads_the_padded_quant_state(precision):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    fmt = QuantFormat(precision)
    state = quantized_module(fmt, "bfloat16", 64, 128).weight.quant_state
    packed = state.as_dict(packed=True)
    offset = state.offset.item() if fmt.double_quant else None
    blob = quant_state_bytes((64, 128), "BF16", fmt, offset)
    packed[f"{QUANT_STATE_PREFIX}{fmt.quant_type}"] = torch.frombuffer(
        bytearray(blob), dtype=torch.uint8
    )
    read = functional.QuantState.from_dict(packed, torch.device("cpu"))
    assert read.shape == (64, 128) and read.dtype == torch.bfloat16 and read.blocksize == 64
    assert read.offset == state.offset


@given(
    st.floats(width=32),
    st.lists(st.integers(0, 10**9), min_size=1, max_size=3),
    st.sampled_from(BLOCKSIZES),
)
def test_quant_state_has_one_length_whatever_the_offset(offset, shape, blocksize):
    fmt = QuantFormat("nf4-dq", blocksize)
    blob = quant_state_bytes(shape, "BF16", fmt, offset)
    assert len(blob) == len(quant_state_bytes(shape, "BF16", fmt, 0.0))
    assert len(blob) % 16 == 0
    parsed = parse_quant_state(blob)
    assert parsed.nested_offset == offset or math.isnan(offset)
    assert (parsed.shape, parsed.blocksize) == (tuple(shape), blocksize)


def test_an_offset_belongs_to_double_quantization_and_only_to_it():
    with pytest.raises(ValueError, match="double quantization"):
        quant_state_bytes((2, 2), "F32", QuantFormat("nf4"), 0.5)
    with pytest.raises(ValueError, match="double quantization"):
        quant_state_bytes((2, 2), "F32", QuantFormat("nf4-dq"), None)


@given(
    st.integers(0, 3000),
    st.integers(0, 3000),
    st.sampled_from(FOUR_BIT),
    st.sampled_from(BLOCKSIZES),
)
def test_sizes_follow_the_formulas(rows, columns, precision, blocksize):
    fmt = QuantFormat(precision, blocksize)
    sizes = {
        layout.name.removeprefix("P.weight"): layout.num_bytes
        for layout in packed_layouts(TensorLayout("P.weight", "F16", (rows, columns)), fmt)
    }
    num_blocks = math.ceil(rows * columns / blocksize)
    assert sizes[""] == math.ceil(rows * columns / 2)
    assert sizes[".absmax"] == num_blocks * (1 if fmt.double_quant else 4)
    assert sizes[".quant_map"] == 64
    if fmt.double_quant:
        assert sizes[".nested_absmax"] == 4 * math.ceil(num_blocks / 256)
        assert sizes[".nested_quant_map"] == 1024


def test_quant_storage_bfloat16_relabels_the_same_bytes():
    (packed, *_), (relabelled, *_) = (
        packed_layouts(WEIGHT, QuantFormat("nf4", quant_storage=storage))
        for storage in ("uint8", "bfloat16")
    )
    assert (packed.dtype, packed.shape) == ("U8", (15360, 1))
    assert (relabelled.dtype, relabelled.shape) == ("BF16", (7680, 1))
    assert packed.num_bytes == relabelled.num_bytes


def test_an_odd_number_of_packed_bytes_cannot_be_stored_as_bfloat16():
    odd = TensorLayout("P.weight", "BF16", (33, 33))
    with pytest.raises(ValueError, match=r"545 bytes, .* uint8 can"):
        packed_layouts(odd, QuantFormat("nf4", quant_storage="bfloat16"))
    assert packed_layouts(odd, QuantFormat("nf4"))[0].shape == (545, 1)


def test_only_floats_are_quantized_and_int8_only_from_matrices():
    with pytest.raises(ValueError, match="I64 cannot be quantized"):
        packed_layouts(TensorLayout("P.weight", "I64", (2, 2)), QuantFormat("nf4"))
    with pytest.raises(ValueError, match="int8 needs a matrix"):
        packed_layouts(TensorLayout("P.weight", "F16", (2, 2, 2)), QuantFormat("int8"))


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_config_is_what_transformers_writes(precision):
    pytest.importorskip("torch")
    BitsAndBytesConfig = pytest.importorskip("transformers").BitsAndBytesConfig
    fmt = QuantFormat(precision)
    ours = quantization_config(
        fmt, compute_dtype="bfloat16", skip_modules=("lm_head",), int8_threshold=5
    )
    four_bit = {}
    if not fmt.is_int8:
        four_bit["bnb_4bit_quant_type"] = fmt.quant_type
        four_bit["bnb_4bit_use_double_quant"] = fmt.double_quant
    theirs = BitsAndBytesConfig(
        load_in_8bit=fmt.is_int8,
        load_in_4bit=not fmt.is_int8,
        bnb_4bit_compute_dtype="bfloat16",
        llm_int8_skip_modules=["lm_head"],
        llm_int8_threshold=5.0,
        **four_bit,
    )
    assert json.loads(json.dumps(ours)) == json.loads(json.dumps(theirs.to_dict()))
    assert list(ours) == sorted(ours)
    assert isinstance(ours["llm_int8_threshold"], float)  # transformers refuses an int


# ---- Reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "float32"])
def test_weights_that_bitsandbytes_wrote_are_found(precision, storage):
    fmt = QuantFormat(precision, quant_storage=storage)
    module = quantized_module(fmt, "bfloat16", 64, 128)
    layouts = layouts_of_state_dict(module.state_dict(), "model.q_proj.")
    tensors = {layout.name: layout for layout in [TensorLayout("norm", "BF16", (64,)), *layouts]}
    found = find_quantized(tensors)
    assert list(found) == ["model.q_proj.weight"]
    quantized = found["model.q_proj.weight"]
    assert quantized.precision == precision
    assert quantized.weight == layouts[0]
    assert list(quantized.statistics.values()) == layouts[1:]
    assert stray_statistics(tensors) == []
    state = None
    if precision != "int8":
        blob = module.state_dict()[f"weight.{QUANT_STATE_PREFIX}{fmt.quant_type}"]
        state = parse_quant_state(bytes(blob.numpy()))
        assert quantized.quant_state == layouts[-1]
    assert layout_problems(quantized, state) == []


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_what_is_written_is_found_again_without_problems(precision):
    fmt = QuantFormat(precision)
    (quantized,) = find_written(fmt).values()
    state = None if fmt.is_int8 else state_of(fmt)
    assert quantized.precision == precision
    assert layout_problems(quantized, state) == []


def find_written(fmt, *, without=(), changed=()):
    tensors = {layout.name: layout for layout in packed_layouts(WEIGHT, fmt)}
    for name in list(tensors):
        if name.endswith(tuple(without)):
            del tensors[name]
    tensors |= {layout.name: layout for layout in changed}
    return find_quantized(tensors)


def state_of(fmt) -> QuantState:
    return parse_quant_state(
        quant_state_bytes(WEIGHT.shape, "BF16", fmt, 0.1 if fmt.double_quant else None)
    )


def test_int8_without_weight_format_is_found():
    (quantized,) = find_written(QuantFormat("int8"), without=[".weight_format"]).values()
    assert list(quantized.statistics) == ["SCB"]
    assert quantized.quant_state is None
    assert layout_problems(quantized) == []


@pytest.mark.parametrize(
    "missing", [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"]
)
def test_a_missing_statistic_is_named(missing):
    """bitsandbytes loads a weight without nested_absmax silently, as garbage."""
    fmt = QuantFormat("nf4-dq")
    (quantized,) = find_written(fmt, without=[f".weight{missing}"]).values()
    assert quantized.precision == "nf4-dq"
    (problem,) = layout_problems(quantized, state_of(fmt))
    assert problem.tensor == WEIGHT.name + missing
    assert (problem.rule, problem.found) == ("statistics", "missing")


WRONG_LAYOUTS = {
    "packed weight": (TensorLayout(WEIGHT.name, "U8", (15359, 1)), "15360 bytes", "15359 bytes"),
    "absmax size": (
        TensorLayout(f"{WEIGHT.name}.absmax", "U8", (481,)),
        "480 elements",
        "481 elements",
    ),
    "absmax dtype": (TensorLayout(f"{WEIGHT.name}.absmax", "F16", (480,)), "U8", "F16"),
    "nested_absmax size": (
        TensorLayout(f"{WEIGHT.name}.nested_absmax", "F32", (1,)),
        "2 elements",
        "1 elements",
    ),
    "quant_map size": (
        TensorLayout(f"{WEIGHT.name}.quant_map", "F32", (15,)),
        "16 elements",
        "15 elements",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_LAYOUTS.values(), ids=WRONG_LAYOUTS.keys())
def test_a_wrong_layout_is_named_with_what_was_expected_and_found(wrong):
    layout, expected, found = wrong
    fmt = QuantFormat("nf4-dq")
    (quantized,) = find_written(fmt, changed=[layout]).values()
    (problem,) = layout_problems(quantized, state_of(fmt))
    assert (problem.tensor, problem.expected, problem.found) == (layout.name, expected, found)


def test_a_quant_state_of_another_format_is_named():
    (quantized,) = find_written(QuantFormat("nf4-dq")).values()
    (problem,) = layout_problems(quantized, state_of(QuantFormat("nf4")))
    assert (problem.rule, problem.expected) == ("quant_state", "nf4-dq")


def test_wrong_int8_statistics_are_named():
    scb = "model.layers.0.mlp.up_proj.SCB"
    for layout in (TensorLayout(scb, "F16", (96,)), TensorLayout(scb, "F32", (95,))):
        (quantized,) = find_written(QuantFormat("int8"), changed=[layout]).values()
        (problem,) = layout_problems(quantized)
        assert problem.tensor == scb


def test_statistics_without_their_weight_are_stray():
    names = {
        "a.weight": "F32",
        "a.weight.absmax": "F32",
        "b.weight.quant_state.bitsandbytes__nf4": "U8",
        "c.SCB": "F32",
        "norm.weight": "BF16",
    }
    tensors = {name: TensorLayout(name, dtype, (4,)) for name, dtype in names.items()}
    assert find_quantized(tensors) == {}
    assert stray_statistics(tensors) == [
        "a.weight.absmax",
        "b.weight.quant_state.bitsandbytes__nf4",
        "c.SCB",
    ]


GOOD = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 3]}
NESTED = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}

BAD_STATES = {
    "not UTF-8": (b"\xff\xfe", "not JSON"),
    "cut off": (b'{"quant_type": "nf4"', "not JSON"),
    "nested too deeply": (b"[" * 60_000, "not JSON"),
    "a list": (b"[]", "not an object"),
    "too long": (b" " * 100_000, "100000 bytes"),
    "unknown key": (GOOD | {"extra": 1}, "extra"),
    "half of the nested keys": (GOOD | {"nested_blocksize": 256}, "nested_offset"),
    "missing key": ({key: GOOD[key] for key in ("quant_type", "dtype", "shape")}, "blocksize"),
    "unknown type": (GOOD | {"quant_type": "int4"}, "quant_type is 'int4'"),
    "unknown dtype": (GOOD | {"dtype": "float64"}, "dtype is 'float64'"),
    "zero block size": (GOOD | {"blocksize": 0}, "blocksize is 0"),
    "true block size": (GOOD | {"blocksize": True}, "blocksize is True"),
    "block size is a list": (GOOD | {"blocksize": [64]}, r"blocksize is \[64\]"),
    "negative size": (GOOD | {"shape": [2, -3]}, "shape is"),
    "no shape": (GOOD | {"shape": None}, "shape is None"),
    "size of text": (GOOD | {"shape": ["2"]}, "shape is"),
    "nested block size": (GOOD | NESTED | {"nested_blocksize": 128}, "nested_blocksize is 128"),
    "nested dtype": (GOOD | NESTED | {"nested_dtype": "bfloat16"}, "nested_dtype"),
    "offset of text": (GOOD | NESTED | {"nested_offset": "0.5"}, "nested_offset is '0.5'"),
}


@pytest.mark.parametrize("bad", BAD_STATES.values(), ids=BAD_STATES.keys())
def test_a_bad_quant_state_is_refused_with_what_is_wrong(bad):
    state, message = bad
    blob = state if isinstance(state, bytes) else json.dumps(state).encode()
    with pytest.raises(ValueError, match=message):
        parse_quant_state(blob)


def test_a_good_quant_state_is_read():
    state = parse_quant_state(json.dumps(GOOD | NESTED).encode())
    assert state == QuantState("nf4", 64, "bfloat16", (2, 3), 256, 0.5)
    assert (state.num_elements, state.num_blocks) == (6, 1)


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_garbage_raises_nothing_but_value_errors(blob):
    with pytest.raises(ValueError):
        parse_quant_state(blob)
