"""What every gate needs: the held-out tasks, a model that answers or proposes, and a file of results that goes on.

with Lab("tiny") as lab:
    lab.counts(lab.answer(lab.part(25), 16, 0.6)).interval()        # 25 held-out tasks of each mode and level
store = Store("results/tiny/base.json", {"model": lab.digest, "samples": 16})
rows = store.get("T0.6", lab.answer, lab.part(25), 16, 0.6)         # made and saved once
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from azr.evals.held_out import load_tasks, sample_seed
from azr.machine import plan
from azr.models import base_description, model_path
from azr.tasks import Task, judge, parse_answer
from azr.tasks.prompts import solve_prompt

from gate_numbers import Counts, stratified, style_of, thought_of  # isort: skip

ANSWERS_A_CALL = 4096
LONGEST = 320  # response tokens: twice the longest thought of the documents, so that the limit decides nothing
DIRECT = "</think><answer>"  # one token: "</think>" alone is another one, which no text of the training has


class Store:
    """A JSON file of parts, one a line, each made once. ValueError if it is about another model or other settings."""

    def __init__(self, path: Path, settings: dict):
        self.path, self.settings, self.parts = Path(path), settings, {}
        if self.path.exists():
            held = json.loads(self.path.read_text())
            wrong = [
                f"{key} is {held['settings'].get(key)!r} there, {value!r} here"
                for key, value in settings.items()
                if held["settings"].get(key) != value
            ]
            if wrong:
                raise ValueError(f"{path}: made with other settings ({'; '.join(wrong)}); delete it or give --out")
            self.parts = held["parts"]

    def get(self, name: str, make: Callable, *arguments: Any) -> Any:
        """The part: as the file has it, or make(*arguments), saved."""
        if name not in self.parts:
            start = time.monotonic()
            self.parts[name] = json.loads(json.dumps(make(*arguments)))
            self.save()
            print(f"{self.path.stem}: {name} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        return self.parts[name]

    def save(self) -> None:
        """Writes all parts, a line each, to a file aside that then takes the place of the old one."""
        lines = [f"{json.dumps(name)}: {json.dumps(part, separators=(',', ':'))}" for name, part in self.parts.items()]
        text = f'{{"settings": {json.dumps(self.settings)},\n"parts": {{\n' + ",\n".join(lines) + "\n}}\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".tmp")
        aside.write_text(text)
        os.replace(aside, self.path)


def digest(model: Path, adapter: Path | None = None) -> str:
    """16 hex digits of the weights. ValueError if there are none."""
    sha = hashlib.sha256()
    for path in (model / "model.safetensors", *([adapter / "adapter_model.safetensors"] if adapter else [])):
        if not path.is_file():
            raise ValueError(f"{path}: no such file; --model takes the directory of an embedded base")
        sha.update(path.read_bytes())
    return sha.hexdigest()[:16]


class Lab:
    """A base (with an adapter, or without) and the sandbox, loaded when first used. Close it, or use it as a context.

    model: a directory with base.json and held_out.jsonl, or "tiny". ValueError for another.
    """

    def __init__(self, model: str, adapter: Path | None = None, seed: int = 0, longest: int = LONGEST):
        self.model, self.adapter, self.seed, self.longest = Path(model_path(model)), adapter, seed, longest
        self.digest, described = digest(self.model, adapter), base_description(model)
        if described is None:
            raise ValueError(f"{model}: has no base.json; the gates are about an embedded base")
        self.template = described["template"]
        self.tasks = load_tasks(self.model / "held_out.jsonl")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if "sandbox" in self.__dict__:
            self.sandbox.close()

    @cached_property
    def policy(self):
        """The base on the CPU, with the adapter if there is one, loaded at the first use."""
        from azr.policy.policy import Policy

        return Policy.load(self.model, "none", adapter=self.adapter, device="cpu", max_batch=plan.TINY.max_batch)

    @cached_property
    def sandbox(self):
        """The sandbox that judges the answers, started at the first use."""
        from sandbox import Sandbox

        return Sandbox()

    def part(self, a_cell: int | None, mode: str | None = None) -> list[int]:
        """Held-out tasks, `a_cell` of each mode and level (None: all)."""
        return [i for i in stratified(self.tasks, a_cell) if mode in (None, self.tasks[i].mode)]

    def counts(self, rows: list) -> Counts:
        """The rows of `answer` as Counts, with the modes and levels of this base's held-out tasks."""
        return Counts.from_json(rows, self.tasks)

    def write(self, index: Sequence[int], path: Path) -> Path:
        """The tasks as a file for --eval-data."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(self.tasks[i].to_json()) + "\n" for i in index))
        return path

    def answer(
        self, index: Sequence[int], n: int, temperature: float, prefixes: Sequence[str] = (), first: int = 0
    ) -> list:
        """Rows of `Counts.from_json` for n answers (numbers first, first + 1, ...) to held-out tasks at these places.

        prefixes: how the responses begin, one a task; they count among the response's tokens.
        """
        tasks = [self.tasks[i] for i in index]
        rows = []
        for i, task, answers in zip(index, tasks, self.respond(tasks, n, temperature, prefixes, first)):
            cells: dict[str, list[int]] = {}
            for response, tokens, right, _, _ in answers:
                cell = cells.setdefault(style_of(task.mode, thought_of(response)), [0, 0, 0])
                cell[:] = cell[0] + 1, cell[1] + right, cell[2] + tokens
            rows.append([i, cells, sum(answer[3] for answer in answers), sum(answer[4] for answer in answers)])
        return rows

    def respond(
        self, tasks: list[Task], n: int, temperature: float, prefixes: Sequence[str] = (), first: int = 0
    ) -> list[list[tuple]]:
        """(response, tokens, right, well formed, cut off) of n answers to each task."""
        result, size = [], max(1, ANSWERS_A_CALL // n)
        for start in range(0, len(tasks), size):
            result += self._respond(tasks[start : start + size], n, temperature, prefixes[start : start + size], first)
        return result

    def _respond(self, tasks, n, temperature, prefixes, first) -> list[list[tuple]]:
        prefixes = list(prefixes) or [""] * len(tasks)
        begun = [self.policy.encode(prefix) if prefix else [] for prefix in prefixes]
        prompts = [self.policy.encode(solve_prompt(task, self.template)) + ids for task, ids in zip(tasks, begun)]
        seeds = [[sample_seed(self.seed, task.hash, first + j) for j in range(n)] for task in tasks]
        rows = self.generate(prompts, n, temperature, seeds)
        texts = [[prefix + self.policy.decode(c.ids) for c in row] for prefix, row in zip(prefixes, rows)]
        parsed = [[parse_answer(task.mode, text) for text in row] for task, row in zip(tasks, texts)]
        pairs = list({(i, answer.value): None for i, row in enumerate(parsed) for answer in row})
        verdicts = dict(zip(pairs, judge([(tasks[i], value) for i, value in pairs], self.sandbox)))
        return [
            [
                (text, len(ids) + len(c.ids), verdicts[i, a.value].ok, a.well_formed, c.finish_reason == "length")
                for text, c, a in zip(texts[i], row, parsed[i])
            ]
            for i, (row, ids) in enumerate(zip(rows, begun))
        ]

    def generate(self, prompts: list[list[int]], n: int, temperature: float, seeds: list[list[int]]) -> list:
        """Completions, (prompts, n)."""
        from azr.policy.policy import Sampling

        return self.policy.generate(prompts, n, Sampling(temperature=temperature, max_new_tokens=self.longest), seeds)
