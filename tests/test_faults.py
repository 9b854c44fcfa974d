"""Faults in real training runs on the embedded model: signals, memory, disk, damaged files, a sandbox under attack.

One undisturbed run of three steps is what all others are compared with; most of these go on from a copy of it whose
third step is taken away. Kills of whole processes are drilled by bench_faults.py, which runs here in its short form.
"""

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_azr
from azr import runs
from azr.policy import backoff
from azr.policy.engine import Engine
from azr.policy.policy import Policy
from azr.runs import Run, newest_intact
from azr.train import checkpoint, loop, rollouts, screen, update
from azr.train.config import Config, completed, resolve
from azr.train.evaluation import Evaluation
from sandbox import PROPOSAL, Sandbox, SandboxError
from sandbox.outcomes import Job

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--prompts-per-mode 2 --answers 2 --max-new-tokens 40 --eval-samples 0 --eval-every 1 --save-every 1".split()


def small_start(patch) -> None:
    """A short seed stage and probe, and every checkpoint of a short run can be resumed."""
    patch.setattr(loop, "PROBE", 1)
    patch.setattr(loop, "SEED_ROUNDS", 2)
    patch.setattr(runs, "KEEP_STATES", 4)


@pytest.fixture(autouse=True)
def few_seed_tasks(monkeypatch):
    small_start(monkeypatch)


def train(out, few_held_out, *flags) -> int:
    """The exit code of the command, run in this process."""
    return train_azr.main(["--out", str(out), "--eval-data", str(few_held_out), *SMALL, *map(str, flags)])


@pytest.fixture(scope="module")
def whole(few_held_out, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        small_start(patch)
        gradients = watch_gradients(patch)
        assert train(out, few_held_out, "--steps", 3) == 0
    return out, gradients


def watch_gradients(patch) -> list[torch.Tensor]:
    """The gradient of every update, before it is clipped."""
    honest, seen = train_azr.apply_gradient, []

    def watched(s, loss):
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in s.policy.trainable_parameters()]
        seen.append(torch.cat([part.flatten() for part in parts]).clone())
        return honest(s, loss)

    patch.setattr(train_azr, "apply_gradient", watched)
    return seen


def before_step_3(whole, directory) -> Path:
    """A copy of the undisturbed run that has just finished its second step."""
    out = directory / "run"
    shutil.copytree(whole[0], out)
    shutil.rmtree(out / "checkpoints" / "step_3")
    return out


def metrics(out) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]


def assert_same(out, whole) -> None:
    """Metrics, samples, final adapter and optimizer state are those of the undisturbed run, bit for bit."""
    assert metrics(out) == metrics(whole[0])
    for name in ("samples.jsonl", "checkpoints/best.json", "probe.jsonl"):
        assert (out / name).read_bytes() == (whole[0] / name).read_bytes(), name
    for name in ("adapter_model.safetensors", "state/tensors.safetensors"):
        assert (out / "checkpoints/step_3" / name).read_bytes() == (whole[0] / "checkpoints/step_3" / name).read_bytes()


def lines_of(text: str, words: str) -> list[str]:
    return [line for line in text.splitlines() if words in line]


# --------------------------------------------------------------------------------------------------------------- kills


def test_killed_and_stopped_processes_lose_nothing(tmp_path):
    """bench_faults.py in its short form: SIGKILL and SIGTERM at random moments of runs that are processes."""
    command = [sys.executable, str(ROOT / "tests" / "bench_faults.py"), "--quick", "--json", str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found").read_text())
    assert found["SIGKILL"]["signals_that_hit"] == 2 and found["SIGTERM"]["signals_that_hit"] == 1
    assert found["SIGKILL"]["steps_lost_at_worst"] <= 2 and found["SIGTERM"]["steps_lost"] == 0
    assert found["SIGTERM"]["signal_to_exit_cpu_seconds_at_worst"] < 5


# --------------------------------------------------------------------------------------------------------------- stops


class Stopper:
    """Makes a function go on without end, doing its real work again and again, and sends a signal while it does."""

    def __init__(self, patch, owner, name, number=signal.SIGTERM):
        self.honest, self.entered, self.at = getattr(owner, name), threading.Event(), None
        patch.setattr(owner, name, self)
        self.thread = threading.Thread(target=self.send, args=(number,))
        self.thread.start()

    def __get__(self, instance, kind):
        return lambda *arguments, **options: self(instance, *arguments, **options)

    def __call__(self, *arguments, **options):
        self.entered.set()
        deadline = time.process_time() + 60
        while time.process_time() < deadline:
            self.honest(*arguments, **options)
        raise AssertionError("nobody stopped this")

    def send(self, number):
        if self.entered.wait(300):
            time.sleep(0.3)  # in the middle
            self.at = time.process_time()
            os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "owner, name",
    [
        (Policy, "generate"),
        (rollouts, "judge"),
        (train_azr, "ppo_loss"),
        (Evaluation, "greedy"),
    ],
    ids=["sampling", "sandbox", "update", "evaluation"],
)
def test_sigterm_in_the_middle_of_a_phase_saves_at_once(owner, name, whole, few_held_out, tmp_path, monkeypatch, capfd):
    out = before_step_3(whole, tmp_path)
    (out / "checkpoints" / "step_2" / "state" / "checksums.json").unlink()  # as if steps 1 and 2 had been saved last
    shutil.rmtree(out / "checkpoints" / "step_2")
    with monkeypatch.context() as patch:
        stopper, honest = None, train_azr.train_step

        def second(s, step):
            nonlocal stopper
            if step == 3:
                stopper = Stopper(patch, owner, name)
            return honest(s, step)

        patch.setattr(train_azr, "train_step", second)
        assert train(out, few_held_out, "--steps", 3, "--save-every", 99, "--resume", "auto") == 0
        seconds = time.process_time() - stopper.at
        stopper.thread.join()
    said = capfd.readouterr()
    assert seconds < 5 and "SIGTERM: stopping" in said.err
    assert f"saved {out}/checkpoints/step_2; go on with: python train_azr.py --resume {out}\n" in said.out
    assert newest_intact(out)[0].name == "step_2" and metrics(out) == metrics(whole[0])[:2]
    if name == "ppo_loss":  # stopped with half a gradient
        assert train(out, few_held_out, "--steps", 3, "--resume", out) == 0
        assert_same(out, whole)


STOPS = [  # in the order of a run; what is stopped at its beginning, and at which of its calls
    ("seed stage", train_azr, "validate_all", 2),
    ("checkpoint 0", runs, "_write_state", 1),
    ("probe", loop, "freeze_probe", 1),
    ("base measurement", Evaluation, "pass_at_k_samples", 1),
    ("propose", train_azr, "propose", 1),
    ("solve", train_azr, "solve", 1),
    ("update", train_azr, "apply_gradient", 1),
    ("record", train_azr, "step_metrics", 1),  # the first that counts: what follows begins with step 2
    ("evaluation", Evaluation, "greedy", 1),
    ("last checkpoint", runs, "_write_state", 2),
    ("end", loop, "conclude", 1),
]


def test_a_reader_that_goes_away_costs_no_complete_step(whole, few_held_out, tmp_path, capfd):
    honest, run = screen.StepLines.show, tmp_path / "run"

    def show(self, metrics):
        if metrics["step"] == 2:
            raise BrokenPipeError
        honest(self, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen.StepLines, "show", show)
        patch.setattr(loop.os, "dup2", lambda *_: None)  # standard output is pytest's
        assert train(run, few_held_out, "--steps", 3, "--save-every", 9) == 0
    assert "step_2; go on with: python" in capfd.readouterr().err
    assert train(run, few_held_out, "--resume", "auto") == 0
    assert (run / "samples.jsonl").read_bytes() == (whole[0] / "samples.jsonl").read_bytes()


def test_the_line_that_a_stop_prints_goes_on_whatever_was_stopped(whole, few_held_out, tmp_path, monkeypatch, capfd):
    out, flags = tmp_path / "run", ["--out", str(tmp_path / "run"), "--eval-data", str(few_held_out), *SMALL]
    flags += ["--steps", "3"]
    for i, (phase, owner, name, call) in enumerate(STOPS):
        with monkeypatch.context() as patch:
            honest, calls = getattr(owner, name), []

            def stopped(*arguments, **options):
                calls.append(1)
                if len(calls) == call:
                    torch.set_grad_enabled(False)  # what a stop leaves behind that comes as `no_grad` ends
                    os.kill(os.getpid(), (signal.SIGINT, signal.SIGTERM)[i % 2])
                return honest(*arguments, **options)

            patch.setattr(owner, name, stopped)
            assert train_azr.main(flags) == 0
        said = capfd.readouterr()
        [line] = lines_of(said.out, "train_azr.py --resume")
        command = ["python", "train_azr.py", "--resume", str(out)]
        assert shlex.split(line.split(" with: ")[1]) == command and ": stopping" in said.err, phase
        flags = command[2:]
    assert train_azr.main(flags) == 0
    assert_same(out, whole)


# -------------------------------------------------------------------------------------------------------------- memory


def run_out() -> None:
    torch.empty(1 << 50)


class Memory:
    """Runs out twice in each phase of the first step, where the computation is half done: the first time what is cached
    is freed, the second time less is computed at once."""

    def __init__(self, patch):
        self.phase, self.calls, self.failed = None, Counter(), []
        for owner, name in (
            (loop, "seed_stage"),
            (train_azr, "propose"),
            (train_azr, "solve"),
            (train_azr, "ppo_update"),
            (Evaluation, "greedy"),
        ):
            self.watch(patch, owner, name)
        load, score, loss = Policy.load, Policy._score_batch, train_azr.ppo_loss

        def loaded(*arguments, **options):
            policy = load(*arguments, **options)
            head = policy.engine.head
            policy.engine.head = lambda hidden: self.once(self.phase, "ppo_update") or head(hidden)
            return policy

        def scored(policy, *rest):
            self.once("forward") if self.phase == "ppo_update" else None
            return score(policy, *rest)

        def lost(s, batch):
            if self.phase == "ppo_update" and batch.log_prob.requires_grad:
                batch.log_prob.register_hook(lambda gradient: self.once("backward"))
            return loss(s, batch)

        patch.setattr(Policy, "load", loaded)
        patch.setattr(Policy, "_score_batch", scored)
        patch.setattr(train_azr, "ppo_loss", lost)

    def watch(self, patch, owner, name):
        honest = getattr(owner, name)

        def watched(loop, *arguments, **options):
            outer, self.phase = self.phase, self.phase or name
            try:
                return honest(loop, *arguments, **options)
            finally:
                self.phase = outer

        patch.setattr(owner, name, watched)

    def once(self, what, but=None):
        self.calls[what] += 1
        if what and what != but and self.calls[what] in (2, 4):
            self.failed.append(what)
            run_out()


def test_out_of_memory_in_each_phase_changes_nothing(whole, few_held_out, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        gradients, memory = watch_gradients(patch), Memory(patch)
        assert train(tmp_path / "run", few_held_out, "--steps", 2) == 0
    phases = ["seed_stage", "propose", "solve", "forward", "backward", "greedy"]
    assert sorted(memory.failed) == sorted(2 * phases)
    said = lines_of(capfd.readouterr().err, "out of memory in")
    assert len(said) == 2 * len(phases) and all("nothing else changes" in line for line in said)
    freed = sum("freed what was cached, and once more" in line for line in said)
    assert freed >= len(phases) - 1 and len(said) - freed >= len(phases) - 1
    for what, count in (("sampling", 8), ("the update", 4)):
        assert len(lines_of("\n".join(said), f"out of memory in {what}:")) == count
    one, other = whole[1][0], gradients[0]
    assert (one - other).norm() / one.norm() < 1e-5
    texts = [(out / "samples.jsonl").read_text().splitlines() for out in (tmp_path / "run", whole[0])]
    assert texts[0] == texts[1][: len(texts[0])] and json.loads(texts[0][-1])["step"] == 2


def test_out_of_memory_that_stays_saves_what_is_complete(whole, few_held_out, tmp_path, monkeypatch, capfd):
    out, honest = before_step_3(whole, tmp_path), Engine.generate

    def tight(engine, prompts, *rest, **further):
        engine.max_batch, engine.pages = 1, min(engine.pages, 16)  # few halvings are left
        run_out()
        return honest(engine, prompts, *rest, **further)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "generate", tight)
        assert train(out, few_held_out, "--steps", 3, "--resume", "auto") == 1
    said = capfd.readouterr().err
    assert f"saved {out}/checkpoints/step_2; go on with" in said
    assert len(lines_of(said, "train_azr.py: out of memory sampling a single sequence")) == 1
    tried = []
    assert backoff.once_more(lambda: tried.append(1) if tried else (tried.append(0), run_out()), "x") is None
    with pytest.raises(backoff.DoesNotFit, match="twice"):
        backoff.once_more(run_out, "loading the checkpoint")


# ------------------------------------------------------------------------------------------------------- not a number


def test_one_nan_gradient_is_one_skipped_step(few_held_out, tmp_path, monkeypatch, capfd):
    out, honest = tmp_path / "run", train_azr.ppo_update

    def poisoned(s, step, samples):
        parameter = s.policy.trainable_parameters()[3]
        hook = parameter.register_hook(lambda gradient: gradient * float("nan")) if step == 2 else None
        try:
            return honest(s, step, samples)
        finally:
            if hook:
                hook.remove()

    monkeypatch.setattr(train_azr, "ppo_update", poisoned)
    assert train(out, few_held_out, "--steps", 3) == 0
    assert [row["train/skipped"] for row in metrics(out)] == [0, 1, 0]
    assert [path.name for path in out.glob("non_finite*")] == ["non_finite_step_2.jsonl"]
    assert len(lines_of(capfd.readouterr().err, "update skipped")) == 1
    steps = [(out / f"checkpoints/step_{step}/state/tensors.safetensors").read_bytes() for step in (1, 2, 3)]
    assert steps[0] == steps[1] != steps[2]  # neither the adapter nor Adam's moments


# ---------------------------------------------------------------------------------------------------- disk and damage


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(whole, few_held_out, tmp_path, capfd):
    out = before_step_3(whole, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # a checkpoint's tensors have 2.3 MB
        code = train(out, few_held_out, "--steps", 3, "--resume", "auto")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = lines_of(capfd.readouterr().err, "train_azr.py: ")
    assert code == 1 and len(said) == 1
    assert "writing checkpoint 3 failed" in said[0] and f"{out}/checkpoints/step_2, go on with: python" in said[0]
    assert not list(out.glob("**/*.tmp-*")) and newest_intact(out)[0].name == "step_2"
    assert train(out, few_held_out, "--steps", 3, "--resume", "auto") == 0
    assert_same(out, whole)


def damage(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    "name, change",
    [
        ("checkpoints/step_3/state/tensors.safetensors", half),
        ("checkpoints/step_3/adapter_model.safetensors", flipped),
        ("checkpoints/step_3/state/state.json", lambda data: data.replace(b'"program"', b'"pro gam"', 1)),
    ],
    ids=["truncated", "flipped", "buffer"],
)
def test_a_damaged_file_is_told_and_the_checkpoint_before_it_is_used(name, change, whole, tmp_path, capfd):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    damage(out / name, change)
    config = json.loads((out / "config.json").read_text())
    with Run.open(out, config, "auto", completed) as run:
        assert run.step == 2
    said = capfd.readouterr().err
    assert len(lines_of(said, f"broken checkpoint, going on from {out}/checkpoints/step_2: ")) == 1
    assert [row["step"] for row in metrics(out)] == [1, 2]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_out_of_memory_while_it_is_loaded(
    whole, few_held_out, tmp_path, monkeypatch, capfd
):
    """And from before two settings existed, with a checkpoint by time, stopped by --max-hours."""
    out, honest, calls = tmp_path / "run", update.restore_tensors, []
    shutil.copytree(whole[0], out)
    damage(out / "checkpoints/step_3/state/tensors.safetensors", flipped)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ("proposer", "attn")}))

    def tight(*arguments):
        honest(*arguments)
        calls.append(1)
        if len(calls) == 1:
            run_out()

    monkeypatch.setattr(update, "restore_tensors", tight)
    monkeypatch.setattr(checkpoint, "SAVE_MINUTES", 1e-6)
    flags = ("--steps", 9, "--save-every", 99, "--eval-every", 1)
    assert train(out, few_held_out, *flags, "--max-hours", 1e-9, "--resume", "auto") == 0
    said = capfd.readouterr()
    assert "out of memory in loading the checkpoint" in said.err and len(calls) == 2
    assert len(lines_of(said.err, "is from before these settings")) == 1 and "proposer joint" in said.err
    assert f"--max-hours 1e-09 reached; saved {out}/checkpoints/step_3; go on with: python" in said.out
    assert_same(out, whole)


def test_settings_that_came_later_count_as_their_defaults(whole, tmp_path, capfd):
    out = before_step_3(whole, tmp_path)
    config = json.loads((out / "config.json").read_text())
    old = {k: v for k, v in config.items() if k not in ("temperature", "prompt_tokens", "save_every")}
    (out / "config.json").write_text(json.dumps(old))
    other = resolve(Config(**{**config, "temperature": 0.5, "resume": "auto"}))[0]
    with pytest.raises(runs.RunError, match=r"temperature: 1.0 -> 0.5.*go|temperature: 1.0 -> 0.5.*repeat"):
        Run.open(out, other.__dict__, "auto", completed)
    same = resolve(Config(**{**old, "resume": "auto"}))[0]
    with Run.open(out, same.__dict__, "auto", completed) as run:
        assert run.step == 2
    assert "save_every 10" in capfd.readouterr().err
    assert json.loads((out / "config.json").read_text())["prompt_tokens"] == config["prompt_tokens"]


# ------------------------------------------------------------------------------------------------------------- sandbox


def test_lanes_that_are_killed_while_they_judge_change_no_verdict(whole, few_held_out, tmp_path, monkeypatch):
    out, honest, given = before_step_3(whole, tmp_path), Sandbox._give, []

    def killed(sandbox, lane, piece):
        honest(sandbox, lane, piece)
        given.append(lane.process.pid)
        if len(given) in (1, 3, 6) and not getattr(piece, "retried", False):  # twice would be `infra`: no verdict
            os.kill(lane.process.pid, signal.SIGKILL)

    monkeypatch.setattr(Sandbox, "_give", killed)
    assert train(out, few_held_out, "--steps", 3, "--resume", "auto") == 0
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["time/lanes_lost"] >= 2 and row["time/unjudged"] == 0
    assert_same(out, whole)


def test_lanes_that_are_killed_while_they_start_are_started_again(monkeypatch):
    honest, started = Sandbox._start, []
    with Sandbox(1) as sandbox:

        def killed(self, seed):
            honest(self, seed)
            started.append(1)
            if len(started) <= limit:
                self._lanes[-1].process.kill()

        monkeypatch.setattr(Sandbox, "_start", killed)
        for limit, fine in ((3, True), (99, False)):
            started.clear()
            for lane in list(sandbox._lanes):
                lane.process.kill()
                lane.process.wait()
            if fine:
                assert sandbox.run([Job("def f(x): return x + 1", ("1",))])[0][0].output == "2"
            else:
                with pytest.raises(SandboxError, match="could not start"):
                    sandbox.run([Job("def f(x): return x + 1", ("1",))])


def test_a_child_that_hangs_is_run_again(tmp_path):
    """Stopped by SIGSTOP in the middle of its program, as a frozen or swapped-out process would be."""
    slow = "def f(x):\n    n = 0\n    while n < 3_000_000: n += 1\n    return x"
    with Sandbox(1, replace(PROPOSAL, wall_seconds=3.0, cpu_seconds=0.5)) as sandbox:
        sandbox.run([Job("def f(x): return x", ("1",))])
        lane = sandbox._lanes[0].process.pid
        frozen = []

        def freeze():
            time.sleep(0.1)
            for child in Path(f"/proc/{lane}/task/{lane}/children").read_text().split():
                frozen.append(os.kill(int(child), signal.SIGSTOP))

        thread = threading.Thread(target=freeze)
        thread.start()
        found = sandbox.run([Job(slow, ("7",))])
        thread.join()
        assert frozen and found[0][0].output == "7"
