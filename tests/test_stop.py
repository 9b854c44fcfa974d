"""Signals as they come: Ctrl-C, SIGTERM, a closed terminal, two in a row, in a finalizer, at random moments."""

import os
import pty
import signal
import sys
import time
from pathlib import Path

import pytest

from azr.stop import StopNow, StopRequest
from test_runs import start

TRAINER = """
    import time
    from azr.stop import StopNow, StopRequest
    def busy(seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.01)
    with StopRequest() as stop:
        try:
            if "shielded" in sys.argv:
                with stop.shield():
                    with stop.shield():
                        print("ready", flush=True)
                        busy(float(sys.argv[1]))
                    print("after inner shield", flush=True)
                print("after shield", flush=True)
            print("ready", flush=True)
            while not stop.save_requested:
                time.sleep(0.01)
            print("saving on request", flush=True)
            stop.save_requested = False
            busy(60)
        except Exception:
            print("caught by mistake")
        except StopNow as reason:
            with stop.shield():
                print("stopped by", reason, flush=True)
                busy(0.5 if "slow-save" in sys.argv else 0)
            print("saved", flush=True)
    """


@pytest.fixture(autouse=True)
def hang_up_is_not_ignored():
    """Tests that are started by nohup ignore SIGHUP, and so would every child of theirs."""
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, old)


def signalled(numbers, *arguments, pause=0.3):
    child = start(TRAINER, *arguments)
    assert child.stdout.readline() == "ready\n", child.stderr.read()
    for number in numbers:
        child.send_signal(number)
        time.sleep(pause)  # so that the second one is no duplicate of the first
    output, error = child.communicate(timeout=30)
    return child.returncode, output.splitlines(), error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_stops(number):
    code, lines, error = signalled([number], 0)
    assert (code, lines) == (0, [f"stopped by {number.name}", "saved"]) and "second one quits" in error


def test_shield_holds_the_stop_back_until_the_outer_block_ends():
    code, lines, _ = signalled([signal.SIGTERM], 1, "shielded")
    assert (code, lines) == (0, ["after inner shield", "stopped by SIGTERM", "saved"])


def test_second_signal_quits_at_once_even_when_shielded():
    code, lines, error = signalled([signal.SIGTERM, signal.SIGINT], 60, "shielded")
    assert (code, lines) == (130, []) and "without saving" in error


def test_a_forwarded_duplicate_is_one_request():
    child = start(TRAINER, 0, "slow-save")
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT), child.send_signal(signal.SIGTERM)  # as Ctrl-C under a launcher
    output, _ = child.communicate(timeout=30)
    assert child.returncode == 0 and output.splitlines()[-1] == "saved"


def test_sigterm_at_random_moments(tmp_path):
    """A loop of unshielded work and shielded records, stopped 15 times: exit 0 each time, nothing lost or doubled."""
    child = start(
        """
        import hashlib, os, random, signal, time, torch
        from test_runs import *
        from azr.stop import StopNow, StopRequest
        torch.set_num_threads(1)
        def loop(ready, last):
            with StopRequest() as stop, Run.open(Path(sys.argv[1]), CONFIG, "auto") as run:
                total = run.load_checkpoint()[1]["total"] if run.resumed else 0
                done, state = run.step, {"total": total}     # the last complete step
                os.write(ready, b"x")
                try:
                    for step in range(run.step + 1, last + 1):
                        digest = 0
                        for i in range(2000):       # the step in progress, dropped by a stop
                            digest = int(hashlib.sha256(f"{step} {digest}".encode()).hexdigest()[:8], 16)
                        with stop.shield():
                            state = {"total": state["total"] + digest}
                            run.log({"step": step, "total": state["total"]})
                            done = step
                            if step % 5 == 0:
                                run.save_checkpoint(step, save_adapter, {}, state, INFO)
                except StopNow:
                    with stop.shield():
                        run.save_checkpoint(done, save_adapter, {}, state, INFO)
        dice = random.Random(2)
        for _ in range(15):
            reader, writer = os.pipe()
            pid = os.fork()
            if not pid:
                loop(writer, 10_000)
                os._exit(0)
            os.read(reader, 1)
            time.sleep(dice.uniform(0.02, 0.15))    # the moment is the test
            os.kill(pid, signal.SIGTERM)
            assert os.waitpid(pid, 0)[1] == 0, "no clean exit"
        totals = [line["total"] for line in read_metrics(Path(sys.argv[1]))]
        total = 0
        for step, found in enumerate(totals, 1):
            digest = 0
            for i in range(2000):
                digest = int(hashlib.sha256(f"{step} {digest}".encode()).hexdigest()[:8], 16)
            total += digest
            assert found == total, step
        print(len(totals))
        """,
        tmp_path,
    )
    output, error = child.communicate(timeout=120)
    assert child.returncode == 0 and int(output) > 10, error


def test_usr1_requests_a_checkpoint_and_goes_on():
    code, lines, _ = signalled([signal.SIGUSR1, signal.SIGTERM], 0)
    assert (code, lines) == (0, ["saving on request", "stopped by SIGTERM", "saved"])


def test_stop_reaches_the_caller_past_an_error_in_the_shield_and_handlers_come_back():
    old = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        stop.check()
        with pytest.raises(StopNow) as caught:
            with stop.shield():
                os.kill(os.getpid(), signal.SIGTERM)
                raise MemoryError("out of memory")
        assert isinstance(caught.value.__context__, MemoryError)
        with stop.shield():  # saving afterwards is not stopped again
            pass
        with pytest.raises(StopNow):
            stop.check()
    assert signal.getsignal(signal.SIGTERM) == old


def test_sighup_stops_but_is_ignored_under_nohup_and_never_is_the_second_request():
    assert signalled([signal.SIGHUP], 0)[:2] == (0, ["stopped by SIGHUP", "saved"])
    code, lines, _ = signalled([signal.SIGTERM, signal.SIGHUP, signal.SIGHUP], 1, "shielded")
    assert (code, lines[-1]) == (0, "saved")
    code, lines, _ = signalled([signal.SIGHUP, signal.SIGTERM], 1, "shielded")  # a session that is closed
    assert (code, lines[-1]) == (0, "saved")
    child = start(TRAINER, 0, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert child.stdout.readline() == "ready\n", child.stderr.read()
    child.send_signal(signal.SIGHUP), time.sleep(0.3)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.communicate(timeout=30)[0].splitlines() == ["stopped by SIGTERM", "saved"]


def test_a_closed_terminal_does_not_keep_the_run_from_saving(tmp_path):
    """The terminal's end is closed while the child prints to it: SIGHUP comes, and every further print would fail."""
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from azr.stop import StopNow, StopRequest
with StopRequest() as stop:
    try:
        while True:
            print("a step", flush=True)
            time.sleep(0.01)
    except StopNow as reason:
        with stop.shield():
            for line in range(100):
                print("saving", flush=True)
            open({str(tmp_path / "saved")!r}, "w").write(str(reason))
"""
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, "-c", code])
    while b"a step" not in os.read(terminal, 1000):
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / "saved").read_text() == "SIGHUP"


def test_a_stop_that_comes_in_a_finalizer_is_not_lost():
    """Python drops what is raised there ("Exception ignored in")."""

    class Finalized:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):
                pass

    with StopRequest() as stop, pytest.raises(StopNow):
        Finalized()
        end = time.monotonic() + 30
        while time.monotonic() < end:
            time.sleep(0.01)
    with StopRequest() as stop, pytest.raises(StopNow):  # and in a shield it waits for the end
        with stop.shield():
            Finalized()
            time.sleep(0.2)
            reached = True
    assert reached
