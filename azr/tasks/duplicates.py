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
    return _digest(item.mode, read_program(item.program).form, _inputs_key(item.program, inputs))


def program_key(task: Task) -> str:
    """Hex digits that are equal for tasks of one mode whose programs do the same: on the fresh inputs of behaviour.py,
    or by their normal form where those say too little (task.behaviour is "")."""
    return _digest(task.mode, task.behaviour or read_program(task.program).form)


def instance_key(task: Task) -> str:
    """Hex digits that are equal for tasks with one program_key and the same inputs, in whatever order and spelling."""
    inputs = [pair[0] for pair in task.visible + task.hidden] or [task.input]
    return _digest(program_key(task), _inputs_key(task.program, inputs))


def _digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def positional(program: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Keyword arguments of f in their places, as far as the program's text tells them."""
    names, args, kwargs = list(read_program(program).parameters), list(args), dict(kwargs)
    while kwargs and len(args) < len(names) and names[len(args)] in kwargs:
        args.append(kwargs.pop(names[len(args)]))
    return tuple(args), kwargs


def _inputs_key(program: str, inputs: list[str]) -> list[str]:
    """The canonical arguments of each input: in their places, what has none under its name in the normal form. Sorted,
    so that a proposer gets nothing for the same ten inputs in another order."""
    names, keys = read_program(program).parameters, []
    for text in inputs:
        try:
            args, kwargs = positional(program, *literal.parse_args(text))
            keys.append(
                literal.canon_args(args, dict(sorted((names.get(name, name), x) for name, x in kwargs.items())))
            )
        except literal.LiteralError:
            keys.append(text.strip())
    return sorted(keys)
