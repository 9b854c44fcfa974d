"""One policy, one sandbox, one seed stage for the tests of all arms: an arm is a few small steps from there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from azr.evals.math_answers import MathGrader
from azr.models import model_path
from azr.policy.policy import LoraSettings, Policy
from azr.runs import Run
from azr.stop import StopRequest
from azr.train import checkpoint, loop
from azr.train.arms import Arms
from azr.train.config import Config, resolve
from sandbox import Sandbox

STEPS = 2  # the second samples from, and scores, adapters that an update has moved
SMALL = {
    "seed": 1,
    "prompts_per_mode": 2,
    "answers": 3,
    "max_new_tokens": 64,
    "eval_every": 0,
    "eval_samples": 0,
    "save_every": 99,
    "steps": 20,
    "max_batch": 256,
}


def reproducible(out) -> list[dict]:
    """metrics.jsonl without times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]


class World:
    """`run(name=value, ...)`: STEPS steps under these settings, made once; see `Result`.

    With a plain Sandbox the phases of a step wait for each other, in all arms alike: what two arms have in common is
    then computed in the same batches, and equal to the last bit. azr/train/ahead.py is tested in test_ahead.py.
    """

    def __init__(self, directory, sandbox: type = Sandbox) -> None:
        self.directory, self.found = directory, {}
        self.policy = self.load()
        self.start = self.policy.adapter_state()
        self.sandbox = sandbox(2)
        self.sandbox.__enter__()
        self.buffers = None

    def load(self) -> Policy:
        return Policy.load(model_path("tiny"), "none", LoraSettings(8, 64.0, "attention"), max_batch=256)

    def state(self, run: Run, stop: StopRequest, grader=None, **settings):
        """The State of a run before its first step, its buffers those of the one seed stage."""
        import train_azr

        config = resolve(Config(**{**SMALL, **settings}))[0]
        if len(self.policy.adapters) > 1:  # what an arm has added stays on its policy
            self.policy = self.load()
        self.policy.load_adapter_state(self.start)
        s = loop.make_state(train_azr.State, config, self.policy, self.sandbox, run.dir, Arms.of(config), grader)
        s.run, s.stop = run, stop
        if self.buffers is None:
            with patch.object(loop, "SEED_ROUNDS", 4):
                loop.seed_stage(s, train_azr.propose, train_azr.validate_all)
            self.buffers = s.buffers.state_dict()
        s.buffers.load_state_dict(self.buffers)
        return s

    def run(self, steps: int = STEPS, **settings) -> SimpleNamespace:
        """rows: metrics without times; samples: what was logged; trained: the samples of each update; adapters: after
        each step; proposers: the adapter of the proposer after each step; state: as it ended."""
        import train_azr

        key = json.dumps([steps, settings], sort_keys=True)
        if key not in self.found:
            with contextlib.ExitStack() as stack:
                stop = stack.enter_context(StopRequest())
                grader = stack.enter_context(MathGrader(1)) if settings.get("algorithm") == "rlvr" else None
                out = Path(tempfile.mkdtemp(prefix="run-", dir=self.directory))
                run = stack.enter_context(Run.open(out, {"steps": 0}, "none"))
                s = self.state(run, stop, grader, **settings)
                trained, adapters, proposers, honest = [], [], [], s.arms.prepare

                def watched(s, step, samples):  # what the update sees: after the arms have prepared it
                    metrics = honest(s, step, samples)
                    trained.append([dataclasses.replace(sample) for sample in samples])
                    return metrics

                s.arms.prepare = watched
                for step in range(1, steps + 1):
                    train_azr.train_step(s, step)
                    adapters.append(self.policy.adapter_state())
                    proposers.append(self.policy.adapter_state(adapter=s.arms.adapter("proposer", "default")))
            rows = reproducible(out)
            samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
            self.found[key] = SimpleNamespace(
                rows=rows, samples=samples, trained=trained, adapters=adapters, proposers=proposers, state=s, out=out
            )
        return self.found[key]

    def run_in_two(self, first: int, steps: int, **settings) -> tuple[list[dict], Path]:
        """The metrics of `steps` steps whose process ended after the first ones and a checkpoint; the last one."""
        import train_azr

        out = Path(tempfile.mkdtemp(prefix="halves-", dir=self.directory))
        with StopRequest() as stop:
            for begin, end, resume in ((1, first, "none"), (first + 1, steps, str(out))):
                with Run.open(out, {"steps": 0}, resume) as run:
                    s = self.state(run, stop, **settings)
                    if run.resumed:
                        checkpoint.load(s)
                    for step in range(begin, end + 1):
                        train_azr.train_step(s, step)
                    saved = checkpoint.save(s, keep=True)
        return reproducible(out), saved

    def close(self) -> None:
        self.sandbox.__exit__(None, None, None)
