"""The three modes of self-play: tasks, reading responses, validating proposals, judging answers, buffers.

    deduction   program and input are given, the output is asked
    abduction   program and output are given, an input is asked (any that gives the output)
    induction   five input/output pairs and a message are given, a program is asked; judged on five hidden pairs

    from azr.tasks import Task, validate, judge        the rest is in the files of this folder
    python -m azr.tasks validate < proposals.jsonl      one verdict a line, in order
    python -m azr.tasks judge < answers.jsonl

Nothing a model wrote is evaluated in this process: values are read by `sandbox.literal`, programs run in the sandbox,
and an expected answer never enters a process that runs model-written code. Equality is Python's == on the values,
with NaN equal to NaN and floats equal within a relative 1e-9.

Left out: rewards and advantages (train_azr.py), mathematics and public benchmarks (azr/evals/benchmarks.py), torch.
"""

from azr.tasks.buffers import Buffers
from azr.tasks.duplicates import duplicate_key
from azr.tasks.judge import judge
from azr.tasks.parse import parse_answer, parse_proposal
from azr.tasks.prompts import INDUCTION_INPUTS, STOP, propose_prompt, solve_prompt, template_hash
from azr.tasks.task import (
    FIELDS,
    MODES,
    SEED_PROGRAM,
    SEED_TASKS,
    VISIBLE,
    Parsed,
    Proposal,
    Sample,
    Task,
    Verdict,
)
from azr.tasks.validate import validate

__all__ = [
    "FIELDS", "INDUCTION_INPUTS", "MODES", "SEED_PROGRAM", "SEED_TASKS", "STOP", "VISIBLE", "Buffers", "Parsed",
    "Proposal", "Sample", "Task", "Verdict", "duplicate_key", "judge", "parse_answer", "parse_proposal",
    "propose_prompt", "solve_prompt", "template_hash", "validate",
]
