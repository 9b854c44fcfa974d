"""The three modes of self-play: tasks, reading responses, validating proposals, judging answers, buffers.

    deduction   program and input are given, the output is asked
    abduction   program and output are given, an input is asked (any that gives the output)
    induction   five input/output pairs and a message are given, a program is asked; judged on five hidden pairs

    python -m azr.tasks validate < proposals.jsonl      one verdict a line, in order
    python -m azr.tasks judge < answers.jsonl

Nothing a model wrote is evaluated in this process: values are read by `sandbox.literal`, programs run in the sandbox,
and an expected answer never enters a process that runs model-written code. Equality is Python's == on the values,
with NaN equal to NaN and floats equal within a relative 1e-9.

Left out: rewards and advantages (train_azr.py), mathematics and public benchmarks (azr/evals/benchmarks.py), torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections import deque
from dataclasses import replace

from azr.tasks.audit import audit_induction, fresh_inputs  # noqa: F401 (re-exported)
from azr.jsonl import stream
from azr.tasks.program import read_program, skeleton
from azr.tasks.prompts import INDUCTION_INPUTS, STOP, propose_prompt, solve_prompt, template_hash  # noqa: F401 (re-exported)
from azr.tasks.task import (FIELDS, MODES, SEED_PROGRAM, SEED_TASKS, VISIBLE, Parsed, Proposal, Sample,  # noqa: F401
                         Task, Verdict, bad_characters, mode_field, text_field)
from azr.tasks.parse import Fence, answer_text, fences, leaked_code
from sandbox import Job, Outcome, Sandbox, SandboxError, literal

MIN_OUTPUTS = 3  # distinct outputs an induction task must show
MAX_PROGRAM, MAX_INPUT, MAX_MESSAGE, MAX_OUTPUT = 8_192, 1_000, 2_000, 400  # characters: what a prompt shows in full
ANSWERS_PER_JOB = 32  # answers that one process of the sandbox tries for one program

# --- reading responses -----------------------------------------------------------------------------------------------

_OUT_TAG = {"deduction": "output", "abduction": "input", "induction": "python"}
_PYTHON = ("python", "py", "python3")


def parse_answer(mode: str, response: str) -> Parsed:
    """A solver's answer as text: its last ```output (deduction), ```input (abduction) or ```python (induction) block;
    for the first two else the last untagged block or the bare answer, for mathematics the bare answer. Never
    raises."""
    well_formed, text, closed = answer_text(response)
    if text is None:
        return Parsed(False, None, "no_format", "there is no answer tag")
    blocks = fences(text)
    wanted = _PYTHON if mode == "induction" else (_OUT_TAG.get(mode),)
    found = [block.text for block in blocks if block.tag in wanted]
    found = found or [block.text for block in blocks if not block.tag]
    value = found[-1] if found and mode != "math" else None
    if value is None and closed and (mode == "math" or mode != "induction" and "```" not in text):
        value = text.strip()
    if not value:
        detail = f"no closed ```{_OUT_TAG.get(mode, '')} block in the answer"
        return Parsed(well_formed, None, "no_answer" if well_formed else "no_format", detail)
    return Parsed(well_formed, value, "ok") if well_formed else Parsed(False, value, "no_format", _BROKEN)


_BROKEN = "the response is not '...</think> <answer>...</answer>'"


def parse_proposal(mode: str, response: str, program: str | None = None) -> Parsed:
    """A proposal: the first ```python block that defines f with the first ```input block; for induction all ```input
    blocks and the last ```message block, about the given `program`. Never raises on a response; whether the proposal
    is any good is for `validate` to say."""
    if mode not in MODES or mode == "induction" and program is None:
        raise ValueError(f"a proposal in mode {mode!r}{' needs its program' * (mode == 'induction')}: cannot be read")
    well_formed, text, _ = answer_text(response)
    if text is None:
        return Parsed(False, None, "no_format", "there is no answer tag")
    blocks = fences(text)
    inputs = tuple(block.text for block in blocks if block.tag == "input")
    messages = [block.text for block in blocks if block.tag == "message" and block.text]
    if mode != "induction":
        program, inputs = _program_block(blocks), inputs[:1]
    parts = {"program": program, "input": inputs, "message": mode != "induction" or messages}
    missing = next((name for name, found in parts.items() if not found), None)
    if missing:
        reason = f"no_{missing}" if well_formed else "no_format"
        return Parsed(well_formed, None, reason, f"no closed block with the {missing}")
    value = Proposal(mode, program, inputs, messages[-1] if mode == "induction" else None)
    return Parsed(well_formed, value, "ok") if well_formed else Parsed(False, value, "no_format", _BROKEN)


def _program_block(blocks: list[Fence]) -> str | None:
    python = [block.text for block in blocks if block.tag in _PYTHON]
    python = python or [block.text for block in blocks if not block.tag and "def " in block.text]
    return next((text for text in python if "def f(" in text), python[0] if python else None)


# --- validating proposals --------------------------------------------------------------------------------------------


def duplicate_key(item: Task | Proposal) -> str:
    """32 hex digits that are equal for tasks that are the same but for names, comments, docstrings, annotations and
    layout of the program and the order of an induction task's inputs (its message is not looked at). Modes never
    share a key."""
    if isinstance(item, Task):
        inputs = [pair[0] for pair in item.visible + item.hidden] if item.mode == "induction" else [item.input]
        if item.mode == "math":
            return item.hash
    else:
        inputs = list(item.inputs)
    reading = read_program(item.program)
    inputs = sorted(_input_key(text, reading.parameters) for text in inputs)
    return hashlib.sha256(json.dumps([item.mode, reading.form, inputs]).encode()).hexdigest()[:32]


def _input_key(text: str, parameters: dict[str, str]) -> str:
    """Canonical arguments, keyword arguments under the normal form's names and in order."""
    try:
        args, kwargs = literal.parse_args(text)
        return literal.canon_args(args, dict(sorted((parameters.get(name, name), x) for name, x in kwargs.items())))
    except literal.LiteralError:
        return text.strip()


def validate(proposals: list[Proposal], sandbox: Sandbox, known: set[str] | None = frozenset(),
             max_output_chars: int = MAX_OUTPUT, exempt: set[str] = frozenset(),
             held_out: frozenset[str] = frozenset()) -> list[Verdict]:
    """A verdict for each proposal, in order; a valid one carries its task.

    known: duplicate keys of tasks that exist already; a proposal repeated in the list is a duplicate of the first valid
    one. None: every proposal for itself, no duplicates.
    exempt: programs that an induction proposal may be about although they are trivial: {SEED_PROGRAM} in the seed
    stage, where nothing else could be given to the proposer.
    held_out: skeletons (azr.tasks.program) of programs kept for measuring, which must not be trained on.
    """
    verdicts: list[Verdict | None] = [None] * len(proposals)
    first, repeats, runs = {}, [], []  # runs: (position, proposal with canonical inputs)
    for i, proposal in enumerate(proposals):
        checked = _check_text(proposal)
        if isinstance(checked, Verdict):
            verdicts[i] = checked
            continue
        if held_out and skeleton(checked.program) in held_out:
            verdicts[i] = Verdict(False, "held_out", "but for names and constants it is a program of a held-out task")
            continue
        key = duplicate_key(checked) if known is not None else i
        if key in (known or ()):
            verdicts[i] = Verdict(False, "duplicate", "the task exists already, names and layout aside")
        elif key in first:
            repeats.append((i, first[key]))
        else:
            first[key] = i
            runs.append((i, checked))
    jobs = [Job(proposal.program, proposal.inputs, stop_at_failure=True) for _, proposal in runs]
    for (i, proposal), outcomes in zip(runs, sandbox.validate(jobs) if jobs else []):
        verdicts[i] = _conclude(proposal, outcomes, max_output_chars, exempt)
    for i, original in repeats:
        same = Verdict(False, "duplicate", "the same task was proposed before in this batch, names and layout aside")
        verdicts[i] = same if verdicts[original].ok else verdicts[original]
    return verdicts


def _check_text(proposal: Proposal) -> Verdict | Proposal:
    """What can be said without running anything: a refusal, or the proposal with canonical inputs."""
    texts = (proposal.program, proposal.message or "", *proposal.inputs)
    fault = next(filter(None, map(bad_characters, texts)), "")
    if fault:
        return Verdict(False, "syntax", f"the text holds {fault}")
    if proposal.mode == "induction" and len(proposal.inputs) != INDUCTION_INPUTS:
        return Verdict(False, "wrong_count", f"{len(proposal.inputs)} inputs instead of {INDUCTION_INPUTS}")
    limits = [("program", proposal.program, MAX_PROGRAM), ("message", proposal.message or "", MAX_MESSAGE)]
    for name, text, limit in limits + [("input", text, MAX_INPUT) for text in proposal.inputs]:
        if len(text) > limit:
            return Verdict(False, "too_large", f"the {name} has {len(text)} characters; at most {limit} are allowed")
    if not read_program(proposal.program).has_entry:
        return Verdict(False, "no_entry", "there is no top-level function named f")
    try:
        inputs = tuple(literal.canon_args(*literal.parse_args(text)) for text in proposal.inputs)
    except literal.LiteralError as error:
        return _no_literal(error, "input")
    if proposal.mode == "induction":
        if len(set(inputs)) < len(inputs):
            return Verdict(False, "inputs_not_distinct", f"{len(set(inputs))} of {len(inputs)} inputs are distinct")
        leaked = leaked_code(proposal.program, proposal.message or "")
        if leaked:
            return Verdict(False, "message_has_code", f"the message gives away {leaked[:80]}")
    return replace(proposal, inputs=inputs)


def _conclude(proposal: Proposal, outcomes: list[Outcome], max_output_chars: int, exempt: set[str]) -> Verdict:
    """The verdict on a proposal that ran."""
    for outcome in outcomes:
        if outcome.status != "ok":
            return Verdict(False, outcome.status, outcome.detail)
    outputs = [outcome.output for outcome in outcomes]
    trivial = read_program(proposal.program).trivial
    if trivial and not (proposal.mode == "induction" and proposal.program in exempt):
        return Verdict(False, "trivial", trivial)
    if "None" in outputs:
        return Verdict(False, "none_output", "f returned None")
    longest = max(map(len, outputs))
    if longest > max_output_chars:
        return Verdict(False, "too_large", f"an output has {longest} characters; at most {max_output_chars} are shown")
    if proposal.mode != "induction":
        task = Task(proposal.mode, proposal.program, proposal.inputs[0], outputs[0])
        return Verdict(True, "ok", task=task, score=1.0)
    distinct = len(set(outputs))
    if distinct < MIN_OUTPUTS:
        return Verdict(False, "outputs_not_diverse", f"{distinct} distinct outputs; at least {MIN_OUTPUTS} are needed")
    pairs = tuple(zip(proposal.inputs, outputs))
    task = Task(proposal.mode, proposal.program, message=proposal.message or "",
                visible=pairs[:VISIBLE], hidden=pairs[VISIBLE:])
    return Verdict(True, "ok", task=task, score=1.0)


# --- judging answers -------------------------------------------------------------------------------------------------

_NO_ANSWER = Verdict(False, "no_answer", "the response holds no answer")
_AGAIN = ("memory", "killed", "forbidden")  # what other inputs in the same process may have caused


def judge(pairs: list[tuple[Task, str | None]], sandbox: Sandbox, fraction: bool = False) -> list[Verdict]:
    """Whether each answer is correct for its task, in order; `ok` means correct. Identical pairs are judged once.

    Deduction compares values; nothing is run. Abduction runs the task's program on the answer. Induction runs the
    answer on the hidden inputs: all must be right, an exception is a failure; `fraction`: go on after a failure, so
    that `score` is the share of right ones. Raises ValueError for a mathematics task and for a task whose expected
    output is no literal.
    """
    verdicts: dict[tuple[str, str | None], Verdict] = {}
    abduction, induction = [], []  # (key, task, canonical arguments), (key, task, program)
    for task, answer in pairs:
        key = (task.hash, answer)
        if key in verdicts:
            continue
        verdicts[key] = _NO_ANSWER
        if task.mode not in MODES:
            raise ValueError(f"{task.mode} tasks are graded by azr.evals.benchmarks, not by azr.tasks.judge")
        if answer is None:
            continue
        if task.mode == "induction":
            verdicts[key] = _check_candidate(answer)
            if verdicts[key].ok:
                induction.append((key, task, answer))
            continue
        try:
            if task.mode == "deduction":
                verdicts[key] = _compare(literal.parse(answer), task.output)
            else:
                abduction.append((key, task, literal.canon_args(*literal.parse_args(answer))))
        except literal.LiteralError as error:
            verdicts[key] = _no_literal(error, "answer")
    _judge_inputs(abduction, sandbox, verdicts)
    jobs = [Job(answer, tuple(given for given, _ in task.hidden), stop_at_failure=not fraction)
            for _, task, answer in induction]
    for (key, task, _), outcomes in zip(induction, sandbox.run(jobs) if jobs else []):
        verdicts[key] = _judge_hidden(task, outcomes, fraction)
    return [verdicts[task.hash, answer] for task, answer in pairs]


def _no_literal(error: literal.LiteralError, what: str) -> Verdict:
    return Verdict(False, "too_large" if isinstance(error, literal.TooLarge) else "not_literal", f"{what}: {error}")


def _compare(value, expected: str) -> Verdict:
    """A value against expected literal text."""
    try:
        wanted = literal.parse(expected)
    except literal.LiteralError as error:
        raise ValueError(f"the task's output {expected[:60]!r} is no literal: {error}") from error
    return Verdict(True, "ok", score=1.0) if literal.equal(value, wanted) else Verdict(False, "wrong", "another value")


def _check_candidate(program: str) -> Verdict:
    fault = bad_characters(program)
    if fault:
        return Verdict(False, "syntax", f"the program holds {fault}")
    if len(program) > MAX_PROGRAM:
        return Verdict(False, "too_large", f"the program has {len(program)} characters, more than {MAX_PROGRAM}")
    if not read_program(program).has_entry:
        return Verdict(False, "no_entry", "there is no top-level function named f")
    return Verdict(True, "ok")


def _judge_inputs(abduction: list[tuple], sandbox: Sandbox, verdicts: dict) -> None:
    """Runs programs on canonical answers. Only programs that cannot carry state share a process between answers, and
    what one answer may have done to the next (memory) is tried again alone: no verdict depends on other answers."""
    wanted = {}  # program -> its inputs, each once
    for _, task, text in abduction:
        wanted.setdefault(task.program, {})[text] = None
    groups = []
    for program, inputs in wanted.items():
        inputs, size = list(inputs), ANSWERS_PER_JOB if read_program(program).stateless else 1
        groups += [(program, tuple(inputs[i : i + size])) for i in range(0, len(inputs), size)]
    outcomes, again = {}, []
    for (program, inputs), row in zip(groups, sandbox.run([Job(*group) for group in groups]) if groups else []):
        outcomes.update({(program, text): outcome for text, outcome in zip(inputs, row)})
        suspect = [text for text, outcome in zip(inputs, row) if outcome.status in _AGAIN]
        again += [(program, text) for text in suspect if len(inputs) > 1]
    for pair, row in zip(again, sandbox.run([Job(program, (text,)) for program, text in again]) if again else []):
        outcomes[pair] = row[0]
    for key, task, text in abduction:
        verdicts[key] = _judge_outcome(outcomes[task.program, text], task.output)


def _judge_outcome(outcome: Outcome, expected: str) -> Verdict:
    if outcome.status != "ok":
        return Verdict(False, outcome.status, outcome.detail)
    return _compare(literal.parse(outcome.output), expected)


def _judge_hidden(task: Task, outcomes: list[Outcome], fraction: bool) -> Verdict:
    """All hidden pairs must be right; a failure counts even where the sandbox failed on another pair."""
    rows = [_judge_outcome(outcome, wanted) for outcome, (_, wanted) in zip(outcomes, task.hidden)]
    wrong = [row for row in rows if not row.ok and row.reason != "infra"] or [row for row in rows if not row.ok]
    if not wrong:
        return Verdict(True, "ok", score=1.0)
    counted = fraction and wrong[0].reason != "infra"
    return replace(wrong[0], score=sum(row.ok for row in rows) / len(rows) if counted else 0.0)


# --- buffers ---------------------------------------------------------------------------------------------------------


class Buffers:
    """Per mode the tasks found so far, each with the step it came in. Full: the oldest leaves. No duplicates."""

    def __init__(self, capacity: int = 16_384):
        if capacity < 1:
            raise ValueError(f"a buffer of {capacity} tasks holds nothing; give a capacity of at least 1")
        self.capacity = capacity
        self._rows: dict[str, deque[tuple[str, int, Task]]] = {mode: deque() for mode in MODES}
        self._keys: dict[str, set[str]] = {mode: set() for mode in MODES}

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))

    def size(self, mode: str) -> int:
        return len(self._rows[mode])

    def add(self, task: Task, step: int) -> bool:
        """Appends the task; False, and nothing changes, when an equal one (duplicate_key) is there."""
        return self._append(duplicate_key(task), step, task)

    def _append(self, key: str, step: int, task: Task) -> bool:
        rows, keys = self._rows[task.mode], self._keys[task.mode]
        if key in keys:
            return False
        if len(rows) == self.capacity:
            keys.remove(rows.popleft()[0])
        rows.append((key, step, task))
        keys.add(key)
        return True

    def keys(self, mode: str | None = None) -> set[str]:
        """Duplicate keys of a mode, or of all (keys of two modes never coincide)."""
        return set().union(*(self._keys[m] for m in ([mode] if mode else MODES)))

    def tasks(self, mode: str) -> list[tuple[Task, int]]:
        """(task, step), oldest first."""
        return [(task, step) for _, step, task in self._rows[mode]]

    def sample(self, mode: str, k: int, rng: random.Random) -> list[Task]:
        """Up to k distinct tasks, uniformly, in random order."""
        rows = self._rows[mode]
        return [rows[i][2] for i in rng.sample(range(len(rows)), min(k, len(rows)))]

    def newest(self, mode: str, k: int, since: int | None = None) -> list[Task]:
        """The up to k tasks that came last, newest first; `since`: none from before that step."""
        found = []
        for _, step, task in reversed(self._rows[mode]):
            if len(found) == k or (since is not None and step < since):
                break
            found.append(task)
        return found

    def sample_program(self, rng: random.Random) -> Task:
        """A task of the deduction and abduction buffers together, uniformly: the induction proposer is asked about
        its program. The seed is drawn only while there is nothing else, since tasks about it are trivial."""
        tasks = [task for mode in ("deduction", "abduction") for _, _, task in self._rows[mode]]
        rows = [task for task in tasks if task.program != SEED_PROGRAM]
        return rng.choice(rows) if rows else SEED_TASKS["deduction"]

    def state_dict(self) -> dict:
        """Everything, as JSON; order and steps included."""
        rows = {mode: [[key, step, task.to_json()] for key, step, task in self._rows[mode]] for mode in MODES}
        return {"capacity": self.capacity, "rows": rows}

    def load_state_dict(self, state: dict) -> None:
        """Restores what state_dict gave, exactly. Raises ValueError where it is broken; the buffers are then
        unchanged."""
        fresh = Buffers(state["capacity"])
        for mode in MODES:
            for key, step, row in state["rows"][mode]:
                task = Task.from_json(row)
                if task.mode != mode or not fresh._append(key, step, task):
                    raise ValueError(f"buffer state: a repeated or misplaced {task.mode} task among the {mode} tasks")
        self.capacity, self._rows, self._keys = fresh.capacity, fresh._rows, fresh._keys


# --- python -m azr.tasks ---------------------------------------------------------------------------------------------


def _validate_rows(rows: list[dict], sandbox: Sandbox, max_output_chars: int) -> list[dict]:
    """One verdict object a row; a ValueError where the row is no proposal."""
    checked = [_attempt(Proposal.from_json, row) for row in rows]
    proposals = [item for item in checked if isinstance(item, Proposal)]
    verdicts = iter(validate(proposals, sandbox, known=None, max_output_chars=max_output_chars))
    return [_validity(item, next(verdicts)) if isinstance(item, Proposal) else item for item in checked]


def _validity(proposal: Proposal, verdict: Verdict) -> dict:
    row = {"valid": verdict.ok, "reason": verdict.reason, "detail": verdict.detail}
    if proposal.mode == "induction":
        pairs = verdict.task.visible + verdict.task.hidden if verdict.ok else ()
        return row | {"outputs": [output for _, output in pairs] if verdict.ok else None}
    return row | {"output": verdict.task.output if verdict.ok else None}


def _judge_rows(rows: list[dict], sandbox: Sandbox) -> list[dict]:
    """One verdict object a row; a ValueError where the row is no task with an answer."""
    checked = [_attempt(_task_and_answer, row) for row in rows]
    verdicts = iter(judge([item for item in checked if isinstance(item, tuple)], sandbox))
    return [_correctness(next(verdicts)) if isinstance(item, tuple) else item for item in checked]


def _correctness(verdict: Verdict) -> dict:
    return {"correct": verdict.ok, "reason": verdict.reason}


def _task_and_answer(row: dict) -> tuple[Task, str | None]:
    if mode_field(row, FIELDS) == "math":
        raise ValueError("math tasks are graded by azr.evals.benchmarks (eval_passk.py score), not by this filter")
    answer = row.get("answer", "")
    return Task.from_json(row), None if answer is None else text_field(row, "answer")


def _attempt(read, row):
    try:
        return read(row)
    except ValueError as error:
        return error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m azr.tasks", description="JSON lines in, one verdict a line out.")
    parser.add_argument("command", choices=["validate", "judge"])
    parser.add_argument("--workers", type=int, default=None, help="processes of the sandbox (default: cores)")
    parser.add_argument("--max-output-chars", type=int, default=MAX_OUTPUT, help="validate: refuse longer outputs")
    options = parser.parse_args(arguments)
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers {options.workers}: at least one process is needed")
    try:
        with Sandbox(workers=options.workers) as sandbox:
            if options.command == "validate":
                return stream(lambda rows: _validate_rows(rows, sandbox, options.max_output_chars))
            return stream(lambda rows: _judge_rows(rows, sandbox))
    except SandboxError as error:
        print(f"azr.tasks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
