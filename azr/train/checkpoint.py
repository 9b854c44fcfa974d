"""What is saved of a training run, and when: the state after each complete step, so that a stop costs the step begun.

    loop.snapshot = loop.changing()             # after each step, when buffers, counters and weights belong together
    if loop.due(step): loop.save(keep=False)    # checkpoints/step_N from that snapshot
    print(loop.stopped())                       # after a signal: saves, says how to go on

`Saved` holds the checkpoint methods of train_azr.py's loop; azr/runs.py writes the files. The snapshot is in the CPU's
memory: it can be written while a step is half done, and after an error of the GPU.

Left out: writing in the background; a checkpoint of a 3B adapter with its Adam state is 0.7 GB, seconds of writing.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path

from azr.train import arms, update
from azr.policy.backoff import Sizes, once_more, rollout_sizes, set_rollout_sizes
from azr.console import warn
from azr.train.loss_scale import LossScale
from azr.tasks.prompts import template_hash
from azr.runs import Run, RunError
from sandbox import SandboxError


class GaveUp(RuntimeError):
    """Training cannot go on; one line says why. Exit code 1."""


class Saved:
    """Of the loop: `config, policy, optimizer, buffers, sizes, foreign, evaluation, template`, and the counters
    `non_finite, elapsed, completed, adaptive, loss_scale`."""

    run: Run  # opened when nothing can be refused any more
    snapshot: tuple | None = None  # of the last complete step; None: there is nothing whole to save
    saved: float = math.inf  # when, on the monotonic clock

    def changing(self) -> tuple:
        """Copies of all that phase 4 changes: what a stopped step goes back to."""
        tensors = update.state_tensors(self.policy, self.optimizer)
        scale = dataclasses.asdict(self.loss_scale)
        return tensors, self.non_finite, self.computed_at_once(), self.adaptive, scale

    def computed_at_once(self) -> dict:
        """Sizes that memory decides: a resume takes them over, since results depend on them in the last bit."""
        return {"scoring": dataclasses.asdict(self.sizes), "rollout": rollout_sizes(self.policy.engine)}

    def set_computed_at_once(self, sizes: dict) -> None:
        self.sizes = Sizes(**sizes["scoring"])
        set_rollout_sizes(self.policy.engine, sizes["rollout"])

    def due(self, step: int) -> bool:
        """Whether the last checkpoint is --save-every steps or --save-minutes old."""
        minutes, age = self.config.save_minutes, time.monotonic() - self.saved
        return step % self.config.save_every == 0 or bool(minutes) and age >= 60 * minutes

    def save(self, keep: bool) -> Path:
        """Writes the last complete step, from its snapshot: the live tensors may be those of a step in progress."""
        tensors, non_finite, sizes, adaptive, loss_scale = self.snapshot
        adapter = {name.removeprefix("adapter/"): t for name, t in tensors.items() if name.startswith("adapter/")}
        state = {
            "buffers": self.buffers.state_dict(),
            "non_finite": non_finite,
            "elapsed": self.elapsed,
            "sizes": sizes,
            "adaptive": adaptive,
            "loss_scale": loss_scale,
            "files": self.digests(),
        }
        info = {**self.policy.info, "template": self.template, "template_hash": template_hash(self.template)}
        write = lambda directory: self.policy.save_adapter(directory, adapter)  # noqa: E731
        path = self.run.save_checkpoint(self.completed, write, tensors, state, info, keep or not self.completed)
        self.saved = time.monotonic()
        return path

    def load(self) -> None:
        tensors, state, _ = self.run.load_checkpoint()
        if state.get("files", {}) != self.digests():
            raise RunError(f"{self.run.dir}: cannot resume, {' or '.join(self.digests())} is no longer what it was")
        once_more(lambda: update.restore_tensors(self.policy, self.optimizer, tensors), "loading the checkpoint")
        self.non_finite, self.adaptive = state["non_finite"], state.get("adaptive", {})
        if "loss_scale" in state:  # checkpoints from before it have none
            self.loss_scale = LossScale(**state["loss_scale"])
        self.set_computed_at_once(state["sizes"])
        self.buffers.load_state_dict(state["buffers"])
        self.elapsed, self.completed, self.saved = state["elapsed"], self.run.step, time.monotonic()
        self.evaluation.mark_best()

    def digests(self) -> dict[str, str]:
        """Of the files of tasks and solutions that the run draws from."""
        files = (self.config.data, self.config.off_policy_source if self.foreign.given else None)
        return {file: arms.digest(file) for file in files if file}

    def stopped(self) -> str:
        """After a stop or an error: saves what is complete, without the step in progress; returns what to tell."""
        if not self.snapshot:
            return f"stopped before the first checkpoint; start again with: {self.run.command()}"
        return f"saved {self.save(keep=False)}; go on with: {self.run.command()}"

    def failed(self, error: Exception) -> None:
        """Saves what is complete before an error ends the run (a full disk: there is a good checkpoint already)."""
        if self.snapshot and not isinstance(error, RunError):
            try:
                warn(self.stopped())
            except (RunError, RuntimeError, OSError) as second:
                warn(f"the last complete step could not be saved: {second}")
        raise GaveUp(str(error)) if isinstance(error, SandboxError) else error
