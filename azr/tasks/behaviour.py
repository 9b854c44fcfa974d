"""What a program does on inputs that its author did not choose: twenty fresh ones of the same types.

    [behaviour] = observe([Task("deduction", "def f(x):\n    return x * 2", "3", "6")], sandbox)
    behaviour.key           # equal for every program that gives the same on the twenty inputs, `return x + x` too
    behaviour.trivial       # "" or why there is nothing to solve: a constant, an argument given back, a lookup

A text can be rewritten in endless ways (brackets, `0x3`, dead branches, swapped operands), so tasks are told apart by
what they do. The inputs depend on the types of the task's own input alone: two tasks about one program meet on the
same inputs. They are small on purpose (no zero, nothing negative unless the own input is, few beyond 100), because
loops of honest programs never end on others. Imports duplicates.py, program.py, task.py and the sandbox.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from typing import NamedTuple

from azr.tasks.duplicates import positional
from azr.tasks.lines import tokens
from azr.tasks.task import Task
from sandbox import Job, Outcome, Sandbox, literal

PROBES = 20  # fresh inputs
CPU_SECONDS = 0.06  # of one fresh input: few programs take a tenth of it; all inputs together have five times that
TELLING = 8  # values that must be among the results before they say which program it is
SURE = 12  # values that must be among the results before a program is called trivial
NEAR = 10  # inputs near the task's own, looked at before a program is called trivial that seems to be more there
MAX_DEPTH = 4  # of nested values that are made anew; what is deeper stays as it is

_WORDS = "level noon abc banana Hello tree aab zebra x madam Python 12 7 305 cat9".split()
_SEPARATORS = (" ", ", ", ",", "-", ":", "=", "/", ".", "_", "  ")
_LETTERS = "abcdefghij"
_ODD = ("(())[]", "([)]", "{a: 1}", "<b>x</b>", "a1b2c3", "aaabbc", "1+2*3", "A-b C_d", "x.y@z.com", "a\tb\n", "")
_LETTER = ("a", "E", "x", "0110", "   ", "---", "7", "o", "zz", "Q")
_NUMBERS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 15, 16, 20, 21, 24, 25, 28, 30, 35, 36, 42, 49, 50, 60, 64, 100)


class Behaviour(NamedTuple):
    """key: hex digits, "" where the fresh inputs give too few values to tell programs apart. trivial: a sentence, or
    "". chance: how often a guess is right that knows what the program does in general, but not here: the share of the
    commonest result in deduction, of the inputs that give the wanted output in abduction, 0 in induction. An opaque bit
    has 1/2, and with it the top of a reward for tasks that are sometimes solved, though nothing can be learned."""

    key: str
    trivial: str
    chance: float


def observe(tasks: list[Task], sandbox: Sandbox) -> list[Behaviour]:
    """The behaviour of each task's program. Raises SandboxError, nothing on a program."""
    own = [dict(task.visible + task.hidden or ((task.input, task.output),)) for task in tasks]
    inputs = [fresh_inputs(task.program, next(iter(pairs))) for task, pairs in zip(tasks, own)]
    rows = _run(tasks, inputs, sandbox)
    seeming = [_triviality(task, list(pairs), row) for task, pairs, row in zip(tasks, own, rows)]
    # What the own input contradicts may be a test that few inputs pass, or a lookup: inputs near it tell.
    doubtful = [i for i, why in enumerate(seeming) if why and not _rule(_values(rows[i]) + list(own[i].items())[:1])]
    near = [[text for given in own[i] for text in near_inputs(given)[: NEAR // len(own[i])]] for i in doubtful]
    for i, row in zip(doubtful, _run([tasks[i] for i in doubtful], near, sandbox)):
        if not _triviality(tasks[i], list(own[i]), rows[i] + row):
            seeming[i] = ""
    outputs = [[outcome.output for _, outcome in row] for row in rows]
    chances = [_chance(task, row) for task, row in zip(tasks, outputs)]
    return [Behaviour(_key(given, row), *rest) for given, row, *rest in zip(inputs, outputs, seeming, chances)]


def _run(tasks: list[Task], inputs: list[list[str]], sandbox: Sandbox) -> list[list[tuple[str, Outcome]]]:
    """(input, outcome) of each program on each of its inputs."""
    jobs = [Job(task.program, tuple(given), cpu_seconds=CPU_SECONDS) for task, given in zip(tasks, inputs)]
    return [list(zip(given, row)) for given, row in zip(inputs, sandbox.run(jobs) if jobs else [])]


def _key(inputs: list[str], outputs: list[str | None]) -> str:
    if sum(output is not None for output in outputs) < TELLING:
        return ""
    return hashlib.sha256(json.dumps([inputs, outputs]).encode()).hexdigest()[:32]


def _chance(task: Task, outputs: list[str | None]) -> float:
    values = Counter(output for output in outputs if output is not None)
    if values.total() < TELLING or task.mode == "induction":
        return 0.0
    right = values[task.output] if task.mode == "abduction" else max(values.values())
    return right / values.total()


def _triviality(task: Task, own: list[str], row: list[tuple[str, Outcome]]) -> str:
    """Why the results need no program: they are all one, or all one of the arguments, or they are so for every input
    that does not stand in the program, as what a table or a chain of tests knows does; else ""."""
    if why := _rule(_values(row)):
        return f"{why}, whatever they are"
    constants = _constants(task.program)
    # A table without a default raises an error for what it does not know, and so do picky programs: these have an own
    # input that does not stand in them.
    table = all(_stands(given, constants) for given in own)
    unknown = [(given, outcome) for given, outcome in row if not _stands(given, constants)]
    why = _rule(_values(unknown, "an error" if table else None))
    return f"{why}, another value for those alone that stand in it" if why else ""


def _values(row: list[tuple[str, Outcome]], error: str | None = None) -> list[tuple[str, str]]:
    """(input, output) of those that have one; `error` stands for the output of one that raised an exception."""
    texts = [(given, error if outcome.status == "error" else outcome.output) for given, outcome in row]
    return [(given, text) for given, text in texts if text is not None]


def _rule(pairs: list[tuple[str, str]]) -> str:
    """What all of these inputs and outputs have in common, "" for nothing."""
    if len(pairs) < SURE:
        return ""
    if len({output for _, output in pairs}) == 1:
        return f"f gives {pairs[0][1][:40]} for {len(pairs)} fresh inputs"
    columns = zip(*(map(literal.canon, _arguments(given)) for given, _ in pairs))
    for place, column in enumerate(columns):
        if all(text == output for text, (_, output) in zip(column, pairs)):
            return f"f gives its argument {place + 1} back for {len(pairs)} fresh inputs"
    return ""


def _arguments(given: str) -> list:
    args, kwargs = literal.parse_args(given)
    return [*args, *kwargs.values()]


def _constants(program: str) -> set:
    """The values of the numbers and texts that stand in a program."""
    values = set()
    for kind, text in tokens(program):
        if kind in ("number", "string"):
            try:
                values.add(literal.parse(text))
            except literal.LiteralError:  # an f-string
                continue
    return values


def _stands(given: str, constants: set) -> bool:
    """Whether an input is made of nothing but numbers and texts that stand in the program."""
    leaves, values = [], _arguments(given)
    for value in values:
        if type(value) is dict:
            values += [*value, *value.values()]
        elif type(value) in (list, tuple, set, frozenset):
            values += value
        else:
            leaves.append(abs(value) if type(value) in (int, float) else value)
    return bool(leaves) and constants.issuperset(leaves)


# --- inputs ----------------------------------------------------------------------------------------------------------


def fresh_inputs(program: str, given: str) -> list[str]:
    """PROBES inputs like the given one (the text between the parentheses of f(...)), the same for every program and
    input of these types."""
    args, kwargs = literal.parse_args(given)
    args, kwargs = positional(program, args, kwargs)
    shapes = [_shape(value) for value in (*args, *kwargs.values())]
    rng = random.Random(json.dumps([shapes, list(kwargs)]))
    inputs = []
    for i in range(PROBES):
        values = [_make(shape, rng, i) for shape in shapes]
        if i % 7 == 6:  # arguments of one type that are equal: a comparison is not always false
            values = [values[shapes.index(shape)] for shape in shapes]
        elif i % 3 == 1:  # arguments that occur in one before: what is looked for is not always absent
            values = [_part(values[:j], value, rng) for j, value in enumerate(values)]
        inputs.append(literal.canon_args(tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :]))))
    return inputs


def near_inputs(given: str) -> list[str]:
    """NEAR inputs that differ from the given one in one place."""
    args, kwargs = literal.parse_args(given)
    values, rng, inputs = [*args, *kwargs.values()], random.Random(given), []
    for _ in range(NEAR if values else 0):
        changed, i = list(values), rng.randrange(len(values))
        changed[i] = _change(changed[i], rng, 0)
        inputs.append(literal.canon_args(tuple(changed[: len(args)]), dict(zip(kwargs, changed[len(args) :]))))
    return inputs


def _part(before: list, value, rng: random.Random):
    """Something of the value's type from an argument before it: letters of a text, a list's element, a dict's key."""
    if type(value) is str and (texts := [text for text in before if type(text) is str and text]):
        text = rng.choice(texts)
        start = rng.randrange(len(text))
        return text[start : start + rng.randint(1, 2)]
    items = [item for held in before if type(held) in (list, tuple, dict) for item in held if type(item) is type(value)]
    return rng.choice(items) if items else value


def _shape(value, depth: int = 0):
    """The types in a value, as JSON: a name, or [name, shapes of what it holds]. Containers are like their first
    element; an empty one is as if it held ints."""
    kind = type(value).__name__
    if kind in ("int", "float"):
        return kind if value >= 0 or value != value else f"negative {kind}"
    if kind in ("list", "tuple", "set", "frozenset", "dict") and depth < MAX_DEPTH:
        if kind == "tuple":
            return [kind, [_shape(item, depth + 1) for item in value[:8]]]
        if kind == "dict":
            pair = next(iter(value.items()), ("a", 1))
            return [kind, [_shape(item, depth + 1) for item in pair]]
        return [kind, [_shape(next(iter(value), 1), depth + 1)]]
    return kind if kind in ("bool", "str") else ["as it is", [literal.canon(value)]]


def _make(shape, rng: random.Random, i: int):
    """A value of the shape; `i` counts the inputs, so that special ones come for certain."""
    if isinstance(shape, str):
        return _scalar(shape, rng, i)
    kind, inside = shape
    if kind == "as it is":
        return literal.parse(inside[0])
    if kind == "tuple":
        return tuple(_make(item, rng, i) for item in inside)
    count = (3, 1, 4, 2, 6, 5, 3, 0)[i % 8]
    if kind == "dict":
        return {_make(inside[0], rng, i + j): _make(inside[1], rng, i + j) for j in range(count)}
    items = [_make(inside[0], rng, rng.randrange(PROBES)) for _ in range(count)]
    if i % 5 == 4:
        items = items[: count // 2] + items[: count // 2][::-1]  # the same from both ends, with repeats
    try:
        return {"list": list, "set": set, "frozenset": frozenset}[kind](items)
    except TypeError:  # a set's elements cannot be hashed only where the own input is no such set
        return items


def _scalar(kind: str, rng: random.Random, i: int):
    if kind == "bool":
        return rng.random() < 0.5
    if kind == "str":
        return _text(rng, i)
    number = rng.choice(_NUMBERS) if i % 2 else rng.randint(1, 1000 if i == 18 else 100 if i % 3 else 9)
    number = -number if kind.startswith("negative") and rng.random() < 0.5 else number
    return number if kind.endswith("int") else number + rng.choice((0.0, 0.5, 0.25, 0.125, 0.3456))


def _text(rng: random.Random, i: int) -> str:
    """Words, numbers, lists with separators, brackets, palindromes, spaces outside: what string programs read."""
    style = i % 8
    if i % 10 == 5:
        return rng.choice(_LETTER)
    if style in (0, 5):
        return "".join(rng.choice(_LETTERS) for _ in range(rng.randint(1, 7)))
    if style == 1:
        return rng.choice(_SEPARATORS).join(rng.sample(_WORDS, rng.randint(2, 4)))
    if style == 2:
        return rng.choice(_WORDS)
    if style == 3:
        return rng.choice((" ", ",")).join(str(rng.randint(1, 40)) for _ in range(rng.randint(1, 4)))
    if style == 4:
        half = "".join(rng.choice(_LETTERS[:4]) for _ in range(rng.randint(1, 3)))
        return half + half[::-1]
    if style == 6:
        return f" {rng.choice(_WORDS).upper()} {rng.choice(_WORDS)}! "
    return rng.choice(_ODD)


def _change(value, rng: random.Random, depth: int):
    """The value with one thing in it changed."""
    if type(value) is bool:
        return not value
    if type(value) in (int, float):
        return value + rng.choice((-2, -1, 1, 2, 3))
    if type(value) is str:
        i = rng.randrange(len(value) + 1)
        return value[:i] + rng.choice(_LETTERS) + value[i + rng.randint(0, 1) :]
    if type(value) in (list, tuple) and value and depth < MAX_DEPTH:
        items, i = list(value), rng.randrange(len(value))
        items[i] = _change(items[i], rng, depth + 1)
        return type(value)(items)
    if type(value) is dict and value and depth < MAX_DEPTH:
        key = rng.choice(list(value))
        return {**value, key: _change(value[key], rng, depth + 1)}
    return value
