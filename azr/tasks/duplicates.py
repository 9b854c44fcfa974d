"""When two tasks are the same task: by their text, and by what their programs do.

    duplicate_key(Task("deduction", "def f(a):\n    return a", "1", "1"))      # equal for "def f(b): return b"
    program_key(task), instance_key(task)       # equal for `x + x` and `x * 2`, once behaviour.py has looked at them

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


def program_key(task: Task) -> str:
    """Hex digits that are equal for tasks of one mode whose programs do the same: on the fresh inputs of behaviour.py,
    or by their normal form where those say too little (task.behaviour is "")."""
    return _digest(task.mode, task.behaviour or read_program(task.program).form)


def instance_key(task: Task) -> str:
    """Hex digits that are equal for tasks with one program_key and the same inputs, in whatever order and spelling."""
    inputs = [pair[0] for pair in task.visible + task.hidden] or [task.input]
    return _digest(program_key(task), sorted(_values_key(task.program, text) for text in inputs))


def _digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _values_key(program: str, text: str) -> str:
    """The arguments in their places, whatever the parameters are called."""
    args, kwargs = positional(program, *literal.parse_args(text))
    return literal.canon_args(args, kwargs)


def positional(program: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Keyword arguments of f in their places, as far as the program's text tells them."""
    names, args, kwargs = list(read_program(program).parameters), list(args), dict(kwargs)
    while kwargs and len(args) < len(names) and names[len(args)] in kwargs:
        args.append(kwargs.pop(names[len(args)]))
    return tuple(args), kwargs


def _input_key(text: str, parameters: dict[str, str]) -> str:
    """Canonical arguments, keyword arguments under the normal form's names and in order."""
    try:
        args, kwargs = literal.parse_args(text)
        return literal.canon_args(args, dict(sorted((parameters.get(name, name), x) for name, x in kwargs.items())))
    except literal.LiteralError:
        return text.strip()
