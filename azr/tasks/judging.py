"""Is an answer right? Values are compared here; programs run in the sandbox, which never sees an expected answer.

    with Sandbox() as sandbox:
        [verdict] = judge([(task, "[1, 2]")], sandbox)
    verdict.ok, verdict.reason              # True, "ok"; or False, "wrong", "timeout", "not_literal", ...

Imports the other files of this folder and the sandbox.
"""

from __future__ import annotations

from dataclasses import replace

from azr.tasks.program import read_program
from azr.tasks.task import MODES, Task, Verdict, bad_characters
from azr.tasks.validation import MAX_PROGRAM, not_literal
from sandbox import Job, Outcome, Sandbox, literal

ANSWERS_PER_JOB = 32  # answers that one process of the sandbox tries for one program

_NO_ANSWER = Verdict(False, "no_answer", "the response holds no answer")
_AGAIN = ("memory", "killed", "forbidden")  # what other inputs in the same process may have caused


def judge(pairs: list[tuple[Task, str | None]], sandbox: Sandbox, fraction: bool = False) -> list[Verdict]:
    """Whether each answer is correct for its task, in order; `ok` means correct. Identical pairs are judged once.

    Deduction compares values; nothing is run. Abduction runs the task's program on the answer. Induction runs the
    answer on the hidden inputs: all must be right, an exception is a failure; `fraction`: go on after a failure, so
    that `score` is the share of right ones. Raises ValueError for a mathematics task and for a task whose expected
    output is no literal; SandboxError.
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
            verdicts[key] = not_literal(error, "answer")
    _judge_inputs(abduction, sandbox, verdicts)
    jobs = [
        Job(answer, tuple(arguments for arguments, _ in task.hidden), stop_at_failure=not fraction)
        for _, task, answer in induction
    ]
    for (key, task, _), outcomes in zip(induction, sandbox.run(jobs) if jobs else []):
        verdicts[key] = _judge_hidden(task, outcomes, fraction)
    return [verdicts[task.hash, answer] for task, answer in pairs]


def _compare(value, expected: str) -> Verdict:
    """A value against expected literal text."""
    try:
        right = literal.parse(expected)
    except literal.LiteralError as error:
        raise ValueError(f"the task's output {expected[:60]!r} is no literal: {error}") from error
    return Verdict(True, "ok", score=1.0) if literal.equal(value, right) else Verdict(False, "wrong", "another value")


def _check_candidate(program: str) -> Verdict:
    """What can be told of a program without running it; `ok` means that it may run."""
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
    by_program = {}  # program -> its inputs, each once and in order: a dict is an ordered set
    for _, task, text in abduction:
        by_program.setdefault(task.program, {})[text] = None
    groups = []
    for program, inputs in by_program.items():
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
    """What a program gave, against expected literal text."""
    if outcome.status != "ok":
        return Verdict(False, outcome.status, outcome.detail)
    return _compare(literal.parse(outcome.output), expected)


def _judge_hidden(task: Task, outcomes: list[Outcome], fraction: bool) -> Verdict:
    """All hidden pairs must be right; a failure counts even where the sandbox failed on another pair."""
    rows = [_judge_outcome(outcome, expected) for outcome, (_, expected) in zip(outcomes, task.hidden)]
    # The reason is that of the first pair that failed by itself; the sandbox's failure only if there is no other.
    wrong = [row for row in rows if not row.ok and row.reason != "infra"] or [row for row in rows if not row.ok]
    if not wrong:
        return Verdict(True, "ok", score=1.0)
    counted = fraction and wrong[0].reason != "infra"
    return replace(wrong[0], score=sum(row.ok for row in rows) / len(rows) if counted else 0.0)
