"""Self-play training of one model that proposes small Python tasks and solves them (Absolute Zero, arXiv 2505.03335).

    python train_azr.py                          the embedded tiny model, on a laptop: two to six minutes, no GPU
    python train_azr.py --model qwen-3b          4-bit base + LoRA on one GPU
    torchrun --nproc-per-node 4 train_azr.py --model qwen-3b      the same run on four (docs/several-gpus.md)
    python train_azr.py --out runs/a --resume auto     go on after a stop, a crash or a kill
    python train_azr.py --model qwen-3b --dry-run      what it would use; nothing is trained
    python train_azr.py --doctor                 what works on this machine and what does not, to paste into an issue
    python train_azr.py --algorithm rlvr --data tasks.jsonl     the same loop on fixed tasks; sft: on given solutions
    python train_azr.py export runs/a --out DIR        base and adapter merged, verified, as a plain bf16 model

This file is the method: `train_step` has the five phases in their order, `ppo_update` and `ppo_loss` the update. What
stands around the steps (seed stage, checkpoints, screen) is in azr/train/loop.py, micro-batches and what to do when
memory runs out in azr/train/update.py, and whatever differs from plain self-play in azr/train/arms, one file each:
every `s.arms...` below does nothing in the default run.

Left out of the textbook PPO: critic and GAE (a reward belongs to a whole response and gamma is 1, so each token's
return is that reward), KL penalty, reference model, learning-rate schedule; as in the published recipe. With one
optimizer step per training step (the default) the ratio is 1 and the clip does nothing: REINFORCE with a baseline.

Ctrl-C, SIGTERM or a closed terminal saves and exits 0, a second one quits (130); SIGUSR1 saves and goes on. Exit codes:
0 done or stopped with a checkpoint; 1 gave up, complete steps are saved (three non-finite losses in a row, no memory,
no sandbox, a full disk); 2 bad input, nothing done.
"""

from __future__ import annotations

import importlib
import math
import random
import signal
import sys
from collections import Counter
from dataclasses import dataclass, field

from azr.machine import doctor

if __name__ == "__main__":  # Ctrl-C while torch loads ends the process without a traceback; later a StopRequest has it
    signal.signal(signal.SIGINT, signal.SIG_DFL)
if __name__ == "__main__" and "--doctor" in sys.argv:  # it runs before the packages that it looks at are imported
    sys.exit(doctor.main(sys.argv[1:], lambda words: importlib.import_module("azr.train.config").parse(words, "")))
if __name__ == "__main__" and sys.argv[1:2] != ["export"]:  # --help and a wrong flag need not wait for torch
    importlib.import_module("azr.train.config").check_early(sys.argv[1:], __doc__)

import torch

from azr import console
from azr.analysis.health import Watch
from azr.evals.held_out import sample_seed
from azr.evals.math_answers import MathGrader
from azr.policy.backoff import Sizes
from azr.policy.policy import Policy, Sampling
from azr.runs import Run
from azr.stop import StopRequest
from azr.tasks import MODES, Buffers, Sample, Task, parse_answer, parse_proposal, solve_prompt, validate
from azr.train import ahead, data, loop, rollouts, trackers, update
from azr.train.arms import Arms
from azr.train.config import Config, as_json, dry_run, parse, resolve
from azr.train.distributed import Ranks, together
from azr.train.evaluation import Evaluation
from azr.train.loss_scale import LossScale
from azr.train.metrics import Clock, sample_row, step_metrics
from azr.train.update import CLIP, GAP_CAP, Batch
from sandbox import Sandbox

GRAD_CLIP = 1.0  # largest norm of the gradient of an optimizer step, as published


@dataclass
class State:
    """All that a run holds. Parameters and buffers change in phases 4 and 5 only, so a stop can drop a step."""

    config: Config
    policy: Policy  # 4-bit base + LoRA: samples and is trained, the same modules
    optimizer: torch.optim.Optimizer
    sandbox: Sandbox | None = None  # runs proposed programs and answers
    buffers: Buffers = field(default_factory=Buffers)  # valid tasks by mode, with the step each came in
    arms: Arms = field(default_factory=Arms)  # what this run does differently; nothing by default
    ahead: ahead.Ahead | None = None  # what was worked out before its phase, in the first three
    sizes: Sizes | None = None  # tokens of a micro-batch; lowered when memory runs out
    loss_scale: LossScale = field(default_factory=LossScale)  # of fp16
    template: str = "azr"  # the wording of the prompts
    sampling: Sampling | None = None
    evaluation: Evaluation | None = None  # the held-out tasks
    grader: MathGrader | None = None  # where a file has mathematics
    ranks: Ranks = field(default_factory=Ranks)  # the processes that share the work of this run; one by default
    run: Run | None = None  # the run directory
    stop: StopRequest | None = None
    tracker: trackers.Tracker = trackers.NONE
    clock: Clock = field(default_factory=Clock)
    non_finite: int = 0  # skipped updates in a row
    completed: int = 0  # steps
    elapsed: float = 0.0  # seconds of training
    snapshot: tuple | None = None  # of the last complete step; None: there is nothing whole to save
    saved: float = math.inf  # when, on the monotonic clock


def train_step(s: State, step: int) -> tuple[dict, list[Sample], list[Sample]]:
    """One step: (metrics, proposals, answers). Until it is recorded a stop drops it."""
    c, s.clock = s.config, Clock()

    with ahead.working(s, step):  # no idle tail: the last proposals are sampled beside the answers to the first
        # 1. Propose: per mode, programs with inputs (induction: inputs, a message), shown earlier tasks as references.
        proposals = propose(s, step) if s.arms.proposes else []
        s.clock.lap("propose")

        # 2. Validate: what is not deterministic, terminating, literal-valued and new is refused with its reason.
        validate_all(s, proposals)
        s.clock.lap("validate")

        # 3. Solve: c.answers answers to each valid task; the share that is correct is its solve rate r.
        tasks = [sample.task for sample in proposals if sample.task]
        tasks += backfill(s, step, proposals) + s.arms.tasks(s, step)
        answers = solve(s, step, tasks, c.answers) if tasks else []
    answers += s.arms.answers(s, step, solve)
    more = s.arms.samples(s, step, proposals, answers, solve)  # trained on too, but no part of r

    # 4. Reward and update. Recipe lean trains the very answers that measured r, so no token is thrown away; the
    #    published one discards them and samples single answers to tasks of the buffer.
    trained = (answers if c.recipe == "lean" else published_solver_samples(s, step, proposals)) + more
    set_rewards(s, proposals, answers, trained)
    trained = [sample for sample in proposals if sample.reward is not None] + trained
    set_advantages(trained, c.recipe)
    given = s.arms.given(s, step)  # samples that bring an advantage of their own
    s.clock.lap("reward")
    losses = ppo_update(s, step, trained + given)
    s.clock.lap("update")

    # 5. Record: buffers, metrics, samples, checkpoint.
    metrics = record(s, step, proposals, answers, more + given, trained + given, losses)
    return metrics, proposals, answers


# ------------------------------------------------------------------------------------------------- phase 1: propose


def propose(s: State, step: int | str, modes: tuple = MODES, count: int | None = None) -> list[Sample]:
    """One proposal for each of `count` (prompts_per_mode) prompts per mode, with references from the buffers."""
    c, asked = s.config, []
    rng = random.Random(f"{c.seed}/{step}/propose")  # nothing random outlives a step, so a resume is exact
    for mode in modes:
        for _ in range(count or c.prompts_per_mode):
            if mode == "induction":  # its program is given: the proposer adds inputs and a message
                asked.append((mode, [s.buffers.sample_program(rng)]))
            else:
                asked.append((mode, s.buffers.sample(mode, c.references, rng)))
    prompts = [rollouts.fitting_prompt(s, mode, references) for mode, references in asked]

    def parse(i: int, response: str):
        mode, references = asked[i]
        return parse_proposal(mode, response, references[0].program if mode == "induction" else None)

    with s.arms.proposing(s):
        return rollouts.generate(s, "proposer", [mode for mode, _ in asked], prompts, 1, f"{step}/propose", parse)


# ------------------------------------------------------------------------------------------------ phase 2: validate


def validate_all(s: State, proposals: list[Sample], exempt: set[str] = frozenset()) -> None:
    """Runs all proposals in the sandbox: each gets its reason, a valid one its task. exempt: what may be trivial."""
    for sample in proposals:
        sample.reason, sample.detail = sample.parsed.reason, sample.parsed.detail
    parsed = [sample for sample in proposals if sample.parsed.value is not None]
    values = [sample.parsed.value for sample in parsed]
    verdicts = validate(values, s.sandbox, s.buffers.keys(), exempt=exempt, held_out=s.evaluation.refused)
    for sample, verdict in zip(parsed, verdicts):
        sample.reason, sample.detail = verdict.reason, verdict.detail
        if verdict.ok and not data.fits(s, verdict.task):
            sample.reason, sample.detail = "too_large", "its solver's prompt would exceed the model's context"
        else:
            sample.task = verdict.task


# --------------------------------------------------------------------------------------------------- phase 3: solve


def solve(s: State, step: int | str, tasks: list[Task], n: int, key: str = "solve") -> list[Sample]:
    """n judged answers to each task. An answer that no verdict could be had for (reason infra) is left out."""
    prompts, modes = [solve_prompt(task, s.template) for task in tasks], [task.mode for task in tasks]

    def parse(i: int, response: str):
        return parse_answer(modes[i], response)

    samples = rollouts.generate(s, "solver", modes, prompts, n, f"{step}/{key}", parse, data.names(tasks))
    for i, sample in enumerate(samples):
        sample.task = tasks[i // n]
    s.clock.lap("solve")
    return rollouts.judged(s, samples)


def backfill(s: State, step: int, proposals: list[Sample]) -> list[Task]:
    """Tasks of the buffer for modes in which less than half of the proposals are valid, up to that half."""
    if s.config.solver_tasks == "fresh" or s.config.recipe == "azr" or not s.arms.proposes:
        return []
    rng, half = random.Random(f"{s.config.seed}/{step}/backfill"), s.config.prompts_per_mode // 2
    valid = Counter(sample.mode for sample in proposals if sample.task)
    return [task for mode in MODES for task in s.buffers.sample(mode, max(0, half - valid[mode]), rng)]


def published_solver_samples(s: State, step: int, proposals: list[Sample]) -> list[Sample]:
    """Recipe azr: one answer to prompts_per_mode tasks per mode, this step's first, then of the buffer."""
    rng, tasks = random.Random(f"{s.config.seed}/{step}/solver"), []
    for mode in MODES:
        new = [sample.task for sample in proposals if sample.task and sample.mode == mode]
        tasks += new + s.buffers.sample(mode, s.config.prompts_per_mode - len(new), rng)
    return solve(s, step, tasks, 1, "train")


# ----------------------------------------------------------------------------------------- phase 4: reward and update


def set_rewards(s: State, proposals: list[Sample], answers: list[Sample], trained: list[Sample]) -> None:
    """Solve rates r from the answers; rewards of the proposals, and of all solver samples."""
    judged: dict[str, list[bool]] = {}
    for sample in answers:
        judged.setdefault(sample.task.hash, []).append(sample.correct)
    rates = {task: sum(correct) / len(correct) for task, correct in judged.items()}
    for sample in proposals:
        sample.solve_rate = rates.get(sample.task.hash) if sample.task else None
        failed = sample.reason == "infra" or (sample.task and sample.solve_rate is None)
        sample.reward = None if failed else proposer_reward(s, sample)  # None: the machine's fault, no training
    for sample in [*answers, *trained]:
        sample.solve_rate = rates.get(sample.task.hash)
        sample.reward = solver_reward(sample, s.config.solver_reward)


def proposer_reward(s: State, sample: Sample) -> float:
    """-1 for what is refused or malformed; else 1 - r, but 0 for a task that is never or always solved (eq. 4): the
    harder the better, as long as it is solved at all. --ends-penalty 0.5: what the published code has at both ends."""
    if sample.task is None or not sample.parsed.well_formed:
        return -1.0
    never_or_always = sample.solve_rate in (0.0, 1.0)
    reward = 0.0 if never_or_always else 1.0 - sample.solve_rate
    return s.arms.reward(sample, reward) - (s.config.ends_penalty if never_or_always else 0.0)


def solver_reward(sample: Sample, kind: str) -> float:
    """graded: 1 correct, -0.5 wrong, -1 malformed (eq. 6); binary: 1 correct and well-formed, else 0."""
    if kind == "binary":
        return float(sample.correct and sample.parsed.well_formed)
    if not sample.parsed.well_formed:
        return -1.0
    return 1.0 if sample.correct else -0.5


def set_advantages(samples: list[Sample], recipe: str) -> None:
    """How much better than expected each response is, (samples,) fp32 computed in fp64.

    lean, solver: (R - mean of its task's answers) / std of its mode: centred as in GRPO (arXiv 2402.03300), one scale
    per mode so that nearly solved tasks are not blown up (arXiv 2503.20783). lean, proposer: (R - mean) / std of its
    mode. azr: TRR++, (R - mean) / std over the TOKENS of its (role, mode): long responses count more.
    """
    for role, mode in dict.fromkeys((sample.role, sample.mode) for sample in samples):
        rows = [sample for sample in samples if (sample.role, sample.mode) == (role, mode)]
        reward = torch.tensor([sample.reward for sample in rows]).double()
        if recipe == "azr":
            advantage = whitened_over_tokens(reward, torch.tensor([len(x.completion.ids) for x in rows]).double())
        elif role == "proposer":
            advantage = centred(reward) / spread(reward)
        else:
            advantage, groups = torch.zeros_like(reward), [sample.group for sample in rows]
            for task in dict.fromkeys(groups):
                index = torch.tensor([i for i, group in enumerate(groups) if group == task])
                advantage[index] = centred(reward[index])
            advantage /= spread(reward)
        for sample, value in zip(rows, advantage.float().tolist()):
            sample.advantage = value


def centred(reward: torch.Tensor) -> torch.Tensor:
    """R - mean. Exactly 0 without variance: a rounding error over a small std must not become an advantage."""
    return torch.zeros_like(reward) if reward.max() == reward.min() else reward - reward.mean()


def spread(reward: torch.Tensor) -> torch.Tensor:
    """The unbiased standard deviation; 1 without variance."""
    return torch.ones_like(reward[0]) if reward.max() == reward.min() else (reward.var() + 1e-8).sqrt()


def whitened_over_tokens(reward: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(R - mu) / sqrt(var + 1e-8), mu = sum n R / sum n, var = sum n (R - mu)^2 / (sum n - 1), n response lengths."""
    total = tokens.sum()
    if total < 2 or reward.max() == reward.min():
        return torch.zeros_like(reward)
    mu = (tokens * reward).sum() / total
    return (reward - mu) / ((tokens * (reward - mu) ** 2).sum() / (total - 1) + 1e-8).sqrt()


def ppo_update(s: State, step: int, samples: list[Sample]) -> dict[str, float]:
    """c.minibatches optimizer steps; fills in each sample's entropy and log-probs; returns the train/ metrics."""
    c, updates = s.config, []
    of_arms = s.arms.prepare(s, step, samples)
    order = list(range(len(samples)))
    random.Random(f"{c.seed}/{step}/minibatches").shuffle(order)
    if c.minibatches > 1:  # the ratio of PPO needs the log-probs before the first of several optimizer steps
        update.old_log_probs(s, [x for x in samples if update.has_ratio(x) and update.has_gradient(s, x)])
    for number in range(c.minibatches):
        batch = [samples[i] for i in sorted(order[number :: c.minibatches])]
        s.arms.mark(s, batch, sample_seed(c.seed, f"{step}/control", number))
        updates.append(optimizer_step(s, batch))
        loop.check_finite(s, step, updates[-1], batch)
    metrics = update.of_step(updates) | of_arms | s.arms.after(s, samples)
    return {f"train/{name}": value for name, value in metrics.items()}


def optimizer_step(s: State, samples: list[Sample]) -> dict[str, float]:
    """One AdamW step on the gradient of the loss over all samples, skipped if it is not finite; returns its metrics."""
    overflows, weights = s.loss_scale.overflows, s.arms.weights(samples, token_weights(samples))
    while True:  # once; in fp16 again at half the loss scale when the gradient overflowed
        loss, columns = update.gradient(s, samples, weights, lambda batch: ppo_loss(s, batch))
        scale, norm = s.loss_scale.value, apply_gradient(s, loss)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if not s.loss_scale.again(loss, skipped):
            break
    metrics = {"loss": loss, "grad_norm": norm, "skipped": float(skipped)}
    if s.loss_scale.active:
        metrics |= {"loss_scale": scale, "overflows": s.loss_scale.overflows - overflows}
    return metrics | update.statistics(columns, samples) | s.arms.metrics(columns)


def apply_gradient(s: State, loss: float) -> float:
    """Clips the gradient's norm and steps AdamW, unless loss or norm is not finite. Returns the norm."""
    # a group is an adapter, one unless an arm adds some: clipped alone, so that none shortens the step of another
    groups = [group["params"] for group in s.optimizer.param_groups]
    norm = math.hypot(*(torch.nn.utils.clip_grad_norm_(group, GRAD_CLIP).item() for group in groups))
    if math.isfinite(loss) and math.isfinite(norm):
        s.optimizer.step()
    s.optimizer.zero_grad(set_to_none=True)
    return norm


def token_weights(samples: list[Sample]) -> list[float]:
    """What every token of a sample weighs: w_g / (tokens of its (role, mode) group g in the whole optimizer step).

    w_g is 1/6, so six groups count the same however long their responses are; an empty group leaves the others alone.
    """
    tokens, w = Counter(), data.group_share(samples)
    for sample in samples:
        tokens[sample.role, sample.mode] += len(sample.completion.ids)
    return [w / max(1, tokens[sample.role, sample.mode]) for sample in samples]


def ppo_loss(s: State, batch: Batch) -> torch.Tensor:
    """A micro-batch's part of the loss: the sum over its response tokens of weight x PPO's clipped surrogate.

    -min(r A, clip(r, 1 - 0.2, 1 + 0.2) A), r = p_now / p_old (Schulman et al. 2017, arXiv 1707.06347, eq. 7).
    """
    low, high = s.arms.clip(CLIP, CLIP)
    ratio = (batch.log_prob - batch.old_log_prob).exp()  # (batch, time); 1 in the first of a step's updates
    clipped = ratio.clamp(1 - low, 1 + high)
    token_loss = -torch.minimum(ratio * batch.advantage, clipped * batch.advantage)
    # Sampler and trainer share their modules, yet not every rounding: an importance weight near 1, at most 2 (TIS, Yao
    # et al. 2025), both log-probs of the weights that sampled.
    gap = (batch.old_log_prob - batch.sampler_log_prob).exp().clamp(max=GAP_CAP).detach()
    token_loss = s.arms.token_loss(batch, gap * token_loss)
    # What padding holds, infinities and NaN included, is no part of the sum over tokens, each with its group's weight.
    return (token_loss.masked_fill(~batch.mask, 0.0) * batch.weight[:, None]).sum() + s.arms.term(batch)


# --------------------------------------------------------------------------------------------------- phase 5: record


def record(s: State, step: int, proposals, answers, more, trained: list[Sample], losses: dict[str, float]) -> dict:
    """Valid tasks enter the buffers; metrics.jsonl, samples.jsonl and a due checkpoint get the step. The metrics."""
    held_out = s.evaluation.greedy() | loop.probe_kl(s) if loop.evaluates(s, step) else {}
    s.clock.lap("evaluate")
    with s.stop.shield():  # a stop comes before or after this, never between
        s.snapshot = None  # an error in between leaves buffers that belong to no step
        for sample in proposals:
            if sample.task is not None:
                s.buffers.add(sample.task, step)
        metrics = {"step": step, **step_metrics(proposals, answers, trained, s.config.answers)}
        metrics |= {**losses, **held_out, **loop.not_reproducible(s)}
        metrics |= {f"buffer/{mode}/size": s.buffers.size(mode) for mode in MODES}
        s.run.log(metrics)
        s.tracker.log(metrics)
        s.run.log_samples([sample_row(step, sample) for sample in [*proposals, *answers, *more]])
        loop.complete(s, step)
    return metrics


# ------------------------------------------------------------------------------------------------------ the script


def train(s: State) -> None:
    """Seed stage and base measurement (or what a checkpoint says), the steps, the final measurement."""
    loop.begin(s, propose, validate_all, solve)
    watcher = loop.Watcher(s, Watch(s.run.config, s.run.dir, console.warn))
    for step in range(s.completed + 1, s.config.steps + 1):
        if not watcher.goes_on(*train_step(s, step)):
            return
    loop.conclude(s, watcher.watch)


def main(arguments: list[str]) -> int:
    """Returns the exit code: see the module."""
    if arguments[:1] == ["export"]:
        from azr.weights.export import main as export  # imports what training does not need

        return export(arguments[1:])
    return together(lambda ranks: loop.exit_code(lambda: run(arguments, ranks)))


def run(arguments: list[str], ranks: Ranks) -> int | None:
    """Trains, or prints what was asked for instead; the exit code, None for 0."""
    config, why = resolve(parse(arguments, __doc__))
    if config.print_config:
        return print(as_json(config))
    if config.dry_run:
        return dry_run(config, why)
    # Gradients are on in here and as before afterwards: a stop in the middle of a `no_grad` can leave them off for good
    with StopRequest(ranks.duplicate_seconds) as stop, torch.inference_mode(False):
        loop.run(config, why, stop, ranks, State, train)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
