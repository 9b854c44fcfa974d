"""What the parts of the loop pass to each other: tasks, proposals, readings, verdicts, samples; and their JSON form.

    task = Task("deduction", program="def f(x):\n    return x + 1", input="1", output="2")
    json.dumps(task.to_json())                  # and Task.from_json(row) back, or ValueError in one line

azr/tasks/__init__.py re-exports these: import them from there. Imports sandbox.literal alone, no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import cached_property

from sandbox import literal

MODES = ("deduction", "abduction", "induction")
INDUCTION_INPUTS = 10  # inputs a proposer writes for an induction task: the first half is shown, the second hidden
VISIBLE = INDUCTION_INPUTS // 2  # pairs the solver sees; the others judge its program
MAX_TEXT = 1_000_000  # characters of any one field that is read from a file


# --- tasks -----------------------------------------------------------------------------------------------------------

# The content of a task by its mode: what its hash and its JSON line consist of, in this order.
FIELDS = {
    "deduction": ("program", "input", "output"),
    "abduction": ("program", "input", "output"),
    "induction": ("program", "message", "visible", "hidden"),
    "math": ("question", "answer"),
}


@dataclass(frozen=True)
class Task:
    """One task. `input` is the text between the parentheses of f(...); values are canonical literal text; `visible`
    and `hidden` are (input, output) pairs. `response` and `log_probs` (nats, one for each of its tokens) come with
    solution files; with `references`, the tasks that a proposer is shown, the response is no answer to the task but a
    proposal of it. `behaviour` (what the program does) and `chance` (how often a guess is right: behaviour.py) with
    validation. None of these is a part of the hash."""

    mode: str
    program: str = ""
    input: str = ""
    output: str = ""
    message: str = ""
    visible: tuple[tuple[str, str], ...] = ()
    hidden: tuple[tuple[str, str], ...] = ()
    question: str = ""
    answer: str = ""
    response: str | None = None
    log_probs: tuple[float, ...] | None = None
    references: tuple[Task, ...] = ()
    behaviour: str = field(default="", compare=False)
    chance: float = field(default=0.0, compare=False)

    @cached_property
    def hash(self) -> str:
        """32 hex digits of the content."""
        content = [self.mode] + [getattr(self, name) for name in FIELDS[self.mode]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    def to_json(self) -> dict:
        """The fields of its mode, ready for json.dumps."""
        row = {"mode": self.mode}
        for name in FIELDS[self.mode]:
            value = getattr(self, name)
            row[name] = [list(pair) for pair in value] if name in ("visible", "hidden") else value
        if self.response is not None:
            row["response"] = self.response
        if self.log_probs is not None:
            row["log_probs"] = list(self.log_probs)
        if self.references:
            row["references"] = [task.to_json() for task in self.references]
        return row

    @staticmethod
    def from_json(row: dict) -> Task:
        """The inverse of to_json; unknown keys are ignored. Raises ValueError with one line that says what is
        wrong."""
        mode = mode_field(row, FIELDS)
        values = {}
        for name in FIELDS[mode]:
            pairs = name in ("visible", "hidden")
            values[name] = pairs_field(row, name) if pairs else text_field(row, name)
        if row.get("response") is not None:
            values["response"] = text_field(row, "response")
        if row.get("log_probs") is not None:
            values["log_probs"] = numbers_field(row, "log_probs")
        if row.get("references") is not None:
            values["references"] = references_field(row)
        # Checked here, so that a file with a broken answer is refused when it is read and not in the middle of a run.
        outputs = [values["output"]] if "output" in values else [pair[1] for pair in values.get("hidden", ())]
        for output in outputs:
            try:
                literal.parse(output)
            except literal.LiteralError as error:
                raise ValueError(f"{mode} task: the output {output[:60]!r} is no literal: {error}") from error
        return Task(mode=mode, **values)


@dataclass(frozen=True)
class Proposal:
    """What a proposer wrote: a program with one input, or for induction ten inputs and a message about a program that
    it was shown."""

    mode: str
    program: str
    inputs: tuple[str, ...]
    message: str | None = None

    @staticmethod
    def from_json(row: dict) -> Proposal:
        """{"mode", "program", "input"} or {"mode": "induction", "program", "inputs", "message"}; raises
        ValueError."""
        mode = mode_field(row, MODES)
        program = text_field(row, "program")
        if mode != "induction":
            return Proposal(mode, program, (text_field(row, "input"),))
        inputs = row.get("inputs")
        if not isinstance(inputs, list):
            raise ValueError("'inputs' must be a list of texts")
        return Proposal(mode, program, tuple(text_field(row, "inputs", x) for x in inputs), text_field(row, "message"))


@dataclass(frozen=True)
class Parsed:
    """A response as read. `well_formed` is about the think and answer tags alone; `value` is a Proposal or an
    answer's text, None when nothing usable is there; `reason` is "ok" only for a well-formed response with a
    value."""

    well_formed: bool
    value: Proposal | str | None
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    """`ok`: valid, or correct. `task`: the task that a valid proposal makes. Reason "infra": the sandbox failed, not
    the model; such a sample is to be dropped."""

    ok: bool
    reason: str
    detail: str = ""
    task: Task | None = None


@dataclass
class Sample:
    """A completion, what it was sampled for, and what the phases of a step learnt about it: the unit of training."""

    role: str  # "proposer" | "solver"
    mode: str
    prompt: str
    prompt_ids: list[int]
    completion: object  # ids, log_probs, finish_reason
    response: str
    group: str  # answers to the same prompt share it
    parsed: Parsed | None = None
    task: Task | None = None  # proposer: the task made, if valid; solver: the task answered
    reason: str = ""
    detail: str = ""
    correct: bool = False
    solve_rate: float | None = None
    reward: float | None = None
    advantage: float = 0.0
    old_log_prob: list[float] | None = None  # of the trainer, before the first of several updates
    entropy: list[float] = field(default_factory=list)  # nats a token
    update: bool = True  # False: a proposal of an arm whose proposer is not trained
    from_base: bool = False  # sampled with the adapter off
    objective: str = ""  # of what the policy did not sample: "truncated", "luffy" or "sft"; "": PPO's


SEED_PROGRAM = "def f(a):\n    return a"
# Half of them are shown and half hidden: both halves have texts, numbers and containers.
_SEED_VALUES = (
    "'Hello world'",
    "7",
    "[3, 1, 2]",
    "(2, 'b')",
    "{'a': 1}",
    "''",
    "-1.5",
    "[[0, 1], [1, 0]]",
    "True",
    "'abc abc'",
)
SEED_TASKS = {
    "deduction": Task("deduction", SEED_PROGRAM, "'Hello world'", "'Hello world'"),
    "abduction": Task("abduction", SEED_PROGRAM, "'Hello world'", "'Hello world'"),
    "induction": Task(
        "induction",
        SEED_PROGRAM,
        message="Give back what you are given.",
        visible=tuple((v, v) for v in _SEED_VALUES[:VISIBLE]),
        hidden=tuple((v, v) for v in _SEED_VALUES[VISIBLE:]),
    ),
}


# --- fields ----------------------------------------------------------------------------------------------------------


def mode_field(row: dict, allowed) -> str:
    """The mode of a row, one of `allowed`; like the others here raises ValueError with one clear line."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    mode = row.get("mode")
    if not isinstance(mode, str) or mode not in allowed:
        raise ValueError(f"'mode' is {str(mode)[:60]!r}; expected one of {', '.join(allowed)}")
    return mode


def text_field(row: dict, name: str, value=None) -> str:
    """A text field, checked for what no program or prompt can hold."""
    if value is None:
        if name not in row:
            raise ValueError(f"the key {name!r} is missing")
        value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be text, not {type(value).__name__}")
    if len(value) > MAX_TEXT:
        raise ValueError(f"{name!r} has {len(value):,} characters; at most {MAX_TEXT:,} are read")
    fault = bad_characters(value)
    if fault:
        raise ValueError(f"{name!r} holds {fault}")
    return value


def bad_characters(text: str) -> str:
    """What a text holds that no program and no prompt can, in words; "" if nothing."""
    # Python refuses a NUL in source; a lone surrogate has no UTF-8, so neither a tokenizer nor a file can take it.
    if "\0" in text:
        return "a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "a lone surrogate"
    return ""


def pairs_field(row: dict, name: str) -> tuple[tuple[str, str], ...]:
    """A list of [input, output] pairs, as tuples."""
    value = row.get(name)
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{name!r} must be a non-empty list of [input, output] pairs")
    if any(not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in value):
        raise ValueError(f"{name!r} must hold [input, output] pairs of texts")
    return tuple((text_field(row, name, pair[0]), text_field(row, name, pair[1])) for pair in value)


def numbers_field(row: dict, name: str) -> tuple[float, ...]:
    """A list of finite numbers."""
    value = row[name]
    numeric = isinstance(value, list) and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value)
    if not numeric or not all(math.isfinite(x) for x in value):
        raise ValueError(f"{name!r} must be a list of finite numbers")
    return tuple(float(x) for x in value)


def references_field(row: dict) -> tuple[Task, ...]:
    """The tasks that a proposer is shown, at least one (for an induction task one alone); math has no proposer."""
    rows, mode = row["references"], row["mode"]
    if not isinstance(rows, list) or not rows or not all(isinstance(x, dict) for x in rows):
        raise ValueError("'references' must be a list of tasks")
    if mode == "math":
        raise ValueError("math task: nobody proposes those, so that it has no references")
    if mode == "induction" and len(rows) > 1:
        raise ValueError(f"induction task: its proposer is shown one reference, not {len(rows)}")
    return tuple(Task.from_json(reference) for reference in rows)
