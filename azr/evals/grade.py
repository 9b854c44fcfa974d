r"""Grades answers to a public benchmark: takes the answer out of a response and asks the right judge about it.

    with Grader(load("cruxeval-o=cruxeval.jsonl")) as grader:
        grader.grade([Answer("sample_0", "[(4, 1)]", "answer")])        # [Grade(False, "wrong", "[(4, 1)]")]

Programs run in the sandbox's benchmark profile against evalplus's inputs (code_answers.py), tasks are judged as in
training (azr/tasks/judging.py), mathematics by math-verify in processes of its own (math_answers.py). Whatever a
response holds (lone surrogates, ten megabytes, nothing), it is graded wrong with a reason. No torch is imported here.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import NamedTuple

from azr.console import note
from azr.evals import code_answers, math_answers
from azr.evals.benchmarks import Benchmark, Item
from azr.evals.held_out import answer_key
from azr.tasks import judge, parse_answer
from azr.tasks.parse import answer_text, fences
from azr.tasks.task import bad_characters
from sandbox import BENCHMARK, Sandbox

PART = 256  # answers to tasks and to questions that are judged together: what a kill can cost
MAX_KEY = 2_000  # characters of a normalised answer that are kept
MAX_RESPONSE = 20_000_000

_TAGS = {"deduction": ("output", ""), "abduction": ("input", ""), "induction": ("python", "py", "python3", "")}
_PYTHON = ("python", "py", "python3", "")
_ASSERTION = re.compile(r"(?:assert\s+)?f\((.*)\)\s*==\s*(.*)", re.DOTALL)
_STATED = re.compile(r"\banswer(?:\s+is|\s*:)\s*:?[ \t]*([^\n]+)", re.IGNORECASE)


class Answer(NamedTuple):
    """form: "completion" (a response, or what goes on after a code prompt), "solution" (a program) or "answer"."""

    task_id: str
    text: str | None
    form: str


@dataclass(frozen=True)
class Grade:
    """answer: the answer in normal form, equal for answers that are the same; None if there is none. base, plus: of a
    program, whether it is right on the base inputs, and on the extra ones too; None where there are none."""

    correct: bool
    reason: str
    answer: str | None = None
    base: bool | None = None
    plus: bool | None = None


class Grader:
    """Opens what a benchmark's grading needs; use as a context manager. Raises SandboxError, MathError."""

    def __init__(self, benchmark: Benchmark, workers: int | None = None):
        self.benchmark = benchmark
        self.workers = workers or len(os.sched_getaffinity(0))
        self.items, self.references = benchmark.by_id(), {}
        # A problem without extra inputs, as Mbpp/793, is judged by its base inputs in both figures.
        self.has_plus = any(item.code and len(item.code.inputs) > item.code.base for item in benchmark.items)
        self._judge = {"task": self._tasks, "math": self._math}.get(benchmark.kind)
        self._locks = {name: threading.Lock() for name in self.items}

    def __enter__(self) -> Grader:
        self._opened = contextlib.ExitStack()
        kind = self.benchmark.kind
        if kind == "code":
            # A sandbox of one lane for each thread, opened when it is needed; the first now, for what it has to say.
            self._idle: queue.SimpleQueue = queue.SimpleQueue()
            self._kept = code_answers.keeper()
            self._idle.put(self._sandbox())
            for _ in range(self.workers - 1):
                self._idle.put(None)
        else:
            tool = math_answers.MathGrader(self.workers) if kind == "math" else Sandbox(self.workers)
            self.tool = self._opened.enter_context(tool)
        return self

    def _sandbox(self, quiet: bool = False) -> Sandbox:
        return self._opened.enter_context(Sandbox(1, BENCHMARK, quiet=quiet))

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    def left_out(self, task_id: str) -> int:
        """The inputs of a problem that its reference solution does not answer, as far as that is known."""
        return len(self.references[task_id].faults) if task_id in self.references else 0

    def grade(self, answers: list[Answer]) -> list[Grade]:
        """The grade of each answer, in order. KeyError: a task_id that the benchmark does not have."""
        grades = dict(self.graded(answers))
        return [grades[i] for i in range(len(answers))]

    def graded(self, answers: list[Answer]) -> Iterator[tuple[int, Grade]]:
        """(place, grade) of each answer as it is known, in any order. Raises as `grade`."""
        grades = {i: _unreadable(answer.text) for i, answer in enumerate(answers)}
        yield from ((i, grade) for i, grade in grades.items() if grade)
        pairs = {i: (self.items[answers[i].task_id], answers[i]) for i, grade in grades.items() if grade is None}
        if self._judge is None:
            yield from self._programs(pairs)
            return
        places = list(pairs)
        for part in (places[start : start + PART] for start in range(0, len(places), PART)):
            yield from zip(part, self._judge([pairs[i] for i in part]))

    # ---------------------------------------------------------------- judges

    def _tasks(self, pairs: list[tuple[Item, Answer]]) -> list[Grade]:
        values = [task_answer(item.task.mode, answer.text, answer.form) for item, answer in pairs]
        verdicts = judge([(item.task, value) for (item, _), value in zip(pairs, values)], self.tool)
        return [
            Grade(verdict.ok, verdict.reason, None if value is None else _key(answer_key(item.task.mode, value)))
            for (item, _), value, verdict in zip(pairs, values, verdicts)
        ]

    def _math(self, pairs: list[tuple[Item, Answer]]) -> list[Grade]:
        values = []
        for item, answer in pairs:
            value = math_answers.extract(answer.text)
            values.append(answer.text.strip() if value is None and answer.form == "answer" else value)
        verdicts = self.tool.grade([(item.task.answer, value) for (item, _), value in zip(pairs, values)])
        return [Grade(verdict.ok, verdict.reason, _key(verdict.key)) for verdict in verdicts]

    def _programs(self, pairs: dict[int, tuple[Item, Answer]]) -> Iterator[tuple[int, Grade]]:
        """Each answer alone, as soon as a lane is free: one that takes its minute holds up no other."""
        threads = ThreadPoolExecutor(self.workers)
        try:
            futures = {threads.submit(self._program, *pair): i for i, pair in pairs.items()}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:  # also of a stop: what has not begun is dropped, what runs ends with its sandbox
            threads.shutdown(wait=False, cancel_futures=True)
            self._kept.trim()
        self._say_where_outputs_are_from()

    def _say_where_outputs_are_from(self) -> None:
        """One line, where reference solutions were not run, or will not be run by the next call."""
        kept, what = self._kept, "outputs of the reference solutions"
        if kept.used:
            count = f"{len(kept.used)} of {len(self.references)}"
            note(f"{what}: {count} from the cache of {min(kept.used)} ({kept.place})")
        elif kept.made:
            note(f"{what}: kept in {kept.place} for the next call")

    def _program(self, item: Item, answer: Answer) -> Grade:
        sandbox = self._idle.get()
        try:
            sandbox = sandbox or self._sandbox(quiet=True)
            with self._locks[item.task_id]:
                if item.task_id not in self.references:
                    self.references[item.task_id] = code_answers.reference_of(item.code, sandbox, self._kept)
            text = program_text(item.code, answer.text, answer.form)
            verdict = code_answers.grade(item.code, text, self.references[item.task_id], sandbox)
        finally:
            self._idle.put(sandbox)
        correct = verdict.ok_plus if self.benchmark.strict else verdict.ok_base
        reason = "ok" if correct else verdict.reason
        plus = verdict.ok_plus if self.has_plus else None
        return Grade(correct, reason, _key(answer_key("induction", text)), verdict.ok_base, plus)


def _unreadable(text: str | None) -> Grade | None:
    """A grade for what no judge could read."""
    if text is None:
        return Grade(False, "no_answer")
    if len(text) > MAX_RESPONSE:
        return Grade(False, "too_large")
    return Grade(False, "syntax") if bad_characters(text) else None


def _key(text: str | None) -> str | None:
    """Long answers keep their beginning and a digest of the whole."""
    if text is None or len(text) <= MAX_KEY:
        return text
    import hashlib

    return f"{text[:80]}... {len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()}"


# ---------------------------------------------------------------- the answer in a response


def task_answer(mode: str, text: str, form: str = "completion") -> str | None:
    """The literal (or for induction the program) that a response gives: as the think/answer format has it, else the
    last fenced block, else between [ANSWER] tags, else after the last "answer is", else all of it. An assertion
    `f(input) == output` gives its side. None: nothing is there."""
    if "<answer>" in text:
        return parse_answer(mode, text).value
    blocks = [block.text for block in fences(text) if block.tag in _TAGS[mode]] if "```" in text else []
    if blocks:
        answer = blocks[-1]
    else:
        stated = form == "completion" and mode != "induction" and (_marked(text) or _last(_STATED, text))
        answer = stated or text
    answer = answer.strip()
    if mode != "induction" and answer.startswith(("f(", "assert")):
        if sides := _ASSERTION.fullmatch(answer):
            answer = sides[1 if mode == "abduction" else 2].strip()
        elif mode == "abduction" and answer.startswith("f(") and answer.endswith(")"):
            answer = answer[2:-1].strip()
    return answer if answer or mode == "abduction" else None  # f() is called with nothing


def _marked(text: str) -> str | None:
    """What is between the last pair of [ANSWER] tags, as CRUXEval's own prompts ask for it."""
    end = text.rfind("[/ANSWER]")
    start = text.rfind("[ANSWER]", 0, max(end, 0))
    return text[start + len("[ANSWER]") : end] if start >= 0 else None


def _last(pattern: re.Pattern, text: str) -> str | None:
    """The last match's group, unless it is blank."""
    groups = pattern.findall(text)
    return groups[-1] if groups and groups[-1].strip() else None


def program_text(problem: code_answers.Problem, text: str, form: str = "completion") -> str:
    """The code of a response: the last fenced block of its answer (or of all of it) that defines the entry point; else
    the text as it is, which code_answers takes for a program or for the rest of the prompt's."""
    if form == "solution":
        return text
    _, tagged, _ = answer_text(text) if "<answer>" in text else (False, None, False)
    region = text if tagged is None else tagged
    if "```" in region:
        blocks = [block.text for block in fences(region) if block.tag in _PYTHON]
        name = re.compile(rf"^(?:async[ \t]+)?def[ \t]+{re.escape(problem.entry_point)}\b", re.MULTILINE)
        blocks = [block for block in blocks if name.search(block)] or (blocks if tagged is not None else [])
        if blocks:
            return blocks[-1]
    return region
