"""What a training run is measured on: held-out tasks fixed when it starts, greedy accuracy, answers for pass@k.

    evaluation = Evaluation(config, policy, sandbox, template, sampling, run_dir)
    metrics = evaluation.greedy()                           # every --eval-every steps
    base = evaluation.pass_at_k_samples("base")             # EvalResult, made once and kept in eval/base.json

Left out: benchmarks from elsewhere, which eval_passk.py does.
"""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from azr import display
from azr.benchmarks import cruxeval_tasks
from azr.heldout import EvalResult, evaluate, load_tasks
from azr.runs import read_lines, write_json_atomic, write_jsonl_atomic
from azr.tasks import MODES, Buffers, Task

if TYPE_CHECKING:
    from azr.config import Config
    from azr.rollout import Policy, Sampling
    from sandbox import Sandbox

BEST = "held-out greedy accuracy, mean over modes"


@dataclass
class Evaluation:
    config: Config
    policy: Policy
    sandbox: Sandbox
    template: str
    sampling: Sampling  # as in training
    run_dir: Path

    def freeze(self, buffers: Buffers) -> None:
        """eval/held_out.jsonl: --eval-data (tiny: its own); else 200 problems of CRUXEval both ways and 64 induction
        tasks of the seed stage, which stay in the buffers and leave them only by age."""
        if self._path().exists():
            return
        tasks = load_tasks(self.config.eval_data) if self.config.eval_data else self._default(buffers)
        self._path().parent.mkdir(exist_ok=True)
        write_jsonl_atomic(self._path(), [task.to_json() for task in tasks])

    def tasks(self) -> list[Task]:
        return load_tasks(self._path())

    def greedy(self) -> dict[str, float]:
        """Metrics of one greedy answer to each task."""
        greedy = dataclasses.replace(self.sampling, temperature=0.0)
        return evaluate(self.policy, self.tasks(), 1, greedy, self.template, self.sandbox, 0).metrics()

    def pass_at_k_samples(self, name: str) -> EvalResult | None:
        """--eval-samples answers to each task; kept in eval/NAME.json, made only once. None if there are to be none."""
        path, n = self.run_dir / "eval" / f"{name}.json", self.config.eval_samples
        if not n:
            return None
        if not path.exists():
            with display.bar(f"held-out tasks, {n} answers each, {name}") as advance:
                settings = self.sampling, self.template, self.sandbox, 0, advance
                result = evaluate(self.policy, self.tasks(), n, *settings)
            write_json_atomic(path, result.to_json())
        return EvalResult.from_json(json.loads(path.read_text()))

    def mark_best(self) -> str | None:
        """Names the evaluated step of the highest mean greedy accuracy over the modes (the first, if several) in
        checkpoints/best.json; returns what to tell. From metrics.jsonl alone, which a resume takes back to its step."""
        best, value = None, -1.0
        for row in read_lines(self.run_dir / "metrics.jsonl"):
            found = [row[key] for mode in MODES if row.get(key := f"held_out/{mode}/accuracy") is not None]
            if found and sum(found) / len(found) > value:
                best, value = row["step"], sum(found) / len(found)
        path = self.run_dir / "checkpoints" / "best.json"
        if best is None:
            path.unlink(missing_ok=True)
            return None
        write_json_atomic(path, {"step": best, "metric": BEST, "value": value})
        return f"best: {path.parent / f'step_{best}'}, {BEST} {value:.3f}"

    def _path(self) -> Path:
        return self.run_dir / "eval" / "held_out.jsonl"

    def _default(self, buffers: Buffers) -> list[Task]:
        rng, modes = random.Random(f"{self.config.seed}/held-out"), ("induction",)
        try:
            tasks = cruxeval_tasks(200)
        except ValueError as error:
            tasks, modes = [], MODES
            display.warn(f"held-out tasks: 64 a mode of the seed stage; {error}; --eval-data FILE takes others")
        return tasks + [task for mode in modes for task in buffers.sample(mode, 64, rng)]
