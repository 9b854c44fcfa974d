"""What happens when lanes, waiting children or the trainer die, are interrupted, fork or use threads."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")

from sandbox import Job, Sandbox, SandboxError

ROOT = Path(__file__).parents[2]
LOOP = "def f(x):\n    while True:\n        pass\n"


def own_answer(sandbox, text):
    """What a program that returns its input gives for `text`."""
    return sandbox.run([Job("def f(x): return x", (text,))])[0][0].output


def test_lanes_that_are_killed_are_replaced_and_their_jobs_retried():
    with Sandbox(2) as own:
        slow = "def f(x):\n    n = 0\n    while n < 4_000_000: n += 1\n    return x"  # eight take .3 s at least
        own.run([Job(slow, ("1",), 10.0)])
        victims = [lane.process.pid for lane in own._lanes]
        killer = threading.Timer(0.1, lambda: [os.kill(pid, 9) for pid in victims])
        killer.start()
        found = own.run([Job(slow, (str(i),), 10.0) for i in range(8)])
        killer.join()
        assert [outcomes[0].output for outcomes in found] == [str(i) for i in range(8)]
        assert own.state["lanes_replaced"] >= 1


def test_waiting_children_that_are_killed_do_no_harm():
    with Sandbox(1) as own:
        own.run([Job("def f(x): return x", ("1",))])
        for pid in descendants(own._lanes[0].process.pid):
            os.kill(pid, signal.SIGKILL)
        assert [outcomes[0].output for outcomes in own.run([Job("def f(x): return x", ("1",))] * 5)] == ["1"] * 5


def descendants(pid):
    """Process ids of the children of a process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                pass
    return found


def gone(pids, seconds=10):
    """Whether all processes end within the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def alive(pid):
    """Whether the process has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("busy", [False, True])
def test_lanes_die_with_a_killed_trainer(busy):
    program = f"""
import json, os, sys
from sandbox import Job, Sandbox
sandbox = Sandbox(1)
sandbox.run([Job("def f(x): return x", ("1",))])
held = os.fork()  # a forked copy keeps our ends of the pipes open
if held == 0:
    os.read(0, 1)
    os._exit(0)
print(json.dumps([lane.process.pid for lane in sandbox._lanes]), flush=True)
if {busy}:
    sandbox.run([Job({LOOP!r}, ("1",), 100.0)])
os.read(0, 1)
"""
    trainer = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    servers = json.loads(trainer.stdout.readline())
    family = servers + [pid for server in servers for pid in descendants(server)]
    time.sleep(0.2 if busy else 0)  # let the loop begin
    trainer.kill()
    assert gone(family)
    trainer.stdin.close()
    trainer.stdout.close()
    trainer.wait()


def test_close_leaves_nothing_and_a_closed_sandbox_says_so():
    own = Sandbox(2)
    own.validate([Job("def f(x): return {x}", ("1",))])
    pids = [lane.process.pid for lane in own._lanes]
    pids += [pid for server in pids for pid in descendants(server)]
    descriptors = len(os.listdir("/proc/self/fd"))
    own.close()
    own.close()
    assert gone(pids, 2) and len(os.listdir("/proc/self/fd")) < descriptors
    with pytest.raises(SandboxError, match="closed"):
        own.run([Job("def f(x): return x", ("1",))])


def test_an_interrupted_run_does_not_disturb_the_next():
    with Sandbox(1) as own:

        def interrupt(number, frame):
            raise KeyboardInterrupt

        former = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                own.run([Job(LOOP, ("1",), 50.0)] * 3)
        finally:
            signal.signal(signal.SIGALRM, former)
        assert own_answer(own, "5") == "5"


def test_a_forked_copy_is_refused_and_does_not_close_our_lanes():
    with Sandbox(1) as own:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                own_answer(own, "1")
            except SandboxError:
                own.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert own_answer(own, "1") == "1"


def test_use_beside_threads():
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(16)]
    for thread in threads:
        thread.start()
    found = []
    with Sandbox(2) as own:
        users = [threading.Thread(target=lambda i=i: found.append(own_answer(own, str(i)))) for i in range(8)]
        for user in users:
            user.start()
        for user in users:
            user.join()
    stop.set()
    assert sorted(found) == sorted(map(str, range(8)))
