"""From settings to a run that is open: what is refused before anything is made, the model, the sandbox, the directory.

start(config, why, stop, make_state, train)     # both from train_azr.py
code = exit_code(lambda: start(...))            # one line on stderr for what ends a run
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from azr import console
from azr.evals import math_answers
from azr.evals.held_out import load_tasks
from azr.models import base_description, model_path
from azr.policy.backoff import DoesNotFit, Sizes, is_out_of_memory
from azr.policy.policy import LoraSettings, ModelError, Policy, Sampling
from azr.runs import DiskError, Run, RunError, read_json_object
from azr.stop import StopNow, StopRequest
from azr.tasks.prompts import STOP
from azr.train import checkpoint, screen, trackers, update
from azr.train.arms import Arms
from azr.train.config import Config, completed, template_of
from azr.train.evaluation import Evaluation
from azr.train.loss_scale import LossScale
from azr.train.rollouts import judged
from sandbox import Sandbox, SandboxError


def start(config: Config, why: str, stop: StopRequest, state_class: type, train: Callable) -> None:
    """Loads the model, opens the run directory, trains: `train` gets the State that `make_state` makes of all that."""
    arms = refuse(config)
    policy = load_policy(config)
    grader = math_answers.MathGrader() if any(task.mode == "math" for task in arms.judged) else nullcontext()
    run_dir = Path(config.out if config.resume in ("auto", "none") else config.resume)
    with Sandbox() as sandbox, grader as grader:
        s = make_state(state_class, config, policy, sandbox, run_dir, arms, grader)
        with Run.open(Path(config.out), dataclasses.asdict(config), config.resume, completed) as run:
            s.run = run
            screen.header(config, why, policy, run.environment(sandbox=sandbox.state))
            s.stop, s.tracker = stop, trackers.open_tracker(config.tracker, run)
            try:
                train(s)
            except StopNow:
                with stop.shield():
                    console.say(checkpoint.stopped(s))
            except Exception as error:
                with stop.shield():
                    checkpoint.failed(s, error)
            finally:
                s.tracker.close()


def make_state(state_class, config: Config, policy: Policy, sandbox: Sandbox, run_dir: Path, arms: Arms, grader=None):
    """The State of a run before its first step; the arms look at their files. ValueError: one of these is of no use."""
    sampling = Sampling(temperature=config.temperature, max_new_tokens=config.max_new_tokens, stop=(STOP,))
    held_out = dataclasses.replace(sampling, temperature=1.0)  # whatever the training has: runs stay comparable
    template = template_of(config)
    s = state_class(
        config,
        policy,
        update.make_optimizer(policy, config.learning_rate),
        sandbox,
        arms=arms,
        grader=grader,
        sizes=Sizes(config.token_budget),
        loss_scale=LossScale.of(policy.info["dtype"]),
        template=template,
        sampling=sampling,
        evaluation=Evaluation(config, policy, sandbox, template, held_out, run_dir),
    )
    arms.start(s, judged)
    return s


def refuse(config: Config) -> Arms:
    """The arms of a run, once everything is checked that can be before the model is loaded and a directory made.

    RunError, ValueError: the run directory holds something else, a file of tasks or a tracker cannot be used.
    """
    Run.check(Path(config.out), config.resume)
    template_of(config)
    trackers.check(config.tracker)
    if config.eval_data and any(task.mode == "math" for task in load_tasks(config.eval_data)):
        raise ValueError(f"{config.eval_data}: has math tasks; measure them with eval_passk.py, before and after")
    return Arms.of(config)


def load_policy(config: Config) -> Policy:
    """The base with new LoRA on it, or with the adapter that --adapter names. ModelError, in one line, for what cannot
    be loaded; ValueError for an adapter of another base or of other settings."""
    lora = LoraSettings(config.lora_rank, config.lora_alpha, config.lora_targets)
    policy = Policy.load(
        model_path(config.model),
        config.quantization,
        lora=None if config.adapter else lora,
        adapter=config.adapter,
        seed=config.seed,
        max_batch=config.max_batch,
        dtype=config.dtype,
        attn=config.attn,
        rollout_weights=config.rollout_weights,
        need_gpu=not config.allow_cpu and base_description(config.model) is None,
    )
    if config.adapter:
        check_adapter(config.adapter, policy, lora)
        console.say(f"warm start from the adapter in {config.adapter}")
    if policy.device.type == "cuda":
        policy.checkpoint_activations()
    return policy


def check_adapter(directory: str, policy: Policy, lora: LoraSettings) -> None:
    """ValueError unless the adapter was trained on this base (where its azr.json says so) and has these settings."""
    card, base = Path(directory) / "azr.json", policy.info["base_model"]
    trained_on = read_json_object(card).get("base_model", base) if card.is_file() else base
    if trained_on != base:
        raise ValueError(f"--adapter {directory} was trained on {trained_on}, not on {base}; give --model {trained_on}")
    if policy.info["lora"] != dataclasses.asdict(lora):
        has = ", ".join(f"{name} {value}" for name, value in policy.info["lora"].items())
        raise ValueError(f"--adapter {directory} has {has}; leave the --lora flags out, or give them these values")


def exit_code(work: Callable[[], int | None]) -> int:
    """What work() returns, or 0 for None; 1 or 2 and one line on stderr for an error that a user can act on."""
    try:
        return work() or 0
    except (checkpoint.GaveUp, DoesNotFit, DiskError) as error:
        print(f"train_azr.py: {error}", file=sys.stderr)
        return 1
    except (ModelError, RunError, SandboxError, ValueError) as error:
        print(f"train_azr.py: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"train_azr.py: {str(error).splitlines()[0]}; take a smaller --preset", file=sys.stderr)
        return 1
    except StopNow:
        return 0  # before the run began: nothing to save
