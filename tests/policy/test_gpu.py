"""Which machines are refused, with which line: every kind of machine, on any machine."""

import contextlib
import io
import sys

import pytest
import torch

from azr.models import model_path
from azr.policy import gpu, load
from azr.policy.gpu import Facts, has_kernels, why_unusable
from azr.policy.policy import ModelError, Policy

CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
# torch's own words: c10/cuda/CUDAFunctions.cpp, torch/csrc/cuda/Module.cpp, torch/cuda/__init__.py
NO_DRIVER = (
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver "
    "from http://www.nvidia.com/Download/index.aspx"
)
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version {}). Please update your GPU driver by "
    "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx "
    "Alternatively, go to: https://pytorch.org to install a PyTorch version that has been compiled with your "
    "version of the CUDA driver."
)
COUNT = (
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices() "
    "that might have already set an error? Error {}"
)
NEW_FOR_CU130 = "pip install torch==2.13.0+cu130 --index-url https://download.pytorch.org/whl/cu130"
NEW_FOR_CU126 = "pip install torch==2.13.0+cu126 --index-url https://download.pytorch.org/whl/cu126"


def facts(torch="2.13.0+cu130", cuda="13.0", **more) -> Facts:
    return Facts(torch, cuda, **more)


@pytest.mark.parametrize(
    "name, capability",
    [("T4", (7, 5)), ("A100", (8, 0)), ("3090", (8, 6)), ("4090", (8, 9)), ("H100", (9, 0)), ("5090", (12, 0))],
)
def test_cards_that_the_pinned_torch_has_kernels_for(name, capability):
    assert why_unusable(facts(name=name, capability=capability, kernels=CU130, driver="580.65.06")) is None


@pytest.mark.parametrize(
    "given, words",
    [
        (
            facts("2.13.0+cpu", None, error="Torch not compiled with CUDA enabled"),
            ["this torch is a CPU build (2.13.0+cpu)", "there is no NVIDIA driver"],
        ),
        (
            facts("2.13.0+cpu", None, error="Torch not compiled with CUDA enabled", driver="580.65.06"),
            ["CPU build", NEW_FOR_CU130],
        ),
        (facts("2.13.0+cpu", None, error="Torch not compiled with CUDA enabled", driver="550.54.15"), [NEW_FOR_CU126]),
        (facts(error=NO_DRIVER), ["torch says: Found no NVIDIA driver on your system;", "docker run --gpus all"]),
        (facts(error=TOO_OLD.format(12080)), ["is too old (found version 12080)", NEW_FOR_CU126]),
        (facts(error=TOO_OLD.format(12020), driver="535.183.01"), [NEW_FOR_CU126]),
        (facts(error=TOO_OLD.format(11040)), ["update the NVIDIA driver to 525 or newer"]),
        (facts("2.16.0+cu132", error=TOO_OLD.format(12080)), [NEW_FOR_CU126]),  # 2.15 has no build for CUDA 12
        (facts("2.11.0+cu130", error=TOO_OLD.format(12080)), [NEW_FOR_CU126]),
        (
            facts(error=COUNT.format("804: forward compatibility was attempted on non supported HW"), driver="535.1.2"),
            ["Error 804: forward compatibility was attempted on non supported HW", NEW_FOR_CU126],
        ),
        (facts(error=COUNT.format("802: system not yet initialized")), ["start nvidia-fabricmanager"]),
        (facts(error="No CUDA GPUs are available", visible=""), ["unset CUDA_VISIBLE_DEVICES"]),
        (facts(error="No CUDA GPUs are available", visible="-1"), ["unset CUDA_VISIBLE_DEVICES"]),
        (facts(error="No CUDA GPUs are available"), ["No CUDA GPUs are available", "nvidia-smi"]),
        (
            facts(name="V100", capability=(7, 0), kernels=CU130, driver="580.65.06"),
            ["torch 2.13.0+cu130 has no kernels for V100 (compute capability 7.0), only for sm_75", NEW_FOR_CU126],
        ),
        (
            facts("2.13.0+cu126", "12.6", name="5090", capability=(12, 0), kernels=CU126, driver="580.65.06"),
            ["5090", NEW_FOR_CU130],
        ),
        (
            facts("2.6.0+cu124", "12.4", name="5090", capability=(12, 0), kernels=CU126, driver="570.86.10"),
            ["update the NVIDIA driver to 580"],
        ),
        (facts(name="K80", capability=(3, 7), kernels=CU130, driver="470.1.1"), ["take a newer card"]),
    ],
)
def test_machines_that_are_refused(given, words):
    line = why_unusable(given)
    assert all(word in line for word in words), line
    assert "\n" not in line and len(line) < 300


def test_a_build_without_local_version_is_named_whole():
    """PyPI's wheel calls itself 2.13.0, so pip would take `torch==2.13.0` for installed and do nothing."""
    assert "torch==2.13.0+cu126 " in why_unusable(facts("2.13.0", error=TOO_OLD.format(12080)))


def test_machine_code_and_ptx():
    assert has_kernels((8, 9), ("sm_80",)) and not has_kernels((8, 0), ("sm_86",))
    assert not has_kernels((9, 0), ("sm_80", "sm_120")) and has_kernels((9, 0), ("sm_90a",))
    assert has_kernels((12, 1), ("sm_90", "compute_120")) and not has_kernels((10, 3), ("compute_120",))
    assert why_unusable(Facts("2.13.0+rocm7", rocm=True, capability=(9, 4), kernels=("gfx942",))) is None


def test_these_facts_are_about_this_machine():
    found = gpu.look()
    assert found.torch == torch.__version__ and (found.error is None) == torch.cuda.is_available()


@pytest.mark.parametrize(
    "error, override, cure",
    [
        ("No compatible CUDA binary found at /x/libbitsandbytes_cuda140.so", None, "pip install -U bitsandbytes"),
        ("No compatible CUDA binary found at /x/libbitsandbytes_cuda99.so", "99", "unset BNB_CUDA_VERSION"),
        ("libcublas.so.13: cannot open shared object file: No such file", None, "install torch again with pip"),
    ],
)
def test_what_bitsandbytes_puts_in_place_of_a_missing_library(monkeypatch, error, override, cure):
    from bitsandbytes import cextension

    monkeypatch.delenv("BNB_CUDA_VERSION", raising=False)
    if override:
        monkeypatch.setenv("BNB_CUDA_VERSION", override)
    monkeypatch.setattr(cextension, "lib", cextension.ErrorHandlerMockBNBNativeLibrary(error))
    line = gpu.why_no_four_bit()
    assert cure in line and f"({error})" in line and "--quantization none" in line and "\n" not in line


def test_without_bitsandbytes_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.cextension", None)
    monkeypatch.delenv("BNB_CUDA_VERSION", raising=False)
    assert "pip install -U bitsandbytes" in gpu.why_no_four_bit()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there its library is one for CUDA")
def test_the_library_for_cpus_is_not_taken_for_one():
    assert "pip install -U bitsandbytes" in gpu.why_no_four_bit()


# --------------------------------------------------------------------------------------------------------- the callers


def train(*flags) -> tuple[int, list[str]]:
    """Exit code and the lines on stderr."""
    import train_azr

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = train_azr.main([str(flag) for flag in flags])
    return code, errors.getvalue().splitlines()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_model_other_than_tiny_needs_a_gpu(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for model in ("qwen-3b", tmp_path):
        code, lines = train("--model", model, "--out", tmp_path / "run")
        assert code == 2 and len(lines) == 1 and not (tmp_path / "run").exists()
        assert "needs a GPU: " in lines[0] and "--allow-cpu" in lines[0] and "--model tiny" in lines[0]
    code, lines = train("--model", tmp_path, "--out", tmp_path / "run", "--allow-cpu")
    assert code == 2 and "model_type" in lines[-1]  # it came as far as to look into the directory


def test_a_wrong_name_is_said_before_the_machine():
    with pytest.raises(ModelError, match="give tiny, qwen-0.5b"):
        Policy.load("qwen3b", need_gpu=True)


def test_a_card_that_cannot_be_used_is_no_card_to_compute_on(monkeypatch, tmp_path):
    """A V100 is pretended: the decision is tested above, here that loading asks for it and does not fall back."""
    (tmp_path / "config.json").write_text("{}")
    v100 = facts(name="V100", capability=(7, 0), kernels=CU130, driver="580.65.06")
    monkeypatch.setattr(load, "look", lambda: v100)
    with pytest.raises(ModelError, match="no kernels for V100.*cu126.*CUDA_VISIBLE_DEVICES= "):
        Policy.load(tmp_path, "none")


def test_a_large_model_on_the_cpu_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(load, "look", lambda: facts(error=NO_DRIVER))
    monkeypatch.setattr(load, "LARGE", 10)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"0" * 11)
    with pytest.raises(ModelError, match="model_type"):
        Policy.load(tmp_path, "none")
    assert "is computed on the CPU, slowly: torch says: Found no NVIDIA driver" in capsys.readouterr().err


def test_no_memory_at_load_is_one_line(monkeypatch, tmp_path):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr("azr.policy.policy.load_model", full)
    for quantization, advice in (("none", "--quantization nf4"), ("nf4", "a smaller model")):
        with pytest.raises(ModelError, match=advice) as caught:
            Policy.load(tmp_path, quantization)
        assert "does not fit the memory" in str(caught.value) and "\n" not in str(caught.value)


def test_no_memory_while_quantizing_is_not_a_broken_file(monkeypatch):
    """transformers catches it and raises something else: what counts is that the allocator has failed."""
    from bitsandbytes.nn import Params4bit

    failures = []

    def full(parameter, device):
        failures.append(device)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Params4bit, "_quantize", full)
    with pytest.raises(ModelError, match="cannot be loaded"):
        Policy.load(model_path("tiny"), "nf4", device="cpu")
    monkeypatch.setattr(load, "_failed_allocations", lambda device: len(failures))
    with pytest.raises(ModelError, match="does not fit the memory"):
        Policy.load(model_path("tiny"), "nf4", device="cpu")


def test_bitsandbytes_is_looked_at_before_anything_loads(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(load, "why_no_four_bit", lambda: "no library")
    with pytest.raises(ModelError, match="no library"):
        Policy.load(tmp_path, "nf4", device="cuda:0")
