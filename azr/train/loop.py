"""Around the steps of train_azr.py: what is refused, the open run, seed stage and probe, checkpoints, the conclusion.

    code = exit_code(lambda: run(config, why, stop, ranks, State, train))     # one line on stderr for what ends a run
    begin(s, propose, validate, solve)                       # what comes before the first step, or a checkpoint
    watcher = Watcher(s, watch)
    for step in range(s.completed + 1, s.config.steps + 1):
        if not watcher.goes_on(*train_step(s, step)):        # train_azr.py: metrics, proposals, answers
            return
    conclude(s, watch)

`s` is the State of train_azr.py. Nothing here imports the script: what is needed of it comes as arguments.
"""

from __future__ import annotations

import dataclasses
import os
import random
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from azr import console
from azr.console import prose, warn
from azr.drawing import png
from azr.evals import math_answers
from azr.evals.held_out import load_tasks, plot_pass_at_k
from azr.jsonl import tolerant_lines, write_jsonl_atomic
from azr.models import base_description, model_path
from azr.passk import powers_of_two
from azr.policy.backoff import DoesNotFit, Sizes, is_out_of_memory
from azr.policy.opening import check_warm_start
from azr.policy.policy import Completion, LoraSettings, ModelError, Policy, Sampling
from azr.runs import DiskError, Run, RunError, newest_intact, read_metrics
from azr.stop import StopNow, StopRequest
from azr.tasks import MODES, SEED_PROGRAM, SEED_TASKS, Sample
from azr.tasks.prompts import STOP
from azr.train import checkpoint, ppo, screen, trackers, update
from azr.train.ahead import RememberingSandbox
from azr.train.arms import Arms
from azr.train.config import Config, completed, template_of
from azr.train.data import check_context
from azr.train.distributed import Lost, Ranks, SharedPolicy, SharedSandbox, open_run
from azr.train.evaluation import Evaluation
from azr.train.loss_scale import LossScale
from azr.train.metrics import memory, sample_row
from azr.train.rollouts import judged
from sandbox import Sandbox, SandboxError

SEED_TASKS_PER_MODE = 256  # the seed stage stops there (Absolute Zero, section 3.3.1: batch size x 4)
SEED_ROUNDS = 20  # a model that proposes nothing valid in so many rounds will not in more
STALLED = 4, 32  # rounds and proposals without one new task, after which it ends too: a round may take minutes
EARLY = 3  # rounds after which a model that keeps no form is told from one that does
PROBE = 64  # prompts and answers of each role and mode, frozen at step 0, to measure every later policy on
NON_FINITE_LIMIT = 3  # skipped updates in a row: one is bad luck, three are a learning rate
TABLE_EVERY = 25  # steps between tables of samples on the screen
NAMES = {"selfplay": "self-play", "rlvr": "RLVR", "sft": "SFT"}


# --------------------------------------------------------------------------------------------------- opening a run


def run(config: Config, why: str, stop: StopRequest, ranks: Ranks, state_class: type, train: Callable) -> None:
    """Loads the model, opens the run directory, trains: `train` gets the State that `make_state` makes of all that."""
    # of cards that differ, the smallest decides the sizes
    config = min(ranks.exchange(config), key=lambda c: (c.token_budget, c.max_batch))
    arms = refuse(config, ranks)
    policy = load_policy(config, ranks)
    maths = any(task.mode == "math" for arm in arms.arms for task in arm.judged)
    grader = math_answers.MathGrader(ranks.workers) if maths else nullcontext()
    run_dir = _directory(config)
    with RememberingSandbox() if ranks.world == 1 else SharedSandbox(ranks) as sandbox, grader as grader:
        s = make_state(state_class, config, policy, sandbox, run_dir, arms, grader, ranks)
        if ranks.leads:
            checkpoint.check_base_and_files(s, run_dir)
        with open_run(ranks, config, completed) as s.run:
            s.evaluation.run_dir = s.run.dir
            screen.header(config, why, policy, s.run.environment(sandbox=sandbox.state))
            if ranks.world > 1:
                console.say(f"{ranks.world} processes share the work of each step; this is rank {ranks.rank}")
            s.stop, s.tracker = stop, trackers.open_tracker(config.tracker if ranks.leads else "none", s.run)
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


def _directory(config: Config) -> Path:
    return Path(config.out if config.resume in ("auto", "none") else config.resume)


def make_state(
    state_class, config: Config, policy: Policy, sandbox: Sandbox, run_dir: Path, arms: Arms, grader=None, ranks=None
):
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
        ranks=ranks or Ranks(),
        sizes=Sizes(config.token_budget),
        loss_scale=LossScale.of(policy.info["dtype"]),
        template=template,
        sampling=sampling,
        evaluation=Evaluation(config, policy, sandbox, template, held_out, run_dir),
    )
    check_context(s)
    arms.start(s, judged)
    return s


def refuse(config: Config, ranks: Ranks) -> Arms:
    """The arms of a run, once everything is checked that can be before the model is loaded and a directory made.

    RunError, ValueError: the run directory holds something else, a file of tasks or a tracker cannot be used.
    """
    if ranks.leads:  # the others may come here when it has begun to write
        Run.check(Path(config.out), config.resume)
    template_of(config)
    trackers.check(config.tracker)
    frozen = config.resume != "none" and (_directory(config) / "eval" / "held_out.jsonl").is_file()
    if config.eval_data and not frozen and any(task.mode == "math" for task in load_tasks(config.eval_data)):
        raise ValueError(f"{config.eval_data}: has math tasks; measure them with eval_passk.py, before and after")
    return Arms.of(config)


def load_policy(config: Config, ranks: Ranks) -> Policy:
    """The base with new LoRA on it, with the adapter that --adapter names, or to be trained as a whole. ModelError, in
    one line, for what cannot be loaded; ValueError for an adapter of another base or of other settings."""
    lora = LoraSettings(config.lora_rank, config.lora_alpha, config.lora_targets)
    own = newest_intact(_directory(config))[0] if config.adapter and config.resume != "none" else None
    adapter = own or config.adapter  # a run that goes on needs what it began with no more
    policy = (Policy if ranks.world == 1 else SharedPolicy).load(
        model_path(config.model),
        config.quantization,
        lora=None if adapter or config.train == "full" else lora,
        adapter=adapter,
        seed=config.seed,
        max_batch=config.max_batch,
        dtype=config.dtype,
        attn=config.attn,
        rollout_weights=config.rollout_weights,
        need_gpu=not config.allow_cpu and base_description(config.model) is None,
        full=config.train == "full",
    )
    if adapter and not own:
        check_warm_start(config.adapter, policy.info, dataclasses.asdict(lora))
        console.say(f"warm start from the adapter in {config.adapter}")
    if ranks.world > 1:
        policy.ranks = ranks
    if policy.device.type == "cuda":
        policy.checkpoint_activations()
    return policy


def exit_code(work: Callable[[], int | None]) -> int:
    """What work() returns, or 0 for None; 1 or 2 and one line on stderr for an error that a user can act on."""
    # peft: that the base of an adapter lies elsewhere now; azr/policy/opening.py looks whether it is the same
    warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path`")
    # torch warns in five lines of what azr/policy/gpu.py says in one
    warnings.filterwarnings("ignore", message="CUDA initialization")
    try:
        return work() or 0
    except StopNow:
        console.say("stopped before the run was open: nothing is changed, the same command starts it")
        return 0
    except BrokenPipeError:  # `| head` has read enough; what is still in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (checkpoint.GaveUp, DoesNotFit, DiskError, Lost) as error:
        code, text = 1, str(error)
    except (ModelError, RunError, SandboxError, ValueError) as error:
        code, text = 2, str(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        code, text = 1, f"{str(error).splitlines()[0]}; take a smaller --preset"
    print(f"train_azr.py: {text}", file=sys.stderr)
    return code


# ------------------------------------------------------------------------------------------------ before the first step


def begin(s, propose: Callable, validate: Callable, solve: Callable) -> None:
    """What a checkpoint says; or the seed stage, the probe and the measurement of the base."""
    if s.run.resumed:
        checkpoint.load(s)
        if s.completed >= s.config.steps:
            console.say(f"all {s.config.steps} steps were complete before; for more of them give a larger --steps")
    # the cache of sampling takes what is free; Adam makes its moments later, at the first update
    s.policy.engine.reserve = update.moments_to_come(s.policy, s.optimizer)
    if not s.run.resumed:
        seed_stage(s, propose, validate)
    # from here on a stop has something to save, even one in the middle of the first step
    s.snapshot = checkpoint.changing(s)
    if not s.run.resumed:
        checkpoint.save(s, keep=True)
    if not s.completed:  # each is made once, so what a stop has left out is made up for
        freeze_probe(s, propose, solve)
        s.evaluation.freeze(s.buffers)
        if greedy := s.evaluation.greedy_answers("base"):
            screen.held_out(greedy.metrics(), "before the first step: ")
        s.evaluation.pass_at_k_samples("base")


def seed_stage(s, propose: Callable, validate: Callable) -> None:
    """Fills the buffers from nothing but the identity program, with the untrained model and no weight update."""
    for task in SEED_TASKS.values():
        s.buffers.add(task, 0)
    target, tried = min(SEED_TASKS_PER_MODE, 4 * s.config.prompts_per_mode), []
    turn = fruitful = seen = 0  # fruitful: the last round that brought a task, after which `seen` had been tried
    while turn < SEED_ROUNDS and (turn - fruitful < STALLED[0] or len(tried) - seen < STALLED[1]):
        modes = tuple(mode for mode in MODES if s.buffers.size(mode) < target)
        if not modes:
            break
        turn += 1
        proposals = propose(s, f"seed-{turn - 1}", modes)
        # at first there is no other program to refer to, and an induction proposal about this one would be trivial
        validate(s, proposals, exempt={SEED_PROGRAM})
        for sample in proposals:
            if sample.task and sample.parsed.well_formed and s.buffers.size(sample.mode) < target:
                s.buffers.add(sample.task, 0)
                fruitful, seen = turn, len(tried) + len(proposals)
        tried += proposals
        round_of = f"seed stage, round {turn} of at most {SEED_ROUNDS}"
        prose(f"{round_of}: {buffer_sizes(s)}, of {target} each; {screen.refusals(proposals)}")
        if turn == EARLY and (text := screen.keeps_no_form(tried, s.config)):
            warn(f"seed stage: {text}")
    if (sizes := buffer_sizes(s)) and min(s.buffers.size(mode) for mode in MODES) < target:
        why = f", none in the last {turn - fruitful}" if turn < SEED_ROUNDS else ""
        warn(f"seed stage: {target} tasks a mode wanted, {sizes} found in {turn} rounds{why}; going on with these")


def buffer_sizes(s) -> str:
    """How many tasks the buffer of each mode holds, as text for the screen."""
    return ", ".join(f"{mode} {s.buffers.size(mode)}" for mode in MODES)


def freeze_probe(s, propose: Callable, solve: Callable) -> None:
    """probe.jsonl: prompts and answers of every role and mode by the untrained policy, with its token ids and their
    log-probs: for entropy on fixed data, and for how far the policy moves (`probe_kl`)."""
    if (s.run.dir / "probe.jsonl").exists():
        return
    # draws of its own: what training draws must not depend on whether there is a probe
    rng = random.Random(f"{s.config.seed}/probe")
    proposals = propose(s, "probe", count=PROBE)
    tasks = [task for mode in MODES for task in s.buffers.sample(mode, PROBE, rng)]
    samples = proposals + solve(s, "probe", tasks, 1)
    rows = [
        {"role": sample.role, "mode": sample.mode, "prompt": sample.prompt, "response": sample.response}
        # of the trainer, which later policies are scored by too: the gap between it and the sampler is no movement
        | {"ids": sample.completion.ids, "log_probs": [round(x, 6) for x in scored.old_log_prob]}
        for sample, scored in zip(samples, update.scored(s, samples))
    ]
    write_jsonl_atomic(s.run.dir / "probe.jsonl", rows)


# ------------------------------------------------------------------------------------------------------- in a step


def check_finite(s, step: int, metrics: dict[str, float], batch: list[Sample]) -> None:
    """Counts skipped updates in a row and saves the batch of each."""
    s.non_finite = s.non_finite + 1 if metrics["skipped"] else 0
    if metrics["skipped"]:
        path = s.run.dir / f"non_finite_step_{step}.jsonl"
        write_jsonl_atomic(path, [sample_row(step, sample) for sample in batch])
        loss, norm = metrics["loss"], metrics["grad_norm"]
        warn(f"step {step}: loss {loss}, gradient norm {norm}: update skipped, batch saved to {path}")


def evaluates(s, step: int) -> bool:
    """Whether the held-out tasks are measured after this step (--eval-every; 0: never)."""
    return bool(s.config.eval_every) and step % s.config.eval_every == 0


def probe_kl(s) -> dict[str, float]:
    """`role/mode/probe_kl`: KL(policy at step 0 || policy now), nats per token at the temperature of the training, on
    the probe, which the former sampled. Estimator k3 (`ppo.kl_k3`), mean over the tokens of all responses.

    {} in a run whose probe is older than its log-probs. Roles that the run has, each with the adapter it is trained in.
    """
    path = s.run.dir / "probe.jsonl"
    rows = tolerant_lines(path, []) if path.is_file() else ()
    samples = [
        Sample(row["role"], row["mode"], row["prompt"], s.policy.encode(row["prompt"]), completion, row["response"], "")
        for row in rows
        if "log_probs" in row and (s.arms.proposes or row["role"] == "solver")
        for completion in [Completion(row["ids"], row["log_probs"], "probe")]
    ]
    groups: dict[str, list[torch.Tensor]] = {}
    for sample, now in zip(samples, update.scored(s, samples)):
        # fp64: exp(d) - d - 1 of a small d is a difference of nearly equal numbers
        log_probs = (torch.tensor(x, dtype=torch.float64) for x in (sample.completion.log_probs, now.old_log_prob))
        kl = ppo.kl_k3(*log_probs)
        for mode in (sample.mode, "all"):
            groups.setdefault(f"{sample.role}/{mode}/probe_kl", []).append(kl)
    return {name: torch.cat(parts).mean().item() for name, parts in groups.items()}


def not_reproducible(s) -> dict[str, float]:
    """The metrics of a step that depend on the machine: seconds of each phase, memory, lanes that died."""
    # added up over resumes, which the clock of a step knows nothing of
    s.elapsed += s.clock.total()
    times = {**s.clock.metrics(), "time/elapsed": round(s.elapsed, 2), **memory(checkpoint.computed_at_once(s))}
    return times | {"time/lanes_lost": s.sandbox.state["lanes_lost"]}


def complete(s, step: int) -> None:
    """The step counts from here on; a checkpoint if one is due, wanted, or belongs to an evaluation.

    GaveUp after NON_FINITE_LIMIT skipped updates in a row.
    """
    evaluated, last = evaluates(s, step), step == s.config.steps
    # number and snapshot change together: whatever stops the run later saves a state that fits its number
    s.completed, s.snapshot = step, checkpoint.changing(s)
    if evaluated or last or s.stop.save_requested or checkpoint.due(s, step):
        checkpoint.save(s, keep=evaluated or last)
        s.stop.save_requested = False
    if evaluated:
        # after the save, so that best.json never names a checkpoint that is not there
        s.evaluation.mark_best()
    if s.non_finite >= NON_FINITE_LIMIT:
        wider = ", or take --dtype bf16 or fp32, whose range is wider" if s.loss_scale.active else ""
        raise checkpoint.GaveUp(
            f"step {step}: {s.non_finite} updates in a row were not finite; lower --learning-rate{wider}"
        )


# -------------------------------------------------------------------------------------------------- between the steps


class Watcher:
    """What the screen shows between the steps, and whether --max-hours are over."""

    def __init__(self, s, watch) -> None:
        """watch: what notes warnings (analysis.health.Watch)."""
        self.s, self.watch, self.start = s, watch, time.monotonic()
        self.lines = screen.StepLines(s.config.steps, s.config.price_per_hour)

    def goes_on(self, metrics: dict, proposals: list[Sample], answers: list[Sample]) -> bool:
        """Shows a step. False: the hours are full; the run is saved."""
        config, step = self.s.config, metrics["step"]
        self.lines.show(metrics)
        self.watch.add(metrics)
        if proposals and (step % TABLE_EVERY == 1 or step == config.steps):
            screen.sample_table(step, proposals, answers)
        over = bool(config.max_hours) and time.monotonic() - self.start > 3600 * config.max_hours
        if self.s.ranks.ends_step(self.s.policy.trainable_parameters(), over) and step < config.steps:
            console.say(f"--max-hours {config.max_hours} reached; {checkpoint.stopped(self.s)}")
            return False
        return True


def conclude(s, watch) -> None:
    """Trained against base: the table and the pass@k plot; what to look at."""
    # from the file, not from memory: a resumed run has the steps before the resume only there
    rows = [row for row in read_metrics(s.run.dir) if row["step"] > 0]
    count = min(10, max(1, len(rows) // 2))
    screen.training_table(rows[:count], rows[-count:])
    names, greedy = ("base", f"step_{s.completed}"), []
    if s.evaluation.has("greedy_base"):  # else the run is older than this measurement, and it is too late for it
        greedy = [s.evaluation.greedy_answers(name) for name in names]
    sampled = [result for name in names if (result := s.evaluation.pass_at_k_samples(name))]
    ks = powers_of_two(s.config.eval_samples) if sampled else [1]
    if (greedy or sampled) and s.ranks.leads:
        screen.before_after(greedy, sampled, ks)
    if sampled and s.ranks.leads:
        plot = s.run.dir / "plots" / "pass_at_k.png"
        plot.parent.mkdir(exist_ok=True)
        plot.write_bytes(png(plot_pass_at_k(*sampled, NAMES[s.config.algorithm], ks)))
        console.say(f"pass@k, base against trained: {plot}")
    if best := s.evaluation.mark_best():
        console.say(best)
    for line in watch.health.summary():
        prose(line)
    prose(f"run directory: {s.run.dir} (metrics.jsonl, samples.jsonl, checkpoints/, eval/, plots/)")
    screen.what_next(s.config, s.run.dir)
