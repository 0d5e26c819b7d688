"""`bench_kernels` on the CPU, with weights of a few kilobytes."""

from __future__ import annotations

import sys

import pytest

from qtool.backends.cpu import CpuBackend
from qtool.bench.contenders import Measured, Sample
from qtool.bench.cpu_device import cut_into_tiles
from qtool.bench.kernels import KernelRequest, bench_kernels, double_quant_ratios, group_rows
from qtool.bench.operations import OPERATIONS, PRODUCTS
from qtool.bench.records import Moved, time_ratio
from qtool.errors import QtoolError
from qtool.runtime.products import MAX_PACKED_TOKENS
from tests.bench.tiny_shape import shrink_sizes

CODECS = ("quantize", "dequantize")


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    shrink_sizes(monkeypatch)


def bench(**options):
    defaults = {
        "shapes": ((24, 192),),
        "words": CODECS,
        "backend": "cpu",
        "num_threads": 2,
        "with_rival": False,
    }
    return bench_kernels(KernelRequest(**(defaults | options)))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_operation_is_checked_and_measured(dtype):
    result = bench(dtypes=(dtype,))
    copy, *rows = result.rows
    assert (copy.engine, copy.op, copy.share_of_limit) == ("limit", "copy", 1)
    assert copy.bytes == 2 * 24 * 192 * (4 if dtype == "F32" else 2)
    assert [row.op for row in rows] == [operation.name for operation in OPERATIONS]
    assert all(row.engine == "qtool" and row.n == 20 and row.seconds_median > 0 for row in rows)
    assert list(result.limits) == [f"copy 24x192 {copy.dtype}"]


def test_odd_shapes_and_several_tiles(monkeypatch):
    monkeypatch.setattr("qtool.bench.cpu_device.DEFAULT_TILE_BYTES", 4096)
    assert len(cut_into_tiles((200, 37), 2)) == 4
    assert len(bench(shapes=((200, 37),)).rows) == 1 + len(OPERATIONS)


def test_bitsandbytes_takes_part_where_it_is_installed():
    pytest.importorskip("bitsandbytes")
    result = bench(words=("quantize nf4", "dequantize nf4", "quantize int8"), with_rival=True)
    engines = {(row.op, row.engine) for row in result.rows}
    rivals = {op for op, engine in engines if engine == "bitsandbytes"}
    assert rivals == {"quantize nf4", "dequantize nf4", "quantize int8"}
    assert "bitsandbytes" in result.versions and result.warnings == ()


def test_without_bitsandbytes_there_is_a_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = bench(words=("quantize nf4",), with_rival=True)
    assert "bitsandbytes is not measured" in result.warnings[0]
    assert {row.engine for row in result.rows} == {"limit", "qtool"}


@pytest.mark.parametrize(
    ("method", "array", "words"),
    [
        ("quantize_4bit", 4, "packed"),
        ("quantize_absmax", 1, "absmax codes"),
        ("quantize_int8", 2, "codes"),
        ("dequantize_4bit", 5, "values"),
        ("dequantize_int8", 3, "values"),
    ],
)
def test_a_kernel_that_gives_a_wrong_byte_is_not_measured(method, array, words, monkeypatch):
    right = getattr(CpuBackend, method)

    def wrong(self, *arguments):
        done = right(self, *arguments)
        arguments[array].reshape(-1).view("u1")[-1] ^= 1
        return done

    monkeypatch.setattr(CpuBackend, method, wrong)
    # So few values that the last byte is seen only because both ends are looked at.
    monkeypatch.setattr("qtool.bench.reference_check.CHECKED_VALUES", 100)
    with pytest.raises(QtoolError, match=f"{words}.* differ from the reference") as caught:
        bench(shapes=((300, 192),))
    assert caught.value.kind == "internal"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"repeats": 19}, "fewer than 20"),
        ({"words": ("nf5",)}, "nf5"),
        ({"words": ("linear",), "tokens": (8, 0)}, "rows=0"),
    ],
)
def test_wrong_requests_are_refused(options, words):
    with pytest.raises(QtoolError, match=words) as caught:
        bench(**options)
    assert caught.value.kind == "usage"


def test_shares_are_of_the_copy_s_rate():
    measured = [
        Measured("quantize nf4", "qtool", Moved(80, 20), (Sample(2.0),)),
        Measured("copy", "limit", Moved(80, 80), (Sample(1.6),)),
    ]
    copy, quantize = group_rows(measured, "1x40", "bf16")
    assert copy.op == "copy" and copy.bytes_per_s == pytest.approx(100)
    # 100 bytes take the copy one second.
    assert quantize.share_of_limit == pytest.approx(0.5)


def test_double_quantization_is_compared_with_none_by_the_same_engine():
    measured = [
        Measured("copy", "limit", Moved(1, 1), (Sample(1.0),)),
        Measured("quantize nf4", "qtool", Moved(1, 1), (Sample(2.0),)),
        Measured("quantize nf4-dq", "qtool", Moved(1, 1), (Sample(3.0),)),
        Measured("quantize nf4-dq", "bitsandbytes", Moved(1, 1), (Sample(9.0),)),
    ]
    (ratio,) = double_quant_ratios(group_rows(measured, "1x1", "bf16"))
    assert ratio["seconds_ratio"] == 1.5 and ratio["engine"] == "qtool"


def test_each_number_of_tokens_is_measured_with_every_product():
    result = bench(words=("linear",), tokens=(1, 5))
    assert list(result.limits) == ["copy 24x192 bf16 x1", "copy 24x192 bf16 x5"]
    names = [product.name for product in PRODUCTS if product.min_tokens == 1]
    for tokens in (1, 5):
        copy, *rows = (row for row in result.rows if row.tokens == tokens)
        assert (copy.engine, copy.share_of_limit, copy.relative_error) == ("limit", 1, None)
        assert [row.op for row in rows if row.engine == "qtool"] == names
        assert [row.op for row in rows if row.engine == "torch"] == names
        for row in rows:
            assert (row.relative_error is None) == (row.engine == "torch")
            assert time_ratio(row, result.rows) > 0
    ratios = result.details["double_quant_ratios"]
    assert [(ratio["tokens"], ratio["engine"]) for ratio in ratios] == [(1, "qtool"), (5, "qtool")]


@pytest.mark.parametrize(("dtype", "error"), [("BF16", 4e-3), ("F16", 1e-3), ("F32", 1e-5)])
def test_products_are_compared_with_float64(dtype, error):
    rows = bench(words=("linear",), dtypes=(dtype,), shapes=((64, 256),)).rows
    errors = [row.relative_error for row in rows if row.engine == "qtool"]
    assert len(errors) == 4 and all(0 < found < error for found in errors)


def test_products_of_rounded_activations_take_many_tokens():
    rounded = [product for product in PRODUCTS if product.threshold is not None]
    assert {product.min_tokens for product in rounded} == {MAX_PACKED_TOKENS + 1}
    rows = bench(words=("linear int8",), shapes=((64, 256),), tokens=(65,)).rows
    errors = {row.op: row.relative_error for row in rows if row.engine == "qtool"}
    # With outliers most of the result is exact.
    exact, plain, outliers = (
        errors[f"linear int8{kind}"] for kind in ("", " rounded", " outliers")
    )
    assert exact < outliers < plain < 2e-2
    with pytest.raises(QtoolError, match="rows=64: activations are rounded where there are more"):
        bench(words=("linear int8 rounded",), tokens=(1, 64))


def test_bitsandbytes_multiplies_the_same_bytes():
    pytest.importorskip("bitsandbytes")
    rows = bench(words=("linear",), with_rival=True, shapes=((64, 256),), tokens=(65,)).rows
    errors = {row.op: row.relative_error for row in rows if row.engine == "bitsandbytes"}
    # It would wait for the device to find outliers.
    assert errors.keys() == {product.name for product in PRODUCTS if not product.threshold}
    assert all(0 < error < 0.03 for error in errors.values())


def test_products_of_rows_that_share_a_block_are_measured():
    rows = bench(words=("linear",), shapes=((64, 100), (3, 5))).rows
    errors = [row.relative_error for row in rows if row.engine == "qtool"]
    assert len(errors) == 8 and all(0 < error < 4e-3 for error in errors)


def test_a_shape_that_bitsandbytes_cannot_multiply_is_a_warning(monkeypatch):
    pytest.importorskip("bitsandbytes")

    def fail(input):
        raise RuntimeError("shape '[64, 1]' is invalid\nat all")

    monkeypatch.setattr("qtool.bench.products.share_layer", lambda module, **options: fail)
    result = bench(words=("linear fp4",), with_rival=True, shapes=((64, 100),), tokens=(2,))
    assert result.warnings == (
        "bitsandbytes is not measured at linear fp4 bf16 64x100, 2 tokens: shape '[64, 1]' is "
        "invalid",
    )
    assert [row.engine for row in result.rows] == ["limit", "qtool", "torch"]


def test_a_product_that_is_wrong_is_not_measured(monkeypatch):
    monkeypatch.setattr("qtool.bench.products.multiply", lambda layer, x: 1.2 * layer(x))
    with pytest.raises(QtoolError, match=r"linear nf4 .* off by 2\.0e-01") as caught:
        bench(words=("linear nf4",))
    assert caught.value.kind == "internal"


def test_without_torch_products_are_left_out_with_a_warning(monkeypatch):
    reason = "products are not measured: no torch"
    monkeypatch.setattr("qtool.bench.kernels._why_no_products", lambda *, on_gpu: reason)
    result = bench(words=("nf4",))
    assert result.warnings == (reason,)
    assert {row.op for row in result.rows} == {"copy", "quantize nf4", "dequantize nf4"}
    with pytest.raises(QtoolError, match="no torch") as caught:
        bench(words=("linear",))
    assert caught.value.kind == "unsupported"
