"""Filters (proposals or answers as JSON lines in, one verdict a line out, in order) and the maker of task files.

    python -m azr.tasks validate < proposals.jsonl
    python -m azr.tasks judge < answers.jsonl
    python -m azr.tasks make tiny|run|benchmark ...     the files of train_azr.py --data; `make --help` says more

validate reads {"mode": "deduction"|"abduction", "program", "input"} or {"mode": "induction", "program", "message",
"inputs": [ten texts]} and writes {"valid", "reason", "detail", "output" (induction: "outputs")}. judge reads a task
with "answer" (induction: a program) and writes {"correct", "reason"}. An "id" is given back; a bad line gives
{"error", "line"}. Reasons: docs/validation.md; tasks: docs/evaluation.md.

Exit codes: 0 done, 1 some lines were bad, 2 bad arguments or no sandbox, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys

from azr.command import MAX_WORKERS, Number, Parser
from azr.jsonl import stream
from azr.tasks.judging import judge
from azr.tasks.task import FIELDS, Proposal, Task, Verdict, mode_field, text_field
from azr.tasks.validation import MAX_OUTPUT, validate
from sandbox import Sandbox, SandboxError


def _validate_rows(rows: list[dict], sandbox: Sandbox, max_output_chars: int) -> list[dict]:
    """One verdict object a row; a ValueError where the row is no proposal."""
    # A bad line keeps its place as the error itself, which `stream` writes; only the others go to the sandbox.
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
    """Runs one of the commands; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["make"]:
        from azr.train.make_data import main as make  # here: filters need nothing of training

        return make(arguments[1:])
    shape = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m azr.tasks", description=__doc__, formatter_class=shape)
    what = "the filter for proposals or for answers, or the maker of files"
    parser.add_argument("command", choices=["validate", "judge", "make"], help=what)
    workers, characters = Number(int, 1, MAX_WORKERS), Number(int, 1, 10**8)
    parser.add_argument("--workers", type=workers, help="processes of the sandbox (default: cores)")
    parser.add_argument(
        "--max-output-chars",
        type=characters,
        default=MAX_OUTPUT,
        help=f"validate: refuse longer outputs (default {MAX_OUTPUT})",
    )
    options = parser.parse_args(arguments)
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
