"""When two tasks are the same task: names, comments, layout and the order of inputs aside.

    duplicate_key(Task("deduction", "def f(a):\n    return a", "1", "1"))      # equal for "def f(b): return b"

Imports program.py, task.py and sandbox.literal.
"""

from __future__ import annotations

import hashlib
import json

from azr.tasks.program import read_program
from azr.tasks.task import Proposal, Task
from sandbox import literal


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
    # Sorted, so that a proposer gets nothing for the same ten inputs in another order.
    inputs = sorted(_input_key(text, reading.parameters) for text in inputs)
    return hashlib.sha256(json.dumps([item.mode, reading.form, inputs]).encode()).hexdigest()[:32]


def _input_key(text: str, parameters: dict[str, str]) -> str:
    """Canonical arguments, keyword arguments under the normal form's names and in order."""
    try:
        args, kwargs = literal.parse_args(text)
        return literal.canon_args(args, dict(sorted((parameters.get(name, name), x) for name, x in kwargs.items())))
    except literal.LiteralError:
        return text.strip()
