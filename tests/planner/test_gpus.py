"""The catalogue, forgiving names, the memory a GPU offers, and this machine's GPUs."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import QtoolError
from qtool.planner import gpus
from qtool.planner.gpus import (
    Gpu,
    find_gpu,
    list_gpus,
    local_gpus,
    read_catalogue,
    resolve_gpus,
    vram_class,
)
from qtool.planner.units import GIB, MIB

NUMBERS = ("memory_mib", "visible_mib", "bandwidth_gb_s", "bf16_dense_tflops", "int8_dense_tops")


def test_catalogue_is_large_and_its_names_are_distinct():
    names = [gpu.name for gpu in read_catalogue()]
    assert len(names) >= 110
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("gpu", read_catalogue(), ids=lambda gpu: gpu.name)
def test_every_number_has_a_basis_and_confirmed_ones_a_source(gpu):
    given_numbers = {name for name in NUMBERS if getattr(gpu, name) is not None}
    assert gpu.basis.keys() == given_numbers
    assert set(gpu.basis.values()) <= {"confirmed", "derived", "recalled"}
    assert "confirmed" not in gpu.basis.values() or gpu.sources
    assert all(getattr(gpu, name) > 0 for name in given_numbers)


@pytest.mark.parametrize("gpu", read_catalogue(), ids=lambda gpu: gpu.name)
def test_every_spelling_in_the_catalogue_finds_its_row(gpu):
    for spelling in (gpu.name, gpu.short_name, *gpu.aliases):
        assert find_gpu(spelling) is gpu
        assert find_gpu(spelling.upper()) is gpu
        assert find_gpu(spelling.lower().replace(" ", "-")) is gpu


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("4090", "NVIDIA GeForce RTX 4090"),
        ("rtx 4090", "NVIDIA GeForce RTX 4090"),
        ("RTX4090", "NVIDIA GeForce RTX 4090"),
        ("geforce-rtx-4090", "NVIDIA GeForce RTX 4090"),
        ("4070ti super", "NVIDIA GeForce RTX 4070 Ti SUPER"),
        ("a100 80gb", "NVIDIA A100 80GB SXM"),
        ("a100-80gb", "NVIDIA A100 80GB SXM"),
        ("h100", "NVIDIA H100 80GB SXM (HBM3)"),
        ("h100 pcie", "NVIDIA H100 80GB PCIe"),
        ("t4", "NVIDIA Tesla T4"),
        ("l40", "NVIDIA L40"),
        ("L40S", "NVIDIA L40S"),
        ("m3 max", "Apple M3 Max"),
        # as nvidia-smi spells them
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB SXM"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB SXM (HBM3)"),
        ("NVIDIA GeForce RTX 3060", "NVIDIA GeForce RTX 3060 12GB"),
        ("NVIDIA RTX 6000 Ada Generation", "NVIDIA RTX 6000 Ada"),
        ("NVIDIA H200", "NVIDIA H200 SXM"),
        ("Tesla V100-SXM2-16GB", "NVIDIA Tesla V100 16GB"),
    ],
)
def test_names_as_people_write_them(name, expected):
    assert find_gpu(name).name == expected


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("a100", ["A100 40GB", "A100 80GB SXM", "A100 80GB PCIe"]),
        ("v100", ["V100 16GB", "V100 32GB"]),
        ("3080", ["RTX 3080 10GB", "RTX 3080 12GB", "RTX 3080 Ti"]),
    ],
)
def test_ambiguous_names_are_answered_with_the_candidates(name, candidates):
    with pytest.raises(QtoolError, match=f"names {len(candidates)} GPUs") as raised:
        find_gpu(name)
    assert raised.value.kind == "usage"
    assert all(f"'{candidate}'" in raised.value.hint for candidate in candidates)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("rtx 4091", "the nearest: 'RTX 4090'"),
        ("H1000", "H100 NVL"),
        ("mi300", "the nearest: 'AMD Instinct MI300X'"),
        *((name, "names are such as '4090'") for name in ("", "rtx", "24", "nonsense")),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(name, nearest):
    with pytest.raises(QtoolError, match="is not in the catalogue") as raised:
        find_gpu(name)
    assert raised.value.kind == "usage"
    assert nearest in raised.value.hint
    assert ("MI" in raised.value.hint) == (name == "mi300")  # not what has nothing in common


@pytest.mark.parametrize("name", ["24GB", "24 gib", " 24.0GB "])
def test_a_size_is_any_gpu_with_so_much(name):
    assert resolve_gpus([name]) == (vram_class(24),)


@pytest.mark.parametrize(
    ("name", "gib"), [("512MB", 0.5), ("0.5 GiB", 0.5), ("1TB", 1024), ("1.5 TiB", 1536)]
)
def test_a_size_may_have_another_unit(name, gib):
    (found,) = resolve_gpus([name])
    assert (found.memory_gb, found.memory_mib) == (gib, gib * 1024)


@pytest.mark.parametrize("name", ["0GB", "0.1GB", "24MB", "99999TB"])
def test_a_size_that_no_gpu_has_is_refused_with_the_limits(name):
    with pytest.raises(QtoolError, match="expected a size from 256MB to 1024TB") as raised:
        resolve_gpus([name])
    assert raised.value.kind == "usage"


@pytest.mark.parametrize("name", ["a100 24gb", "24", "24 kB"])
def test_what_is_not_quite_a_size_is_a_name(name):
    with pytest.raises(QtoolError, match="catalogue"):
        resolve_gpus([name])


def test_the_machine_s_own_memory_is_no_gpu_without_kernels():
    host = replace(vram_class(24), vendor=gpus.HOST_VENDOR)
    assert not host.lacks_kernels


# -- where qtool's kernels run ---------------------------------------------------------------------


def test_what_the_kernels_need_is_what_they_say_themselves():
    from cupy_kernels import OLDEST_COMPUTE_CAPABILITY

    assert gpus.OLDEST_COMPUTE_CAPABILITY == OLDEST_COMPUTE_CAPABILITY


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("T4", False),
        ("RTX 4090", False),
        ("RTX 5090", False),  # 12.0 is newer than 7.5
        ("V100 16GB", True),
        ("P40", True),
        ("MI300X", True),
        ("M3 Max", True),
        ("Intel Arc B580", True),
        ("24GB", False),
    ],
)
def test_kernels_run_on_nvidia_gpus_from_turing_on(name, lacks):
    (gpu,) = resolve_gpus([name])
    assert gpu.lacks_kernels == lacks


def test_a_gpu_of_this_machine_that_is_not_in_the_catalogue_is_not_judged(nvidia_smi):
    nvidia_smi("0, [N/A], 49140, 48900, NVIDIA GeForce RTX 9090")
    (new,) = local_gpus()
    assert not new.lacks_kernels


@given(st.text(max_size=30))
def test_any_text_finds_a_gpu_or_is_a_usage_error(name):
    try:
        assert find_gpu(name) in read_catalogue()
    except QtoolError as error:
        assert error.kind == "usage"


# -- usable memory --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "visible_gib"),
    [
        ("T4", 14.563),
        ("L4", 22.161),
        ("A10G", 22.184),
        ("A100 40GB", 39.494),
        ("A100 80GB SXM", 79.15),
        ("RTX 6000 Ada", 48508 / 1024),
        ("B200", 182642 / 1024),
        ("H200", 143155 / 1024),
    ],
)
def test_usable_memory_is_the_least_that_was_logged(name, visible_gib):
    assert find_gpu(name).usable_bytes == pytest.approx(visible_gib * GIB, abs=MIB)


def test_usable_memory_of_others_follows_the_rule():
    small = Gpu("small", "NVIDIA", memory_gb=24, memory_mib=24564)
    large = Gpu("large", "NVIDIA", memory_gb=80, memory_mib=81559)
    assert small.usable_bytes == int(24564 * MIB * 0.985)
    assert large.usable_bytes == (81559 - 768) * MIB
    assert Gpu("sold", "Intel", memory_gb=32, memory_mib=None).usable_bytes == int(32 * GIB * 0.985)


@pytest.mark.parametrize("gpu", read_catalogue(), ids=lambda gpu: gpu.name)
def test_usable_memory_is_below_what_is_sold(gpu):
    assert 0.6 * gpu.memory_gb * GIB < gpu.usable_bytes < gpu.memory_gb * GIB


def test_recalled_memory_is_known_as_such():
    assert find_gpu("RTX 4060").memory_is_recalled
    assert not find_gpu("RTX 4090").memory_is_recalled
    assert not find_gpu("RTX 2080 Ti").memory_is_recalled  # its visible total was logged
    assert not vram_class(24).memory_is_recalled


@given(st.floats(1, 1000), st.floats(1, 1000))
def test_larger_memory_offers_more_but_for_the_step_between_the_rules(a, b):
    low, high = sorted((a, b))
    step = 0.1 * GIB  # at 48 GiB the rule changes from a share to a fixed loss
    assert vram_class(low).usable_bytes <= vram_class(high).usable_bytes + step


# -- this machine ---------------------------------------------------------------------------------


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a program named nvidia-smi on the PATH that prints what it is told."""

    def install(stdout, exit_code=0):
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\ncat <<'END'\n{stdout}\nEND\nexit {exit_code}\n")
        script.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return install


def test_local_gpus_have_the_memory_that_is_free(nvidia_smi):
    nvidia_smi(
        "0, Disabled, 81920, 61440, NVIDIA A100-SXM4-80GB\n"
        "1, [N/A], 49140, 48900, NVIDIA GeForce RTX 9090"
    )
    busy, new = local_gpus()
    assert busy.usable_bytes == 61440 * MIB
    assert busy.bandwidth_gb_s == find_gpu("a100 80gb").bandwidth_gb_s
    assert not busy.memory_is_recalled
    assert new.usable_bytes == int(49140 * MIB * 0.985) and new.bandwidth_gb_s is None


def test_auto_names_the_local_gpus_and_equal_ones_once(nvidia_smi):
    lines = [
        f"{n}, Disabled, 81559, {(81000, 81000, 900)[n]}, NVIDIA H100 80GB HBM3" for n in range(3)
    ]
    nvidia_smi("\n".join(lines))
    gpus = resolve_gpus(["auto", "4090", "rtx 4090"])
    assert [(gpu.name, gpu.free_mib) for gpu in gpus] == [
        ("NVIDIA H100 80GB HBM3", 81000),
        ("NVIDIA H100 80GB HBM3", 900),
        ("NVIDIA GeForce RTX 4090", None),
    ]


@pytest.mark.parametrize(
    ("stdout", "exit_code"),
    [("", 0), ("0, [N/A], [N/A], [N/A], NVIDIA GB10", 0), ("broken driver", 9)],
)
def test_no_local_gpu_is_an_error_that_says_why(nvidia_smi, stdout, exit_code):
    nvidia_smi(stdout, exit_code)
    with pytest.raises(QtoolError, match=r"gpu='auto': nvidia-smi") as raised:
        local_gpus()
    assert raised.value.kind == "not_found"


def test_a_gpu_without_memory_of_its_own_moves_no_number(nvidia_smi):
    nvidia_smi(
        "0, [N/A], [N/A], [N/A], NVIDIA GB10\n"
        "1, Disabled, 81559, [Insufficient Permissions], NVIDIA H100 80GB HBM3\n"
        "2, [N/A], 24564, 24000, NVIDIA GeForce RTX 4090"
    )
    assert [gpu.free_mib for gpu in local_gpus()] == [24000]
    assert [(gpu.index, gpu.has_memory) for gpu in list_gpus()] == [
        (0, False),
        (1, False),
        (2, True),
    ]


def test_of_a_gpu_that_mig_divides_nobody_has_the_whole_memory(nvidia_smi):
    nvidia_smi(
        "0, Disabled, 81559, 81000, NVIDIA H100 80GB HBM3\n"
        "1, Enabled, 81559, 81000, NVIDIA H100 80GB HBM3"
    )
    with pytest.raises(QtoolError, match=r"MIG divides GPU 1 \(NVIDIA H100 80GB HBM3\)") as raised:
        resolve_gpus(["auto"])
    assert raised.value.kind == "unsupported"
    assert "vram='GIB'" in raised.value.hint


def test_no_nvidia_smi_is_an_error_that_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    said = r"no NVIDIA driver was found \(nvidia-smi is not installed\)"
    with pytest.raises(QtoolError, match=said) as raised:
        local_gpus()
    assert "gpu='RTX 4090'" in raised.value.hint
