"""train_azr.py --doctor as a user runs it: no GPU, packages missing, broken or crashing, no seccomp."""

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from azr import isolated
from azr.machine import probes
from azr.policy import attention, load

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="checks are forked")

ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, "train_azr.py", "--doctor"]
FAILS_WITH_A_TOKEN = """
import os
raise ImportError(f"undefined symbol; {os.environ['HF_TOKEN']}, by {os.environ['USER']} in {os.environ['HOME']}/x")
"""
WITHOUT_SECCOMP = """
import os, sys
sys.path.insert(0, "tests/sandbox/attacks")
import harness
harness.refuse_calls((317, 277), prctl_option=22)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def run(command, **environment):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})


def line_of(text: str, label: str) -> str:
    """The text behind a label, continued lines included."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line[:17].strip() == label)
    rest = [line for line in lines[start + 1 :]]
    more = next((i for i, line in enumerate(rest) if line[:17].strip() or not line), len(rest))
    return " ".join(line[17:].strip() for line in [lines[start], *rest[:more]])


def test_a_machine_without_gpu_with_secrets(tmp_path):
    home = tmp_path / "home" / "margarete"
    home.mkdir(parents=True)
    done = run(
        [*SCRIPT, "--out", str(home / "run"), "--quantization", "nf4"],
        HF_TOKEN="hf_secretsecret",
        OTHER_API_KEY="sesame-open",
        HOME=str(home),
        USER="margarete",
        LOGNAME="margarete",
        HF_HUB_OFFLINE="1",
        CUDA_VISIBLE_DEVICES="",
        TRITON_INTERPRET="0",
    )
    text = done.stdout
    assert done.returncode == 0 and done.stderr == "" and "Traceback" not in text, done
    assert "\x1b" not in text and max(map(len, text.splitlines())) < 80
    for secret in ("hf_secret", "margarete", "sesame"):
        assert secret not in text
    assert "~/run" in line_of(text, "disk") and "GiB" in line_of(text, "memory")
    assert line_of(text, "packages").startswith(f"torch {torch.__version__}")
    assert line_of(text, "gpu").startswith("none") and line_of(text, "attention").startswith("sdpa; ")
    assert "right at width 128, 384" in line_of(text, "4-bit")
    assert "seccomp True" in line_of(text, "sandbox") and "trials pass" in line_of(text, "sandbox")
    assert line_of(text, "verdict") == "training --model tiny will work here"


def test_a_broken_package_is_named_without_secrets(tmp_path):
    (tmp_path / "peft.py").write_text(FAILS_WITH_A_TOKEN)
    names = {"HF_TOKEN": "hf_secretsecret", "HOME": str(tmp_path / "margarete"), "USER": "margarete"}
    code = (
        "from azr.machine import doctor\nfor block in doctor.packages(['numpy', 'peft']).blocks: doctor.show('', block)"
    )
    done = run([sys.executable, "-c", code], PYTHONPATH=str(tmp_path), LOGNAME="margarete", **names)
    text = " ".join(done.stdout.split())
    assert text.startswith("peft cannot be imported (ImportError: undefined symbol; <token>, by <user> in ~/x)"), done
    assert "pip install" in text and "numpy" not in text


def test_a_sandbox_that_cannot_isolate_is_exit_code_1(tmp_path):
    (tmp_path / "transformers.py").write_text("raise SystemExit('no')")  # and ends quickly: torch is not asked for
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    done = run([sys.executable, "-c", WITHOUT_SECCOMP, *SCRIPT[1:]], PYTHONPATH=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr, done
    assert line_of(done.stdout, "sandbox").startswith("programs cannot be confined here (seccomp no")
    because = line_of(done.stdout, "because")
    assert because.startswith("programs cannot be confined") and "Docker" in because and "WSL" in because
    assert line_of(done.stdout, "verdict") == "training --model tiny WILL NOT WORK here"
    text = " ".join(done.stdout.split())
    assert "torch cannot be imported (ended by SIGSEGV)" in text  # a crash costs a line, not the report
    assert "transformers cannot be imported (SystemExit" in text


def test_without_any_package():
    done = run([sys.executable, "-S", *SCRIPT[1:], "--model", "qwen-3b"])  # -S: no site-packages
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr, done
    assert line_of(done.stdout, "packages") == "none"
    for name in ("torch", "transformers", "bitsandbytes"):
        assert f"{name} is missing: pip install -r requirements.txt" in done.stdout
    assert "seccomp True" in line_of(done.stdout, "sandbox")


def test_a_reader_that_goes_away_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(SCRIPT, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


def test_a_bad_flag_is_refused():
    done = run([sys.executable, "-S", *SCRIPT[1:], "--modle", "tiny"])
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--model" in done.stderr


def test_apart_survives_crash_exit_and_hang():
    def half_way(end):
        yield "first"
        end()

    def raises():
        raise ValueError("two\nlines")

    def hangs():
        while True:
            time.sleep(60)

    assert isolated.apart(lambda: iter([1, [2, "x"]])) == ([1, [2, "x"]], None)
    assert isolated.apart(lambda: half_way(raises)) == (["first"], "ValueError: two")
    assert isolated.apart(lambda: half_way(lambda: os.kill(os.getpid(), 9))) == (["first"], "ended by SIGKILL")
    assert isolated.apart(lambda: half_way(lambda: os._exit(7))) == (["first"], "ended by exit code 7")
    assert isolated.apart(lambda: half_way(hangs), seconds=2) == (["first"], "no answer in 2 s")


def broken_check():
    raise OSError("no")


def test_a_check_that_fails_blocks_only_if_it_is_vital():
    assert isolated.finding(broken_check).blocks == []
    assert isolated.finding(broken_check, vital=True).blocks == ["the check of broken check failed: OSError: no"]


def test_an_attention_that_does_not_work_blocks_only_if_asked_for(monkeypatch):
    monkeypatch.setattr(attention, "_interpreted", lambda: False)
    sizes = (6, 2, 32)
    if torch.cuda.is_available():
        pytest.skip("this machine may have what is asked for")
    assert probes.attention("auto", *sizes).lines[0][1].startswith("sdpa; ")
    [block] = probes.attention("flash", *sizes).blocks
    assert "--attn flash cannot be used: no CUDA device" in block and "--attn auto" in block


def misread(width: int) -> bool:
    """Whether bitsandbytes' kernel for this CPU goes wrong where a block goes on in the next row: the one for AVX-512
    does, the plain one does not."""
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    layer = bnb.nn.Linear4bit(width, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    with torch.no_grad():
        read = layer.to("cpu")(torch.eye(width)).T
    return ((read - weight).norm() / weight.norm()).item() > 0.15


@pytest.mark.skipif(torch.cuda.is_available(), reason="what bitsandbytes does on a CPU")
def test_four_bit_widths_of_the_model_block_it():
    blocks = probes.four_bit([160, 448]).blocks
    assert len(blocks) == misread(160)
    assert all("width 160" in block and "--quantization none" in block for block in blocks)
    assert probes.four_bit([2048]).blocks == []


def test_the_dtype_follows_the_device(monkeypatch, capsys):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert load.compute_dtype(None, cpu) is load.compute_dtype("auto", cpu) is torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert load.compute_dtype("auto", gpu) is load.compute_dtype("bf16", gpu) is torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))  # a T4
    assert load.compute_dtype("auto", gpu) is torch.float16 and load.compute_dtype("fp32", gpu) is torch.float32
    assert capsys.readouterr().err == ""
    assert load.compute_dtype(torch.bfloat16, gpu) is torch.bfloat16  # as an adapter from another card was trained
    assert "no bf16 in hardware" in capsys.readouterr().err
    assert load.compute_dtype("fp16", cpu) is torch.float16
    assert "float16 on a CPU is for tests" in capsys.readouterr().err
    with pytest.raises(load.ModelError, match="dtype must be auto, bf16, fp16, fp32"):
        load.compute_dtype("int8", cpu)


def test_a_broken_flash_attn_is_hidden_aloud(monkeypatch, capsys, tmp_path):
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is installed here")
    load.hide_broken_flash_attention()
    assert capsys.readouterr().err == ""
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        load.hide_broken_flash_attention()
        [said] = capsys.readouterr().err.splitlines()
        assert "ImportError: undefined symbol" in said and "without it" in said
        assert importlib.util.find_spec("flash_attn") is None
    finally:
        sys.modules.pop("flash_attn", None)


def pins(file: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==([^\s;#]+)", (ROOT / file).read_text(), re.M))


def test_pins_of_both_sets():
    ordinary, gpu = pins("requirements.txt"), pins("requirements-gpu.txt")
    assert gpu["torch"].startswith("2.10.") and "flash-attn" in gpu and "flash-attn" not in ordinary
    assert {name: gpu[name] for name in ordinary if name != "torch"} == {
        name: pin for name, pin in ordinary.items() if name != "torch"
    }
