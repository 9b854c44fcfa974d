"""What is saved of a training run, and when: the state after each complete step, so that a stop costs the step begun.

    s.snapshot = changing(s)              # after each step, when buffers, counters and weights belong together
    if due(s, step): save(s, keep=False)  # checkpoints/step_N from that snapshot
    print(stopped(s))                     # after a signal: saves, says how to go on

`s` is the State of train_azr.py; azr/runs.py writes the files. The snapshot is in the CPU's memory: it can be written
while a step is half done, and after an error of the GPU.

Left out: writing in the background; a checkpoint of a 3B adapter with its Adam state is 0.7 GB, seconds of writing.
With --train full the snapshot is 12 bytes a weight, of a 3B 37 GB in the CPU's memory after every step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from functools import partial
from pathlib import Path

from azr.console import warn
from azr.jsonl import read_object, write_json_atomic
from azr.models import portable
from azr.policy.backoff import Sizes, once_more, rollout_sizes, set_rollout_sizes
from azr.policy.full import read_weights
from azr.policy.opening import Opening, check_base, read_record
from azr.runs import RunError, step_directories
from azr.tasks.prompts import template_hash
from azr.train import update
from azr.train.loss_scale import LossScale
from sandbox import SandboxError

SAVE_MINUTES = 10.0  # between checkpoints where --save-every steps take longer: what a kill may cost


class GaveUp(RuntimeError):
    """Training cannot go on; one line says why. Exit code 1."""


def changing(s) -> tuple:
    """Copies of all that phase 4 changes: what a stopped step goes back to."""
    if not s.ranks.leads:
        return ()  # rank 0 saves
    # on the CPU: after an error of the GPU nothing can be read from it any more
    tensors = update.state_tensors(s.policy, s.optimizer)
    return tensors, s.non_finite, computed_at_once(s), s.arms.state, dataclasses.asdict(s.loss_scale)


def computed_at_once(s) -> dict:
    """Sizes that memory decides: a resume takes them over, since results depend on them in the last bit."""
    return {"scoring": dataclasses.asdict(s.sizes), "rollout": rollout_sizes(s.policy.engine)}


def due(s, step: int) -> bool:
    """Whether the last checkpoint is --save-every steps or SAVE_MINUTES old."""
    # steps alone would let a slow machine lose hours, minutes alone would make short runs save nothing
    return step % s.config.save_every == 0 or time.monotonic() - s.saved >= 60 * SAVE_MINUTES


def save(s, keep: bool) -> Path:
    """Writes the last complete step, from its snapshot: the live tensors may be those of a step in progress."""
    if not s.ranks.leads:
        return s.run.dir
    tensors, non_finite, sizes, arms, loss_scale = s.snapshot
    state = {
        "buffers": s.buffers.state_dict(),
        "non_finite": non_finite,
        "elapsed": s.elapsed,
        "sizes": sizes,
        "adaptive": arms,  # called after the only arm that has a state, as it always was
        "loss_scale": loss_scale,
        "files": digests(s),
    }
    base = portable(s.policy.info["base_model"])
    info = {**s.policy.info, "base_model": base, "template": s.template, "template_hash": template_hash(s.template)}
    write = partial(write_adapters, s.policy, tensors, info)
    if s.policy.full and not s.policy.full.rounds:  # the model itself is the state: once is enough
        tensors = {name: t for name, t in tensors.items() if not name.startswith("adapter/")}
    # step 0 is always kept: its azr.json tells whoever reads the run what the base was
    keep = keep or not s.completed
    path = s.run.save_checkpoint(s.completed, write, tensors, state, info, keep)
    s.saved = time.monotonic()
    return path


def write_adapters(policy, tensors: dict, info: dict, directory: Path) -> None:
    """The adapters of a snapshot: "default" is the checkpoint itself, each further one a folder of its name, with its
    azr.json, so that whatever takes a checkpoint takes the folder."""
    policy.save_adapter(directory, update.of_adapter(tensors, "default"))
    for adapter in policy.adapters[1:]:
        policy.save_adapter(directory / adapter, update.of_adapter(tensors, adapter))
        write_json_atomic(directory / adapter / "azr.json", info)


def load(s) -> None:
    """Takes the checkpoint that the run goes on from."""
    tensors, state, directory = s.run.load_checkpoint()
    if s.policy.full and not s.policy.full.rounds:
        tensors |= {f"adapter/{name}": t for name, t in read_weights(directory).items()}
    # the moments come on top of the loaded base: what is cached may have to be freed for them
    once_more(lambda: update.restore_tensors(s.policy, s.optimizer, tensors), "loading the checkpoint")
    s.non_finite, s.arms.state = state["non_finite"], state.get("adaptive", {})
    if "loss_scale" in state:  # checkpoints from before it have none
        s.loss_scale = LossScale(**state["loss_scale"])
    s.sizes = Sizes(**state["sizes"]["scoring"])
    set_rollout_sizes(s.policy.engine, state["sizes"]["rollout"])
    s.buffers.load_state_dict(state["buffers"])
    s.elapsed, s.completed, s.saved = state["elapsed"], s.run.step, time.monotonic()
    # the lines of later steps are gone from metrics.jsonl, and one of them may have been the best
    s.evaluation.mark_best()


def check_base_and_files(s, directory: Path) -> None:
    """ModelError, RunError: the base of a run that goes on is another one, or a file that it draws from has changed.
    Where they lie may differ. Before the run is opened: a refusal must leave its config.json as it was."""
    if s.config.resume == "none" or not (steps := step_directories(directory)):
        return
    newest = steps[-1][1]
    opening = Opening(s.config.model, newest, read_record(newest), s.config.quantization, None, s.template)
    for doubt in check_base(opening, s.policy.info):
        warn(doubt)
    try:
        files = read_object(newest / "state" / "state.json").get("files", {})
    except ValueError:
        return  # a broken checkpoint: whoever opens the run says so, and goes on from the one before
    if list(files.values()) != list(digests(s).values()):
        raise RunError(f"{directory}: cannot resume, {' or '.join(digests(s))} is no longer what it was")


def digests(s) -> dict[str, str]:
    """16 hex digits of each file of tasks and solutions that the arms draw from."""
    return {file: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] for file in s.arms.files()}


def stopped(s) -> str:
    """After a stop or an error: saves what is complete, without the step in progress; returns what to tell."""
    if not s.snapshot:
        return f"stopped before the first checkpoint; start again with: {s.run.command()}"
    return f"saved {save(s, keep=False)}; go on with: {s.run.command()}"


def failed(s, error: Exception) -> None:
    """Saves what is complete before an error ends the run (a full disk: there is a good checkpoint already)."""
    # a RunError is about the run's own files: writing to them once more could only fail again, or hide it
    if s.snapshot and not isinstance(error, RunError):
        try:
            warn(stopped(s))
        except (RunError, RuntimeError, OSError) as second:
            warn(f"the last complete step could not be saved: {second}")
    raise GaveUp(str(error)) if isinstance(error, SandboxError) else error
