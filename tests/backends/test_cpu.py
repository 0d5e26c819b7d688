"""The CPU backend as its callers use it: threads, tiles, arguments, start-up, disk cache."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from qtool.backends import choose_backend
from qtool.backends.cpu import CpuBackend, describe_cpu, vector_instructions
from qtool.formats import floats
from tests.backends.reference import assert_same_bits, quantize_4bit, quantize_int8

CPU = CpuBackend()


def make_weight(size, seed=0):
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    return floats.narrow(values, "BF16")


@pytest.mark.parametrize("num_threads", [2, 5])
def test_tiles_quantized_by_several_threads_are_the_tensor_quantized_at_once(num_threads):
    values, tile = make_weight(300_001), 8192
    packed, absmax, _ = quantize_4bit(CPU, values, "BF16", "nf4", 64)
    codes, scb, _ = quantize_int8(CPU, values[:300_000].reshape(300, 1000), "BF16")
    out_packed, out_absmax = np.zeros_like(packed), np.zeros_like(absmax)
    out_codes, out_scb = np.zeros_like(codes), np.zeros_like(scb)

    def four_bit(start):
        stop = min(start + tile, values.size)
        CPU.quantize_4bit(
            values[start:stop],
            "BF16",
            "nf4",
            64,
            out_packed[start // 2 : -(-stop // 2)],
            out_absmax[start // 64 : -(-stop // 64)],
        )

    def int8(row):
        rows = values[row * 1000 : (row + 10) * 1000].reshape(10, 1000)
        CPU.quantize_int8(rows, "BF16", out_codes[row : row + 10], out_scb[row : row + 10])

    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(3):
            list(pool.map(four_bit, range(0, values.size, tile)))
            list(pool.map(int8, range(0, 300, 10)))
    assert_same_bits(out_packed, packed)
    assert_same_bits(out_absmax, absmax)
    assert_same_bits(out_codes, codes)
    assert_same_bits(out_scb, scb)


def test_kernels_run_without_the_gil():
    from qtool.backends import cpu_kernels

    kernels = [
        getattr(cpu_kernels, name)
        for name in dir(cpu_kernels)
        if hasattr(getattr(cpu_kernels, name), "py_func")
    ]
    assert len(kernels) > 10
    assert all(kernel.targetoptions["nogil"] for kernel in kernels)
    assert not any(kernel.targetoptions.get("fastmath") for kernel in kernels)


def test_read_only_input_is_enough():
    values = make_weight(256)
    values.setflags(write=False)
    packed, _, _ = quantize_4bit(CPU, values, "BF16", "nf4", 64)
    assert_same_bits(packed, quantize_4bit(CPU, values.copy(), "BF16", "nf4", 64)[0])


WRONG_ARGUMENTS = {
    "packed is too short": {"packed": np.zeros(31, np.uint8)},
    "absmax is too short": {"absmax": np.zeros(0, np.float32)},
    "absmax is float64": {"absmax": np.zeros(1, np.float64)},
    "values are not contiguous": {"values": np.zeros(128, np.uint16)[::2]},
    "values are of another dtype": {"values": np.zeros(64, np.float16)},
    "values have two dimensions": {"values": np.zeros((8, 8), np.uint16)},
    "block size is no block size": {"blocksize": 48},
}


@pytest.mark.parametrize("wrong", WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS.keys())
def test_a_wrong_array_is_refused_before_the_kernel_writes(wrong):
    arguments = {
        "values": np.zeros(64, np.uint16),
        "dtype": "BF16",
        "quant_type": "nf4",
        "blocksize": 64,
        "packed": np.zeros(32, np.uint8),
        "absmax": np.zeros(1, np.float32),
    }
    CPU.quantize_4bit(**arguments)
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*"):
        CPU.quantize_4bit(**arguments | wrong)


def test_wrong_sizes_of_statistics_and_rows_are_refused():
    absmax = np.zeros(300, np.float32)
    with pytest.raises(ValueError, match="nested_absmax: expected contiguous float32"):
        CPU.quantize_absmax(absmax, np.zeros(300, np.uint8), np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="codes: expected"):
        CPU.dequantize_absmax(
            np.zeros(299, np.uint8), np.zeros(2, np.float32), np.float32(0), absmax
        )
    rows = np.zeros((4, 8), np.float32)
    with pytest.raises(ValueError, match="scb: expected"):
        CPU.quantize_int8(rows, "F32", np.zeros((4, 8), np.int8), np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="two dimensions"):
        CPU.quantize_int8(rows[0], "F32", np.zeros(8, np.int8), np.zeros(1, np.float32))


def test_empty_tensors_are_left_alone():
    packed, absmax, num_bad = quantize_4bit(CPU, make_weight(0), "BF16", "nf4", 64)
    assert (packed.size, absmax.size, num_bad) == (0, 0, 0)
    assert CPU.quantize_absmax(absmax, packed, absmax) == 0
    codes, _, num_bad = quantize_int8(CPU, np.zeros((3, 0), np.float16), "F16")
    assert (codes.size, num_bad) == (0, 0)


def test_the_choice_says_why_and_on_what():
    backend, reason = choose_backend("cpu")
    assert backend.name == "cpu"
    assert reason == f"asked for ({describe_cpu()})"
    assert vector_instructions() in describe_cpu()
    assert "core" in describe_cpu()
    assert choose_backend().reason.startswith("auto: ")


def test_numba_is_loaded_at_the_first_kernel_and_torch_never():
    script = """
        import sys
        import numpy as np
        from qtool.backends import choose_backend
        backend = choose_backend().backend
        assert "numba" not in sys.modules
        backend.count_nonfinite(np.zeros(8, np.uint16), "BF16")
        assert "numba" in sys.modules
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


def test_a_kernel_that_cannot_be_cached_is_compiled_all_the_same():
    """Numba refuses to cache where it finds no folder to write to, as for code without a file."""
    from qtool.backends.cpu_kernels import kernel

    namespace: dict = {}
    exec("def double(x):\n    return 2 * x", namespace)
    assert kernel(namespace["double"])(21) == 42
