"""Each check says what it found and what helps; whatever breaks, the report goes on."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest

from qtool.doctor import Check, gpu, hub, machine, model, packages, round_trip, run_checks
from qtool.formats.precisions import QuantFormat
from qtool.runtime import requirements
from tests.cli.running import run
from tests.hub_server import TOKEN, HubServer, hub_server
from tests.inspection.folders import quantized_llama
from tests.planner.foreign import write_fp8
from tests.tiny_models import write_llama

__all__ = ["hub_server"]  # the fixture

NO_GPU = gpu.NvidiaSmi()
H200 = gpu.NvidiaSmi((gpu.Gpu("NVIDIA H200", 143771, 143000, "9.0"),), "580.95.05", "13.0")
CUDA_12 = gpu.NvidiaSmi(H200.gpus, "550.54.14", "12.4")

ROWS = (
    "NVIDIA H200, 143771, 143155, 9.0, 580.95.05, GPU-aa01, Disabled\n"
    "NVIDIA L4, 23034, 100, 8.9, 580.95.05, GPU-bb02, [N/A]\n"
)
BANNER = """
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 580.95.05              Driver Version: 580.95.05      CUDA Version: 13.0     |
+-----------------------------------------+------------------------+----------------------+
"""


DIVIDED_ROWS = (
    "NVIDIA A100-SXM4-40GB, 40960, 40000, 8.0, 580.95.05, GPU-cc03, Enabled\n"
    "NVIDIA L4, 23034, 22000, 8.9, 580.95.05, GPU-bb02, [N/A]\n"
)
LISTING = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-cc03)
  MIG 3g.20gb     Device  0: (UUID: MIG-11aa)
  MIG 1c.1g.5gb   Device  1: (UUID: MIG-22bb)
GPU 1: NVIDIA L4 (UUID: GPU-bb02)
"""
MIG_TABLE = """
| MIG devices:                                                                            |
+------------------+----------------------------------+-----------+-----------------------+
| GPU  GI  CI  MIG |                     Memory-Usage |        Vol|      Shared           |
|==================+==================================+===========+=======================|
|  0    1   0   0  |              37MiB / 19968MiB    | 42      0 |  3   0    2    0    0 |
|                  |               0MiB / 32767MiB    |           |                       |
+------------------+----------------------------------+-----------+-----------------------+
|  0    9   0   1  |            4000MiB /  4864MiB    | 14      0 |  1   0    0    0    0 |
+------------------+----------------------------------+-----------+-----------------------+
"""


def divided() -> gpu.NvidiaSmi:
    smi = gpu.parse_nvidia_smi(DIVIDED_ROWS, BANNER)
    return gpu.with_slices(smi, LISTING, BANNER + MIG_TABLE)


def only(checks) -> Check:
    (check,) = checks
    return check


def by_name(checks) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test asks the real Hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def set_versions(monkeypatch, **versions):
    """Packages have these versions; others are as installed. None: not installed."""
    chosen = {name.replace("_", "-"): version for name, version in versions.items()}
    real = packages.installed_version

    def version_of(name):
        return chosen[name] if name in chosen else real(name)

    monkeypatch.setattr(packages, "installed_version", version_of)
    monkeypatch.setattr(gpu, "installed_version", version_of)


class TestTheWholeReport:
    def test_covers_every_section_and_passes_here(self):
        checks = list(run_checks())
        sections = dict.fromkeys(section for section, _ in checks)
        assert list(sections) == ["Software", "Machine", "GPU", "Hub", "Round trip"]
        failed = [check for _, check in checks if check.status == "fail"]
        assert failed == []

    def test_a_check_that_breaks_is_a_line_and_the_others_go_on(self, monkeypatch):
        def explode():
            raise RuntimeError("no such thing")
            yield

        monkeypatch.setattr(machine, "check_memory", explode)
        found = by_name(check for _, check in run_checks())
        assert found["memory"].status == "fail"
        assert "RuntimeError: no such thing" in found["memory"].found
        assert found["memory"].fix
        assert {"disk, here", "cpu"} <= found.keys()

    @pytest.mark.parametrize("path", ["CPUINFO", "MEMINFO"])
    def test_a_missing_proc_file_is_a_line(self, path, monkeypatch, tmp_path):
        monkeypatch.setattr(machine, path, tmp_path / "missing")
        statuses = [check.status for _, check in run_checks()]
        assert statuses.count("fail") == 1

    def test_every_warning_and_failure_says_what_helps(self, monkeypatch, tmp_path):
        set_versions(monkeypatch, numpy="1.0", torch=None, numba=None)
        monkeypatch.setattr(machine, "ENOUGH_DISK_BYTES", 1 << 60)
        monkeypatch.setattr(machine, "ENOUGH_MEMORY_BYTES", 1 << 60)
        checks = [check for _, check in run_checks(str(tmp_path))]
        bad = [check for check in checks if check.status in ("warn", "fail")]
        assert len(bad) >= 6
        assert all(check.fix for check in bad)


class TestPackages:
    def test_minimum_versions_are_those_of_the_project(self):
        text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
        project = tomllib.loads(text)["project"]
        lines = [("", line) for line in project["dependencies"]]
        extras = project["optional-dependencies"]
        for extra in ("run", "finetune"):
            lines += [(extra, line) for line in extras[extra] if not line.startswith("qtool[")]
        wanted = {(extra, line.partition(",")[0]) for extra, line in lines}  # without upper bounds
        listed = {(r.extra, f"{r.package}>={r.minimum}") for r in packages.REQUIREMENTS}
        assert listed == wanted

    def test_a_missing_base_package_fails_and_a_missing_extra_does_not(self, monkeypatch):
        set_versions(monkeypatch, numba=None, torch=None)
        found = by_name(packages.check_packages())
        assert found["numba"].status == "fail" and "pip install" in found["numba"].fix
        assert found["torch"].status == "info" and 'pip install "qtool[run]"' in found["torch"].fix

    def test_what_needs_an_extra_is_said(self, monkeypatch):
        set_versions(monkeypatch, peft=None, trl=None, datasets="3.9")
        found = by_name(packages.check_packages())
        assert found["peft"].status == found["trl"].status == "info"
        assert "generate --adapter, finetune and the check of merge" in found["peft"].found
        assert found["trl"].found == "not installed; finetune needs it"
        assert found["trl"].fix == 'pip install "qtool[finetune]"'
        assert found["datasets"].status == "fail" and "4.0" in found["datasets"].found

    @pytest.mark.parametrize(
        ("version", "status"),
        [("1.25.9", "fail"), ("1.26", "ok"), ("1.26.0", "ok"), ("2.0.0rc1", "ok"), ("10.1", "ok")],
    )
    def test_versions_are_compared_as_numbers(self, version, status, monkeypatch):
        set_versions(monkeypatch, numpy=version)
        assert by_name(packages.check_packages())["numpy"].status == status

    def test_nothing_heavy_is_imported(self):
        script = (
            "import sys, json, os\n"
            "os.environ['HF_HUB_OFFLINE'] = '1'\n"
            "from qtool.doctor import packages, gpu, machine\n"
            "smi = gpu.ask_nvidia_smi()\n"
            "for check in (packages.check_packages(), gpu.check_gpus(smi), gpu.check_cupy(smi),\n"
            "              gpu.check_torch_build(smi), machine.check_cpu()): list(check)\n"
            "print({'torch', 'transformers', 'cupy', 'numba'} & set(sys.modules))\n"
        )
        import sys

        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.stdout.strip() == "set()", done.stderr


class TestGpu:
    def test_nvidia_smi_s_words_are_read(self):
        smi = gpu.parse_nvidia_smi(ROWS, BANNER)
        assert smi.gpus == (
            gpu.Gpu("NVIDIA H200", 143771, 143155, "9.0", "GPU-aa01"),
            gpu.Gpu("NVIDIA L4", 23034, 100, "8.9", "GPU-bb02"),
        )
        assert (smi.driver, smi.cuda, smi.cuda_major) == ("580.95.05", "13.0", 13)

    def test_memory_that_others_hold_is_a_warning(self):
        found = by_name(gpu.check_gpus(gpu.parse_nvidia_smi(ROWS, BANNER)))
        assert found["driver"].status == found["gpu 0"].status == "ok"
        assert found["gpu 1"].status == "warn" and "another process" in found["gpu 1"].fix

    def test_a_gpu_without_memory_of_its_own_is_fine(self):
        smi = gpu.parse_nvidia_smi(
            "NVIDIA GB10, [N/A], [N/A], 12.1, 580.95.05, GPU-1, [N/A]\n", BANNER
        )
        check = by_name(gpu.check_gpus(smi))["gpu 0"]
        assert check.status == "ok" and "shares the host's memory" in check.found

    def test_no_driver_is_a_fact(self, monkeypatch):
        monkeypatch.setattr(gpu.shutil, "which", lambda program: None)
        smi = gpu.ask_nvidia_smi()
        assert smi == NO_GPU
        check = only(gpu.check_gpus(smi))
        assert check.status == "info" and "install its driver" in check.fix

    @pytest.mark.parametrize(
        ("script", "words"),
        [
            (
                "echo 'Driver/library version mismatch' >&2; exit 18",
                "Driver/library version mismatch",
            ),
            ("echo 'No devices were found'", "ValueError"),
            ("exit 9", "exit code 9"),
        ],
    )
    def test_a_failing_nvidia_smi_fails_with_its_words(self, script, words, monkeypatch, tmp_path):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        check = only(gpu.check_gpus(gpu.ask_nvidia_smi()))
        assert check.status == "fail" and words in check.found and check.fix

    def test_a_working_nvidia_smi_is_asked_both_ways(self, monkeypatch, tmp_path):
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f"#!/bin/sh\ncase \"$1\" in --query*) printf '{ROWS}';; *) echo '{BANNER}';; esac\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        assert gpu.ask_nvidia_smi() == gpu.parse_nvidia_smi(ROWS, BANNER)

    @pytest.mark.parametrize(
        ("smi", "cuda", "status", "fix"),
        [
            (H200, None, "warn", "whl/cu130"),
            (CUDA_12, None, "warn", "whl/cu126"),
            (CUDA_12, "13.0", "warn", "update the driver"),
            (H200, "12.8", "ok", ""),
            (H200, "13.0", "ok", ""),
        ],
    )
    def test_torch_must_be_built_for_the_driver(self, smi, cuda, status, fix, monkeypatch):
        set_versions(monkeypatch, torch="2.13.0")
        monkeypatch.setattr(gpu, "torch_cuda_version", lambda: cuda)
        check = only(gpu.check_torch_build(smi))
        assert check.status == status and fix in check.fix

    def test_torch_s_build_does_not_matter_without_a_gpu(self):
        assert list(gpu.check_torch_build(NO_GPU)) == []

    def test_torch_s_own_version_file_is_read(self, monkeypatch, tmp_path):
        torch = pytest.importorskip("torch")
        assert gpu.torch_cuda_version() == torch.version.cuda
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('not imported')")
        text = "__version__ = '2.13.0'\ndebug = False\ncuda: Optional[str] = '13.0'\n"
        (tmp_path / "torch" / "version.py").write_text(text)
        spec = type("Spec", (), {"origin": str(tmp_path / "torch" / "__init__.py")})
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: spec)
        assert gpu.torch_cuda_version() == "13.0"


class TestMig:
    @pytest.fixture(autouse=True)
    def not_set(self, monkeypatch):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def test_slices_are_read_with_their_memory(self):
        first, second = divided().gpus
        assert first.slices == (
            gpu.Slice("3g.20gb", "MIG-11aa", 19968, 19931),
            gpu.Slice("1c.1g.5gb", "MIG-22bb", 4864, 864),
        )
        assert first.is_divided and not second.is_divided and second.slices == ()

    def test_each_slice_is_a_line(self):
        found = by_name(gpu.check_gpus(divided()))
        assert "MIG divides it into 2 slices" in found["gpu 0"].found
        assert "MiB" not in found["gpu 0"].found  # which no program can have
        assert found["gpu 0 mig 0"].status == "ok"
        assert found["gpu 0 mig 0"].found == "3g.20gb: 19,931 MiB free of 19,968 MiB, MIG-11aa"
        assert found["gpu 0 mig 1"].status == "warn"
        assert found["visible devices"].status == "info"
        assert "a program sees one slice" in found["visible devices"].found
        assert "CUDA_VISIBLE_DEVICES=MIG-11aa" in found["visible devices"].fix

    def test_a_table_of_another_form_leaves_the_memory_unknown(self):
        smi = gpu.with_slices(gpu.parse_nvidia_smi(DIVIDED_ROWS, BANNER), LISTING, BANNER)
        assert smi.gpus[0].slices[0] == gpu.Slice("3g.20gb", "MIG-11aa")
        assert by_name(gpu.check_gpus(smi))["gpu 0 mig 0"].found == "3g.20gb, MIG-11aa"

    def test_no_slice_is_a_warning(self):
        smi = gpu.with_slices(gpu.parse_nvidia_smi(DIVIDED_ROWS, BANNER), "", BANNER)
        check = by_name(gpu.check_gpus(smi))["gpu 0"]
        assert check.status == "warn" and "no slice" in check.found and "-cgi" in check.fix

    def test_weights_are_compared_with_what_a_program_can_have(self):
        assert divided().free_mib == (19931, 864, 22000)

    def test_a_working_nvidia_smi_is_asked_for_slices(self, monkeypatch, tmp_path):
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f"#!/bin/sh\ncase \"$1\" in --query*) printf '{DIVIDED_ROWS}';;\n"
            f"-L) printf '{LISTING}';;\n*) cat <<'END'\n{BANNER}{MIG_TABLE}END\n;; esac\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        assert gpu.ask_nvidia_smi() == divided()

    @pytest.mark.parametrize(
        ("asked", "status", "words"),
        [
            ("1", "ok", "GPU 1"),
            ("GPU-bb", "ok", "NVIDIA L4"),
            ("MIG-22bb", "ok", "MIG 1c.1g.5gb"),
            ("1,7", "warn", "7 is no GPU here"),
            ("7", "warn", "programs see none"),
            ("", "warn", "programs see none"),
            ("-1", "warn", "programs see none"),
            ("MIG-11aa,MIG-22bb", "warn", "one slice at a time"),
        ],
    )
    def test_what_the_variable_names(self, asked, status, words, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked)
        check = by_name(gpu.check_gpus(divided()))["visible devices"]
        assert check.status == status and words in check.found
        assert bool(check.fix) == (status == "warn")

    def test_nothing_is_said_where_nothing_is_chosen(self):
        assert "visible devices" not in by_name(gpu.check_gpus(H200))


class TestCupy:
    def test_not_installed_is_a_fact(self, monkeypatch):
        set_versions(monkeypatch, cupy_cuda12x=None, cupy_cuda13x=None, cupy=None)
        check = only(gpu.check_cupy(H200))
        assert check.status == "info" and 'pip install "qtool[cuda13]"' in check.fix
        assert only(gpu.check_cupy(NO_GPU)).fix == ""  # it would be of no use

    def test_two_at_once_fail(self, monkeypatch):
        set_versions(monkeypatch, cupy_cuda12x="14.0", cupy_cuda13x="14.0", cupy=None)
        check = only(gpu.check_cupy(H200))
        assert check.status == "fail" and "pip uninstall" in check.fix

    def test_a_newer_cuda_than_the_driver_s_fails(self, monkeypatch):
        set_versions(monkeypatch, cupy_cuda12x=None, cupy_cuda13x="14.0", cupy=None)
        found = by_name(gpu.check_cupy(CUDA_12))
        assert found["cupy"].status == "fail" and "qtool[cuda12]" in found["cupy"].fix

    def test_missing_cuda_libraries_fail_with_the_command_that_installs_them(
        self, monkeypatch, tmp_path
    ):
        set_versions(monkeypatch, cupy_cuda12x=None, cupy_cuda13x="14.0", cupy=None)
        monkeypatch.setattr(gpu.sysconfig, "get_path", lambda name: str(tmp_path))
        monkeypatch.setenv("CUDA_PATH", str(tmp_path / "cuda"))
        monkeypatch.setattr(gpu.ctypes.util, "find_library", lambda name: None)
        check = by_name(gpu.check_cupy(H200))["cuda libraries"]
        assert check.status == "fail" and "libnvrtc.so" in check.found
        assert 'pip install "qtool[cuda13]"' in check.fix

    @pytest.mark.parametrize("place", ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "cuda/lib64"])
    def test_libraries_are_found_where_they_are_installed(self, place, monkeypatch, tmp_path):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "libnvrtc.so.13").touch()
        monkeypatch.setattr(gpu.sysconfig, "get_path", lambda name: str(tmp_path))
        monkeypatch.setenv("CUDA_PATH", str(tmp_path / "cuda"))
        monkeypatch.setattr(gpu.ctypes.util, "find_library", lambda name: None)
        assert gpu.find_cuda_library("nvrtc", 13) == tmp_path / place / "libnvrtc.so.13"
        assert gpu.find_cuda_library("nvrtc", 12) is None

    def test_a_library_of_the_system_counts_if_it_is_of_the_right_version(
        self, monkeypatch, tmp_path
    ):
        monkeypatch.setattr(gpu.sysconfig, "get_path", lambda name: str(tmp_path))
        monkeypatch.setenv("CUDA_PATH", str(tmp_path))
        monkeypatch.setattr(gpu.ctypes.util, "find_library", lambda name: f"lib{name}.so.12")
        assert gpu.find_cuda_library("nvrtc", 12) == Path("libnvrtc.so.12")
        assert gpu.find_cuda_library("nvrtc", 13) is None


X86 = "processor\t: 0\nmodel name\t: AMD EPYC 9654\nflags\t\t: fpu avx2 avx512f avx512_bf16 xyz\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimdhp bf16 i8mm\nCPU implementer\t: 0x41\n"
OLD = "model name\t: old\nflags\t\t: fpu sse2\n"


class TestMachine:
    def test_vector_features_are_read(self):
        assert machine.read_cpu_features(X86) == (
            "AMD EPYC 9654",
            ("AVX2", "AVX-512F", "AVX-512 BF16"),
        )
        assert machine.read_cpu_features(ARM)[1] == ("NEON", "NEON fp16", "BF16", "I8MM")

    @pytest.mark.parametrize(("text", "status"), [(X86, "ok"), (ARM, "ok"), (OLD, "warn")])
    def test_a_cpu_without_wide_vectors_is_a_warning(self, text, status, monkeypatch, tmp_path):
        monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
        machine.CPUINFO.write_text(text)
        assert by_name(machine.check_cpu())["cpu"].status == status

    def test_a_container_s_limits_count(self, enough_memory, monkeypatch, tmp_path):
        monkeypatch.setattr(machine, "CGROUP", tmp_path)
        (tmp_path / "cpu.max").write_text("50000 100000\n")
        (tmp_path / "memory.max").write_text(f"{1 << 30}\n")
        (tmp_path / "memory.current").write_text(f"{1 << 29}\n")
        assert machine.usable_cores() == (0.5, "container limit")
        assert machine.available_memory_bytes() == (1 << 29, 1 << 30)
        assert only(machine.check_memory()).status == "warn"

    def test_no_limit_is_no_limit(self, monkeypatch, tmp_path):
        monkeypatch.setattr(machine, "CGROUP", tmp_path)
        (tmp_path / "cpu.max").write_text("max 100000\n")
        (tmp_path / "memory.max").write_text("max\n")
        (tmp_path / "memory.current").write_text("1\n")
        assert machine.usable_cores()[0] >= 1
        assert machine.available_memory_bytes()[1] > 1 << 30

    def test_a_folder_that_does_not_exist_yet_is_on_some_disk(self, tmp_path):
        check = machine.check_free_space("disk", tmp_path / "a" / "b", "elsewhere")
        assert "GiB free" in check.found

    def test_a_full_disk_is_a_warning(self, tmp_path, monkeypatch):
        monkeypatch.setattr(machine, "ENOUGH_DISK_BYTES", 1 << 60)
        check = machine.check_free_space("disk", tmp_path, "set HF_HOME to a larger disk")
        assert check.status == "warn" and "HF_HOME" in check.fix


class TestHub:
    @pytest.fixture
    def online(self, monkeypatch, hub_server: HubServer):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub_server.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        return hub_server

    def test_offline_is_a_fact_and_nobody_is_asked(self, hub_server, monkeypatch):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", hub_server.url)
        monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
        found = by_name(hub.check_hub())
        assert found["hub"].status == "info" and found["token"].status == "ok"
        assert hub_server.requests == []

    def test_an_endpoint_that_answers_is_fine(self, online):
        found = by_name(hub.check_hub())
        assert found["hub"].status == "ok" and online.url in found["hub"].found
        assert found["token"].status == "info" and "hf auth login" in found["token"].fix

    def test_an_endpoint_that_does_not_answer_is_a_warning(self, online):
        online.stop_answering()
        found = by_name(hub.check_hub())
        assert found["hub"].status == "warn"
        assert "HF_ENDPOINT" in found["hub"].fix and "HF_HUB_OFFLINE" in found["hub"].fix

    @pytest.mark.parametrize(
        ("answer", "status"), [(200, "ok"), (401, "warn"), (403, "warn"), (500, "info")]
    )
    def test_a_token_is_tried(self, answer, status, online, monkeypatch):
        asked = []

        class Session:
            def get(self, url, headers=None, timeout=None):
                asked.append((url, headers))
                return type("Response", (), {"status_code": answer})

        monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
        monkeypatch.setattr("huggingface_hub.get_session", Session)
        found = by_name(hub.check_hub())
        assert found["token"].status == status
        assert asked[-1] == (f"{online.url}/api/whoami-v2", {"authorization": f"Bearer {TOKEN}"})
        assert TOKEN not in repr(found)


def set_model_type(folder, model_type):
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = model_type
    known = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(known))


class TestModel:
    @pytest.fixture
    def folder(self, tmp_path):
        parts, _ = quantized_llama(QuantFormat("nf4-dq"), hidden=24)  # an even head
        parts.other_files["tokenizer.json"] = b"{}"
        parts.other_files["tokenizer_config.json"] = b'{"pad_token": "<pad>"}'
        return parts.write(tmp_path / "model")

    def test_a_sound_model_has_nothing_to_fix(self, folder):
        found = by_name(model.check_model(str(folder), H200))
        checks = ("model", "architecture", "size", "compute dtype", "tokenizer", "pad token")
        assert tuple(found) == checks
        assert {check.status for check in found.values()} == {"ok"}
        assert found["architecture"].found == "llama: LlamaForCausalLM"

    @pytest.mark.parametrize(
        ("model_type", "found", "fix"),
        [
            ("llamma", "model_type 'llamma', which this transformers does not know", "upgrade"),
            ("llamma", "(the nearest that it knows: llama, ", "upgrade"),
            ("t5", "t5 models do not generate text", "decoder"),
            (None, "says no model_type", "fetch config.json again"),
        ],
    )
    def test_a_model_type_that_does_not_run_fails_as_it_would_to_generate(
        self, folder, model_type, found, fix
    ):
        set_model_type(folder, model_type)
        checks = by_name(model.check_model(str(folder), NO_GPU))
        check = checks["architecture"]
        assert check.status == "fail" and found in check.found and fix in check.fix
        assert checks["size"].status == "ok"  # what else there is to know is said too
        ran = run("generate", folder, "Hi", "--device", "cpu", "--json")
        assert ran.exit_code == 1
        assert (ran.error["message"], ran.error["hint"]) == (check.found, check.fix)

    def test_a_model_type_that_only_transformers_knows_is_a_warning(self, folder):
        set_model_type(folder, "helium")
        checks = by_name(model.check_model(str(folder), NO_GPU))
        assert checks["architecture"].found == "helium: HeliumForCausalLM"
        assert checks["layers"].status == "warn" and "helium" in checks["layers"].found

    def test_the_nearest_model_types_are_named_as_estimate_does(self, folder):
        set_model_type(folder, "llamma")
        layers = by_name(model.check_model(str(folder), NO_GPU))["layers"]
        error = run("estimate", folder, "--json").error  # packed, its size alone says nothing
        assert "the nearest of them: llama" in error["message"]
        assert error["message"].removeprefix(f"{folder}: ") in layers.found
        assert error["hint"] in layers.fix

    def test_a_mixture_is_a_warning_where_quantize_refuses_it(self, test_data):
        folder = test_data / "models/tinymoe-6m"
        check = by_name(model.check_model(str(folder), NO_GPU))["layers"]
        assert check.status == "warn" and "8 experts per layer, which quantize" in check.found
        ran = run("quantize", folder, "--dry-run", "--json")
        assert ran.exit_code == 1 and "mixture of 8 experts" in ran.error["message"]

    def test_a_bare_config_is_enough_for_estimate(self, folder):
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        found = by_name(model.check_model(str(folder), NO_GPU))
        assert tuple(found) == ("model", "architecture")
        assert found["model"].status == "warn" and "estimate" in found["model"].fix
        assert run("estimate", folder, "--json").exit_code == 0

    def test_weights_in_other_formats_fail(self, folder):
        for file in folder.glob("*.safetensors*"):
            file.rename(folder / "pytorch_model.bin")
        check = only(model.check_model(str(folder), NO_GPU))
        assert check.status == "fail" and "pickles" in check.found and "save_" in check.fix

    def test_small_numbers_are_not_shown_as_nothing(self, folder):
        found = by_name(model.check_model(str(folder), H200))
        num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        [mib] = re.findall(r": nf4-dq, ([\d.]+) MiB of weights$", found["model"].found)
        assert 0 < float(mib) <= num_bytes / (1 << 20) + 0.01
        assert found["size"].found.startswith("weights take under 1 % of")

    def test_without_transformers_the_model_type_is_not_judged(self, folder, monkeypatch):
        monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
        check = by_name(model.check_model(str(folder), NO_GPU))["architecture"]
        assert check.status == "info" and check.found.startswith("llama; whether transformers")
        assert check.fix == 'pip install "qtool[run]"'

    def test_float32_products_are_a_warning(self, folder):
        config = (folder / "config.json").read_text().replace('"bfloat16"', '"float32"')
        (folder / "config.json").write_text(config)
        check = by_name(model.check_model(str(folder), NO_GPU))["compute dtype"]
        assert check.status == "warn" and "bnb_4bit_compute_dtype" in check.fix

    def test_no_pad_token_is_no_warning_since_qtool_needs_none(self, folder):
        (folder / "tokenizer_config.json").write_text('{"pad_token": null}')
        check = by_name(model.check_model(str(folder), NO_GPU))["pad token"]
        assert check.status == "info" and "eos_token" in check.fix

    def test_a_missing_tokenizer_is_a_warning(self, folder):
        (folder / "tokenizer.json").unlink()
        assert by_name(model.check_model(str(folder), NO_GPU))["tokenizer"].status == "warn"

    def test_a_full_precision_model_that_does_not_fit_should_be_quantized(self, tmp_path):
        write_llama(tmp_path)
        full = gpu.NvidiaSmi((gpu.Gpu("tiny", 1, 0, "9.0"),))
        check = by_name(model.check_model(str(tmp_path), full))["size"]
        assert check.status == "warn" and "qtool quantize" in check.fix

    def test_a_packed_model_that_does_not_fit_should_be_estimated(self, folder):
        full = gpu.NvidiaSmi((gpu.Gpu("tiny", 1, 0, "9.0"),))
        check = by_name(model.check_model(str(folder), full))["size"]
        assert check.status == "warn" and "qtool estimate" in check.fix

    def test_16_bit_weights_that_pose_as_int8_fail(self, tmp_path):
        parts, original = quantized_llama(QuantFormat("int8"))
        original.config["quantization_config"] = parts.quantization | {
            "llm_int8_has_fp16_weight": True
        }
        found = by_name(model.check_model(str(original.write(tmp_path / "m")), NO_GPU))
        assert found["quantization"].status == "fail"

    @pytest.mark.parametrize("entry", [{"quantization_config": {"quant_method": "fp8"}}, {}])
    def test_formats_of_others_fail_as_they_do_where_they_are_to_be_read(self, tmp_path, entry):
        write_fp8(tmp_path, **entry)
        full = gpu.NvidiaSmi((gpu.Gpu("tiny", 1, 0, "9.0"),))
        found = by_name(model.check_model(str(tmp_path), full))
        assert ": fp8, " in found["model"].found
        assert found["quantization"].status == "fail" and "fp8" in found["quantization"].found
        assert "full-precision model" in found["quantization"].fix
        assert "qtool quantize" not in found["size"].fix
        assert run("quantize", tmp_path, "-o", tmp_path / "out", "--dry-run").exit_code == 1

    def test_a_model_that_cannot_be_opened_fails_with_the_reason(self, tmp_path):
        check = only(model.check_model(str(tmp_path), NO_GPU))
        assert check.status == "fail" and check.fix


class TestRoundTrip:
    def test_the_cpu_is_exact(self):
        assert only(round_trip.check_round_trip("cpu")).status == "ok"

    @pytest.mark.parametrize(
        ("method", "output", "wrong"),
        [
            ("quantize_4bit", 4, ["nf4", "fp4"]),
            ("dequantize_4bit", 5, ["nf4", "fp4"]),
            ("quantize_absmax", 1, ["double quant"]),
            ("dequantize_absmax", 3, ["double quant"]),
            ("quantize_int8", 2, ["int8"]),
            ("dequantize_int8", 3, ["int8"]),
        ],
    )
    def test_a_backend_that_is_off_by_one_bit_fails(self, method, output, wrong, monkeypatch):
        from qtool.backends.cpu import CpuBackend

        exact = getattr(CpuBackend, method)

        def off_by_one_bit(self, *arguments):
            result = exact(self, *arguments)
            arguments[output].reshape(-1).view(np.uint8)[0] ^= 1
            return result

        monkeypatch.setattr(CpuBackend, method, off_by_one_bit)
        check = only(round_trip.check_round_trip("cpu"))
        assert check.status == "fail"
        named = re.search(r"reference: (.*)", check.found)
        assert named and named.group(1).split(", ") == wrong
