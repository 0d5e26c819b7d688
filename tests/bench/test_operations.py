"""Operations are found by their words, and count the bytes that their outputs really have."""

from __future__ import annotations

import pytest

from qtool.bench.operations import (
    OPERATIONS,
    PRODUCTS,
    Operation,
    Product,
    choose_operations,
    parse_shape,
)
from qtool.bench.records import Moved
from qtool.errors import QtoolError
from qtool.formats.bitsandbytes import packed_layouts
from qtool.formats.tensors import TensorLayout


def names(*words):
    return [known.name for chosen in choose_operations(words) for known in chosen]


def test_words_choose_operations_and_products():
    assert names() == [known.name for known in (*OPERATIONS, *PRODUCTS)]
    assert names("nf4") == ["quantize nf4", "dequantize nf4", "linear nf4"]
    assert names("dequantize") == ["dequantize nf4", "dequantize nf4-dq", "dequantize int8"]
    assert names("linear int8") == ["linear int8", "linear int8 rounded", "linear int8 outliers"]
    assert names("linear") == ["linear nf4", "linear nf4-dq", "linear fp4", *names("linear int8")]
    assert names("quantize fp4", "dequantize int8") == ["quantize fp4", "dequantize int8"]


def test_unknown_words_are_refused_with_all_names():
    with pytest.raises(QtoolError, match="nf5") as caught:
        choose_operations(["quantize nf5"])
    assert caught.value.kind == "usage" and "quantize nf4-dq" in caught.value.hint


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
@pytest.mark.parametrize(("dtype", "itemsize"), [("BF16", 2), ("F32", 4)])
def test_bytes_are_those_of_the_file_format(operation, dtype, itemsize):
    shape = (48, 1000)
    weight = TensorLayout("w.weight", dtype, shape)
    constants = ("quant_map", "quant_state", "weight_format")  # the same for every weight
    stored = sum(
        layout.num_bytes
        for layout in packed_layouts(weight, operation.format)
        if not any(part in layout.name for part in constants)
    )
    stored += 4 * operation.format.double_quant  # the offset, which files keep in quant_state
    values = 48 * 1000 * itemsize
    moved = operation.moved(shape, dtype)
    if operation.direction == "quantize":
        assert moved == Moved(values, stored)
    else:
        assert moved == Moved(stored, values)


def test_bytes_of_the_measured_shape():
    moved = Operation("quantize", "nf4-dq").moved((28672, 8192), "BF16")
    assert moved.input_bytes == 469_762_048
    # Half a byte per value, a byte per 64 values, 4 bytes per 64 * 256, and the offset.
    assert moved.output_bytes == 117_440_512 + 3_670_016 + 57_344 + 4


@pytest.mark.parametrize("precision", ["nf4", "nf4-dq", "int8"])
def test_a_product_moves_what_is_stored_and_its_activations(precision):
    stored = Operation("dequantize", precision).moved((48, 1000), "BF16").input_bytes
    moved = Product(precision).moved((48, 1000), "BF16", 3)
    assert moved == Moved(stored + 3 * 1000 * 2, 3 * 48 * 2)


@pytest.mark.parametrize("text", ["", "12", "1x2x3", "0x4", "-1x4", "axb", "1.5x2"])
def test_shapes_that_are_none_are_refused(text):
    with pytest.raises(QtoolError, match="ROWSxCOLUMNS"):
        parse_shape(text)
    assert parse_shape("28672X8192") == (28672, 8192)
