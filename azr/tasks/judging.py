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
from sandbox import PROPOSAL, Job, Outcome, Sandbox, literal

# CPU seconds of an answer per input. Who needs more gets this many times what the task's own program needs, and at most
# the sandbox's limit: an endless loop costs 0.03 s and not 1 s, and an answer to a slow task has its time.
QUICK_SECONDS, TIME_FACTOR = 0.03, 20.0

_NO_ANSWER = Verdict(False, "no_answer", "the response holds no answer")


def judge(pairs: list[tuple[Task, str | None]], sandbox: Sandbox) -> list[Verdict]:
    """Whether each answer is correct for its task, in order; `ok` means correct. Identical pairs are judged once.

    Deduction compares values; nothing is run. Abduction runs the task's program on the answer. Induction runs the
    answer on the hidden and the visible inputs: all must be right (an answer that contradicts what it was shown may be
    right for the hidden ones by chance), an exception is a failure. Raises ValueError for a mathematics task and for a
    task whose expected output is no literal; SandboxError.
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
    jobs = []
    for _, task, answer in induction:
        inputs = tuple(given for given, _ in task.hidden + task.visible)
        jobs.append((Job(answer, inputs, stop_at_failure=True), Job(task.program, inputs)))
    for (key, task, _), outcomes in zip(induction, _run(jobs, sandbox)):
        verdicts[key] = _judge_pairs(task, outcomes)
    return [verdicts[task.hash, answer] for task, answer in pairs]


def _compare(value, expected: str) -> Verdict:
    """A value against expected literal text."""
    try:
        right = literal.parse(expected)
    except literal.LiteralError as error:
        raise ValueError(f"the task's output {expected[:60]!r} is no literal: {error}") from error
    return Verdict(True, "ok") if literal.equal(value, right) else Verdict(False, "wrong", "another value")


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
    """Runs programs on canonical answers, a job for each answer: no verdict depends on other answers. The sandbox runs
    several in one process where it can prove that they do not meet."""
    jobs = {
        (task.program, text): (Job(task.program, (text,)), Job(task.program, (task.input,)))
        for _, task, text in abduction
    }
    outcomes = dict(zip(jobs, _run(list(jobs.values()), sandbox)))
    for key, task, text in abduction:
        verdicts[key] = _judge_outcome(outcomes[task.program, text][0], task.output)


def _run(jobs: list[tuple[Job, Job]], sandbox: Sandbox) -> list[list[Outcome]]:
    """The outcomes of the first job of each pair; the second, the task's program on the task's inputs, tells what time
    an answer may need."""
    results = sandbox.run([replace(job, cpu_seconds=QUICK_SECONDS) for job, _ in jobs])
    late = [i for i, row in enumerate(results) if any(outcome.status == "timeout" for outcome in row)]
    limits = dict.fromkeys(jobs[i][1] for i in late)
    for job, row in zip(limits, sandbox.run(limits)):
        good = all(outcome.status == "ok" for outcome in row)
        limits[job] = min(PROPOSAL.cpu_seconds, TIME_FACTOR * row[-1].seconds) if good else PROPOSAL.cpu_seconds
    late = [i for i in late if limits[jobs[i][1]] > QUICK_SECONDS]
    for i, row in zip(late, sandbox.run([replace(jobs[i][0], cpu_seconds=limits[jobs[i][1]]) for i in late])):
        results[i] = row
    return results


def _judge_outcome(outcome: Outcome, expected: str) -> Verdict:
    """What a program gave, against expected literal text."""
    if outcome.status != "ok":
        return Verdict(False, outcome.status, outcome.detail)
    return _compare(literal.parse(outcome.output), expected)


def _judge_pairs(task: Task, outcomes: list[Outcome]) -> Verdict:
    """All pairs must be right; a failure counts even where the sandbox failed on another pair."""
    rows = [_judge_outcome(outcome, expected) for outcome, (_, expected) in zip(outcomes, task.hidden + task.visible)]
    # The reason is that of the first pair that failed by itself; the sandbox's failure only if there is no other.
    wrong = [row for row in rows if not row.ok and row.reason != "infra"] or [row for row in rows if not row.ok]
    return wrong[0] if wrong else Verdict(True, "ok")
