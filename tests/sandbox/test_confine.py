"""What protects the trainer: the state a sandbox reports, its refusal without seccomp, the filter's tables."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")

from sandbox import Sandbox, confine

ROOT = Path(__file__).parents[2]


def test_state_says_what_protects():
    with Sandbox(1) as opened:
        state = opened.state
    assert state["seccomp"] is True and state["weak"] is False and state["limits"] == "set"
    assert state["landlock"] is not None and state["uid"] is not None
    json.dumps(state)


WITHOUT_SECCOMP = """
import sys
sys.path.insert(0, "tests/sandbox/attacks")
import harness
harness.refuse_calls((317, 277), prctl_option=22)
from sandbox import Job, Sandbox, SandboxError
try:
    Sandbox(1)
    print("started")
except SandboxError as error:
    print(error)
with Sandbox(1, allow_weak=True) as weak:
    print(weak.state["weak"], weak.state["seccomp"])
    [found] = weak.run([Job("def f(x):\\n while x: pass\\n return x", ("0", "1"), 0.1)])
    print(*(outcome.status for outcome in found))
"""


def test_without_seccomp_it_refuses_or_is_weak_when_told():
    done = subprocess.run([sys.executable, "-c", WITHOUT_SECCOMP], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert "Docker" in lines[0] and "WSL" in lines[0] and "seccomp" in lines[0], done
    assert lines[1].startswith("True no") and lines[2] == "ok timeout", done
    assert "WEAK MODE" in done.stderr


def test_filter_tables_build_for_both_architectures():
    for machine in ("x86_64", "aarch64"):
        program = confine.build_filter(machine, 1)
        assert len(program) % 8 == 0 and len(program) // 8 < 256
        for number in range(-1, 500):
            action = interpret(program, confine._ARCHITECTURES[machine][1], number & 0xFFFFFFFF, (7, 0, 0, 0, 0, 0))
            column = confine._ARCHITECTURES[machine][0]
            expected = (
                confine._RET_ALLOW
                if number in [pair[column] for pair in confine._ALLOW.values()]
                else confine._RET_EPERM
                if number in [pair[column] for pair in confine._FAIL.values()]
                else confine._RET_KILL
            )
            checks = {pair[column]: name for name, pair in confine._CHECK.items()}
            if number in checks:
                expected = confine._RET_ALLOW if checks[number] in ("mmap", "mprotect") else confine._RET_EPERM
            assert action == expected, (machine, number)
        write = confine._CHECK["write"][confine._ARCHITECTURES[machine][0]]
        assert interpret(program, confine._ARCHITECTURES[machine][1], write, (1, 0, 0, 0, 0, 0)) == confine._RET_ALLOW
        mmap = confine._CHECK["mmap"][confine._ARCHITECTURES[machine][0]]
        assert interpret(program, confine._ARCHITECTURES[machine][1], mmap, (0, 0, 7, 0, 0, 0)) == confine._RET_EPERM
        assert interpret(program, 0x40000003, write, (1, 0, 0, 0, 0, 0)) == confine._RET_KILL


def interpret(program, architecture, number, arguments):
    """Runs a BPF program of the kind that confine builds on one system call."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *arguments)
    place, value = 0, 0
    while True:
        code, yes, no, constant = struct.unpack_from("=HBBI", program, 8 * place)
        place += 1
        if code == 0x06:
            return constant
        if code == 0x20:
            value = struct.unpack_from("=I", data, constant)[0]
        else:
            place += (
                yes if {0x15: value == constant, 0x35: value >= constant, 0x45: bool(value & constant)}[code] else no
            )
