"""Dequantized values are bit-equal to bitsandbytes', whole and in pieces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from qtool.formats.codebooks import dynamic_map
from qtool.runtime import dequantize, dequantize_host
from qtool.runtime.dequantize import dequantize_4bit, dequantize_absmax, dequantize_int8

bnb_functional = pytest.importorskip("bitsandbytes.functional")

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Compare representations, so that -0.0 differs from 0.0 and NaN equals itself."""
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.contiguous().view(views[tensor.element_size()])


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    differ = (bits(found) != bits(expected)).nonzero()
    assert not len(differ), f"{len(differ)} differ, first at {differ[0].tolist()}"


def whole(packed: torch.Tensor, absmax: torch.Tensor, state: object, n: int) -> torch.Tensor:
    return dequantize_4bit(
        packed,
        absmax,
        quant_type=state.quant_type,  # type: ignore[attr-defined]
        blocksize=state.blocksize,  # type: ignore[attr-defined]
        start=0,
        stop=n,
        dtype=state.dtype,  # type: ignore[attr-defined]
    )


def as_one_row(weight: torch.Tensor) -> torch.Tensor:
    """With AVX512 bitsandbytes' CPU kernel begins a new block with each row; the format's blocks
    go on over the ends of rows."""
    return weight.reshape(1, -1)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize("shape", [(64, 96), (7, 13), (33, 172), (1, 1)])
def test_four_bit_equals_bitsandbytes(
    path: str, quant_type: str, dtype: torch.dtype, blocksize: int, shape: tuple[int, int]
) -> None:
    torch.manual_seed(blocksize + shape[1])
    weight = torch.randn(shape).to(dtype)
    packed, state = bnb_functional.quantize_4bit(
        as_one_row(weight), blocksize=blocksize, quant_type=quant_type
    )
    expected = bnb_functional.dequantize_4bit(packed, state)
    found = whole(packed, state.absmax, state, weight.numel()).view(1, -1)
    # FP4's negative zero comes as a positive one from our kernels, and from bitsandbytes for odd
    # sizes.
    assert_same_bits(found + 0.0, expected + 0.0)


@pytest.mark.parametrize("shape", [(64, 96), (33, 172), (700, 512)])
def test_double_quantized_absmax_equals_bitsandbytes(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    weight = torch.randn(shape, dtype=torch.float32).bfloat16()
    packed, state = bnb_functional.quantize_4bit(
        as_one_row(weight), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    absmax = dequantize_absmax(
        state.absmax, state.state2.absmax, state.state2.code, state.offset.float()
    )
    assert_same_bits(
        whole(packed, absmax, state, weight.numel()).view(1, -1),
        bnb_functional.dequantize_4bit(packed, state),
    )


def test_int8_equals_bitsandbytes(path: str) -> None:
    torch.manual_seed(2)
    codes, scb, _ = bnb_functional.int8_vectorwise_quant(torch.randn(37, 65).half())
    expected = bnb_functional.int8_vectorwise_dequant(codes, scb)
    assert_same_bits(dequantize_int8(codes, scb, torch.float32), expected)
    assert_same_bits(dequantize_int8(codes, scb, torch.bfloat16), expected.bfloat16())


@pytest.fixture(params=["kernels", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Our CPU kernels, and the torch operators that every other device takes."""
    if request.param == "torch":
        monkeypatch.setattr(dequantize, "SOURCE_DTYPES", {})
    return str(request.param)


def golden_cases(path: Path) -> list[dict[str, object]]:
    with safe_open(path, framework="pt") as file:
        return list(json.loads(file.metadata()["cases"]))


def test_golden_bytes_of_the_cuda_kernels_decode_to_their_values(
    path: str, test_data: Path
) -> None:
    golden = test_data / "golden" / "bitsandbytes_cuda.safetensors"
    zero = 0.0 if path == "kernels" else -0.0  # x + 0.0 drops a zero's sign, x + -0.0 keeps it
    nested_map = torch.from_numpy(dynamic_map().copy())
    num_checked = 0
    with safe_open(golden, framework="pt") as file:
        names = set(file.keys())
        for number, case in enumerate(golden_cases(golden)):
            for quant_type in ("nf4", "fp4"):
                prefix = f"{number:03d}.{quant_type}."
                if f"{prefix}packed" not in names:
                    continue
                expected = file.get_tensor(f"{prefix}dequantized").reshape(-1)
                absmax = file.get_tensor(f"{prefix}absmax")
                if not absmax.isfinite().all():
                    continue
                arguments = {
                    "quant_type": quant_type,
                    "blocksize": case["blocksize"],
                    "start": 0,
                    "stop": expected.numel(),
                    "dtype": expected.dtype,
                }
                packed = file.get_tensor(f"{prefix}packed")
                found = dequantize_4bit(packed, absmax, **arguments)
                assert_same_bits(found + zero, expected + zero)
                nested = dequantize_absmax(
                    file.get_tensor(f"{prefix}nested_codes"),
                    file.get_tensor(f"{prefix}nested_absmax"),
                    nested_map,
                    file.get_tensor(f"{prefix}nested_offset").reshape(()),
                )
                expected = file.get_tensor(f"{prefix}dequantized_dq").reshape(-1)
                found = dequantize_4bit(packed, nested, **arguments)
                assert_same_bits(found + zero, expected + zero)
                num_checked += 1
    assert num_checked > 100


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_range_equals_the_slice_of_the_whole(data: st.DataObject) -> None:
    num_elements = data.draw(st.integers(1, 700))
    blocksize = data.draw(st.sampled_from([32, 64, 256]))
    start = data.draw(st.integers(0, num_elements - 1))
    stop = data.draw(st.integers(start + 1, num_elements))
    chunk = data.draw(st.sampled_from([1, 64, 100, 1 << 18]))
    generator = torch.Generator().manual_seed(num_elements)
    packed = torch.randint(0, 256, ((num_elements + 1) // 2, 1), generator=generator).byte()
    absmax = torch.rand(-(-num_elements // blocksize), generator=generator)
    arguments = {"quant_type": "fp4", "blocksize": blocksize, "dtype": torch.float16}
    expected = dequantize_4bit(packed, absmax, start=0, stop=num_elements, **arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dequantize.CHUNK_ELEMENTS, "cpu", chunk)
        patch.setattr(dequantize_host, "MIN_ELEMENTS_PER_THREAD", chunk)
        patch.setattr(torch, "get_num_threads", lambda: 3)
        for dtypes in (dequantize.SOURCE_DTYPES, {}):  # our kernels, then torch's operators
            patch.setattr(dequantize, "SOURCE_DTYPES", dtypes)
            found = dequantize_4bit(packed, absmax, start=start, stop=stop, **arguments)
            assert_same_bits(found + 0.0, expected[start:stop] + 0.0)


def test_int8_rows_in_pieces_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(-127, 128, (19, 11)).to(torch.int8)
    scb = torch.rand(19)
    expected = dequantize_int8(codes, scb, torch.float16)
    monkeypatch.setattr(dequantize_host, "MIN_ELEMENTS_PER_THREAD", 30)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert_same_bits(dequantize_int8(codes, scb, torch.float16), expected)
    monkeypatch.setattr(dequantize, "SOURCE_DTYPES", {})
    monkeypatch.setitem(dequantize.CHUNK_ELEMENTS, "cpu", 30)
    assert_same_bits(dequantize_int8(codes, scb, torch.float16), expected)
