"""Self-play training of one model that proposes small Python tasks and solves them (Absolute Zero, arXiv 2505.03335).

    python train_azr.py                          the embedded tiny model, on any laptop: about 12 minutes, no GPU
    python train_azr.py --model qwen-3b          4-bit base + LoRA on one GPU
    python train_azr.py --out runs/a --resume auto     go on after a stop, a crash or a kill
    python train_azr.py --model qwen-3b --dry-run      what it would use; nothing is trained
    python train_azr.py --doctor                 what works on this machine and what does not, to paste into an issue
    python train_azr.py --algorithm rlvr --data tasks.jsonl     the same loop on fixed tasks; sft: on given solutions
    python train_azr.py export runs/a --out DIR        base and adapter merged, verified, as a plain bf16 model

A step has five phases: propose, validate, solve, reward and update, record. Ctrl-C, SIGTERM or a closed terminal saves
and exits 0, a second one quits (130); SIGUSR1 saves and goes on. Exit codes: 0 done or stopped with a checkpoint; 1
gave up (three non-finite losses in a row, no memory, no sandbox: complete steps are saved; a full disk: the last
checkpoint is whole); 2 bad input, nothing done.

Left out of the textbook PPO: critic, KL penalty, reference model, learning-rate schedule; as in the published recipe.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

from azr.models import base_description, model_path
from azr.machine import doctor


def settings_of(arguments: list[str]):
    """The settings of a command line, for the doctor: it runs before the packages that it looks at are imported."""
    from azr.train.config import parse

    return parse(arguments, "see azr/machine/doctor.py")


if __name__ == "__main__" and "--doctor" in sys.argv:
    sys.exit(doctor.main(sys.argv[1:], settings_of))

from azr.evals import math_answers
from azr import console
from azr.train import screen, memory_probe, arms, entropy_control, off_policy, trackers, update
from azr.policy.backoff import DoesNotFit, Sizes, is_out_of_memory
from azr.train.config import Config, completed, dry_run, parse, resolve, template_of
from azr.console import warn
from azr.train.evaluation import Evaluation
from azr.analysis.health import Watch
from azr.evals.held_out import load_tasks, plot_pass_at_k, sample_seed
from azr.train.loss_scale import LossScale
from azr.train.metrics import Clock, memory, sample_row, step_metrics
from azr.passk import powers_of_two
from azr.tasks.prompts import STOP, propose_prompt, solve_prompt
from azr.train.rewards import proposer_reward, solver_reward
from azr.policy.policy import LoraSettings, ModelError, Policy, Sampling
from azr.runs import DiskError, Run, RunError, read_lines, write_jsonl_atomic
from azr.train.checkpoint import GaveUp, Saved
from azr.stop import StopNow, StopRequest
from azr.tasks import (
    MODES,
    SEED_PROGRAM,
    SEED_TASKS,
    Buffers,
    Parsed,
    Sample,
    Task,
    judge,
    parse_answer,
    parse_proposal,
    validate,
)
from sandbox import Sandbox, SandboxError

SEED_TASKS_PER_MODE = 256  # the seed stage stops there (Absolute Zero, section 3.3.1: batch size x 4)
SEED_ROUNDS = 20
SILENCE = 30  # seconds after which the seed stage says how far it is
PROBE = 64  # prompts and answers a role and mode, frozen at step 0, for entropy on fixed data
NON_FINITE_LIMIT = 3
# train/ metrics that sft has not
UNSAMPLED = ("log_prob_gap", "log_prob_gap_max", "gap_p99", "gap_outside_10", "gap_k3", "gap_capped", "clip_fraction")


class SelfPlay(Saved):
    """The state of a run: policy, optimizer, buffers. Parameters and buffers change in phases 4 and 5 only."""

    tracker = trackers.NONE  # until the run is open

    def __init__(
        self, config: Config, policy: Policy, sandbox: Sandbox, run_dir: Path, data=(), given=(), grader=None
    ):
        """data: the tasks of rlvr, the solutions of sft; given: off-policy solutions; grader: if math is among them."""
        self.config, self.policy, self.sandbox, self.grader = config, policy, sandbox, grader
        self.template = template_of(config)
        self.optimizer = update.make_optimizer(policy, config.learning_rate)
        self.sizes, self.buffers = Sizes(config.token_budget), Buffers()
        self.sampling = Sampling(temperature=config.temperature, max_new_tokens=config.max_new_tokens, stop=(STOP,))
        held_out = dataclasses.replace(self.sampling, temperature=config.eval_temperature)
        self.evaluation = Evaluation(config, policy, sandbox, self.template, held_out, run_dir)
        self.adaptive: dict = {}  # the state of --entropy-control adaptive
        self.loss_scale = LossScale.of(policy.info["dtype"])
        self.non_finite, self.elapsed, self.completed = 0, 0.0, 0
        self.clock = Clock()
        self.exempt: set[str] = set()  # programs that may be trivial: the identity, while there is nothing else
        self.data, given = arms.fitting(data, self.fits), arms.fitting(given, self.fits)
        self.foreign = off_policy.Foreign(
            config, policy, self.template, given, self.solve, self.judge, self.score
        )  # fmt: skip

    # ---------------------------------------------------------------- phase 1: propose

    def propose(self, step: int | str, modes: tuple = MODES, count: int | None = None) -> list[Sample]:
        """One proposal for each of `count` (prompts_per_mode) prompts a mode, with references from the buffers."""
        # Nothing random outlives a step, so a resume is exact.
        rng, asked = random.Random(f"{self.config.seed}/{step}/propose"), []
        for mode in modes:
            for _ in range(count or self.config.prompts_per_mode):
                if mode == "induction":
                    references = [self.buffers.sample_program(rng)]
                else:
                    references = self.buffers.sample(mode, self.config.references, rng)
                asked.append((mode, references))
        prompts = [self.fitting_prompt(mode, references) for mode, references in asked]
        base = self.config.proposer == "frozen-base"
        with self.policy.disable_adapter() if base else nullcontext():
            samples = self.sample("proposer", [mode for mode, _ in asked], prompts, 1, f"{step}/propose")
        for sample, (mode, references) in zip(samples, asked):
            sample.update, sample.from_base = self.config.proposer == "joint", base
            program = references[0].program if mode == "induction" else None
            sample.parsed = read(sample, parse_proposal(mode, sample.response, program))
        return samples

    def fitting_prompt(self, mode: str, references: list[Task]) -> str:
        """The proposer's prompt, without the last references if it would be longer than prompt_tokens with them."""
        prompt = propose_prompt(mode, references, self.template)
        while mode != "induction" and references and len(self.policy.encode(prompt)) > self.config.prompt_tokens:
            references = references[:-1]
            prompt = propose_prompt(mode, references, self.template)
        return prompt

    def sample(self, role: str, modes: list[str], prompts: list[str], n: int, key: str) -> list[Sample]:
        """n responses to each prompt as Samples, in order; `key` makes their seeds."""
        ids = [self.policy.encode(prompt) for prompt in prompts]
        seeds = [[sample_seed(self.config.seed, f"{key}/{i}", j) for j in range(n)] for i in range(len(ids))]
        completions = self.policy.generate(ids, n, self.sampling, seeds)
        return [
            Sample(role, modes[i], prompts[i], ids[i], completion, self.policy.decode(completion.ids), f"{key}/{i}")
            for i, row in enumerate(completions)
            for completion in row
        ]

    # ---------------------------------------------------------------- phase 2: validate

    def validate(self, samples: list[Sample]) -> list[Sample]:
        """Runs every proposal in the sandbox; each sample gets a verdict, a valid one its task. Returns the valid."""
        parsed = [sample for sample in samples if sample.parsed.value is not None]
        proposals, refused = [sample.parsed.value for sample in parsed], self.evaluation.refused
        verdicts = validate(proposals, self.sandbox, self.buffers.keys(), exempt=self.exempt, held_out=refused)
        for sample in samples:
            sample.reason, sample.detail = sample.parsed.reason, sample.parsed.detail
        for sample, verdict in zip(parsed, verdicts):
            sample.reason, sample.detail = verdict.reason, verdict.detail
            if verdict.ok and not self.fits(verdict.task):
                sample.reason, sample.detail = "too_large", "its solver's prompt would exceed the model's context"
            else:
                sample.task = verdict.task
        return [sample for sample in samples if sample.task is not None]

    def fits(self, task: Task) -> bool:
        """Whether a solver's prompt and its longest (or given) response fit the model's context."""
        context = getattr(self.policy.base.config, "max_position_embeddings", None) or math.inf
        longest = max(self.config.max_new_tokens, len(self.policy.encode(task.response or "")))
        return len(self.policy.encode(solve_prompt(task, self.template))) + longest <= context

    # ---------------------------------------------------------------- phase 3: solve

    def solve(self, step: int, tasks: list[Task], n: int, key: str = "solve") -> list[Sample]:
        """n judged answers to each task. An answer that no verdict could be had for (reason infra) is left out."""
        prompts = [solve_prompt(task, self.template) for task in tasks]
        samples = self.sample("solver", [task.mode for task in tasks], prompts, n, f"{step}/{key}")
        for i, sample in enumerate(samples):
            sample.task = tasks[i // n]
            sample.parsed = read(sample, parse_answer(sample.mode, sample.response))
        self.clock.lap("solve")
        return self.judge(samples)

    def judge(self, samples: list[Sample]) -> list[Sample]:
        """Verdicts of the sandbox, and of math-verify on mathematical answers."""
        code = [sample for sample in samples if sample.mode != "math"]
        math_ = [sample for sample in samples if sample.mode == "math"]
        verdicts = judge([(sample.task, sample.parsed.value) for sample in code], self.sandbox)
        for sample, verdict in zip(code, verdicts):
            sample.correct, sample.detail = verdict.ok, verdict.detail
            sample.reason = verdict.reason if sample.parsed.value is not None else sample.parsed.reason
        pairs = [(sample.task.answer, math_answers.extract(sample.response)) for sample in math_]
        for sample, verdict in zip(math_, self.grader.grade(pairs) if pairs else []):
            sample.correct = verdict.ok
            sample.reason = verdict.reason if sample.parsed.value is not None else sample.parsed.reason
        self.clock.lap("judge")
        judged = [sample for sample in samples if sample.reason != "infra"]
        self.clock.count("unjudged", len(samples) - len(judged))
        return judged

    def backfill(self, step: int, valid: list[Sample]) -> list[Task]:
        """Buffer tasks for modes in which less than half of the proposals are valid, up to that half."""
        if self.config.solver_tasks == "fresh" or self.config.recipe == "azr":
            return []
        rng, wanted = random.Random(f"{self.config.seed}/{step}/backfill"), self.config.prompts_per_mode // 2
        counts = {mode: sum(sample.mode == mode for sample in valid) for mode in MODES}
        return [task for mode in MODES for task in self.buffers.sample(mode, max(0, wanted - counts[mode]), rng)]

    def matched(self, step: int, proposals: list[Sample]) -> list[Sample]:
        """--proposer no-update-matched: answers to buffer tasks that have as many tokens as the proposals."""
        if self.config.proposer != "no-update-matched":
            return []

        n = self.config.answers if self.config.recipe == "lean" else 1
        draw = lambda *wave: arms.from_buffers(self.buffers, self.config.seed, step, *wave)  # noqa: E731
        return arms.fill(arms.tokens(proposals), n, draw, lambda tasks, key: self.solve(step, tasks, n, key))

    # ---------------------------------------------------------------- phase 4: reward and update

    def reward(self, step: int, proposals: list[Sample], answers: list[Sample], extra: list[Sample]) -> list[Sample]:
        """Rewards and advantages; returns what is trained on (recipe azr: with solver samples of their own).

        extra: solver samples that measure no solve rate, and foreign solutions.
        """
        rates = solve_rates(answers)
        for sample in proposals:
            sample.solve_rate = rates.get(sample.task.hash) if sample.task else None
            if sample.reason == "infra" or (sample.task and sample.solve_rate is None):
                sample.reward = None  # the machine failed, not the model: no reward, no training
                continue
            sample.reward = proposer_reward(
                sample.task is not None, sample.parsed.well_formed, sample.solve_rate, self.config.proposer_reward,
                self.config.ends_penalty, sample.task.hash if sample.task else "",
            )  # fmt: skip
        trained = (answers if self.config.recipe == "lean" else self.solver_samples(step, proposals)) + extra
        for sample in [*answers, *trained]:
            sample.solve_rate = rates.get(sample.task.hash)
            sample.reward = solver_reward(sample.correct, sample.parsed.well_formed, self.config.solver_reward)
        samples = [sample for sample in proposals if sample.reward is not None] + trained
        update.advantages(samples, self.config.recipe, self.config.off_policy_baseline)
        return samples

    def solver_samples(self, step: int, proposals: list[Sample]) -> list[Sample]:
        """Recipe azr: one answer to prompts_per_mode tasks a mode, this step's first, then of the buffer."""
        rng, tasks = random.Random(f"{self.config.seed}/{step}/solver"), []
        for mode in MODES:
            new = [sample.task for sample in proposals if sample.task and sample.mode == mode]
            tasks += new + self.buffers.sample(mode, self.config.prompts_per_mode - len(new), rng)
        return self.solve(step, tasks, 1, "train")

    def update(self, step: int, samples: list[Sample]) -> dict[str, float]:
        """One optimizer step a minibatch; fills in each sample's entropy and log-probs; returns the train/ metrics."""
        config = self.settings_now(step)
        more = update.prepare(self.policy, samples, config, self.sizes) | self.foreign.metrics(step, samples)
        order = list(range(len(samples)))
        random.Random(f"{self.config.seed}/{step}/minibatches").shuffle(order)
        parts = [sorted(order[i :: self.config.minibatches]) for i in range(self.config.minibatches)]
        if self.config.minibatches > 1:  # several updates: the ratio of PPO needs the log-probs before the first
            mine = [sample for sample in samples if not sample.from_base and sample.objective != "sft"]
            update.old_log_probs(self.policy, mine, config, self.sizes)
        done = []
        for number, part in enumerate(parts):
            batch = [samples[i] for i in part]
            entropy_control.mark(batch, config, sample_seed(config.seed, f"{step}/control", number))
            done.append(
                update.optimizer_step(self.policy, self.optimizer, batch, config, self.sizes, self.loss_scale)
            )
            self.check_finite(step, done[-1], batch)
        if config.entropy_control == "adaptive":
            own = [s for s in samples if s.update and not s.objective]
            entropy = math.fsum(x for s in own for x in s.entropy) / max(1, arms.tokens(own))
            self.adaptive = entropy_control.adapt(self.adaptive, entropy, self.config)
        return update.of_step(done) | more

    def settings_now(self, step: int) -> Config:
        """The settings with what a schedule or a controller changes from step to step."""
        control, gamma = self.config.entropy_control, self.foreign.gamma(step)
        now = entropy_control.coefficient(control, self.config.entropy_coefficient, self.adaptive)
        bonus = {"entropy_coefficient": now} if control in entropy_control.BONUS else {}
        return dataclasses.replace(self.config, off_policy_gamma=gamma, **bonus)

    def score(self, samples: list[Sample], base: bool = False) -> list[Sample]:
        """Copies of the samples with log-probs and entropies of the present weights, or of the base, adapter off."""
        return update.scored(self.policy, samples, self.config, self.sizes, base)

    def check_finite(self, step: int, metrics: dict[str, float], batch: list[Sample]) -> None:
        """Counts skipped updates in a row and saves the batch of each."""
        self.non_finite = self.non_finite + 1 if metrics["skipped"] else 0
        if metrics["skipped"]:
            path = self.run.dir / f"non_finite_step_{step}.jsonl"
            write_jsonl_atomic(path, [sample_row(step, sample) for sample in batch])
            loss, norm = metrics["loss"], metrics["grad_norm"]
            warn(f"step {step}: loss {loss}, gradient norm {norm}: update skipped, batch saved to {path}")

    # ---------------------------------------------------------------- phase 5: record

    def record(self, step: int, proposals: list, answers: list, extra: list, trained: list, more: dict) -> dict:
        """Valid tasks enter the buffers; metrics.jsonl and samples.jsonl get the step. Returns the metrics."""
        for sample in proposals:
            if sample.task is not None:
                self.buffers.add(sample.task, step)
        metrics = {"step": step, **step_metrics(proposals, answers, trained, self.config.answers), **more}
        metrics |= {f"buffer/{mode}/size": self.buffers.size(mode) for mode in MODES}
        self.run.log(metrics)
        self.tracker.log(metrics)
        self.run.log_samples([sample_row(step, sample) for sample in [*proposals, *answers, *extra]])
        return metrics

    # ---------------------------------------------------------------- one step

    def step(self, step: int, stop: StopRequest) -> tuple[dict, list[Sample], list[Sample]]:
        """The five phases. Until the shield, a stop drops the step: `snapshot` is what to go back to."""
        clock = self.clock = Clock()
        proposals, answers, extra = self.collect(step)
        extra = extra + self.foreign.solutions(step, answers)
        samples = self.reward(step, proposals, answers, extra)
        clock.lap("reward")
        train = {f"train/{name}": value for name, value in self.update(step, samples).items()}
        clock.lap("update")
        evaluated = bool(self.config.eval_every) and step % self.config.eval_every == 0
        held_out = self.evaluation.greedy() if evaluated else {}
        clock.lap("evaluate")
        with stop.shield():
            self.snapshot = None  # an error in between leaves buffers that belong to no step
            self.elapsed += clock.total()
            times = {**clock.metrics(), "time/elapsed": round(self.elapsed, 2), **memory(self.computed_at_once())}
            times["time/lanes_lost"] = self.sandbox.state["lanes_lost"]
            metrics = self.record(step, proposals, answers, extra, samples, {**train, **held_out, **times})
            last = step == self.config.steps
            self.completed, self.snapshot = step, self.changing()
            if evaluated or last or stop.save_requested or self.due(step):
                self.save(keep=evaluated or last)
                stop.save_requested = False
            if evaluated:
                self.evaluation.mark_best()
        if self.non_finite >= NON_FINITE_LIMIT:
            wider = ", or take --dtype bf16 or fp32, whose range is wider" if self.loss_scale.active else ""
            raise GaveUp(
                f"step {step}: {self.non_finite} updates in a row were not finite; lower --learning-rate{wider}"
            )
        return metrics, proposals, answers

    def collect(self, step: int) -> tuple[list[Sample], list[Sample], list[Sample]]:
        """Phases 1 to 3: proposals, the answers that measure their solve rates, more samples to train on."""
        proposals = self.propose(step)
        self.clock.lap("propose")
        valid = self.validate(proposals)
        self.clock.lap("validate")
        tasks = [sample.task for sample in valid] + self.backfill(step, valid) + self.foreign.tasks(step)
        answers = self.solve(step, tasks, self.config.answers)
        return proposals, answers, self.matched(step, proposals)

    # ---------------------------------------------------------------- before the first step

    def seed_stage(self) -> None:
        """Fills the buffers from nothing but the identity program, with the untrained model and no weight update."""
        for task in SEED_TASKS.values():
            self.buffers.add(task, 0)
        self.exempt = {SEED_PROGRAM}
        target, said = min(SEED_TASKS_PER_MODE, 4 * self.config.prompts_per_mode), time.monotonic()
        for turn in range(SEED_ROUNDS):
            modes = tuple(mode for mode in MODES if self.buffers.size(mode) < target)
            if not modes:
                break
            for sample in self.validate(self.propose(f"seed-{turn}", modes)):
                if sample.parsed.well_formed and self.buffers.size(sample.mode) < target:
                    self.buffers.add(sample.task, 0)
            if time.monotonic() - said > SILENCE:  # a model that proposes nothing valid needs every round
                said = time.monotonic()
                console.say(
                    f"seed stage, round {turn + 1} of at most {SEED_ROUNDS}: {self.buffer_sizes()}, of {target} each"
                )
        self.exempt, sizes = set(), self.buffer_sizes()
        console.say(f"seed stage, from the identity program alone: {sizes} tasks")
        if min(self.buffers.size(mode) for mode in MODES) < target:
            warn(
                f"seed stage: {target} tasks a mode wanted, {sizes} found in {SEED_ROUNDS} rounds; going on with these"
            )

    def buffer_sizes(self) -> str:
        return ", ".join(f"{mode} {self.buffers.size(mode)}" for mode in MODES)

    def freeze_probe(self) -> None:
        """probe.jsonl: prompts and answers of every role and mode by the untrained model, for entropy on fixed data."""
        if (self.run.dir / "probe.jsonl").exists():
            return
        rng, rows = random.Random(f"{self.config.seed}/probe"), []
        proposals = self.propose("probe", count=PROBE)
        tasks = [task for mode in MODES for task in self.buffers.sample(mode, PROBE, rng)]
        for sample in proposals + self.solve("probe", tasks, 1):
            rows.append(
                {"role": sample.role, "mode": sample.mode, "prompt": sample.prompt, "response": sample.response}
            )
        write_jsonl_atomic(self.run.dir / "probe.jsonl", rows)


class Rlvr(SelfPlay):
    """Answers to the tasks of --data, rewarded and trained as in self-play; nothing is proposed.

    The seed stage and the probe are those of self-play, so what is held out or probed is the same.
    """

    def collect(self, step: int) -> tuple[list[Sample], list[Sample], list[Sample]]:
        return [], self.from_data(step, lambda tasks, key: self.solve(step, tasks, self.config.answers, key)), []

    def from_data(self, step: int, answer, n: int | None = None) -> list[Sample]:
        """answer(tasks, key) to as many tasks as self-play proposes, or as make --step-tokens with n samples a task."""

        def draw(wave: int | None, count: int) -> list[Task]:
            return arms.draw(self.data, step, count, self.config.seed, wave)

        if tokens := self.config.step_tokens:
            return arms.fill(tokens, n or self.config.answers, draw, answer)
        a_task = self.config.answers // (n or self.config.answers)  # tasks that stand for one of self-play
        return answer(draw(None, 3 * self.config.prompts_per_mode * a_task), "solve")


class Sft(Rlvr):
    """Cross-entropy on the responses of --data, through the same update; nothing is sampled or rewarded."""

    def collect(self, step: int) -> tuple[list[Sample], list[Sample], list[Sample]]:
        given = lambda tasks, _: off_policy.supervised(self.policy, tasks, self.template)  # noqa: E731
        return [], [], self.from_data(step, given, 1)

    def reward(self, step: int, proposals: list[Sample], answers: list[Sample], extra: list[Sample]) -> list[Sample]:
        return extra

    def update(self, step: int, samples: list[Sample]) -> dict[str, float]:
        return super().update(step, samples) | dict.fromkeys(UNSAMPLED, math.nan)


LOOPS = {"selfplay": SelfPlay, "rlvr": Rlvr, "sft": Sft}
NAMES = {"selfplay": "self-play", "rlvr": "RLVR", "sft": "SFT"}


def read(sample: Sample, parsed: Parsed) -> Parsed:
    """`parsed`, or why there was nothing to parse: a request too long for the KV cache comes back without a token."""
    if sample.completion.finish_reason != "too_long":
        return parsed
    return Parsed(False, None, "too_long", "its prompt and longest response do not fit the KV cache")


def solve_rates(answers: list[Sample]) -> dict[str, float]:
    """Share of correct answers a task, format aside; tasks without a single verdict are missing."""
    judged: dict[str, list[bool]] = {}
    for sample in answers:
        judged.setdefault(sample.task.hash, []).append(sample.correct)
    return {task: sum(correct) / len(correct) for task, correct in judged.items()}


# -------------------------------------------------------------------- the script


def train(loop: SelfPlay, stop: StopRequest) -> None:
    """Seed stage and base measurement (or what a checkpoint says), the steps, the final measurement."""
    config, start = loop.config, time.monotonic()
    if loop.run.resumed:
        loop.load()
    # the cache of sampling takes what is free; Adam makes its moments later, at the first update
    loop.policy.engine.reserve = update.moments_to_come(loop.policy, loop.optimizer)
    memory_probe.at_start(loop.policy, loop.optimizer, config, loop.sizes)
    if not loop.run.resumed:
        loop.seed_stage()
    loop.snapshot = loop.changing()
    if not loop.run.resumed:
        loop.save(keep=True)
    if not loop.completed:  # each is made once, so what a stop has left out is made up for
        loop.freeze_probe()
        loop.evaluation.freeze(loop.buffers)
        loop.evaluation.pass_at_k_samples("base")
    lines = screen.StepLines(config.steps, config.price_per_hour)
    lines.header()
    watch = Watch(dataclasses.asdict(config), loop.run.dir, console.warn)
    for step in range(loop.completed + 1, config.steps + 1):
        metrics, proposals, answers = loop.step(step, stop)
        lines.show(metrics)
        watch.add(metrics)
        if proposals and (step % 25 == 1 or step == config.steps):
            screen.sample_table(step, proposals, answers)
        if config.max_hours and time.monotonic() - start > 3600 * config.max_hours and step < config.steps:
            console.say(f"--max-hours {config.max_hours} reached; {loop.stopped()}")
            return
    conclude(loop)
    screen.summary(watch.health.summary())
    screen.where(loop.run.dir)


def conclude(loop: SelfPlay) -> None:
    """Trained against base: the table and the pass@k plot."""
    rows = [row for row in read_lines(loop.run.dir / "metrics.jsonl") if row["step"] > 0]
    count = min(10, max(1, len(rows) // 2))
    screen.training_table(rows[:count], rows[-count:])
    base, trained = (loop.evaluation.pass_at_k_samples(name) for name in ("base", f"step_{loop.completed}"))
    if base and trained:
        ks = powers_of_two(loop.config.eval_samples)
        screen.before_after(base, trained, ks)
        plot = loop.run.dir / "plots" / "pass_at_k.png"
        plot.parent.mkdir(exist_ok=True)
        plot_pass_at_k({"base": base, NAMES[loop.config.algorithm]: trained}, plot, ks)
        console.say(f"pass@k, base against trained: {plot}")
    if best := loop.evaluation.mark_best():
        console.say(best)


def start(config: Config, why: str, stop: StopRequest) -> None:
    """Opens the run directory, loads the model, trains."""
    lora = LoraSettings(config.lora_rank, config.lora_alpha, config.lora_targets)
    # Everything that can be refused is refused before the run directory is made.
    Run.check(Path(config.out), config.resume)
    template_of(config)
    trackers.check(config.tracker)
    if config.eval_data and any(task.mode == "math" for task in load_tasks(config.eval_data)):
        raise ValueError(f"{config.eval_data}: has math tasks; measure them with eval_passk.py, before and after")
    data, given, math_ = arms.read_files(config)
    grader = math_answers.MathGrader() if math_ else nullcontext()
    policy = Policy.load(
        model_path(config.model), config.quantization, lora, seed=config.seed, max_batch=config.max_batch,
        dtype=config.dtype, attn=config.attn, rollout_weights=config.rollout_weights,
        need_gpu=not config.allow_cpu and base_description(config.model) is None,
    )  # fmt: skip
    if policy.device.type == "cuda":
        policy.checkpoint_activations()
    run_dir = Path(config.out if config.resume in ("auto", "none") else config.resume)
    with Sandbox() as sandbox, grader as grader:
        loop = LOOPS[config.algorithm](config, policy, sandbox, run_dir, data, given, grader)
        with Run.open(Path(config.out), dataclasses.asdict(config), config.resume, completed) as loop.run:
            screen.header(config, why, policy, loop.run.environment(sandbox=sandbox.state))
            loop.tracker = trackers.open_tracker(config.tracker, loop.run)
            try:
                train(loop, stop)
            except StopNow:
                with stop.shield():
                    console.say(loop.stopped())
            except Exception as error:
                with stop.shield():
                    loop.failed(error)
            finally:
                loop.tracker.close()


def main(arguments: list[str]) -> int:
    """Returns the exit code: see the module."""
    if arguments[:1] == ["export"]:
        from azr.weights.export import main as export  # imports what training does not need

        return export(arguments[1:])
    # torch warns in five lines of what azr/policy/gpu.py says in one
    warnings.filterwarnings("ignore", message="CUDA initialization")
    try:
        if "--doctor" in arguments:
            return doctor.main(arguments, settings_of)
        config, why = resolve(parse(arguments, __doc__))
        if config.dry_run:
            return dry_run(config, why)
        with StopRequest() as stop:
            start(config, why, stop)
    except (GaveUp, DoesNotFit, DiskError) as error:
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
        pass  # before the run began: nothing to save
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
