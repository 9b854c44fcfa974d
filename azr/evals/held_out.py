"""Held-out evaluation in a training run: sample answers to fixed tasks, judge them, and say how sure the numbers are.

    tasks = load_tasks("held_out.jsonl")
    base = evaluate(policy, tasks, n=16, sampling=Sampling(temperature=1.0), template="tiny", sandbox=sandbox, seed=0)
    difference(base, trained, k=1, mode="deduction")        # Interval(mean, low, high), paired over problems
    drawn = plot_pass_at_k(base, trained, "trained")        # a figure; azr/drawing.py makes a PNG of it

Estimators and intervals are those of azr/passk.py: over problems like these, not over training runs. Left out: k beyond
n. No torch is imported here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from azr import drawing
from azr.console import warn
from azr.jsonl import strict_lines
from azr.palette import style
from azr.passk import Interval, bootstrap_interval, bootstrap_statistic, pass_at_k, powers_of_two, share_interval

if TYPE_CHECKING:
    from azr.policy.policy import Policy, Sampling
    from azr.tasks import Task
    from sandbox import Sandbox

ANSWERS_PER_CALL = 2048  # samples between two reports of progress


# ---------------------------------------------------------------- tasks


def load_tasks(path: str | Path, solutions: bool = False, proposals: bool = False) -> list[Task]:
    """The tasks of a JSON-lines file; with `solutions` each (task, response) counts as one, and with `proposals` a
    response may be a proposal of the task. Repeats are left out, loudly. ValueError with file and line for a bad line,
    for one without the response that is wanted, and for a proposal that is not."""
    from azr.tasks import Task

    path, tasks, repeats = Path(path), {}, 0
    if not path.is_file():
        fault = "is a directory" if path.is_dir() else "no such file"
        raise ValueError(f"{path}: {fault}; expected one task as JSON a line")
    for where, row in strict_lines(path):
        try:
            task = Task.from_json(row)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from error
        if solutions and not task.response:
            raise ValueError(f'{where}: has no "response"; python -m azr.tasks make ... --solutions writes them')
        if task.references and not proposals:
            raise ValueError(f"{where}: is a proposal, which --algorithm sft alone takes")
        key = task.hash, task.response if solutions else None
        repeats += key in tasks
        tasks.setdefault(key, task)
    if not tasks:
        raise ValueError(f"{path}: holds no tasks; expected one task as JSON a line")
    if repeats:
        warn(f"{path}: {repeats} lines repeat an earlier task and are left out")
    return list(tasks.values())


# ---------------------------------------------------------------- results


@dataclass
class TaskResult:
    """What n answers to one task came to."""

    hash: str
    mode: str
    n: int
    correct: int  # once parsed, whatever their format
    well_formed: int  # in the think/answer format
    correct_well_formed: int
    distinct_correct: int  # different correct answers
    truncated: int  # ended by the length limit
    infra: int  # no verdict because of the machine; counted as wrong
    tokens: list[int] = field(default_factory=list)  # length of each response


@dataclass
class EvalResult:
    """Results of every task, in order, and what they were made with."""

    tasks: list[TaskResult]
    settings: dict  # samples, seed, template, template_hash, sampling

    @property
    def modes(self) -> list[str]:
        """The modes of the tasks, each once, in the order in which they first appear."""
        return list(dict.fromkeys(task.mode for task in self.tasks))

    def of(self, mode: str | None) -> list[TaskResult]:
        """The tasks of a mode; None: all."""
        return [task for task in self.tasks if mode in (None, task.mode)]

    def column(self, name: str, mode: str | None = None) -> np.ndarray:
        """Returns one count of every task, such as "correct", (problems,)."""
        return np.array([getattr(task, name) for task in self.of(mode)], dtype=np.int64)

    def pass_at_k(self, k: int | Sequence[int], mode: str | None = None) -> Interval:
        """Estimates pass@k with its interval over problems: floats for one k, (ks,) for several. mode None means all
        tasks. ValueError if some k is above the samples a task has."""
        return share_interval(pass_at_k(self.column("n", mode), self.column("correct", mode), k))

    def share(self, hits: str, of: str, mode: str | None = None) -> float:
        """sum(hits) / sum(of): ("correct_well_formed", "well_formed") is accuracy for well-formed answers only."""
        total = self.column(of, mode).sum()
        return float(self.column(hits, mode).sum() / total) if total else math.nan

    def metrics(self) -> dict[str, float]:
        """Flat metrics a mode, and over "all" when there are several modes."""
        result = {}
        for mode in [*self.modes, *([None] if len(self.modes) > 1 else [])]:
            name = f"held_out/{mode or 'all'}"
            tasks = self.of(mode)
            result |= {
                f"{name}/accuracy": self.share("correct", "n", mode),
                f"{name}/accuracy_well_formed": self.share("correct_well_formed", "well_formed", mode),
                f"{name}/well_formed_rate": self.share("well_formed", "n", mode),
                f"{name}/truncated_rate": self.share("truncated", "n", mode),
                f"{name}/solved_rate": float(np.mean(self.column("correct", mode) > 0)),
                f"{name}/distinct_correct": float(self.column("distinct_correct", mode).mean()),
                f"{name}/response_tokens": float(np.mean([count for task in tasks for count in task.tokens])),
            }
        return result

    def to_json(self) -> dict:
        """Returns plain data, which `from_json` reads back."""
        return {"settings": self.settings, "tasks": [dataclasses.asdict(task) for task in self.tasks]}

    @classmethod
    def from_json(cls, data: dict) -> EvalResult:
        """Reads back what `to_json` gave. ValueError if it is something else."""
        try:
            return cls([TaskResult(**task) for task in data["tasks"]], data["settings"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an evaluation result: {error}") from error


def difference(base: EvalResult, trained: EvalResult, k: int | Sequence[int] = 1, mode: str | None = None) -> Interval:
    """pass@k of trained minus base, paired over problems. ValueError if they are not the same problems and settings."""
    check_comparable(base, trained)
    values = [pass_at_k(result.column("n", mode), result.column("correct", mode), k) for result in (base, trained)]
    return bootstrap_interval(values[1] - values[0])


def well_formed_difference(base: EvalResult, trained: EvalResult, mode: str | None = None) -> Interval:
    """Like `difference`, for the share of correct answers among well-formed ones: it tells a gain from mere format."""
    check_comparable(base, trained)
    names = ("correct_well_formed", "well_formed")
    columns = np.stack([result.column(name, mode) for result in (base, trained) for name in names], axis=1)
    return bootstrap_statistic(columns, lambda sums: sums[..., 2] / sums[..., 3] - sums[..., 0] / sums[..., 1])


def check_comparable(a: EvalResult, b: EvalResult) -> None:
    """Raises ValueError unless problems, template and decoding are the same."""
    if [task.hash for task in a.tasks] != [task.hash for task in b.tasks]:
        raise ValueError("the two results are not about the same tasks in the same order")
    for key in ("template", "template_hash", "sampling"):
        if a.settings.get(key) != b.settings.get(key):
            raise ValueError(f"the two results differ in {key}: {a.settings.get(key)} and {b.settings.get(key)}")


# ---------------------------------------------------------------- evaluation


def sample_seed(seed: int, task_hash: str, sample: int) -> int:
    """A 64-bit seed that depends on nothing else, so any answer can be made again alone, on any machine."""
    text = json.dumps([seed, task_hash, sample]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def evaluate(
    policy: Policy,
    tasks: list[Task],
    n: int,
    sampling: Sampling,
    template: str,
    sandbox: Sandbox,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """n answers to each task, judged. progress(tasks done, tasks) is called as it goes.

    ValueError if there is nothing to do or a prompt does not fit the model's context.
    """
    from azr.tasks.prompts import template_hash

    if not tasks or n < 1:
        raise ValueError(f"nothing to evaluate: {len(tasks)} tasks with {n} samples each")
    results, size = [], max(1, ANSWERS_PER_CALL // n)
    for start in range(0, len(tasks), size):
        results += _evaluate_part(policy, tasks[start : start + size], n, sampling, template, sandbox, seed)
        if progress:
            progress(len(results), len(tasks))
    if missing := sum(result.infra for result in results):
        warn(f"{missing} of {n * len(tasks)} answers could not be judged (machine too busy?) and count as wrong")
    settings = {
        "samples": n,
        "seed": seed,
        "template": template,
        "template_hash": template_hash(template),
        "sampling": json.loads(json.dumps(dataclasses.asdict(sampling))),
    }
    return EvalResult(results, settings)


def _evaluate_part(
    policy: Policy, tasks: list[Task], n: int, sampling: Sampling, template: str, sandbox: Sandbox, seed: int
) -> list[TaskResult]:
    from azr.tasks import judge, parse_answer
    from azr.tasks.prompts import solve_prompt

    prompts = [policy.encode(solve_prompt(task, template)) for task in tasks]
    seeds = [[sample_seed(seed, task.hash, sample) for sample in range(n)] for task in tasks]
    completions = policy.generate(prompts, n, sampling, seeds)
    parsed = [
        [parse_answer(task.mode, policy.decode(completion.ids)) for completion in row]
        for task, row in zip(tasks, completions, strict=True)
    ]
    # Equal answers to a task are judged once: the sandbox is the slow part.
    pairs = list({(i, answer.value): None for i, row in enumerate(parsed) for answer in row})
    verdicts = dict(zip(pairs, judge([(tasks[i], value) for i, value in pairs], sandbox), strict=True))
    return [
        _task_result(task, row, answers, [verdicts[i, answer.value] for answer in answers])
        for i, (task, row, answers) in enumerate(zip(tasks, completions, parsed))
    ]


def _task_result(task: Task, completions: list, answers: list, verdicts: list) -> TaskResult:
    """One task's rows: completions, parsed answers and verdicts, each (n,)."""
    correct = [verdict.ok for verdict in verdicts]
    return TaskResult(
        hash=task.hash,
        mode=task.mode,
        n=len(answers),
        correct=sum(correct),
        well_formed=sum(answer.well_formed for answer in answers),
        correct_well_formed=sum(ok and answer.well_formed for ok, answer in zip(correct, answers)),
        distinct_correct=len({answer_key(task.mode, answer.value) for ok, answer in zip(correct, answers) if ok}),
        truncated=sum(completion.finish_reason == "length" for completion in completions),
        infra=sum(verdict.reason == "infra" for verdict in verdicts),
        tokens=[len(completion.ids) for completion in completions],
    )


def answer_key(mode: str, answer: str) -> str:
    """Equal for answers that differ in layout only: literals in canonical form, programs without line-end spaces."""
    if mode in ("deduction", "abduction"):
        from sandbox import literal

        try:
            return literal.canon_args(*literal.parse_args(answer))
        except literal.LiteralError:
            pass  # an answer the judge reads in another way stands for itself
    return "\n".join(line.rstrip() for line in answer.strip().splitlines())


# ---------------------------------------------------------------- the plot


def plot_pass_at_k(base: EvalResult, trained: EvalResult, name: str, ks: Sequence[int] | None = None):
    """The figure of pass@k over k: a panel a mode and one for all tasks; `name` is that of the trained model.

    The band around its curve is the 95 % interval of its paired difference from the base, so the difference is
    established where the band leaves the base's curve. Needs matplotlib.
    """
    ks = ks or powers_of_two(int(min(base.column("n").min(), trained.column("n").min())))
    panels = [*base.modes, *([None] if len(base.modes) > 1 else [])]
    drawn, every = drawing.figure(len(panels), 3.0, 3.2, share=True)
    for axes, mode in zip(every, panels):
        means = [result.pass_at_k(ks, mode).mean for result in (base, trained)]
        for mean, words, side in zip(means, ("base", name), ("base", "tuned")):
            axes.plot(ks, mean, label=words, **drawing.look(style(side)))
        gap = difference(base, trained, ks, mode)
        low, high = (np.clip(means[1] - gap.mean + end, 0, 1) for end in (gap.low, gap.high))
        words = f"{name}: 95 % of its paired difference from base"
        axes.fill_between(ks, low, high, color=style("tuned").color, alpha=0.2, linewidth=0, label=words)
        drawing.doubling(axes, ks)
        shown = "pass@k, mean over tasks" if axes is every[0] else ""
        drawing.label(axes, f"{mode or 'all'}, {len(base.of(mode))} tasks", "k, answers per task", shown)
    every[0].set_ylim(bottom=0)
    drawing.legend(drawn, every)
    return drawn
