"""The CUDA backend gives the bytes of the CPU backend, and of bitsandbytes where it should."""

from __future__ import annotations

import numpy as np
import pytest

from qtool.backends.cpu import CpuBackend
from qtool.backends.cuda import CudaBackend
from qtool.errors import QtoolError
from qtool.formats import floats
from qtool.formats.precisions import BLOCKSIZES
from tests.backends.reference import (
    assert_same_bits,
    dequantize_4bit,
    quantize_4bit,
    quantize_absmax,
    quantize_int8,
)
from tests.backends.test_against_reference import DTYPES, KINDS, make_values

pytestmark = pytest.mark.gpu

NUM_CASES = 600
CPU = CpuBackend()


@pytest.fixture(scope="module")
def cuda():
    return CudaBackend()


def generated_case(seed):
    """A tensor of any dtype and kind, of a size near the edges of blocks, warps and launches."""
    rng = np.random.default_rng([seed, 7])
    edge = int(rng.choice([0, 64, 256, 1024, 8192, 65_536, 262_144]))
    size = max(1, edge + int(rng.integers(-2, 3))) if seed % 2 else int(rng.integers(1, 40_000))
    dtype, kind = DTYPES[seed % 3], KINDS[seed % len(KINDS)]
    values = make_values(kind, dtype, size, seed)
    return values, dtype, str(rng.choice(["nf4", "fp4"])), int(rng.choice(BLOCKSIZES)), rng


@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_the_bytes_are_those_of_the_cpu_backend(cuda, seed):
    values, dtype, quant_type, blocksize, rng = generated_case(seed)
    check_4_bit(cuda, values, dtype, quant_type, blocksize, str(rng.choice(DTYPES)))
    check_double_quantization(cuda, values, dtype)
    row_size = int(rng.choice([1, 8, 100, 1024, 4096, 8192, 14_336, 28_672, 60_000]))
    row_size = min(row_size, values.size)
    rows = values[: values.size // row_size * row_size].reshape(-1, row_size)
    check_int8(cuda, rows, dtype, str(rng.choice(DTYPES)))


def check_4_bit(cuda, values, dtype, quant_type, blocksize, target):
    found = quantize_4bit(cuda, values, dtype, quant_type, blocksize)
    packed, absmax, num_bad = quantize_4bit(CPU, values, dtype, quant_type, blocksize)
    assert_same_bits(found[0], packed, "packed")
    assert_same_bits(found[1], absmax, "absmax")
    assert found[2] == num_bad == cuda.count_nonfinite(values, dtype)

    arguments = (packed, absmax, quant_type, blocksize, target, values.size)
    found = dequantize_4bit(cuda, *arguments)
    assert_same_values(found, dequantize_4bit(CPU, *arguments), target)


def check_double_quantization(cuda, values, dtype):
    absmax = floats.flush_subnormals(floats.widen(values, dtype))
    codes, nested, offset = quantize_absmax(CPU, absmax)
    found = quantize_absmax(cuda, absmax)
    assert_same_bits(found[2], offset, "offset")
    assert_same_bits(found[1], nested, "nested_absmax")
    assert_same_bits(found[0], codes, "codes")

    ours, theirs = np.empty_like(absmax), np.empty_like(absmax)
    cuda.dequantize_absmax(codes, nested, offset, ours)
    CPU.dequantize_absmax(codes, nested, offset, theirs)
    assert_same_bits(ours, theirs, "absmax read back")


def check_int8(cuda, rows, dtype, target):
    found = quantize_int8(cuda, rows, dtype)
    codes, scb, num_bad = quantize_int8(CPU, rows, dtype)
    assert_same_bits(found[0], codes, "codes")
    assert_same_bits(found[1], scb, "SCB")
    assert found[2] == num_bad

    ours = np.empty(rows.shape, floats.NUMPY_DTYPES[target])
    theirs = np.empty_like(ours)
    cuda.dequantize_int8(codes, scb, target, ours)
    CPU.dequantize_int8(codes, scb, target, theirs)
    assert_same_values(ours, theirs, target)


def assert_same_values(found, expected, dtype):
    assert_same_bits(floats.widen(found, dtype), floats.widen(expected, dtype), dtype)


@pytest.mark.parametrize("size", [65_537, 4_194_305, 5_000_000])
def test_the_offset_is_summed_in_the_same_order(cuda, size):
    """Large values that cancel each other: what is left of the small ones depends on the order."""
    rng = np.random.default_rng(size)
    large = rng.random(size // 3) * 2.0 ** rng.integers(50, 70, size // 3)
    values = np.concatenate([large, -large, rng.random(size - 2 * large.size)])
    values = rng.permutation(values).astype(np.float32)
    assert quantize_absmax(cuda, values)[2] == quantize_absmax(CPU, values)[2]


@pytest.mark.parametrize("target", ["compute_75", "compute_80", "compute_89"])
def test_what_the_driver_makes_of_older_ptx_gives_the_same_bytes(cuda, target, monkeypatch):
    monkeypatch.setenv("QTOOL_KERNEL_TARGET", target)
    for seed in range(24):
        values, dtype, quant_type, blocksize, _ = generated_case(seed)
        check_4_bit(cuda, values, dtype, quant_type, blocksize, dtype)
        check_double_quantization(cuda, values, dtype)
        check_int8(cuda, values.reshape(1, -1), dtype, dtype)


def test_threads_at_once_do_not_disturb_each_other(cuda):
    from concurrent.futures import ThreadPoolExecutor

    cases = [generated_case(seed)[:4] for seed in range(64)]
    reservation = cuda.reserve(8, 1 << 20)
    with ThreadPoolExecutor(reservation.num_workers) as pool:
        found = list(pool.map(lambda case: quantize_4bit(cuda, *case), cases))
    cuda.release()
    for (packed, absmax, num_bad), case in zip(found, cases, strict=True):
        expected = quantize_4bit(CPU, *case)
        assert_same_bits(packed, expected[0])
        assert_same_bits(absmax, expected[1])
        assert num_bad == expected[2]


# ---- Memory -----------------------------------------------------------------------------------


def test_host_buffers_are_page_locked_and_counted():
    import cupy

    backend = CudaBackend()
    before = backend.page_locked_bytes
    buffer = backend.host_buffer(1 << 20)
    buffer[:] = 7
    attributes = cupy.cuda.runtime.pointerGetAttributes(buffer.ctypes.data)
    assert attributes.type == 1  # cudaMemoryTypeHost: page-locked
    assert backend.page_locked_bytes == before + (1 << 20)
    del buffer
    backend.release()
    assert backend.page_locked_bytes == 0


def test_a_reservation_is_counted_and_given_back():
    backend = CudaBackend()
    reservation = backend.reserve(3, 1 << 20)
    assert (reservation.num_workers, reservation.tile_bytes, reservation.notes) == (3, 1 << 20, ())
    assert 3 << 20 < backend.peak_device_bytes < 3 * (2 << 20)
    values = make_values(KINDS[1], "BF16", 1 << 19, 0)
    quantize_4bit(backend, values, "BF16", "nf4", 64)
    peak = backend.peak_device_bytes
    assert peak < 3 * (2 << 20), "a tile of the reserved size needs no more"
    backend.release()
    backend.reserve(1, 1 << 20)
    assert backend.peak_device_bytes == peak, "what was given back is not counted again"


class ShortOfMemory:
    """cudaMalloc of a device on which only `limit_bytes` are free."""

    def __init__(self, limit_bytes):
        import cupy

        self._error = cupy.cuda.runtime.CUDARuntimeError
        self._real = cupy.cuda.Memory
        self.free_bytes = limit_bytes

    def __call__(self, num_bytes):
        if num_bytes > self.free_bytes:
            raise self._error(2)
        self.free_bytes -= num_bytes
        limited = self

        class Memory(limited._real):
            def __del__(self):
                limited.free_bytes += num_bytes

        return Memory(num_bytes)


def test_a_device_short_of_memory_gets_smaller_tiles_and_the_same_bytes(monkeypatch):
    import cupy

    monkeypatch.setattr(cupy.cuda, "Memory", ShortOfMemory(16 << 20))
    backend = CudaBackend()
    reservation = backend.reserve(4, 16 << 20)
    assert reservation.tile_bytes == 2 << 20
    assert "short of memory" in reservation.notes[0] and "2,048" in reservation.notes[0]
    values = make_values(KINDS[1], "BF16", 1 << 20, 0)
    found = quantize_4bit(backend, values, "BF16", "nf4", 64)
    assert_same_bits(found[0], quantize_4bit(CPU, values, "BF16", "nf4", 64)[0])


def test_a_device_too_small_for_any_tile_is_an_error(monkeypatch):
    import cupy

    monkeypatch.setattr(cupy.cuda, "Memory", ShortOfMemory(1 << 20))
    with pytest.raises(QtoolError, match="MiB free, too little for 8 tiles") as caught:
        CudaBackend().reserve(8, None)
    assert caught.value.kind == "memory"
    assert "--backend cpu" in caught.value.hint


def test_without_page_locked_memory_it_says_so_and_works(monkeypatch):
    import cupy

    def refuse(*_):
        raise cupy.cuda.runtime.CUDARuntimeError(2)

    monkeypatch.setattr(cupy.cuda, "PinnedMemory", refuse)
    backend = CudaBackend()
    assert "page-locked" in backend.reserve(2, 1 << 20).notes[0]
    buffer = backend.host_buffer(1000)
    assert buffer.size == 1000 and backend.page_locked_bytes == 0
    values = make_values(KINDS[1], "BF16", 5000, 0)
    found = quantize_4bit(backend, values, "BF16", "nf4", 64)
    assert_same_bits(found[0], quantize_4bit(CPU, values, "BF16", "nf4", 64)[0])


# ---- The launchers, on device arrays ----------------------------------------------------------


def device_quantize(values, dtype, num_values, stream=0):
    """NF4 of a device array by the launcher: packed and absmax as device arrays."""
    import cupy

    from cupy_kernels.quantize_4bit import quantize_4bit as launch

    packed = cupy.full(-(-num_values // 2), 0xA5, cupy.uint8)
    absmax = cupy.full(-(-num_values // 64), -7, cupy.float32)
    bad = cupy.zeros(1, cupy.uint64)
    launch(
        values.data.ptr, dtype, num_values, "nf4", 64, packed.data.ptr, absmax.data.ptr,
        bad.data.ptr, stream,
    )  # fmt: skip
    return packed, absmax, bad


def test_launchers_keep_to_the_stream_they_are_given():
    """A kernel queued on a stream sees what was queued there before it, and nothing waits."""
    import cupy

    values = make_values(KINDS[1], "BF16", 1 << 24, 3)
    stream = cupy.cuda.Stream(non_blocking=True)
    source = cupy.zeros(values.size, cupy.uint16)
    cupy.cuda.Device().synchronize()
    with stream:
        ballast = cupy.random.random(1 << 24, dtype=cupy.float32)
        for _ in range(20):
            ballast = cupy.sqrt(ballast)
        source.set(values, stream=stream)
    packed, absmax, _ = device_quantize(source, "BF16", values.size, stream.ptr)
    stream.synchronize()
    expected = quantize_4bit(CPU, values, "BF16", "nf4", 64)
    assert_same_bits(packed.get(), expected[0])
    assert_same_bits(absmax.get(), expected[1])


def test_more_than_2_to_the_31_values_are_quantized_to_the_last():
    import cupy

    piece = make_values(KINDS[1], "BF16", 1 << 22, 4)
    num_values = (1 << 31) + 3 * piece.size + 12_345
    repeats = -(-num_values // piece.size)
    source = cupy.tile(cupy.asarray(piece), repeats)[:num_values]
    packed, absmax, bad = device_quantize(source, "BF16", num_values)
    expected = quantize_4bit(CPU, piece, "BF16", "nf4", 64)
    assert int(bad[0]) == 0
    for found, period in ((packed, expected[0]), (absmax, expected[1])):
        whole = found[: found.size // period.size * period.size].reshape(-1, period.size)
        assert bool((whole == cupy.asarray(period)).all())
    tail = num_values % piece.size
    last = quantize_4bit(CPU, piece[:tail], "BF16", "nf4", 64)
    assert_same_bits(packed[-last[0].size :].get(), last[0])
    assert_same_bits(absmax[-last[1].size :].get(), last[1])

    del source
    from cupy_kernels.dequantize_4bit import dequantize_4bit as launch

    values = cupy.full(num_values, 0xFFFF, cupy.uint16)
    launch(packed.data.ptr, num_values, absmax.data.ptr, "nf4", 64, "BF16", values.data.ptr, 0)
    wanted = dequantize_4bit(CPU, *expected[:2], "nf4", 64, "BF16", piece.size)
    whole = values[: num_values // piece.size * piece.size].reshape(-1, piece.size)
    assert bool((whole == cupy.asarray(wanted)).all())
    wanted = dequantize_4bit(CPU, *last[:2], "nf4", 64, "BF16", tail)
    assert_same_bits(values[-tail:].get(), wanted)


@pytest.mark.parametrize("offset_bytes", [2, 4, 8])
def test_an_unaligned_address_is_refused(offset_bytes):
    from cupy_kernels.quantize_4bit import quantize_4bit as launch

    with pytest.raises(ValueError, match=r"values: address 0x.* is not a multiple of 16"):
        launch(0x1000 + offset_bytes, "BF16", 64, "nf4", 64, 0x2000, 0x3000, 0x4000, 0)


def test_nested_absmax_is_decoded_on_the_way(cuda):
    import cupy

    from cupy_kernels.dequantize_4bit import NestedAbsmax
    from cupy_kernels.dequantize_4bit import dequantize_4bit as launch
    from qtool.formats.codebooks import dynamic_map

    for seed in range(30):
        values, dtype, quant_type, blocksize, _ = generated_case(seed)
        packed, absmax, _ = quantize_4bit(CPU, values, dtype, quant_type, blocksize)
        codes, nested, offset = quantize_absmax(CPU, absmax)
        CPU.dequantize_absmax(codes, nested, offset, absmax)
        expected = dequantize_4bit(CPU, packed, absmax, quant_type, blocksize, dtype, values.size)

        mean = np.array([offset], np.float32)
        device = [cupy.asarray(array) for array in (packed, codes, nested, dynamic_map(), mean)]
        target = cupy.zeros(values.size, values.dtype)
        statistics = NestedAbsmax(*(a.data.ptr for a in device[1:]))
        launch(
            device[0].data.ptr, values.size, statistics, quant_type, blocksize, dtype,
            target.data.ptr, 0,
        )  # fmt: skip
        assert_same_values(target.get(), expected, dtype)


# ---- bitsandbytes, live -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def bnb():
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return functional


def _on_gpu(values, dtype):
    import torch

    names = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    return torch.from_numpy(values.view(f"i{values.itemsize}").copy()).cuda().view(names[dtype])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bit_codes_and_absmax_are_those_of_bitsandbytes(cuda, bnb, dtype, quant_type):
    for seed, blocksize in enumerate([64, 128, 256, 512, 1024, 2048, 4096] * 3):
        values = make_values(KINDS[1], dtype, 4096 * 61, seed)
        theirs, state = bnb.quantize_4bit(
            _on_gpu(values, dtype), blocksize=blocksize, quant_type=quant_type
        )
        packed, absmax, _ = quantize_4bit(cuda, values, dtype, quant_type, blocksize)
        assert_same_bits(absmax, state.absmax.cpu().numpy(), "absmax")
        assert_same_bits(packed, theirs.cpu().numpy().reshape(-1), "packed")


def test_int8_rows_are_those_of_bitsandbytes(cuda, bnb):
    values = make_values(KINDS[1], "F16", 512 * 4096, 11).reshape(512, 4096)
    codes, scb, _ = bnb.int8_vectorwise_quant(_on_gpu(values, "F16").reshape(512, 4096))
    found = quantize_int8(cuda, values, "F16")
    assert_same_bits(found[0], codes.cpu().numpy(), "codes")
    assert_same_bits(found[1], scb.cpu().numpy(), "SCB")
