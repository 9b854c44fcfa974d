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
from dataclasses import replace
from sandbox import PROPOSAL
raw = replace(PROPOSAL, gate=False, modules=PROPOSAL.modules + ("time",))
with Sandbox(1, raw, allow_weak=True, quiet=True) as weak:
    code = "import time\\ndef f(x):\\n if x == 2: time.sleep(100)\\n return x"
    print(*(outcome.status for outcome in weak.run([Job(code, ("1", "2", "3"))])[0]))
with Sandbox(1, allow_weak=True) as weak:
    print(weak.state["weak"], weak.state["seccomp"])
    [found] = weak.run([Job("def f(x):\\n while x: pass\\n return x", ("0", "1"), 0.1)])
    print(*(outcome.status for outcome in found))
"""


def test_without_seccomp_it_refuses_or_is_weak_when_told():
    done = subprocess.run([sys.executable, "-c", WITHOUT_SECCOMP], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert "Docker" in lines[0] and "WSL" in lines[0] and "seccomp" in lines[0], done
    assert lines[1] == "ok timeout ok", done  # seen to sleep, since no filter keeps it from that
    assert lines[2].startswith("True no") and lines[3] == "ok timeout", done
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
                allowed, waits = checks[number] in ("mmap", "mprotect"), checks[number] == "futex"
                expected = confine._RET_EAGAIN if waits else confine._RET_ALLOW if allowed else confine._RET_EPERM
            assert action == expected, (machine, number)
        write = confine._CHECK["write"][confine._ARCHITECTURES[machine][0]]
        assert interpret(program, confine._ARCHITECTURES[machine][1], write, (1, 0, 0, 0, 0, 0)) == confine._RET_ALLOW
        mmap = confine._CHECK["mmap"][confine._ARCHITECTURES[machine][0]]
        assert interpret(program, confine._ARCHITECTURES[machine][1], mmap, (0, 0, 7, 0, 0, 0)) == confine._RET_EPERM
        assert interpret(program, 0x40000003, write, (1, 0, 0, 0, 0, 0)) == confine._RET_KILL
        futex = confine._CHECK["futex"][confine._ARCHITECTURES[machine][0]]
        for command, limit, action in [
            (0x81, 0, "ALLOW"),  # FUTEX_WAKE_PRIVATE
            (0x80, 0, "EAGAIN"),  # FUTEX_WAIT_PRIVATE, for ever
            (0x189, 1 << 40, "ETIMEDOUT"),  # FUTEX_WAIT_BITSET by the wall clock; the limit is at this address
            (6, 4096, "ETIMEDOUT"),  # FUTEX_LOCK_PI
        ]:
            heard = interpret(program, confine._ARCHITECTURES[machine][1], futex, (4096, command, 1, limit, 0, 0))
            assert heard == getattr(confine, f"_RET_{action}")


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
        elif code == 0x54:
            value &= constant
        else:
            place += (
                yes if {0x15: value == constant, 0x35: value >= constant, 0x45: bool(value & constant)}[code] else no
            )
