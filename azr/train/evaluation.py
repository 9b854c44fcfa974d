"""What a training run is measured on: held-out tasks fixed when it starts, greedy accuracy, answers for pass@k.

    evaluation = Evaluation(config, policy, sandbox, template, sampling, run_dir)
    base = evaluation.greedy_answers("base")                # EvalResult, made once and kept in eval/greedy_base.json
    metrics = evaluation.greedy()                           # every --eval-every steps
    base = evaluation.pass_at_k_samples("base")             # many answers a task, likewise in eval/base.json

The embedded model's file has 2,100 tasks, too many for a run: greedy accuracy is measured on GREEDY for each mode and
difficulty from 1 to 6 statements, and of these SAMPLED are answered many times, evenly spread over the file in both
cases. What is frozen is in RUN/eval/held_out.jsonl. Programs of held-out tasks are refused as proposals, those of the
whole file (RUN/eval/refused.json has their skeletons). Left out: benchmarks from elsewhere, which eval_passk.py does.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from azr import console
from azr.evals.benchmarks import cruxeval_tasks
from azr.evals.held_out import EvalResult, evaluate, load_tasks
from azr.jsonl import write_json_atomic, write_jsonl_atomic
from azr.models import base_description
from azr.runs import read_metrics
from azr.tasks import MODES, Buffers, Task
from azr.tasks.program import skeleton

if TYPE_CHECKING:
    from azr.policy.policy import Policy, Sampling
    from azr.train.config import Config
    from sandbox import Sandbox

BEST = "held-out greedy accuracy, mean over modes"
GREEDY, SAMPLED = 20, 5  # of the embedded model's tasks of a mode and difficulty
LONGEST = 6  # statements; longer programs than the base was trained on are for eval_passk.py
_ASSIGNED = re.compile(r"^\s*(\w+)=", re.MULTILINE)


def statements(program: str) -> int:
    """How many statements a program of the embedded model's generator has: each assigns one name of its own, though
    a loop assigns it twice."""
    return len(set(_ASSIGNED.findall(program)))


def evenly(tasks: list[Task], count: int) -> list[Task]:
    """`count` tasks of each mode and difficulty, evenly spread over those given and in their order; all where there
    are fewer."""
    groups: dict[tuple[str, int], list[int]] = {}
    for i, task in enumerate(tasks):
        groups.setdefault((task.mode, statements(task.program)), []).append(i)
    groups_of_size = (rows for (_, size), rows in groups.items() if size <= LONGEST)
    chosen = {rows[i * len(rows) // count] for rows in groups_of_size for i in range(count)}
    return [tasks[i] for i in sorted(chosen)]


@dataclass
class Evaluation:
    """The held-out tasks of a run and what is measured on them: greedy accuracy, pass@k, the best step."""

    config: Config
    policy: Policy
    sandbox: Sandbox
    template: str
    sampling: Sampling  # as in training
    run_dir: Path

    @property
    def path(self) -> Path:
        """The frozen held-out tasks."""
        return self.run_dir / "eval" / "held_out.jsonl"

    def freeze(self, buffers: Buffers) -> None:
        """eval/held_out.jsonl: --eval-data (tiny: a part of its own); else 200 problems of CRUXEval both ways and 64
        induction tasks of the seed stage, which stay in the buffers and leave them only by age."""
        if self.path.exists():
            return
        tasks = evenly(self._given, GREEDY) if self.own else self._given
        if not self.config.held_out_file:  # tasks of all modes only if there is nothing else
            rng, modes = random.Random(f"{self.config.seed}/held-out"), ("induction",) if self._given else MODES
            tasks = tasks + [task for mode in modes for task in buffers.sample(mode, 64, rng)]
        self.path.parent.mkdir(exist_ok=True)
        write_jsonl_atomic(self.path, [task.to_json() for task in tasks])

    def tasks(self) -> list[Task]:
        """The frozen held-out tasks, read from eval/held_out.jsonl; `freeze` must have been called."""
        return load_tasks(self.path)

    @cached_property
    def own(self) -> bool:
        """Whether it is the embedded model's own file that the run is evaluated on."""
        own = not self.config.eval_data and bool(self.config.held_out_file)
        return own and base_description(self.config.model) is not None

    @cached_property
    def refused(self) -> frozenset[str]:
        """Skeletons of the programs that no proposal may have: of all tasks that were fixed before anything was
        proposed. Frozen in eval/refused.json at the first use, in the seed stage.

        The induction tasks that `freeze` draws from the buffers are not among them. Their programs were proposed before
        they were frozen, are shown as references, and induction proposals about them are asked for: to refuse those
        would punish the proposer for what it was given.
        """
        path = self.run_dir / "eval" / "refused.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_json_atomic(path, sorted({skeleton(task.program) for task in self._given if task.program}))
        return frozenset(json.loads(path.read_text()))

    def greedy(self) -> dict[str, float]:
        """Metrics of one greedy answer to each task."""
        return self._answers(self.tasks(), 1, 0.0).metrics()

    def greedy_answers(self, name: str) -> EvalResult | None:
        """One greedy answer to each task, kept in eval/greedy_NAME.json, made only once. None with --eval-every 0."""
        if not self.config.eval_every:
            return None
        return self._kept(f"greedy_{name}", f"greedy answers, {name}", self.tasks(), 1, 0.0)

    def pass_at_k_samples(self, name: str) -> EvalResult | None:
        """--eval-samples answers to each task (tiny: a part of them); kept in eval/NAME.json, made only once. None if
        there are to be none."""
        n = self.config.eval_samples
        if not n:
            return None
        tasks = evenly(self.tasks(), SAMPLED) if self.own else self.tasks()
        return self._kept(name, f"{n} answers each, {name}", tasks, n, self.sampling.temperature)

    def _answers(self, tasks: list[Task], n: int, temperature: float, advance: Callable | None = None) -> EvalResult:
        sampling = dataclasses.replace(self.sampling, temperature=temperature)
        return evaluate(self.policy, tasks, n, sampling, self.template, self.sandbox, 0, advance)

    def has(self, name: str) -> bool:
        """Whether eval/NAME.json is there."""
        return (self.run_dir / "eval" / f"{name}.json").exists()

    def _kept(self, name: str, what: str, tasks: list[Task], n: int, temperature: float) -> EvalResult:
        """What eval/NAME.json holds, made first if it is not there."""
        path = self.run_dir / "eval" / f"{name}.json"
        if not self.has(name):
            with console.bar(f"held-out tasks, {what}") as advance:
                result = self._answers(tasks, n, temperature, advance)
            write_json_atomic(path, result.to_json())
        return EvalResult.from_json(json.loads(path.read_text()))

    def mark_best(self) -> str | None:
        """Names the evaluated step of the highest mean greedy accuracy over the modes (the first, if several) in
        checkpoints/best.json; returns what to tell. From metrics.jsonl alone, which a resume takes back to its step."""
        best, value = None, -1.0
        for row in read_metrics(self.run_dir):
            accuracies = [row[key] for mode in MODES if row.get(key := f"held_out/{mode}/accuracy") is not None]
            if accuracies and sum(accuracies) / len(accuracies) > value:
                best, value = row["step"], sum(accuracies) / len(accuracies)
        path = self.run_dir / "checkpoints" / "best.json"
        if best is None:
            path.unlink(missing_ok=True)
            return None
        write_json_atomic(path, {"step": best, "metric": BEST, "value": value})
        return f"best: {path.parent / f'step_{best}'}, {BEST} {value:.3f}"

    @cached_property
    def _given(self) -> list[Task]:
        """--eval-data, else CRUXEval's; [] where it cannot be had."""
        if self.config.held_out_file:
            return load_tasks(self.config.held_out_file)
        try:
            return cruxeval_tasks(200)
        except ValueError as error:
            console.warn(f"held-out tasks: 64 a mode of the seed stage; {error}; --eval-data FILE takes others")
            return []
